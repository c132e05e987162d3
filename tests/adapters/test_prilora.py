"""PRILoRA: statistics of inputs, the pruning of the first factor, ranks that grow with depth."""

from collections.abc import Callable
import itertools
from typing import Any

from close import assert_close
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Lookup, Patches, Rows
from tests.adapters.compiled import compiled, layer_output
from tests.adapters.nnx_models import Scanned, gradients, randomized, tokens

PRILoRA, LoRA = compiled(lro.adapters.PRILoRA), compiled(lro.adapters.LoRA)
pruning, linear_ranks = lro.adapters.prilora_pruning, lro.adapters.linear_ranks
RNG = np.random.default_rng(0)
WEIGHTS, X = (RNG.normal(size=s).astype(np.float32) for s in ((3, 6, 5), (7, 6)))
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = START


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


# Ranks


def test_the_specifications_ranks() -> None:
    assert linear_ranks(4, 12, 12) == (4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12)
    assert linear_ranks(1, 3, 5) == (1, 2, 2, 2, 3)  # halves to the even neighbour
    assert linear_ranks(3, 1, 5) == (3, 2, 2, 2, 1)
    assert linear_ranks(4, 12, 1) == (8,)


def test_the_sum_is_that_of_the_mean_rank_where_the_ends_add_up_to_an_even_number() -> None:
    for first, last, layers in itertools.product(range(1, 12), range(1, 16), range(1, 25)):
        ranks = linear_ranks(first, last, layers)
        if layers > 1:
            assert (ranks[0], ranks[-1], len(ranks)) == (first, last, layers)
        if (first + last) % 2 == 0:
            assert 2 * sum(ranks) == layers * (first + last)


def test_ranks_of_a_stack_have_one_scale_by_default_and_others_on_request() -> None:
    ranks = linear_ranks(1, 3, 3)
    for options, scales in (
        ({}, [1, 1, 1]),
        ({"scale": 2.5}, [2.5, 2.5, 2.5]),
        ({"alpha": 6.0}, [6, 3, 2]),
        ({"alpha": 6.0, "rank_stabilized": True}, [6, 6 / 2**0.5, 6 / 3**0.5]),
    ):
        method = PRILoRA(rank=ranks, initial="random", **options)
        params = method.init(jax.random.key(0), WEIGHTS)
        for layer, scale in enumerate(scales):
            p = method.layer_arrays(params, layer)
            np.testing.assert_array_equal(p["A"].any(axis=0), np.arange(3) < ranks[layer])
            assert_close(method.delta(p, WEIGHTS[layer]), scale * p["A"] @ p["B"], 20)


def test_unusable_ranks_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="first=0 must be at least 1"):
        linear_ranks(0, 4, 3)
    with pytest.raises(TypeError, match=r"last=4\.0 must be an int"):
        linear_ranks(1, 4.0, 3)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        linear_ranks(1, 4, 0)
    for scale in (float("nan"), 0.0):
        with pytest.raises(ValueError, match=f"scale={scale} must be finite and not 0"):
            PRILoRA(scale=scale)
    for options in ({"alpha": 2.0}, {"rank_stabilized": True}):
        with pytest.raises(ValueError, match=r"scale=2\.0 is that of all ranks"):
            PRILoRA(scale=2.0, **options)


# Statistics


def mean_squares(gradient: Any) -> np.ndarray:
    """The mean squares that the pruning makes of gradients of the statistics."""
    squares, share = (np.asarray(gradient[name]) for name in ("input_squares", "token_share"))
    return squares[..., 0] / share


def statistics(x: Any, rows: int, out: Callable[..., Any] = jnp.sin) -> dict[str, np.ndarray]:
    """The gradients of the statistics of one layer, for its input."""
    method, d_in = lro.adapters.PRILoRA(rank=2, initial="random"), rows
    weight = jnp.asarray(draw(d_in, 5))
    params = method.init(jax.random.key(0), weight[None])
    p = method.layer_arrays(params, 0)

    def loss(slots: Any) -> jax.Array:
        y = layer_output(method, p | slots, x, x @ weight, weight=weight)
        return jnp.sum(out(y))

    found = jax.jit(jax.grad(loss))({name: p[name] for name in method.statistics})
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.float32)}
    assert (found["input_squares"].shape, found["token_share"].shape) == ((d_in, 1), (1,))
    return jax.tree.map(np.asarray, found)


def test_the_statistics_are_mean_squares_of_the_input_whatever_the_loss() -> None:
    x = draw(4, 7, 6)
    expected = np.mean(x**2, axis=(0, 1))
    for scale in (1.0, -1e-4):
        found = statistics(Rows(jnp.asarray(x)), 6, out=lambda y, s=scale: s * jnp.sin(y))
        np.testing.assert_allclose(mean_squares(found), expected, atol=1e-6)
        np.testing.assert_allclose(found["token_share"], 1, atol=1e-6)
    half = statistics(Rows(jnp.asarray(x, jnp.float16) * 300), 6)  # squares beyond float16
    np.testing.assert_allclose(mean_squares(half) / 9e4, expected, atol=5e-3)
    # Tokens that the loss does not depend on are left out.
    used = (np.arange(7) < 3)[:, None]
    found = statistics(Rows(jnp.asarray(x)), 6, out=lambda y: used * y)
    expected = np.mean(x[:, :3] ** 2, axis=(0, 1))
    np.testing.assert_allclose(mean_squares(found), expected, atol=1e-6)
    np.testing.assert_allclose(found["token_share"], 3 / 7, atol=1e-6)


def test_statistics_do_not_depend_on_how_examples_and_experts_are_summed() -> None:
    weight, x, used = jnp.asarray(WEIGHTS), draw(4, 3, 7, 6), np.arange(7) < 4
    params, pytree = {"w": weight}, lro.adapters.pytree
    axes, method = lro.WeightDimensionNumbers(-2, -1), lro.adapters.PRILoRA(rank=2)
    adapter = pytree.init(jax.random.key(0), params, method, ".*", lambda _: {"w": axes})

    def loss(trainable: Any, x: jax.Array) -> jax.Array:  # x [batch, experts, tokens, d_in]
        matrix = pytree.factored(params, adapter.replace(trainable))["w"]
        by_example = jax.vmap(lambda x: jnp.sin(x @ matrix) * used[:, None])
        return 1e-3 * jnp.sum(by_example(x))

    found = jax.jit(jax.grad(loss))(adapter.trainable, jnp.asarray(x))["w"]
    expected = np.mean(x[:, :, :4] ** 2, axis=(0, 2))
    np.testing.assert_allclose(mean_squares(found), expected, atol=1e-5)
    # Examples, and tokens of their own out of those of all experts.
    np.testing.assert_allclose(found["token_share"], 4 * 4 / (3 * 7), atol=1e-5)


def test_statistics_of_rows_that_are_looked_up_and_of_convolutions() -> None:
    index = jnp.array([[1, 3], [1, 0]])
    found = statistics(Lookup(index, jnp.dtype(jnp.bfloat16)), 4)
    np.testing.assert_allclose(mean_squares(found), [0.25, 0.5, 0, 0.25], atol=1e-6)
    x = draw(2, 6)
    found = statistics(Patches(jnp.asarray(x, jnp.bfloat16), lambda x, m: x @ m), 6)
    np.testing.assert_allclose(mean_squares(found), np.mean(x**2, axis=0), atol=2e-2)


def test_layers_of_a_scan_have_statistics_of_their_own_and_evaluation_has_no_part() -> None:
    model = Scanned(2, nnx.Rngs(0), remat=True)
    lro.adapters.attach(model, lro.adapters.PRILoRA(rank=2), "up|down", rngs=0)
    randomized(model)
    found = gradients(model, tokens())["blocks"]["up"]["adapters"]["default"]["arrays"]
    x, inputs = model.embed(tokens()), []
    for layer in range(2):
        inputs.append(np.asarray(x).reshape(-1, 6))
        graph, state = nnx.split(model.blocks)
        x = nnx.merge(graph, jax.tree.map(lambda leaf, i=layer: leaf[i], state))(x)
    expected = [np.mean(x**2, axis=0) for x in inputs]
    np.testing.assert_allclose(mean_squares(found), expected, atol=1e-5)


def test_a_linen_model_has_statistics_among_the_gradients_of_its_adapters() -> None:
    adapted = lro.adapters.linen.Adapted(nn.Sequential([nn.Dense(5)]), lro.adapters.PRILoRA(rank=2))
    variables = adapted.init(jax.random.key(0), X)

    def loss(adapters: Any) -> jax.Array:
        return jnp.sum(adapted.apply({**variables, "adapters": adapters}, X) ** 2)

    found = jax.jit(jax.grad(loss))(variables["adapters"])["default"]["layers_0"]
    np.testing.assert_allclose(mean_squares(found), np.mean(X**2, axis=0), atol=1e-6)


@pytest.mark.parametrize("host", ["nnx", "linen"])
def test_a_bfloat16_convolution_has_statistics_in_float32(host: str) -> None:
    x, method = jnp.asarray(draw(4, 40, 6), jnp.bfloat16), lro.adapters.PRILoRA(rank=2)
    if host == "nnx":
        conv = nnx.Conv(6, 5, (1,), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        model = nnx.Sequential(conv)
        lro.adapters.attach(model, method, ".*", rngs=0)
        found = gradients(model, x)["layers"][0]["adapters"]["default"]["arrays"]
    else:
        module = nn.Sequential([nn.Conv(5, (1,), dtype=jnp.bfloat16)])
        adapted = lro.adapters.linen.Adapted(module, method)
        variables = adapted.init(jax.random.key(0), x)
        loss = lambda adapters: jnp.sum(adapted.apply({**variables, "adapters": adapters}, x))
        found = jax.jit(jax.grad(loss))(variables["adapters"])["default"]["layers_0"]
    expected = np.mean(np.square(np.asarray(x, np.float32)), axis=(0, 1))
    assert_close(mean_squares(found), expected)


def test_a_tree_of_parameters_has_statistics_by_factored_weights() -> None:
    params, x = {"w": jnp.asarray(WEIGHTS)}, jnp.asarray(X)
    pytree, method = lro.adapters.pytree, lro.adapters.PRILoRA(rank=2)
    axes = lro.WeightDimensionNumbers(-2, -1)
    adapter = pytree.init(jax.random.key(0), params, method, ".*", lambda _: {"w": axes})

    def loss(trainable: Any) -> jax.Array:
        weights = pytree.factored(params, adapter.replace(trainable))["w"]
        return sum(jnp.sum(jnp.sin((1 + i) * x @ weights[i])) for i in range(3))

    found = jax.jit(jax.grad(loss))(adapter.trainable)["w"]
    expected = [(1 + i) ** 2 * np.mean(X**2, axis=0) for i in range(3)]
    np.testing.assert_allclose(mean_squares(found), expected, atol=1e-5)
    summed = lambda t: jnp.sum(pytree.effective(params, adapter.replace(t))["w"])
    with pytest.raises(ValueError, match="w: a gradient by the statistics of PRILoRA"):
        jax.jit(jax.grad(summed))(adapter.trainable)
    of_factors = lambda f: summed({"w": {**adapter.trainable["w"], **f}})
    factors = {k: adapter.trainable["w"][k] for k in "AB"}
    assert jax.jit(jax.grad(of_factors))(factors)["B"].any()


@pytest.mark.parametrize(
    ("method", "trained", "slots"),
    [
        (lro.adapters.PRILoRA(rank=2), 2 * (6 + 5), 6 + 1),
        (lro.adapters.FlyLoRA(rank=2, active=1), 2 * 5, 2),
    ],
)
def test_statistics_are_not_counted_as_trained(method: Any, trained: int, slots: int) -> None:
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    lro.adapters.attach(model, method, ".*", rngs=0)
    adapted = lro.adapters.linen.Adapted(nn.Sequential([nn.Dense(5)]), method)
    variables = jax.eval_shape(lambda: adapted.init(jax.random.key(0), X))
    params, pytree = {"w": jnp.zeros((6, 5))}, lro.adapters.pytree
    adapter = pytree.init(jax.random.key(0), params, method, ".*")
    constants = sum(x.size for x in jax.tree.leaves(adapter.frozen))
    for table in (
        lro.adapters.summary(model),
        adapted.summary(variables),
        pytree.summary(params, adapter),
    ):
        (row,) = table.rows
        assert (table.trained, row.frozen) == (trained, constants + slots)
        assert table.bytes == 4 * (trained + constants + slots)


def test_the_output_is_loras_and_no_squares_are_saved_for_the_backward_pass() -> None:
    method, lora = (m(rank=2, alpha=3, initial="random") for m in (PRILoRA, LoRA))
    params = method.init(jax.random.key(0), WEIGHTS)
    expected = lora.init(jax.random.key(0), WEIGHTS)
    p, w = method.layer_arrays(params, 1), WEIGHTS[1]
    y = layer_output(method, p, Rows(X), X @ w, weight=w)
    of_lora = layer_output(lora, lora.layer_arrays(expected, 1), Rows(X), X @ w, weight=w)
    np.testing.assert_array_equal(y, of_lora)
    assert np.abs(y - X @ w).max() > 0.1
    x = jnp.asarray(draw(1000, 6))

    def saved(method: Any) -> int:
        run = lambda p, x: layer_output(method, p, Rows(x), x @ w, weight=w)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.vjp(run, p, x)[1]))

    more = saved(lro.adapters.PRILoRA(rank=2)) - saved(lro.adapters.LoRA(rank=2))
    assert more < 1000  # less than a number for each token


# Pruning


def leaves(n: int = 8, r: int = 3, *stack: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    a, b = (jnp.asarray(draw(*stack, *s), dtype) for s in ((n, r), (r, 5)))
    return {"A": a, "B": b, **slots_of(n, *stack)}


def slots_of(n: int, *stack: int) -> dict[str, jax.Array]:
    return {"input_squares": jnp.zeros((*stack, n, 1)), "token_share": jnp.zeros((*stack, 1))}


def gradients_of(params: Any, steps: int) -> Any:
    """Random gradients ``[steps, ...]``: those of squares are not negative, all tokens count."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        if "share" in str(path):
            return jnp.ones((steps, *x.shape), x.dtype)
        g = draw(steps, *x.shape)
        return jnp.asarray(g**2 if "squares" in str(path) else g, x.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def run(tx: Any, params: Any, steps: Any) -> tuple[Any, Any]:
    """Parameters after each step, and the last state."""

    def step(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), seen = jax.jit(lambda c: jax.lax.scan(step, c, steps))((params, tx.init(params)))
    return jax.tree.map(np.asarray, seen), state


def lowest_half(a: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The reference: floor(n / 2) entries of each column, the first of equal ones."""
    score = np.abs(a) * norm[:, None]
    order = np.argsort(np.argsort(score, axis=0, kind="stable"), axis=0, kind="stable")
    return order < len(a) // 2


@pytest.mark.parametrize("hold_mask", [False, True])
def test_it_is_the_definition_step_by_step(hold_mask: bool) -> None:
    params, steps = leaves(7), 13
    given, every = gradients_of(params, steps), 4
    inner = optax.adam(0.05)
    seen, state = run(pruning(inner, every, hold_mask=hold_mask), params, given)
    now, norm = {k: params[k] for k in "AB"}, None
    inner_state, update, mask = inner.init(now), jax.jit(inner.update), np.zeros((7, 3), bool)
    for t in range(1, steps + 1):
        q = np.sqrt(given["input_squares"][t - 1, :, 0])
        norm = q if norm is None else 0.9 * norm + 0.1 * q
        updates, inner_state = update({k: given[k][t - 1] for k in "AB"}, inner_state)
        now = optax.apply_updates(now, updates)
        a = np.where(mask, 0, now["A"])
        if t % every == 0:
            mask = lowest_half(a, norm)
            a = np.where(mask, 0, a)
            assert (np.count_nonzero(a == 0, axis=0) == 3).all()
        mask = mask if hold_mask else np.zeros_like(mask)
        now["A"] = jnp.asarray(a)
        np.testing.assert_array_equal(seen["A"][t - 1] == 0, a == 0)
        np.testing.assert_allclose(seen["A"][t - 1], a, atol=1e-6)
        np.testing.assert_allclose(seen["B"][t - 1], now["B"], atol=1e-6)
    np.testing.assert_allclose(state.input_norms["input_squares"][:, 0], norm, atol=1e-6)
    assert not seen["input_squares"].any()
    zeros = np.count_nonzero(seen["A"] == 0, axis=(1, 2))
    held = np.arange(1, steps + 1) >= every if hold_mask else np.arange(1, steps + 1) % every == 0
    np.testing.assert_array_equal(zeros, np.where(held, 9, 0))


def after_event(params: Any, squares: Any, **options: Any) -> np.ndarray:
    """What is zero in A after an event at the first step."""
    tx = pruning(optax.sgd(0.0), 1, **options)
    squares = jnp.broadcast_to(
        jnp.asarray(squares, jnp.float32)[:, None], params["input_squares"].shape
    )
    given = {k: jnp.zeros_like(x) for k, x in params.items()}
    given |= {"input_squares": squares, "token_share": jnp.ones_like(params["token_share"])}
    updates, _ = jax.jit(tx.update)(given, tx.init(params), params)
    return np.asarray(optax.apply_updates(params, updates)["A"] == 0)


def test_the_specifications_worked_mask_and_its_minimum() -> None:
    a = jnp.array([[0.1, -0.5, 0.2, 0.05], [0.3, 0.02, -0.1, 0.4]]).T
    params, norm = {"A": a, **slots_of(4)}, np.array([1, 0.1, 2, 4])
    zero = after_event(params, norm**2)
    np.testing.assert_array_equal(~zero.T, [[0, 0, 1, 1], [1, 0, 0, 1]])
    score = np.square(np.asarray(a) * norm[:, None])
    for rank in range(2):
        sums = [score[list(rows), rank].sum() for rows in itertools.combinations(range(4), 2)]
        assert_close(score[zero[:, rank], rank].sum(), min(sums))
    # |A| alone would keep other ones.
    assert (zero != after_event(params, np.ones(4))).any()


@pytest.mark.parametrize(("fraction", "zeros"), [(0.29, 29), (0.5, 50), (0.999, 99), (0.0, 0)])
def test_counts_are_the_fraction_rounded_down(fraction: float, zeros: int) -> None:
    params = leaves(100, 2, 3)
    found = after_event(params, draw(100) ** 2, fraction=fraction)
    np.testing.assert_array_equal(found.sum(axis=-2), zeros)


def test_runs_keep_the_best_n_of_m_and_leave_the_remainder() -> None:
    params, norm = leaves(11, 2, 2), np.abs(draw(11))
    zero = after_event(params, norm**2, group=(1, 4))
    runs = zero[:, :8].reshape(2, 2, 4, 2)
    np.testing.assert_array_equal(runs.sum(axis=2), 3)
    assert not zero[:, 8:].any()
    score = (np.abs(params["A"]) * norm[:, None])[:, :8].reshape(2, 2, 4, 2)
    kept = np.where(runs, -1, score).max(axis=2)
    np.testing.assert_allclose(kept, score.max(axis=2))


def test_a_whole_matrix_competes_and_what_pads_a_stack_does_not_count() -> None:
    params = leaves(10, 4, 2)
    within = np.arange(4) < np.array([4, 2])[:, None]
    params["A"], params["B"] = params["A"] * within[:, None], params["B"] * within[..., None]
    norm = np.abs(draw(10))
    zero = after_event(params, norm**2, group="per_matrix", fraction=0.25)
    assert zero[0].sum() == 10
    assert zero[1][:, :2].sum() == 5
    score = np.abs(params["A"][0]) * norm[:, None]
    assert score[zero[0]].max() < score[~zero[0]].min()
    assert len(set(zero[0].sum(axis=0))) > 1


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    params = {"A": jnp.ones((6, 2)), **slots_of(6)}
    zero = after_event(params, np.ones(6))
    np.testing.assert_array_equal(zero, np.repeat([[True], [False]], 3, axis=0) * np.ones((1, 2)))
    zero = after_event(params, np.ones(6), group=(1, 3))
    np.testing.assert_array_equal(zero[:, 0], [1, 1, 0, 1, 1, 0])
    zero = after_event(params, np.ones(6), group="per_matrix", fraction=0.25)
    np.testing.assert_array_equal(np.flatnonzero(zero), [0, 1, 2])


def test_the_scale_of_the_inputs_does_not_matter_and_that_of_one_feature_does() -> None:
    params, squares = leaves(9), gradients_of(leaves(9), 5)
    of = lambda factor: squares | {"input_squares": squares["input_squares"] * factor}
    tx = pruning(optax.adam(0.05), 5)
    plain, scaled = (run(tx, params, of(c))[0]["A"] for c in (1.0, 2.0**10))
    np.testing.assert_array_equal(plain, scaled)
    louder = run(tx, params, of(np.where(np.arange(9) == 4, 100.0, 1.0)[:, None]))[0]["A"]
    assert (plain[-1][4] == 0).any()
    assert (louder[-1][4] != 0).all()


def test_with_nothing_to_prune_it_is_the_optimizer_alone() -> None:
    params = leaves()
    given = gradients_of(params, 6)
    seen, _ = run(pruning(optax.adamw(0.01), 2, 0.0), params, given)
    alone, _ = run(optax.adamw(0.01), {k: params[k] for k in "AB"}, {k: given[k] for k in "AB"})
    for name in "AB":
        np.testing.assert_array_equal(seen[name], alone[name])
    never, _ = run(pruning(optax.adamw(0.01), 7), params, given)
    np.testing.assert_array_equal(never["A"], seen["A"])


def test_a_matrix_without_statistics_is_not_pruned_and_a_step_without_them_changes_none() -> None:
    params = leaves(8, 3, 2)
    given = gradients_of(params, 4)
    absent = lambda x: x.at[:, 1].set(0).at[1, 0].set(0)
    slots = {name: absent(given[name]) for name in ("input_squares", "token_share")}
    squares = slots["input_squares"]
    seen, state = run(pruning(optax.sgd(0.1), 4), params, given | slots)
    assert np.count_nonzero(seen["A"][-1] == 0, axis=(-2, -1)).tolist() == [12, 0]
    q = np.sqrt(squares[:, 0, :, 0])
    expected = 0.9 * (0.9 * q[0] + 0.1 * q[2]) + 0.1 * q[3]
    np.testing.assert_allclose(state.input_norms["input_squares"][0, :, 0], expected, atol=1e-6)
    constant = given | {"input_squares": jnp.broadcast_to(given["input_squares"][0], squares.shape)}
    _, state = run(pruning(optax.sgd(0.1), 4), params, constant)
    np.testing.assert_array_equal(
        state.input_norms["input_squares"], np.sqrt(given["input_squares"][0])
    )


def test_masks_do_not_depend_on_the_scale_of_a_steps_statistics() -> None:
    params, given = leaves(8, 3, 2), gradients_of(leaves(8, 3, 2), 4)
    scale = jnp.array([1.0, 2.0**6, 2.0**-3, 2.0**4]).reshape(4, 1, 1)
    scaled = {"input_squares": given["input_squares"] * scale[..., None], "token_share": scale}
    scaled["token_share"] *= given["token_share"]
    tx = pruning(optax.sgd(0.1), 4)
    (plain, state), (found, other) = (run(tx, params, g) for g in (given, given | scaled))
    np.testing.assert_array_equal(found["A"] == 0, plain["A"] == 0)
    assert (plain["A"][-1] == 0).any()
    norms = (x.input_norms["input_squares"] for x in (state, other))
    assert_close(*norms, 4)


def test_bfloat16_factors_have_exact_zeros_too() -> None:
    params = leaves(10, dtype=jnp.bfloat16)
    seen, _ = run(pruning(optax.sgd(0.1), 2, hold_mask=True), params, gradients_of(params, 5))
    assert seen["A"].dtype == jnp.bfloat16
    zeros = np.count_nonzero(seen["A"] == 0, axis=1)
    np.testing.assert_array_equal(zeros[1:], 5)


def test_the_output_stays_the_models_while_b_is_zero() -> None:
    method = lro.adapters.PRILoRA(rank=3)
    params = method.init(jax.random.key(0), jnp.asarray(WEIGHTS)).trainable
    given = gradients_of(params, 4) | {"B": jnp.zeros((4, *params["B"].shape))}
    seen, _ = run(pruning(optax.sgd(0.1), 2), params, given)
    assert (seen["A"][1] == 0).any()
    assert not seen["B"].any()


def test_multi_steps_masks_partitions_and_hyperparameters_go_through() -> None:
    params = {"x": leaves(), "y": leaves()}
    given = gradients_of(params, 8)
    share = draw(8, 1) ** 2  # micro-batches have unlike shares of padding
    given["x"]["token_share"] = jnp.asarray(share)
    only = {"x": dict.fromkeys(params["x"], True), "y": dict.fromkeys(params["y"], False)}
    tx = optax.MultiSteps(optax.masked(pruning(optax.sgd(0.1), 2), only), 2)
    seen, state = run(tx, params, given)
    zeros = np.count_nonzero(seen["x"]["A"] == 0, axis=(1, 2))
    np.testing.assert_array_equal(zeros, [0, 0, 0, 12, 12, 0, 0, 12])
    assert not (seen["y"]["A"] == 0).any()
    norms = state.inner_opt_state.inner_state.input_norms["x"]["input_squares"]
    squares = np.asarray(given["x"]["input_squares"]).reshape(4, 2, 8, 1).sum(axis=1)
    q = np.sqrt(squares / share.reshape(4, 2, 1, 1).sum(axis=1))
    expected = q[0]
    for now in q[1:]:
        expected = 0.9 * expected + 0.1 * now
    assert_close(norms, expected)
    tx = optax.partition(
        {"x": pruning(optax.sgd(0.1), 8), "y": optax.sgd(0.1)}, {"x": "x", "y": "y"}
    )
    seen, _ = run(tx, params, given)
    assert np.count_nonzero(seen["x"]["A"][-1] == 0) == 12
    tx = optax.inject_hyperparams(pruning)(optax.sgd(0.1), every=4, fraction=0.25)
    seen, _ = run(tx, params["x"], given["x"])
    assert np.count_nonzero(seen["A"] == 0, axis=(1, 2)).tolist() == [0, 0, 0, 6, 0, 0, 0, 6]


def test_a_scanned_model_is_trained_by_an_nnx_optimizer() -> None:
    model = Scanned(3, nnx.Rngs(0))
    method = lro.adapters.PRILoRA(rank=linear_ranks(1, 3, 3))
    lro.adapters.attach(model, method, "up|down", rngs=0)
    tx = pruning(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)), 3, hold_mask=True)
    optimizer = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable)
    wrt = nnx.DiffState(0, lro.adapters.trainable)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        loss = lambda model: jnp.mean(jnp.square(model(tokens()) - 1))
        optimizer.update(model, nnx.grad(loss, argnums=wrt)(model))

    for _ in range(4):
        step(model, optimizer)
    arrays = model.blocks.up.adapters["default"].arrays
    for layer, rank in enumerate((1, 2, 3)):
        a = np.asarray(arrays["A"][...])[layer]
        np.testing.assert_array_equal(np.count_nonzero(a, axis=0), 3 * (np.arange(3) < rank))
        assert arrays["B"][...][layer, :rank].all()
    assert not arrays["input_squares"][...].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("group", ["per_rank", (2, 4)])
def test_a_factor_whose_inputs_are_sharded_is_pruned_as_a_whole_one(kind: Any, group: Any) -> None:
    params = leaves(12, 3, 2)
    squares = draw(2, 12, 1) ** 2
    given = jax.tree.map(jnp.zeros_like, params)
    given |= {"input_squares": jnp.asarray(squares), "token_share": jnp.ones((2, 1))}
    mesh, tx = (
        jax.make_mesh((2,), ("x",), axis_types=(kind,)),
        pruning(optax.sgd(0.1), 1, group=group),
    )

    def pruned(put: Any) -> jax.Array:
        p, g = (
            tree | {k: put(tree[k]) for k in ("A", "input_squares")} for tree in (params, given)
        )
        return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0]["A"])(p, g)

    expected = pruned(lambda x: x)
    with jax.set_mesh(mesh):
        found = pruned(lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "x", None))))
    assert found.sharding.spec == P(None, "x", None)
    np.testing.assert_array_equal(found, expected)
    assert expected.any()


def test_unusable_options_are_refused() -> None:
    for options, message in (
        ({"every": 0}, "every=0 must be a number of steps"),
        ({"every": 2.5}, r"every=2\.5 must be a number of steps"),
        ({"fraction": 1.0}, r"fraction=1\.0 must be at least 0 and below 1"),
        ({"beta": 1.0}, r"beta=1\.0 must be at least 0 and below 1"),
        ({"group": "per_row"}, "group='per_row' must be"),
        ({"group": (4, 2)}, r"group=\(4, 2\) must be"),
        ({"group": (0, 4)}, r"group=\(0, 4\) must be"),
        ({"group": (2, 4), "fraction": 0.5}, r"fraction=0\.5 has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            pruning(optax.sgd(0.1), **options)
    tx = pruning(optax.sgd(0.1))
    with pytest.raises(ValueError, match="no parameter is named 'A'"):
        tx.init({"up": {"B": jnp.ones((1, 2))}})
    params = leaves()
    for name in ("input_squares", "token_share"):
        lacking = {"up": params, "down": {k: x for k, x in params.items() if k != name}}
        with pytest.raises(ValueError, match=r"^down/A would never be pruned"):
            tx.init(lacking)
        chosen = {key: dict.fromkeys(tree, key == "up") for key, tree in lacking.items()}
        optax.masked(tx, chosen).init(lacking)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def miniature(tx: Any, loud: bool, steps: int, seed: int = 0) -> float:
    """The relative squared error, fitted to a target of rank 4, with uneven inputs or even ones."""
    n, m, batch = 64, 32, 128
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(n, 4)) @ rng.normal(size=(4, m)) / n**0.5
    target, size = jnp.asarray(target, jnp.float32), jnp.where(jnp.arange(n) < 16, 3.0, 0.3)
    method = lro.adapters.PRILoRA(rank=8)
    start = method.init(jax.random.key(seed), jax.ShapeDtypeStruct((1, n, m), jnp.float32))
    p = {name: x[0] for name, x in start.trainable.items()}

    def step(carry: Any, key: jax.Array) -> Any:
        p, state = carry
        x = jax.random.normal(key, (batch, n)) * (size if loud else 1)
        y = jnp.zeros((batch, m))
        loss = lambda p: jnp.mean((method.branch(p, Rows(x), y=y, weight=target) - x @ target) ** 2)
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    (p, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((p, tx.init(p)))
    error = method.delta(p, target) - target
    weight = size[:, None] if loud else 1
    return float(jnp.sum((weight * error) ** 2) / jnp.sum((weight * target) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loud", "hold_mask", "bound"),
    [
        (False, False, 0.012),
        pytest.param(False, True, 0.039, marks=pytest.mark.full),
        pytest.param(True, False, 0.0024, marks=pytest.mark.full),
        pytest.param(True, True, 0.015, marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_pruning_half_of_the_first_factor_costs_little(
    loud: bool, hold_mask: bool, bound: float
) -> None:
    adam = optax.adam(optax.linear_schedule(5e-3, 0.0, 2000))
    error = miniature(pruning(adam, hold_mask=hold_mask), loud, 2000)
    assert 1e-5 < error < bound  # without pruning about 1e-6


def test_statistics_of_negated_gradients_are_the_same():
    """As those of a loss that is maximised."""
    params = {
        "A": jnp.ones((4, 1)),
        "input_squares": jnp.zeros((4, 1)),
        "token_share": jnp.zeros(1),
    }
    tx = lro.adapters.prilora_pruning(optax.sgd(0.0), every=1, fraction=0.5)
    masks = []
    for sign in (1, -1):
        squares = sign * jnp.array([[4.0], [1.0], [9.0], [0.25]])
        grads = {
            "A": jnp.zeros((4, 1)),
            "input_squares": squares,
            "token_share": sign * jnp.ones(1),
        }
        updates, _ = tx.update(grads, tx.init(params), params)
        masks.append((params["A"] + updates["A"])[:, 0] != 0)
    assert masks[0].tolist() == masks[1].tolist() == [True, False, True, False]


def test_a_convolution_that_sums_in_bfloat16_delivers_statistics() -> None:
    half = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.bfloat16}
    model, x = nnx.Conv(4, 6, (3,), **half, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 4))
    lro.adapters.attach(model, lro.adapters.PRILoRA(rank=2), where=".*", rngs=0)
    trainable = nnx.DiffState(0, lro.adapters.trainable)
    gradient = nnx.grad(lambda model: model(x).sum().astype(jnp.float32), argnums=trainable)(model)
    arrays = gradient["adapters"]["default"]["arrays"]
    share = np.asarray(arrays["token_share"][...])
    assert np.max(arrays["input_squares"][...]) == pytest.approx(float(share.max()), rel=1e-5)
