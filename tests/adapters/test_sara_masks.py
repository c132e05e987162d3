"""SaRA's masks over any parameters: what is outside never moves, and the penalty on the rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.slices.call import CannotCutError, Whole

RNG = np.random.default_rng(0)
ADAMW = optax.adamw(0.1, weight_decay=0.1)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def after(tx, params, gradients, steps):
    """Parameters after steps, and the state."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return run((params, tx.init(params)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_entries_do_not_move_by_one_bit(dtype):
    params = {"w": normal(20, 30).astype(dtype), "zero": jnp.zeros(3, dtype)}
    tx = lro.adapters.sara(ADAMW, threshold=0.5)
    new, state = after(tx, params, lambda p: jax.tree.map(jnp.cos, p), 3)
    mask = np.abs(np.asarray(params["w"], np.float32)) < 0.5
    np.testing.assert_array_equal(state.trained["w"], mask)
    np.testing.assert_array_equal(np.asarray(new["w"] != params["w"]), mask)
    assert (new["zero"] != 0).all()


def test_gradients_of_other_entries_count_in_no_norm():
    params, gradient = {"w": jnp.array([3.0, 0.3, 0.4])}, {"w": jnp.array([100.0, 3.0, -4.0])}
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    tx = lro.adapters.sara(clipped, threshold=1.0)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [0, -0.6, 0.8], atol=1e-6)


def test_the_threshold_is_strict():
    params = {"w": jnp.array([0.5, -0.5, 0.498046875], jnp.bfloat16)}
    state = lro.adapters.sara(ADAMW, threshold=0.5).init(params)
    np.testing.assert_array_equal(state.trained["w"], [False, False, True])
    tx = lro.adapters.sara(optax.sgd(1.0), threshold=1.0, reselect_after=1)
    reached = {"w": jnp.array([-1.0, 0.5])}
    _, state = tx.update(reached, tx.init({"w": jnp.zeros(2)}), reached)
    _, state = tx.update(reached, state, reached)
    np.testing.assert_array_equal(state.trained["w"], [False, True])


def test_a_fraction_is_each_leafs_own_and_takes_ties_together():
    params = {"w": normal(10, 10), "large": 100 * normal(10), "ties": jnp.ones(4)}
    state = lro.adapters.sara(ADAMW, fraction=0.2).init(params)
    counts = {name: int(x.sum()) for name, x in state.trained.items()}
    assert counts == {"w": 20, "large": 2, "ties": 4}
    below = np.sort(np.abs(params["w"]).ravel())[:20]
    np.testing.assert_array_equal(np.sort(np.abs(params["w"][state.trained["w"]])), below)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fraction_selects_zeros_and_subnormal_numbers(dtype):
    params = {"zero": jnp.zeros(4, dtype), "some": jnp.array([0, 0, 0, 1, 2], dtype)}
    params["least"] = jnp.full(3, 1e-40, dtype)
    state = lro.adapters.sara(ADAMW, fraction=0.5).init(params)
    counts = {name: int(x.sum()) for name, x in state.trained.items()}
    assert counts == {"zero": 4, "some": 3, "least": 3}


def test_values_that_stay_zero_are_not_frozen():
    values = {"values": jnp.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])}
    push = {"values": jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])}
    _, state = after(lro.adapters.sara_reselection(optax.sgd(0.1), 1), values, lambda _: push, 2)
    np.testing.assert_array_equal(
        state.trained["values"], [[True, False, True], [True, True, True]]
    )


def injected(make, inner, **options):
    static = {"fraction"} & options.keys()
    return optax.inject_hyperparams(make, static_args=static)(inner, **options)


def plain(make, inner, **options):
    return make(inner, **options)


@pytest.mark.combinations(1)
@pytest.mark.parametrize("make", [injected, plain])
@pytest.mark.parametrize(
    "options", [{"threshold": 1.5}, {"fraction": 0.5}, {"threshold": 1.5, "reselect_after": 2}]
)
def test_a_step_may_donate_parameters_and_state(make, options):
    params = {"a": normal(4), "b": normal(4)}
    tx, again = make(lro.adapters.sara, ADAMW, **options), jax.tree.map(jnp.array, params)

    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    state, donating = tx.init(params), jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        params, state = donating(params, state)
    expected, _ = after(tx, again, lambda p: jax.tree.map(jnp.cos, p), 2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, expected)


def test_each_leaf_has_a_buffer_of_its_own_for_an_injected_threshold():
    reselection, params = lro.adapters.sara_reselection, {"values": jnp.ones(4)}
    tx = injected(reselection, ADAMW, reselect_after=2, threshold=1.5)
    state = tx.init({"a": params, "b": params})
    doubled = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)
    assert doubled(state).inner_state.threshold["b"]["values"] == 3


@pytest.mark.parametrize("make", [injected, plain])
def test_without_a_penalty_nothing_of_it_is_computed(make):
    params, sgd = {"kernel": normal(70, 70)}, optax.sgd(1.0)
    tx = make(lro.adapters.sara, sgd, threshold=1.0)
    assert "dot_general" not in str(jax.make_jaxpr(tx.update)(params, tx.init(params)))
    tx = make(lro.adapters.sara, sgd, threshold=1.0, rank_penalty=0.1)
    assert "dot_general" in str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


def test_what_has_grown_is_frozen_once_at_its_value_and_the_others_keep_their_moments():
    params = {"values": jnp.array([[0.1, -0.2, 0.3], [1.0, -2.0, 0.0]]), "other": jnp.ones(2)}
    push = {"values": jnp.array([[-1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), "other": jnp.ones(2)}
    # At three updates two values are beyond the largest of their layers at the start.
    plain = optax.sgd(0.1, momentum=0.5)
    tx = lro.adapters.sara_reselection(plain, 3)
    before, _ = after(plain, params, lambda _: push, 3)
    at_three, state = after(tx, params, lambda _: push, 3)
    np.testing.assert_array_equal(at_three["values"], before["values"])
    assert state.trained["values"].all()
    later, state = after(tx, params, lambda _: push, 6)
    frozen = np.array([[True, False, False], [False, True, False]])
    np.testing.assert_array_equal(~state.trained["values"], frozen)
    np.testing.assert_array_equal(later["values"][frozen], at_three["values"][frozen])
    np.testing.assert_allclose(later["other"], after(plain, params, lambda _: push, 6)[0]["other"])
    assert isinstance(state.trained["other"], optax.MaskedNode)
    # A survivor grows beyond the threshold afterwards, and is still trained.
    late = {"values": jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), "other": jnp.zeros(2)}
    grown, state = after(tx, params, lambda _: late, 12)
    assert bool(state.trained["values"][0, 1]) is False
    slow = jax.tree.map(lambda x: 0.05 * x, late)
    grown, state = after(tx, params, lambda _: slow, 60)
    assert abs(grown["values"][0, 1]) > 0.3
    assert state.trained["values"].all()


def test_the_penalty_is_the_gradient_of_the_nuclear_norm_of_one_matrix_a_step():
    params = {"a": normal(70, 80), "stack": normal(2, 66, 90), "small": normal(64, 90)}
    specs = {"a": (-2, -1), "stack": (-2, -1), "small": (-2, -1)}
    specs = {name: lro.matrices.WeightDimensionNumbers(*axes) for name, axes in specs.items()}
    tx = lro.adapters.sara(
        optax.sgd(1.0), threshold=1.0, rank_penalty=0.5, weight_dimension_numbers=specs
    )
    zeros, seen = jax.tree.map(jnp.zeros_like, params), set()
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(12):
        updates, state = update(zeros, state, params)
        assert not updates["small"].any()
        matrices = {"a": updates["a"], **{f"stack{i}": updates["stack"][i] for i in range(2)}}
        of = {"a": params["a"], **{f"stack{i}": params["stack"][i] for i in range(2)}}
        (name,) = [name for name, x in matrices.items() if x.any()]
        seen.add(name)
        mask = np.abs(of[name]) < 1
        u, s, v = np.linalg.svd(np.where(mask, of[name], 0), full_matrices=False)
        assert s[-1] > 1e-2 * s[0]  # else no gradient is told from another
        np.testing.assert_allclose(matrices[name], np.where(mask, -0.5 * u @ v, 0), atol=1e-4)
    assert seen == {"a", "stack0", "stack1"}


@pytest.mark.slow
def test_the_penalty_lowers_the_nuclear_norm_along_training():
    start, x, target = 0.1 * normal(70, 80), normal(40, 70), normal(40, 80)
    gradients = jax.grad(lambda p: jnp.square(x @ p["kernel"] - target).mean())
    norms = []
    for penalty in (0.0, 5e-3):
        tx = lro.adapters.sara(optax.adamw(1e-3), threshold=0.1, rank_penalty=penalty)
        new, state = after(tx, {"kernel": start}, gradients, 50)
        masked = np.where(state.trained["kernel"], new["kernel"], 0)
        norms.append(np.linalg.svd(masked, compute_uv=False).sum())
    assert norms[1] < 0.95 * norms[0]


def test_bad_arguments_are_refused():
    sara, reselection, params = lro.adapters.sara, lro.adapters.sara_reselection, {"w": jnp.ones(2)}
    for make, error, message in (
        (lambda: sara(ADAMW), ValueError, "give exactly one"),
        (lambda: sara(ADAMW, threshold=0.0), ValueError, r"threshold=0.0 must be finite"),
        (lambda: sara(ADAMW, fraction=2), ValueError, "fraction=2 must be at most 1"),
        (lambda: sara(ADAMW, fraction=1, rank_penalty=-1), ValueError, "and not negative"),
        (lambda: sara(ADAMW, fraction=1, rank_penalty="1"), TypeError, "'1' must be a number"),
        (lambda: sara(ADAMW, fraction=1, reselect_after="9"), TypeError, "'9' must be an int"),
        (lambda: sara(ADAMW, fraction=1, reselect_after=0), ValueError, "must be at least 1"),
        (lambda: sara(ADAMW, fraction=1, reselect_after=0.5), TypeError, "must be an int"),
        (lambda: sara(ADAMW, fraction=jnp.ones([])), TypeError, 'give static_args="fraction"'),
        (lambda: sara(optax.adam, fraction=1), TypeError, "inner=adam must be"),
        (lambda: reselection(ADAMW, None), TypeError, "reselect_after=None must be an int"),
        (lambda: reselection(ADAMW, 3, threshold=-1.0), ValueError, "threshold=-1.0 must be"),
        (lambda: reselection(ADAMW, 3, names="values"), ValueError, "must be a sequence of names"),
        (lambda: reselection(ADAMW, 3).init(params), ValueError, "no parameter is named 'values'"),
        (lambda: sara(ADAMW, fraction=1).init({"n": 1 + jnp.arange(2)}), TypeError, "n is int32"),
    ):
        with pytest.raises(error, match=message):
            make()
    tx = sara(optax.sgd(1.0), fraction=1, reselect_after=1)
    with pytest.raises(ValueError, match="reselect_after needs the parameters"):
        tx.update(params, tx.init(params))
    large = {"kernel": jnp.ones((65, 65))}
    tx = sara(optax.sgd(1.0), fraction=1, rank_penalty=0.1)
    with pytest.raises(CannotCutError, match="rank_penalty draws one of all matrices"):
        tx.update(large, tx.init(large), large, whole=Whole(tree=large))
    with pytest.warns(UserWarning, match=r"sara\(threshold=0.5\) selects no entry"):
        sara(ADAMW, threshold=0.5).init(params)
    with pytest.warns(UserWarning, match=r"sara\(fraction=0.5\) selects no entry"):
        sara(ADAMW, fraction=0.5).init({"w": jnp.full(2, jnp.nan)})
    with pytest.warns(UserWarning, match="rank_penalty=0.1 has no effect: no parameter is a"):
        state = (tx := sara(optax.sgd(1.0), fraction=1, rank_penalty=0.1)).init(params)
    updates, _ = tx.update(params, state, params)
    np.testing.assert_array_equal(updates["w"], [-1, -1])
