"""MiSS: rows that inputs share, and blocks that multiply the weight."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Lookup, Patches, Rows
from tests.adapters.compiled import compiled, gradient, layer_output
from tests.adapters.nnx_models import Scanned, call, tokens

MiSS, MiSSBat = compiled(lro.adapters.MiSS), compiled(lro.adapters.MiSSBat)
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
EPS = np.finfo(np.float32).eps
FORMS = {
    "shard": (MiSS, {"rank": 5}),
    "mini": (MiSS, {"rank": 5, "mini_rank": 4}),
    "bat": (MiSSBat, {"rank": 4}),
    "bat_in": (MiSSBat, {"rank": 4, "side": "in"}),
}


@pytest.fixture(autouse=True)
def same_draws():
    """A test draws the same numbers, whichever ran before it."""
    RNG.bit_generator.state = START


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def made(form, d_in=12, d_out=8, scale=0.5):
    """A method, its arrays on one weight, moved, and the weight."""
    kind, options = FORMS[form]
    method, weight = kind(**options), drawn(d_in, d_out)
    p = method.layer_arrays(method.init(jax.random.key(0), weight[None]), 0)
    name = "mini" if form == "mini" else "D"
    assert not p[name].any()
    return method, p | {name: scale * drawn(*p[name].shape)}, weight


def trained(p):
    """Name and value of the trained array."""
    return ("mini", p["mini"]) if "mini" in p else ("D", p["D"])


def delta_of(form, d, weight):
    """The definition, entry by entry, in float64."""
    d_in, d_out = weight.shape
    d, w = d.astype(np.float64), weight.astype(np.float64)
    change = np.zeros(weight.shape)
    if form in ("shard", "mini"):
        for i in range(d_in):
            for o in range(d_out):
                change[i, o] = d[i % d.shape[0], o % d.shape[1]]
        return change
    r = d.shape[-1]
    for j in range(d_in // r):
        for q in range(d_out // r):
            at = slice(j * r, (j + 1) * r), slice(q * r, (q + 1) * r)
            c = d[q if form == "bat" else j].T
            change[at] = c @ (w[at] + np.eye(r))
    return change


@pytest.mark.parametrize("d_in", [12, 20])
@pytest.mark.parametrize("form", FORMS)
def test_output_merged_weight_and_gradients_are_those_of_the_definition(form, d_in):
    method, p, weight = made(form, d_in)
    x, weights_of_loss = drawn(7, d_in), drawn(7, 8)
    name, d = trained(p)
    change = delta_of(form, d, weight)
    np.testing.assert_allclose(method.delta(p, weight), change, atol=1e-5)
    y = x @ weight
    start = layer_output(method, p | {name: 0 * d}, Rows(x), y, weight=weight)
    np.testing.assert_array_equal(start, y)
    out = layer_output(method, p, Rows(x), y, weight=weight)
    np.testing.assert_allclose(out, x.astype(np.float64) @ (weight + change), atol=3e-5)
    loss = lambda d, x: jnp.sum(
        weights_of_loss * layer_output(method, p | {name: d}, Rows(x), y, weight=weight)
    )
    of_d, of_x = gradient(loss, d, x, argnums=(0, 1))
    np.testing.assert_allclose(of_x, weights_of_loss @ change.T, atol=3e-5)
    of_weight = x.T @ weights_of_loss
    # Linear in D: the gradient's product with a direction is the change of the sum.
    for _ in range(3):
        direction = drawn(*d.shape)
        expected = np.sum(of_weight * delta_of(form, direction, weight))
        np.testing.assert_allclose(np.sum(of_d * direction), expected, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_tables_and_convolutions_and_experts_get_the_product_with_the_same_matrix(form):
    method, p, weight = made(form)
    index = np.array([[3, 11], [0, 7]])
    zeros = lambda *shape: np.zeros(shape, np.float32)
    name, d = trained(p)
    change = delta_of(form, d, weight)
    out = layer_output(method, p, Lookup(index, jnp.float32), zeros(2, 2, 8), weight=weight)
    np.testing.assert_allclose(out, change[index], atol=1e-5)
    x = drawn(7, 12)
    conv = Patches(x, lambda x, matrix: x @ matrix)
    out = jax.jit(lambda p, y: layer_output(method.method, p, conv, y, weight=weight))(
        p, zeros(7, 8)
    )
    np.testing.assert_allclose(out, x @ change, atol=3e-5)
    two = {key: np.stack([a, 2 * a if key == name else a]) for key, a in p.items()}
    experts, weights = drawn(2, 7, 12), np.stack([weight, weight])
    out = layer_output(method, two, Rows(experts), zeros(2, 7, 8), weight=weights)
    for layer in range(2):
        np.testing.assert_allclose(out[layer], (layer + 1) * experts[layer] @ change, atol=6e-5)


def test_the_worked_sum_over_blocks():
    method = MiSS(rank=2)
    d = np.array([[1, 10], [100, 1000]], np.float32)
    p = method.layer_arrays(method.init(jax.random.key(0), np.zeros((1, 5, 2), np.float32)), 0)
    x, y = np.arange(1, 6, dtype=np.float32), np.zeros(2, np.float32)
    out = layer_output(method, p | {"D": d}, Rows(x), y, weight=np.zeros((5, 2), np.float32))
    np.testing.assert_allclose(out, [609, 6090], rtol=1e-6)  # S = [9, 6]


def test_the_worked_block_and_a_weight_of_zeros_and_a_multiple_of_the_identity():
    weight = np.array([[1, 2], [3, 4]], np.float32)
    c = np.array([[0.1, 0.2], [0, 0.5]], np.float32)
    for side in ("out", "in"):
        delta = MiSSBat(rank=2, side=side).delta({"D": c.T[None]}, weight)
        np.testing.assert_allclose(delta, [[0.8, 1.2], [1.5, 2.5]], atol=1e-6)
    method, p, weight = made("bat")
    repeated = np.concatenate([np.tile(block.T, (3, 1)) for block in p["D"]], axis=1)
    np.testing.assert_allclose(method.delta(p, 0 * weight), repeated, atol=1e-6)
    multiple = {"D": np.tile(0.3 * np.eye(4, dtype=np.float32), (2, 1, 1))}
    expected = 0.3 * (weight + np.tile(np.eye(4), (3, 2)))
    np.testing.assert_allclose(method.delta(multiple, weight), expected, atol=1e-6)


def test_rows_repeat_and_the_rank_is_at_most_r_and_that_of_blocks_is_full():
    method, p, weight = made("shard", 20)
    change = method.delta(p, weight)
    np.testing.assert_allclose(change[5:], change[:-5], atol=1e-5)
    assert np.linalg.matrix_rank(change) == 5
    np.testing.assert_allclose(np.sum(change**2), 4 * np.sum(p["D"] ** 2), rtol=1e-5)
    a, b = method.to_lora(p)
    assert (a.shape, b.shape) == ((20, 5), (5, 8))
    np.testing.assert_allclose(a @ b, change, atol=1e-5)
    method, p, weight = made("mini", 13)
    a, b = method.to_lora(p)
    np.testing.assert_allclose(a @ b, method.delta(p, weight), atol=1e-5)
    assert np.linalg.matrix_rank(a @ b) == 4
    for d_in, d_out, rank in ((16, 12, 2), (64, 64, 4)):
        for side in ("out", "in"):
            method = MiSSBat(rank=rank, side=side)
            weight = drawn(d_in, d_out)
            d = drawn(*method.init(jax.random.key(0), weight[None]).trainable["D"].shape[1:])
            change = method.delta({"D": d}, weight)
            assert np.linalg.matrix_rank(change) == min(d_in, d_out)


def test_a_mini_rank_of_all_outputs_and_a_rank_of_all_inputs():
    method, p, weight = made("shard")
    mini = MiSS(rank=5, mini_rank=8)
    own = mini.layer_arrays(mini.init(jax.random.key(0), weight[None]), 0)
    assert own["mini"].shape == p["D"].shape
    repeated = mini.delta(own | {"mini": p["D"]}, weight)
    np.testing.assert_allclose(repeated, method.delta(p, weight), atol=1e-5)
    whole = MiSS(rank=12)
    p = whole.layer_arrays(whole.init(jax.random.key(0), weight[None]), 0)
    d = drawn(12, 8)
    np.testing.assert_allclose(whole.delta(p | {"D": d}, weight), d, atol=1e-5)


def test_the_first_step_of_sgd_is_the_block_count_times_a_projection_and_far_longer_than_loras():
    d_in, d_out, rank, rate = 1024, 64, 16, 0.1
    of_weight, x = drawn(d_in, d_out), np.eye(d_in, dtype=np.float32)
    weight = np.zeros((d_in, d_out), np.float32)

    def first_change(method, name):
        p = method.layer_arrays(method.init(jax.random.key(0), weight[None]), 0)
        loss = lambda moved: jnp.sum(
            of_weight * layer_output(method, p | {name: moved}, Rows(x), weight, weight=weight)
        )
        return method.delta(p | {name: p[name] - rate * gradient(loss, p[name])}, weight)

    gain = lambda change: np.linalg.norm(change) / np.linalg.norm(of_weight) / rate
    change = first_change(MiSS(rank=rank), "D")
    sums = of_weight.astype(np.float64).reshape(-1, rank, d_out).sum(0)
    np.testing.assert_allclose(change, -rate * np.tile(sums, (d_in // rank, 1)), atol=1e-4)
    np.testing.assert_allclose(gain(change), np.sqrt(d_in / rank), rtol=0.1)
    lora = first_change(compiled(lro.adapters.LoRA)(rank=rank), "B")
    np.testing.assert_allclose(gain(lora), np.sqrt(rank / d_in) / 3, rtol=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_merging_and_unmerging_gives_the_weight_back(form):
    method, p, weight = made(form, 20, scale=0.2)
    merged = method.merged(p, weight).weight
    back = method.unmerged(p, merged)
    if form in ("shard", "mini"):
        size = np.abs(weight).max() + np.abs(merged).max()
    else:
        size = max(np.linalg.cond(np.eye(4) + d.T) for d in p["D"]) * np.abs(merged).max()
    assert np.abs(back - weight).max() <= 8 * EPS * size
    low = jnp.asarray(weight, jnp.bfloat16)
    assert method.merged(p, low).weight.dtype == jnp.bfloat16
    assert method.unmerged(p, low).dtype == jnp.bfloat16


def test_a_singular_change_is_not_unmerged():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    lro.adapters.attach(model, lro.adapters.MiSSBat(rank=2), rngs=0)
    d = model.layers[0].adapters["default"].arrays["D"]
    d.set_value(d[...].at[1].set(-jnp.eye(2)))
    lro.adapters.merge(model)
    merged = np.asarray(model.layers[0].kernel[...])
    with pytest.raises(ValueError, match="MiSSBat made to the weight of layers/0 has no inverse"):
        lro.adapters.unmerge(model)
    np.testing.assert_array_equal(model.layers[0].kernel[...], merged)
    params = {"w": jnp.ones((2, 2))}
    adapter = lro.adapters.pytree.init(
        jax.random.key(0), params, lro.adapters.MiSSBat(rank=1, side="in")
    )
    adapter = adapter.replace({"w": {"D": -jnp.ones((2, 1, 1))}})
    merged = lro.adapters.pytree.merge(params, adapter)
    with pytest.raises(ValueError, match="weight of w has no inverse"):
        lro.adapters.pytree.unmerge(merged, adapter)


def test_two_adapters_multiply_the_base_and_add_up():
    model, x = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), drawn(3, 4)
    y, kernel = model(x), np.asarray(model.layers[0].kernel[...])
    expected = np.zeros((4, 4))
    for name in ("first", "second"):
        lro.adapters.attach(model, lro.adapters.MiSSBat(rank=2), rngs=0, name=name)
        d = drawn(2, 2, 2)
        model.layers[0].adapters[name].arrays["D"].set_value(jnp.asarray(d))
        expected += delta_of("bat", d, kernel)
    np.testing.assert_allclose(model(x), y + x @ expected, atol=1e-5)
    with pytest.raises(ValueError, match="can be merged only by itself"):
        lro.adapters.merge(model)


def test_backward_saves_no_array_of_the_weights_size_but_the_weight():
    from jax._src.ad_checkpoint import saved_residuals

    weight, x = jnp.ones((64, 32)), jnp.ones((3, 64))
    for side in ("out", "in"):
        method = lro.adapters.MiSSBat(rank=4, side=side)
        d = jnp.ones(method.init(jax.random.key(0), weight[None]).trainable["D"].shape[1:])
        y = x @ weight
        loss = lambda d, x, m=method, y=y: layer_output(
            m, {"D": d}, Rows(x), y, weight=weight
        ).sum()
        saved = [
            (a.size, source) for a, source in saved_residuals(loss, d, x) if a.size >= weight.size
        ]
        assert all("constant" in source or "argument" in source for _, source in saved), saved
        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(d, x))
        made = [line for line in jaxpr.splitlines() if ":f32[64,32] =" in line]
        assert bool(made) == (side == "out")  # blocks of inputs need no such matrix at all


def test_a_sum_over_blocks_is_no_product_and_adds_in_float32():
    method = lro.adapters.MiSS(rank=4)
    p = method.layer_arrays(method.init(jax.random.key(0), jnp.zeros((1, 4096, 3))), 0)
    f = lambda x: layer_output(method, p, Rows(x), x[..., :3], weight=jnp.zeros((4096, 3)))
    jaxpr = str(jax.make_jaxpr(f)(jnp.ones((2, 4096), jnp.bfloat16)))
    assert jaxpr.count("dot_general") == 1
    assert ":f32[2,4] = reduce_sum" in jaxpr


def test_a_model_with_layers_in_a_scan_starts_where_it_was():
    for method in (lro.adapters.MiSS(rank=4), lro.adapters.MiSSBat(rank=3)):
        model = Scanned(2, nnx.Rngs(0))
        before = call(model, tokens())
        lro.adapters.attach(model, method, "up|down", rngs=0)
        np.testing.assert_allclose(call(model, tokens()), before, atol=1e-5)
        row = lro.adapters.summary(model).rows[0]
        assert row.rank == method.rank


def test_what_cannot_be_is_refused_by_name():
    for make, error, message in (
        (lambda: MiSS(alpha=2.0), ValueError, "alpha=2.0 must be None: MiSS has no scale"),
        (lambda: MiSSBat(alpha=2.0), ValueError, "alpha=2.0 must be None"),
        (lambda: MiSS(rank=(1, 2)), TypeError, r"rank=\(1, 2\) must be an int"),
        (lambda: MiSS(rank=0), ValueError, "rank=0 must be at least 1"),
        (lambda: MiSSBat(rank=0), ValueError, "rank=0 must be at least 1"),
        (lambda: MiSSBat(rank=(2, 2)), TypeError, r"rank=\(2, 2\) must be an int"),
        (lambda: MiSS(mini_rank=0), ValueError, "mini_rank=0 must be at least 1"),
        (lambda: MiSS(mini_rank=2.0), TypeError, "mini_rank=2.0 must be an int"),
        (lambda: MiSSBat(side="both"), ValueError, "side='both' must be one of"),
        (lambda: MiSS(dropout=1.0), ValueError, "dropout=1.0 must be"),
    ):
        with pytest.raises(error, match=message):
            make()
    weights = np.zeros((1, 6, 9), np.float32)
    for method, message in (
        (MiSS(rank=7), r"rank=7 must be at most d_in of the weight \[6, 9\]"),
        (MiSS(rank=2, mini_rank=4), r"mini_rank=4 must divide d_out of the weight \[6, 9\]"),
        (MiSSBat(rank=2), r"rank=2 must divide both sides of the weight \[6, 9\]"),
        (MiSSBat(rank=9), r"rank=9 must divide both sides of the weight \[6, 9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            method.init(jax.random.key(0), weights)
    with pytest.raises(TypeError, match="MiSSBat makes no change of low rank"):
        MiSSBat(rank=3).to_lora({})
