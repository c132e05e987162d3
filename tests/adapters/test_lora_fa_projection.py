"""LoRA-FA's projected update: closed forms, invariances, and how leaves find their factors."""

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

LoRAFA = lro.adapters.LoRAFA
projection, collect = lro.adapters.lora_fa_projection, lro.adapters.lora_fa_factors
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def projected(a, scale, d):
    """The update of B at the full gradient D."""
    a, d = np.asarray(a, np.float32), np.asarray(d, np.float32)
    return np.asarray(_projected(a, np.float32(scale), np.float32(scale) * (a.mT @ d)))


@jax.jit
def _projected(a, scale, g):
    tx = projection({"": (a, scale)})
    return tx.update({"B": g}, tx.init({"B": g}))[0]["B"]


def onto(a, d):
    a = np.asarray(a, np.float64)
    return a @ np.linalg.pinv(a) @ d


def test_the_worked_example():
    d = np.array([[1.0], [5.0]])
    g = projected([[2.0], [0.0]], 3.0, d)
    assert_close(g, [[1 / 6]], dtype=np.float32)
    assert_close(3 * np.array([[2.0], [0.0]]) @ g, [[1], [0]], dtype=np.float32)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize(("rank", "batch"), [(1, ()), (4, (3,)), (6, (2, 1))])
def test_a_step_of_sgd_projects_the_full_gradient_whatever_the_scales(rank, batch, scale, size):
    a, d = size * normal(0, *batch, 9, rank), normal(1, *batch, 9, 4)
    step = scale * np.matmul(a, projected(a, scale, d))
    for index in np.ndindex(*batch):
        np.testing.assert_allclose(step[index], onto(a[index], d[index]), rtol=1e-3, atol=2e-4)


def test_nothing_changes_if_the_columns_are_mixed():
    a, d, mix = normal(0, 9, 3), normal(1, 9, 4), normal(2, 3, 3) + 2 * np.eye(3)
    step = 2.0 * a @ projected(a, 2.0, d)
    mixed = (a @ mix).astype(np.float32)
    np.testing.assert_allclose(2.0 * mixed @ projected(mixed, 2.0, d), step, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_with_a_square_factor_training_is_that_of_the_whole_weight():
    x, y, w = normal(0, 12, 5), normal(1, 12, 3), normal(2, 5, 3)
    method = LoRAFA(rank=5, alpha=2, orthonormal=True)
    params = method.init(KEY, w[None])
    frozen, b, full = params.frozen, params.trainable, jnp.asarray(w)
    tx = optax.chain(projection(collect(frozen, method)), optax.sgd(0.05))
    state = tx.init(b)
    fit = lambda w: jnp.mean(jnp.square(x @ w - y))
    of = lambda b: jnp.asarray(w) + method.deltas(params._replace(trainable=b), w[None])[0]

    @jax.jit
    def step(b, state, full):
        updates, state = tx.update(jax.grad(lambda b: fit(of(b)))(b), state)
        return optax.apply_updates(b, updates), state, full - 0.05 * jax.grad(fit)(full)

    for _ in range(5):
        b, state, full = step(b, state, full)
    np.testing.assert_allclose(of(b), full, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_of_an_orthonormal_factor_it_is_a_division_by_the_squared_scale():
    method = LoRAFA(rank=3, alpha=12, orthonormal=True)
    params = method.init(KEY, np.zeros((2, 9, 4)))
    tx = projection(collect(params.frozen, method))
    g = {"B": jnp.asarray(normal(1, 2, 3, 4))}
    np.testing.assert_allclose(
        tx.update(g, tx.init(params.trainable))[0]["B"], g["B"] / 16, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "kind", ["more columns than rows", "a column twice", "zero columns", "zero"]
)
def test_factors_without_full_rank_are_safe(kind):
    a = normal(0, 4, 7) if kind == "more columns than rows" else normal(0, 9, 4)
    if kind == "a column twice":
        a[:, 3] = a[:, 1]
    if kind == "zero columns":
        a[:, 2:] = 0
    if kind == "zero":
        a[:] = 0
    d = normal(1, a.shape[0], 4)
    step = 1e-3 * a @ projected(1e-3 * a, 1.0, d)
    np.testing.assert_allclose(step, onto(a, d) if kind != "zero" else 0 * d, atol=1e-3)


def test_no_gradient_stays_none():
    a = normal(0, 9, 3)
    tx = optax.chain(projection({"": (a, 2.0)}), optax.adam(0.1))
    b = {"B": jnp.zeros((3, 4))}
    assert not tx.update(b, tx.init(b))[0]["B"].any()


@pytest.mark.slow
def test_ranks_of_their_own_are_as_many_projections():
    method = LoRAFA(rank=(1, 3), alpha=5)
    params = method.init(KEY, np.zeros((2, 9, 4)))
    g = {"B": jnp.asarray(normal(1, 2, 3, 4)) * (np.arange(3) < [[1], [3]])[..., None]}
    tx = projection(collect(params.frozen, method))
    got = np.asarray(tx.update(g, tx.init(params.trainable))[0]["B"])
    for layer, rank in enumerate(method.rank):
        a = params.frozen["A"][layer, :, :rank]
        own = projection({"": (a, 5 / rank)})
        one = {"B": g["B"][layer, :rank]}
        np.testing.assert_allclose(
            got[layer, :rank], own.update(one, own.init(one))[0]["B"], rtol=1e-4, atol=1e-6
        )
        assert not got[layer, rank:].any()


def test_leaves_are_found_by_the_ending_of_their_path_and_others_pass():
    a = {"query": normal(0, 9, 3), "value": normal(1, 9, 3)}
    factors = collect({k: {"A": v} for k, v in a.items()}, LoRAFA(rank=8, alpha=6))
    np.testing.assert_array_equal(factors["query"][1], [2, 2, 2])  # by the rank it has
    b = {"B": jnp.ones((3, 4))}
    params = {"block": {"query": b, "value": b, "key": b}, "bias": jnp.ones(4)}
    tx = projection(factors)
    state = tx.init(params)
    g, again = jax.jit(tx.update)(params, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    np.testing.assert_array_equal(g["block"]["key"]["B"], b["B"])
    np.testing.assert_array_equal(g["bias"], params["bias"])
    for name in a:
        expected = np.linalg.inv(4 * a[name].T @ a[name]) @ b["B"]
        np.testing.assert_allclose(g["block"][name]["B"], expected, rtol=1e-3, atol=1e-6)


def test_gradients_keep_their_dtype_and_are_projected_in_float32():
    a = normal(0, 9, 3)
    tx = projection({"": (jnp.asarray(a, jnp.bfloat16), 2.0)})
    g = {"B": jnp.asarray(normal(1, 3, 4), jnp.bfloat16)}
    state = tx.init(g)
    assert state.inverse["B"].dtype == jnp.float32
    got = tx.update(g, state)[0]["B"]
    assert got.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
    exact = np.linalg.inv(4 * rounded.T @ rounded) @ np.asarray(g["B"], np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0.005, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.full), True])
def test_an_nnx_model_trains_with_it(scanned):
    make = lambda rngs: nnx.Linear(6, 6, rngs=rngs)
    rngs = nnx.Rngs(0)
    model = nnx.vmap(make)(rngs.split(2)) if scanned else make(rngs)
    model = nnx.Sequential(model) if not scanned else nnx.Dict(layers=model)
    lro.adapters.attach(model, LoRAFA(rank=2, alpha=6), ".*", rngs=0)
    factors = collect(model)
    a, scale = next(iter(factors.values()))
    assert a.shape == ((2, 6, 2) if scanned else (6, 2))
    assert (scale == 3).all()
    tx = optax.chain(projection(factors), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable)
    state = nnx.state(model, lro.adapters.trainable)
    grads = jax.tree.map(jnp.ones_like, state)

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer, grads)
    (b,) = jax.tree.leaves(nnx.state(model, lro.adapters.trainable))
    inverse = np.linalg.inv(9 * np.matmul(np.asarray(a).swapaxes(-1, -2), a))
    np.testing.assert_allclose(b, -2 * inverse @ np.ones(b.shape), rtol=1e-3, atol=1e-5)


def test_wrappers_of_optax_do_not_mind():
    a = normal(0, 9, 3)
    params = {"query": {"B": jnp.ones((3, 4))}, "bias": jnp.ones(4)}
    plain = projection({"query": (a, 2.0)})
    expected = plain.update(params, plain.init(params))[0]
    masked = optax.masked(plain, {"query": {"B": True}, "bias": False})
    by_label = optax.partition(
        {"fa": plain, "rest": optax.identity()}, {"query": {"B": "fa"}, "bias": "rest"}
    )
    for tx in (masked, by_label):
        got = tx.update(params, tx.init(params), params)[0]
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    empty = plain.init({})
    assert plain.update({}, empty)[0] == {}


def test_what_does_not_fit_is_refused_by_name():
    a, b = normal(0, 9, 3), {"query": {"B": jnp.ones((3, 4))}}
    with pytest.raises(ValueError, match="damping=-1"):
        projection({"": (a, 1.0)}, damping=-1)
    with pytest.raises(ValueError, match=r"no parameter is the B of one of the factors.*'key'"):
        projection({"key": (a, 1.0)}).init(b)
    with pytest.raises(ValueError, match=r"factors\['query'\] has A of shape \(9, 2\)"):
        projection({"query": (a[:, :2], 1.0)}).init(b)
    with pytest.raises(ValueError, match="method=None"):
        collect({"A": a})
    with pytest.raises(ValueError, match="no LoRA-FA adapter"):
        collect({"B": a}, LoRAFA())


def pefts_adamw(b, gradients, a, scale, rate=1e-2, decay=0.1, b1=0.9, b2=0.999, eps=1e-6):
    """What ``LoraFAOptimizer`` computes, without its product in bfloat16; float64."""
    inverse = np.linalg.pinv(a.T @ a + 1e-8 * np.eye(a.shape[1])) / scale**2
    m = v = 0.0
    for t, raw in enumerate(gradients, 1):
        g = inverse @ raw
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        b = b - rate * (1 - b2**t) ** 0.5 / (1 - b1**t) * m / (np.sqrt(v) + eps)
        b = b - rate * decay * b
    return b


def test_chained_with_adamw_it_is_pefts_optimizer():
    a, b = normal(0, 9, 3), normal(1, 3, 4)
    gradients = [normal(i, 3, 4) for i in range(2, 8)]
    tx = optax.chain(
        projection({"": (a, 4.0)}),
        optax.scale_by_adam(eps=1e-8),
        optax.scale_by_learning_rate(1e-2),
    )
    params, state = {"B": jnp.asarray(b)}, None
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update({"B": jnp.asarray(g)}, state)
        params = optax.apply_updates(params, updates)
        params = {"B": params["B"] * (1 - 1e-2 * 0.1)}  # its decay comes after the step
    expected = pefts_adamw(b, gradients, a.astype(np.float64), 4.0)
    # Its eps stands beside the moment without bias correction: up to 1e-3 of a small step.
    np.testing.assert_allclose(params["B"], expected, rtol=1e-4, atol=2e-4)
