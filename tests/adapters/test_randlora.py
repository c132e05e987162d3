"""RandLoRA: shared random bases with trained scales."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Lookup, Rows
from tests.adapters.compiled import compiled, gradient, layer_output
from tests.adapters.nnx_models import Scanned, Unrolled, call, tokens

RandLoRA = compiled(lro.adapters.RandLoRA)
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
EPS = np.finfo(np.float32).eps
SHAPES = {"wide": (6, 9), "tall": (9, 6), "square": (7, 7), "small": (4, 9)}
RANK, ALPHA = 4, 10


@pytest.fixture(autouse=True)
def same_draws():
    """A test draws the same numbers, whichever ran before it."""
    RNG.bit_generator.state = START


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def made(shape, rank=RANK, **options):
    """A method, its arrays on one weight beside a larger one, moved, and the weight."""
    method, weight = RandLoRA(rank=rank, alpha=ALPHA, **options), drawn(*shape)
    shared = method.init_shared(jax.random.key(0), [weight[None], np.zeros((1, 8, 11))]).frozen
    own = method.init_layers(jax.random.key(1), weight[None], shared).trainable
    return method, {**shared, **{name: drawn(*x.shape[1:]) for name, x in own.items()}}, weight


def delta_of(p, shape, scale):
    """The definition by positions, in float64: PEFT's order of bases."""
    a, b, scales, gamma = (np.asarray(p[k], np.float64) for k in ("A", "B", "lambda", "gamma"))
    (rank, count), d, largest = scales.shape, min(shape), max(shape)
    change = np.zeros((largest, d))
    for position in range(rank * count):
        k, j = divmod(position, count)
        basis, column = divmod(position, rank)
        row = scales[k, j] * a[k, 0, :d] * gamma[j]
        change += np.outer(b[:largest, basis, column], row)
    return scale * (change.T if shape[0] <= shape[1] else change)


@pytest.mark.parametrize("bases", ["dense", "sparse"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.combinations(1)
def test_output_merged_weight_and_gradients_are_those_of_the_definition(name, bases):
    shape = SHAPES[name]
    method, p, weight = made(shape, bases=bases)
    change = delta_of(p, shape, ALPHA / RANK)
    size = np.abs(change).max()
    np.testing.assert_allclose(method.delta(p, weight) / size, change / size, atol=1e-6)
    x, weights_of_loss = drawn(5, shape[0]), drawn(5, shape[1])
    y = x @ weight
    out = layer_output(method, p, Rows(x), y, weight=weight)
    np.testing.assert_allclose((out - y) / size, x @ change / size, atol=1e-5)
    trained = {name: p[name] for name in ("lambda", "gamma")}
    loss = lambda t, x: jnp.sum(
        weights_of_loss * layer_output(method, p | t, Rows(x), y, weight=weight)
    )
    slopes, of_x = gradient(loss, trained, x, argnums=(0, 1))
    np.testing.assert_allclose(of_x / size, weights_of_loss @ change.T / size, atol=1e-5)
    of_weight = x.T @ weights_of_loss
    for key, value in trained.items():  # the change is linear in each
        direction = drawn(*value.shape)
        expected = np.sum(of_weight * delta_of(p | {key: direction}, shape, ALPHA / RANK))
        actual = np.sum(slopes[key] * direction)
        np.testing.assert_allclose(actual / size, expected / size, atol=1e-4)


def test_the_worked_numbers_and_the_pairing_of_bases():
    p = {
        "A": np.array([[[1, -1]]], np.float32),
        "B": np.array([[[1], [2]], [[0], [1]], [[-1], [1]]], np.float32),
        "lambda": np.array([[0.5, 1]], np.float32),
        "gamma": np.array([[1, 1], [2, 1]], np.float32),
    }
    expected = np.array([[4.5, -2.5], [2, -1], [1.5, -0.5]])
    one = RandLoRA(rank=1, alpha=1)
    np.testing.assert_allclose(one.delta(p, np.zeros((3, 2), np.float32)), expected, atol=1e-6)
    np.testing.assert_allclose(one.delta(p, np.zeros((2, 3), np.float32)), expected.T, atol=1e-6)
    default = RandLoRA(rank=1).delta(p, np.zeros((3, 2), np.float32))
    np.testing.assert_allclose(default, 20 * expected, rtol=1e-6)
    # With one entry of lambda at 1 the change is the outer product of one column and one row.
    method = RandLoRA(rank=2, alpha=2)
    b = np.arange(1, 7, dtype=np.float32).reshape(1, 3, 2) * np.ones((7, 1, 1), np.float32)
    p = {"A": np.ones((2, 1, 6), np.float32), "B": b, "gamma": np.ones((3, 6), np.float32)}
    pairs = {(0, 0): (0, 0), (0, 1): (0, 1), (0, 2): (1, 0)}
    pairs |= {(1, 0): (1, 1), (1, 1): (2, 0), (1, 2): (2, 1)}
    for (k, j), (basis, column) in pairs.items():
        scales = np.zeros((2, 3), np.float32)
        scales[k, j] = 1
        change = method.delta(p | {"lambda": scales}, np.zeros((6, 7), np.float32))
        np.testing.assert_allclose(change, b[0, basis, column], rtol=1e-6)


def test_it_starts_at_the_model_and_the_first_step_moves_lambda_alone():
    method, p, weight = made(SHAPES["wide"])
    own = method.init_layers(jax.random.key(0), weight[None], {}).trainable
    assert (own["lambda"].shape, own["gamma"].shape) == ((1, 4, 2), (1, 2, 6))
    np.testing.assert_allclose(own["gamma"], 1 / 6)
    assert not own["lambda"].any()
    p |= {name: x[0] for name, x in own.items()}
    x = drawn(5, 6)
    y = x @ weight
    np.testing.assert_array_equal(layer_output(method, p, Rows(x), y, weight=weight), y)
    loss = lambda t: layer_output(method, p | t, Rows(x), y, weight=weight).sum()
    slopes = gradient(loss, {name: p[name] for name in own})
    assert not slopes["gamma"].any()
    assert slopes["lambda"].all()


def test_the_rank_is_full_after_the_second_update():
    weight = np.zeros((12, 20), np.float32)
    method = RandLoRA(rank=5)
    params = method.init(jax.random.key(0), weight[None])
    p = {**params.frozen, **{name: x[0] for name, x in params.trainable.items()}}
    trained, ranks = {name: p[name] for name in params.trainable}, []
    of_weight, tx = drawn(12, 20), optax.sgd(1e-3)
    state = tx.init(trained)
    for _ in range(4):
        change = method.delta(p | trained, weight)
        ranks.append(int(np.linalg.matrix_rank(change.astype(np.float64), rtol=1e-5)))
        slopes = gradient(lambda t: jnp.sum(of_weight * method.delta(p | t, weight)), trained)
        updates, state = tx.update(slopes, state)
        trained = jax.tree.map(np.add, trained, jax.tree.map(np.asarray, updates))
    assert ranks == [0, 5, 12, 12]


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 8), (8, 5)])
def test_with_one_basis_it_is_vera_without_its_output_vector(d_in, d_out):
    method, p, weight = made((d_in, d_out), rank=6)
    assert p["lambda"].shape == (6, 1)
    p["gamma"] = np.ones((1, 5), np.float32)
    vera = compiled(lro.adapters.VeRA)(rank=6)
    of_vera = {"A": p["B"][:8, 0], "B": p["A"][:, 0, :5], "d": p["lambda"][:, 0]}
    of_vera["b"] = np.ones(5, np.float32)
    expected = ALPHA / 6 * vera.delta(of_vera, np.zeros((8, 5), np.float32))
    expected = expected.T if d_in < d_out else expected
    np.testing.assert_allclose(method.delta(p, weight), expected, atol=1e-5)


def test_tables_experts_and_bfloat16():
    method, p, weight = made(SHAPES["tall"])
    change = delta_of(p, SHAPES["tall"], ALPHA / RANK)
    zeros = lambda *shape: np.zeros(shape, np.float32)
    index = np.array([[3, 8], [0, 7]])
    out = layer_output(method, p, Lookup(index, jnp.float32), zeros(2, 2, 6), weight=weight)
    np.testing.assert_allclose(out, change[index], atol=1e-4)
    two = p | {"lambda": np.stack([p["lambda"], 2 * p["lambda"]])}
    two["gamma"] = np.stack([p["gamma"]] * 2)
    x = drawn(2, 5, 9)
    stack = np.stack([weight] * 2)
    out = layer_output(method, two, Rows(x), zeros(2, 5, 6), weight=stack)
    for layer in range(2):
        np.testing.assert_allclose(out[layer], (layer + 1) * x[layer] @ change, atol=2e-3)
    low = x.astype(jnp.bfloat16)
    out = layer_output(method, p, Rows(low), zeros(2, 5, 6).astype(jnp.bfloat16), weight=weight)
    assert out.dtype == jnp.bfloat16
    exact = low.astype(np.float64) @ change
    assert np.abs(out.astype(np.float64) - exact).max() < 0.02 * np.abs(exact).max()


def test_bases_do_not_depend_on_the_order_of_layers_and_small_layers_read_the_first_parts():
    method, key = RandLoRA(rank=RANK), jax.random.key(3)
    weights = [np.zeros((2, *shape), np.float32) for shape in SHAPES.values()]
    frozen = method.init_shared(key, weights).frozen
    again = method.init_shared(key, weights[::-1]).frozen
    jax.tree.map(np.testing.assert_array_equal, frozen, again)
    # The largest smaller side is 7 (square), the largest side 9.
    assert (frozen["A"].shape, frozen["B"].shape) == ((4, 1, 7), (9, 2, 4))
    _, p, weight = made((3, 5))
    cut = p | {"A": p["A"][:, :, :3], "B": p["B"][:5, :1]}
    part, whole = (RandLoRA(rank=RANK).delta(arrays, weight) for arrays in (cut, p))
    np.testing.assert_allclose(part, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("bases", "share"), [("dense", 1), ("sparse", 1 / 3), ("very_sparse", 1 / 8)]
)
def test_entries_of_the_bases(bases, share):
    shared = RandLoRA(rank=16, bases=bases).init_shared(
        jax.random.key(0), [jax.ShapeDtypeStruct((1, 64, 128), jnp.float32)]
    )
    for x in shared.frozen.values():
        x = x.astype(np.float64)
        np.testing.assert_allclose(x.std(ddof=1), 1, rtol=1e-5)
        if bases == "dense":
            assert 1.65 < np.abs(x).max() < 1.82
            continue
        values, counts = np.unique(x, return_counts=True)
        np.testing.assert_allclose(values, values[2] * np.array([-1, 0, 1]))
        deviation = np.sqrt(share * (1 - share) / x.size)
        assert abs(1 - counts[1] / x.size - share) < 4 * deviation
        assert abs(counts[2] - counts[0]) < 4 * np.sqrt(share * x.size)


def test_sparse_bases_of_tiny_layers_may_lose_rank():
    method, weight = lro.adapters.RandLoRA(rank=5, bases="sparse"), jnp.zeros((12, 20))
    scales, gamma = drawn(5, 3), drawn(3, 12)

    def change(key):
        own = {"lambda": scales, "gamma": gamma}
        return method.delta(method.init_shared(key, [weight[None]]).frozen | own, weight)

    changes = jax.jit(jax.vmap(change))(jax.random.split(jax.random.key(0), 100))
    ranks = np.linalg.matrix_rank(np.asarray(changes, np.float64), tol=1e-4)
    assert (ranks < 12).any()
    assert (ranks == 12).any()


@pytest.mark.parametrize(
    ("spectrum", "ours", "within", "rank_5"),
    [("flat", 0.81, 0.03, 0.92), ("1/i", 0.73, 0.08, 0.31)],
)
def test_it_fits_flat_spectra_better_than_a_low_rank_of_as_many_numbers_and_others_worse(
    spectrum, ours, within, rank_5
):
    side, rank, count = 32, 4, 8
    u, v = (np.linalg.qr(drawn(side, side).astype(np.float64))[0] for _ in range(2))
    values = np.ones(side) if spectrum == "flat" else 1 / np.arange(1, side + 1)
    target = (u * values) @ v
    size = np.linalg.norm(target)
    np.testing.assert_allclose(np.linalg.norm(values[5:]) / size, rank_5, atol=0.01)

    method = RandLoRA(rank=rank, alpha=rank)
    weight = np.zeros((side, side), np.float32)
    frozen = method.init_shared(jax.random.key(0), [weight[None]]).frozen
    a = frozen["A"][:, 0].astype(np.float64)
    columns = frozen["B"].astype(np.float64).reshape(side, rank, count)  # by position, as rows
    scales, gamma = drawn(rank, count).astype(np.float64), np.ones((count, side))
    left = []
    for _ in range(30):
        for c in range(side):  # by least squares in gamma, a column at a time
            terms = np.einsum("okj,kj,k->oj", columns, scales, a[:, c])
            gamma[:, c] = np.linalg.lstsq(terms, target[c])[0]
        change = np.einsum("okj,kj,kc,jc->co", columns, scales, a, gamma)
        left.append(np.linalg.norm(change - target) / size)
        terms = np.einsum("okj,kc,jc->cokj", columns, a, gamma).reshape(-1, rank * count)
        scales = np.linalg.lstsq(terms, target.ravel())[0].reshape(rank, count)
    p = frozen | {"lambda": scales.astype(np.float32), "gamma": gamma.astype(np.float32)}
    error = np.linalg.norm(method.delta(p, weight) - target) / size
    np.testing.assert_allclose(error, ours, atol=within)
    if spectrum == "flat":
        np.testing.assert_allclose(left[0], np.sqrt(1 - 1 / rank), atol=0.02)


def test_backward_saves_only_the_arrays_and_thin_products():
    from jax._src.ad_checkpoint import saved_residuals

    tokens_, method = 3, lro.adapters.RandLoRA(rank=8)
    for shape, thin in (((64, 96), 64), ((96, 64), 64)):
        weight, x = jnp.ones(shape), jnp.ones((tokens_, shape[0]))
        params = method.init(jax.random.key(0), weight[None])
        p = method.layer_arrays(params, 0)
        output = lambda t, x, p=p, w=weight: layer_output(method, p | t, Rows(x), x @ w, weight=w)
        loss = lambda t, x, output=output: output(t, x).sum()
        saved = saved_residuals(loss, {name: p[name] for name in ("lambda", "gamma")}, x)
        made = [a.shape for a, source in saved if "output of" in source]
        if shape[0] < shape[1]:
            assert not made
        else:
            assert made == [(tokens_, thin)]  # x V


@pytest.mark.parametrize("kind", [Unrolled, Scanned])
def test_the_bases_are_once_in_a_compiled_step(kind):
    depth = 3
    model = kind(depth, nnx.Rngs(0))
    before = call(model, tokens())
    lro.adapters.attach(model, lro.adapters.RandLoRA(rank=2), "up|down", rngs=0)
    np.testing.assert_allclose(call(model, tokens()), before, atol=1e-5)
    (bases,) = model.adapter_groups["default"].values()
    assert (bases["A"].shape, bases["B"].shape) == ((2, 1, 6), (12, 3, 2))
    graphdef, trained, rest = nnx.split(model, lro.adapters.trainable, ...)

    def loss(trained, rest, x):
        return jnp.sum(nnx.merge(graphdef, trained, rest, copy=True)(x) ** 2)

    step = jax.jit(jax.grad(loss)).lower(trained, rest, tokens()).compile()
    layer = 2 * 6 * 12 + 12 + 2 * (2 * 3 + 3 * 6)  # weights, a bias, lambda and gamma
    outside = 11 * 6 + 6 * 11 + 11 + tokens().size
    expected = 4 * (depth * layer + outside + 2 * 6 + 12 * 3 * 2)
    assert step.memory_analysis().argument_size_in_bytes == expected


def test_a_scan_over_layers_saves_no_bases_for_each():
    side, temporaries = 128, []
    method = lro.adapters.RandLoRA(rank=16)
    for depth in (2, 6):
        weights = jnp.zeros((depth, side, side))
        params = jax.eval_shape(method.init, jax.random.key(0), weights)

        def loss(trained, frozen, weights, x):
            def layer(x, of_layer):
                own, weight = of_layer
                y = x @ weight
                return layer_output(method, frozen | own, Rows(x), y, weight=weight), None

            return jnp.sum(jax.lax.scan(layer, x, (trained, weights))[0])

        args = (params.trainable, params.frozen, weights, jnp.zeros((4, side)))
        memory = jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[1] - temporaries[0] < 4 * side * side * 4 / 2  # half a weight a layer


def test_what_cannot_be_is_refused_by_name():
    for options, error, message in (
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"rank": (2, 3)}, TypeError, r"rank=\(2, 3\) must be an int"),
        ({"bases": "ternary"}, ValueError, "bases='ternary' must be one of"),
        ({"dropout": -0.1}, ValueError, "dropout=-0.1 must be at least 0"),
    ):
        with pytest.raises(error, match=message):
            RandLoRA(**options)
    with pytest.raises(TypeError, match="RandLoRA makes no change of low rank"):
        RandLoRA(rank=2).to_lora({})
    tiny = jnp.zeros((1, 1, 1))
    with pytest.raises(
        ValueError, match=r"all 1 entries of the shared array 'A' \(1, 1, 1\) drawn"
    ):
        lro.adapters.RandLoRA(rank=1).init(jax.random.key(0), tiny)
    method, p, weight = made(SHAPES["wide"])
    for changed, message in (
        ({"A": p["A"][:, :, :5]}, r"\(4, 1, 5\) and .* needs \(4, 1, 6\) and \(9, 2, 4\), or"),
        ({"B": p["B"][:8]}, r"and \(8, 2, 4\): .* or more than 6, 9 and 2"),
        ({"B": p["B"][:, :1]}, r"and \(11, 1, 4\): "),
        ({"B": p["B"][..., :3]}, r"and \(11, 2, 3\): "),
        ({"A": np.tile(p["A"], (2, 1, 1))}, r"\(8, 1, 8\) and "),
    ):
        with pytest.raises(ValueError, match=message):
            method.delta(p | changed, weight)


def test_merging_and_unmerging_gives_the_weight_back_and_dropped_inputs_are_scaled_up():
    method, p, weight = made(SHAPES["small"])
    merged = method.merged(p, weight).weight
    size = np.abs(weight).max() + np.abs(merged).max()
    assert np.abs(method.unmerged(p, merged) - weight).max() <= 4 * EPS * size
    dropping, p, weight = made(SHAPES["wide"], dropout=0.5)
    x, zeros = np.ones((1, 6), np.float32), np.zeros((1, 9), np.float32)
    out = lambda key: layer_output(dropping, p, Rows(x), zeros, weight=weight, key=key)
    still = x @ dropping.delta(p, weight)
    np.testing.assert_allclose(out(None), still, atol=1e-3)
    mean = np.mean(jax.jit(jax.vmap(out))(jax.random.split(jax.random.key(0), 4000)), axis=0)
    assert np.abs(mean - still).max() < 0.1 * np.abs(dropping.delta(p, weight)).sum(0).max()
