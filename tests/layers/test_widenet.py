"""Mixtures of experts and WideNet: routing, slots, grouped products, one block for all layers."""

from collections.abc import Callable
import functools

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import Experts
from lowrank_optax.models import WideNetViT

LOGITS = np.array([[2, 1, 0], [0, 1, 2], [1, 0, 2], [3, 0, 1], [0.5, 0.4, 0.3]], np.float32)
TOKENS, WIDTH, HIDDEN, COUNT = 48, 8, 12, 4


def arrays(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (TOKENS, WIDTH), (WIDTH, COUNT), (COUNT, WIDTH, HIDDEN), (COUNT, HIDDEN, WIDTH)
    return tuple(rng.normal(size=shape).astype(np.float32) / shape[-2] ** 0.5 for shape in shapes)


def mixture(options, x, router, up, down, *, dispatch="slots", key=None, mask=None):
    def experts(rows, sizes):
        hidden = jnp.tanh(lro.layers.grouped_linear(rows, up, sizes=sizes))
        return lro.layers.grouped_linear(hidden, down, sizes=sizes)

    return lro.layers.mixture_of_experts(
        x, router, experts, options, dispatch=dispatch, key=key, mask=mask
    )


def by_loops(x, router, up, down, top_k, capacity):
    """The definition, token by token, in float64."""
    x, router, up, down = (a.astype(np.float64) for a in (x, router, up, down))
    y, room, dropped = np.zeros_like(x), np.full(len(up), capacity), 0
    for t, token in enumerate(x):
        p = np.exp(token @ router)
        p /= p.sum()
        for e in np.argsort(-p, kind="stable")[:top_k]:
            if room[e] == 0:
                dropped += 1
                continue
            room[e] -= 1
            y[t] += p[e] * np.tanh(token @ up[e]) @ down[e]
    return y, dropped / (len(x) * top_k)


def test_routing_of_the_worked_example() -> None:
    def balance(logits):
        return lro.layers.route_to_experts(logits, jnp.eye(3), 2).balance_loss

    routing = lro.layers.route_to_experts(jnp.asarray(LOGITS), jnp.eye(3), 2)
    assert routing.experts.tolist() == [[0, 1], [2, 1], [2, 0], [0, 2], [0, 1]]
    gates = [[0.665241, 0.244728]] * 3 + [[0.843795, 0.114195], [0.367165, 0.332225]]
    np.testing.assert_allclose(routing.gates, gates, atol=1e-6)
    np.testing.assert_allclose(routing.load, [0.4, 0.3, 0.3], atol=1e-7)
    np.testing.assert_allclose(routing.balance_loss, 1.032658, atol=1e-6)
    gradient = jax.grad(balance)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(gradient[0], [0.013362, -0.009768, -0.003594], atol=1e-6)
    # The closed form, of all tokens.
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    load = np.array([0.4, 0.3, 0.3])
    np.testing.assert_allclose(gradient, 3 / 5 * p * (load - (p @ load)[:, None]), atol=1e-7)


def test_worked_example_drops_the_last_token_of_a_full_expert() -> None:
    """Three slots for each expert: only the fourth choice of expert 0 has none."""
    experts = lambda rows, sizes: jnp.ones_like(rows)
    options = Experts(3, top_k=2, capacity_factor=1.0)
    x = jnp.asarray(LOGITS)
    y, statistics = lro.layers.mixture_of_experts(x, jnp.eye(3), experts, options)
    gates = [0.909969] * 3 + [0.957990, 0.332225]
    np.testing.assert_allclose(y[:, 0], gates, atol=1e-6)
    np.testing.assert_allclose(statistics.dropped, 0.1, atol=1e-7)


@pytest.mark.parametrize(("count", "top_k", "loss"), [(4, 1, 4), (4, 2, 2), (8, 2, 4), (3, 3, 1)])
def test_balance_loss_where_all_tokens_choose_the_same_experts(
    count: int, top_k: int, loss: int
) -> None:
    logits = np.full((6, count), -np.inf, np.float32)
    logits[:, :top_k] = 0
    routing = lro.layers.route_to_experts(jnp.ones((6, 1)), jnp.asarray(logits[:1]), top_k)
    np.testing.assert_allclose(routing.balance_loss, loss, rtol=1e-6)
    if count == top_k:
        np.testing.assert_allclose(routing.gates.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("factor", [None, 1.0, 0.5])
def test_slots_compute_the_definition(factor: float | None) -> None:
    options = Experts(COUNT, 2, factor)
    y, statistics = jax.jit(functools.partial(mixture, options))(*arrays())
    capacity = TOKENS if factor is None else int(TOKENS * 2 * factor / COUNT)
    expected, dropped = by_loops(*arrays(), 2, capacity)
    assert_close(y, expected)
    np.testing.assert_allclose(statistics.dropped, dropped, atol=1e-6)
    assert (dropped > 0) == (factor is not None)


def test_grouped_products_equal_slots_and_so_do_their_gradients() -> None:
    """One expert is chosen by no token: its gradient is zero, not NaN."""
    x, router, up, down = map(jnp.asarray, arrays())
    router = router.at[:, 2].set(0).at[0, 2].set(-100.0)
    x = x.at[:, 0].set(jnp.abs(x[:, 0]) + 1)
    mask = jnp.arange(TOKENS) < TOKENS - 5
    x = x.at[-5:].set(jnp.nan)  # padding

    def loss(dispatch, *given):
        y, statistics = mixture(Experts(4, 2, None), x, *given, dispatch=dispatch, mask=mask)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), (y, statistics)

    run = lambda *given: [
        jax.value_and_grad(functools.partial(loss, dispatch), argnums=(0, 1, 2), has_aux=True)(
            *given
        )
        for dispatch in ("slots", "ragged")
    ]
    ((_, (y, seen)), gradients), ((_, (other, also)), others) = jax.jit(run)(router, up, down)
    assert float(seen.load[2]) == 0
    for gradient, again in zip((y, *gradients), (other, *others), strict=True):
        assert_close(again, np.asarray(gradient, np.float64))
        assert np.isfinite(gradient).all()
    assert not y[-5:].any()
    assert not gradients[1][2].any()
    assert all(map(np.any, gradients))
    np.testing.assert_allclose(seen.load, also.load)
    assert seen.dropped == 0 == also.dropped


def test_order_of_experts_and_of_tokens_does_not_matter() -> None:
    x, router, up, down = arrays()
    run = jax.jit(functools.partial(mixture, Experts(COUNT, 2, None)))
    y, statistics = run(x, router, up, down)
    order = np.array([2, 0, 3, 1])
    same, permuted = run(x, router[:, order], up[order], down[order])
    assert_close(same, np.asarray(y, np.float64))
    np.testing.assert_allclose(permuted.load, statistics.load[order])
    assert_close(run(x[::-1].copy(), router, up, down)[0][::-1], np.asarray(y, np.float64))


def test_capacity_is_that_of_the_number_as_it_is_written() -> None:
    capacity = lro.layers.expert_capacity
    assert capacity(90, Experts(4, 2, 1.4)) == 63  # in binary floating point it would be 62
    assert capacity(5, Experts(3, 2, 1.0)) == 3
    assert capacity(6, Experts(4, 2, None)) == 6
    assert capacity(4, Experts(2, 2, 100.0)) == 4
    assert capacity(0, Experts(2, 2)) == 0
    with pytest.raises(ValueError, match="leaves no room"):
        capacity(1, Experts(8, 1, 1.0))


def test_noise_is_that_of_the_key() -> None:
    x, router, up, down = arrays()
    run = functools.partial(mixture, Experts(COUNT, 2), x, router * 0, up, down)
    first, again, other = (run(key=jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    noisy = lro.layers.route_to_experts(
        jnp.zeros((4000, 1)), jnp.zeros((1, 2)), 2, key=jax.random.key(0)
    )
    # Two equal logits with noise of standard deviation 1/2 each: their difference has 0.707.
    p = np.asarray(noisy.gates).astype(np.float64)
    difference = np.abs(np.log(p[:, 0] / p[:, 1]))
    np.testing.assert_allclose(np.sqrt(np.mean(difference**2)), 0.5**0.5, rtol=0.05)
    zeros = lro.layers.route_to_experts(jnp.zeros((3, 1)), jnp.zeros((1, 4)), 2)
    assert zeros.experts.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        ({"top_k": 5}, "top_k=5 is above num_experts=4"),
        ({"top_k": True}, "top_k must be a positive integer"),
        ({"capacity_factor": 0.0}, "capacity_factor must be a positive"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be a positive"),
        ({"capacity_factor": True}, "capacity_factor must be a positive"),
        ({"capacity_factor": "1.2"}, "capacity_factor must be a positive"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(**options)


def test_bad_calls_are_refused() -> None:
    x, router, up, down = arrays()
    with pytest.raises(ValueError, match="dispatch='ragged' drops no choice"):
        mixture(Experts(COUNT), x, router, up, down, dispatch="ragged")
    with pytest.raises(ValueError, match="dispatch must be"):
        mixture(Experts(COUNT), x, router, up, down, dispatch="einsum")
    with pytest.raises(ValueError, match="num_experts=8"):
        mixture(Experts(8), x, router, up, down)
    with pytest.raises(ValueError, match="not an axis of the current mesh"):
        mixture(Experts(COUNT, expert_axis="expert"), x, router, up, down)
    with pytest.raises(ValueError, match="mask must be booleans"):
        mixture(Experts(COUNT), x, router, up, down, mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="top_k must be from 1"):
        lro.layers.route_to_experts(x, router, 5)
    with pytest.raises(ValueError, match="num_heads=3 must divide"):
        lro.layers.WideNetBlock(8, 3, 8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="patch_size"):
        WideNetViT(9, 2, 10, 8, 2, 8, 2, rngs=nnx.Rngs(0))
    block = lro.layers.WideNetBlock(8, 2, 8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="give training=True"):
        block(jnp.ones((1, 2, 8)), key=jax.random.key(0))
    for shape in [(2, 8), (1, 2, 4)]:
        with pytest.raises(ValueError, match=r"x must be \[B, N, 8\]"):
            block(jnp.ones(shape))
    with pytest.raises(ValueError, match=r"booleans of shape \(1, 2\), got float32"):
        block(jnp.ones((1, 2, 8)), mask=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"dropout_rate must be from 0 to 1, got 1\.5"):
        lro.layers.ExpertFFN(2, 8, 8, dropout_rate=1.5, rngs=nnx.Rngs(0))


def test_numbers_of_experts_that_differ_are_refused() -> None:
    """A product of one matrix with the rows of several experts would be one of all of them."""
    x, router, up, _ = map(jnp.asarray, arrays())
    experts = lro.layers.ExpertFFN(1, WIDTH, HIDDEN, rngs=nnx.Rngs(0))
    mixture = lro.layers.MixtureOfExperts(experts, WIDTH, Experts(COUNT), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rows of 4 experts, for a layer of 1"):
        mixture(x)
    rows = jnp.ones((COUNT, 3, WIDTH))
    with pytest.raises(ValueError, match="one matrix, bias and size for each expert"):
        lro.layers.grouped_linear(rows, up[:1])
    with pytest.raises(ValueError, match="one matrix, bias and size for each expert"):
        lro.layers.grouped_linear(rows, up, jnp.ones((1, HIDDEN)))
    summed = lambda rows, sizes: rows.sum(0)
    with pytest.raises(ValueError, match=r"one row for each of theirs, \[4, 28\]"):
        lro.layers.mixture_of_experts(x, router, summed, Experts(COUNT))


def test_padding_may_hold_nan_and_tokens_be_narrower_than_weights() -> None:
    block = lro.layers.WideNetBlock(8, 2, 12, 2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(block)
    mask = jnp.arange(5) < jnp.array([[5], [3]])
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))

    @jax.jit
    def run(state, padding):
        def loss(state):
            tokens = jnp.where(mask[..., None], x, padding).astype(jnp.bfloat16)
            y, routing = nnx.merge(graphdef, state)(tokens, mask=mask, training=True)
            assert y.dtype == jnp.float32
            return jnp.sum(jnp.where(mask[..., None], y, 0) ** 2) + routing.balance_loss.sum()

        return jax.value_and_grad(loss)(state)

    (loss, gradient), (expected, others) = run(state, jnp.nan), run(state, 7.0)
    assert float(loss) == float(expected)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(a, b)  # the same program on the same numbers


def test_tpus_get_grouped_products_where_these_can_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    experts = lro.layers.ExpertFFN(COUNT, WIDTH, HIDDEN, rngs=nnx.Rngs(0))
    layer = lro.layers.MixtureOfExperts(experts, WIDTH, Experts(COUNT), rngs=nnx.Rngs(0))
    x = jnp.ones((TOKENS, WIDTH), jnp.bfloat16)

    def lowered(training: bool = False, of: Callable = lambda loss: loss) -> str:
        graphdef, state = nnx.split(layer)
        loss = lambda state: nnx.merge(graphdef, state)(x, training=training)[0].sum()
        return jax.jit(of(loss)).trace(state).lower(lowering_platforms=("tpu",)).as_text()

    assert "ragged_dot" in lowered()
    assert "ragged_dot" in lowered(of=jax.grad)
    assert "ragged_dot" not in lowered(training=True)  # a limited capacity
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        assert "ragged_dot" not in lowered()
    experts.up.precision = "highest"
    assert "ragged_dot" not in lowered()
    with pytest.raises(ValueError, match="a precision or another call of its own"):
        lro.layers.call_expert_linear(experts.up, x, jnp.full(COUNT, TOKENS // COUNT))
    experts.up.precision = None
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), "experts", rngs=1)
    assert "ragged_dot" not in lowered()


def test_experts_on_eight_devices_exchange_tokens_by_all_to_alls() -> None:
    """Two rows of four: experts over one axis, tokens over both."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    x, router, up, down = map(jnp.asarray, arrays())
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    sharded = (
        place(x, ("data", "expert")),
        place(router),
        place(up, "expert"),
        place(down, "expert"),
    )

    def loss(factor, axis, *given):
        y, statistics = mixture(Experts(COUNT, 2, factor, axis), *given)
        return jnp.sum(y**2) + statistics.balance_loss, (y, statistics)

    def step(factor, axis, *given):
        return jax.value_and_grad(functools.partial(loss, factor, axis), (0, 1, 2, 3), True)(*given)

    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(step, None, "expert")).lower(*sharded).compile()
        (_, (y, statistics)), gradients = run(*sharded)
        assert run.as_text().count(" all-to-all(") >= 3
        # A kernel's gradient is summed over the rows of the mesh, and gathered nowhere.
        assert gradients[2].sharding.spec[0] == "expert"
        _, dropping = jax.jit(functools.partial(mixture, Experts(COUNT, 2, 0.5, "expert")))(
            *sharded
        )
        with pytest.raises(ValueError, match="num_experts=6 does not divide over the 4 devices"):
            lro.layers.mixture_of_experts(
                x, jnp.ones((WIDTH, 6)), None, Experts(6, expert_axis="expert")
            )
        with pytest.raises(ValueError, match="47 tokens do not divide over the 8 devices"):
            mixture(Experts(COUNT, expert_axis="expert"), x[:-1], router, up, down)
    (_, (whole, same)), expected = jax.jit(functools.partial(step, None, None))(x, router, up, down)
    for a, b in zip((y, *statistics, *gradients), (whole, *same, *expected), strict=True):
        assert_close(a, np.asarray(b, np.float64))
    # Six tokens on each device choose twelve of four experts, each of which has one slot there.
    assert 0.5 < dropping.dropped < 0.9


def test_copies_of_experts_each_compute_the_tokens_of_their_device() -> None:
    mesh = jax.make_mesh((8, 1), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    x, router, up, down = map(jnp.asarray, arrays())
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    def compiled(axis):
        run = functools.partial(mixture, Experts(COUNT, 2, None, axis))
        return jax.jit(run).lower(x, router, up, down).compile()

    with jax.set_mesh(mesh):
        apart, together = compiled("expert"), compiled(None)
        operations = [each.cost_analysis()["flops"] for each in (apart, together)]
        # Eight times as many where every device has the slots of all tokens.
        assert operations[0] < operations[1] / 4
        found, expected = (each(x, router, up, down)[0] for each in (apart, together))
    assert_close(found, np.asarray(expected, np.float64))


def test_explicit_axes_are_refused_or_made_automatic() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
    given = tuple(map(jnp.asarray, arrays()))
    run = functools.partial(mixture, Experts(COUNT, 2, None, "expert"))
    spec = PartitionSpec("data")
    with jax.set_mesh(mesh):
        x = jax.device_put(given[0], spec)
        for options in (Experts(COUNT), Experts(COUNT, expert_axis="expert")):
            with pytest.raises(ValueError, match="over automatic axes alone, not over"):
                mixture(options, x, *given[1:])
        automatic = jax.sharding.auto_axes(lambda *given: run(*given)[0], out_sharding=spec)
        y = jax.jit(automatic)(x, *given[1:])
        assert jax.typeof(y).sharding.spec[0] == "data"
    assert_close(y, by_loops(*arrays(), 2, TOKENS)[0])


SIZES = {  # https://arxiv.org/abs/2107.11817, table of ImageNet, exactly
    "B": ((224, 16, 1000, 768, 12, 4096, 12), 29_690_600),
    "L": ((224, 16, 1000, 1024, 16, 4096, 24), 40_941_544),
    "H": ((224, 14, 1000, 1280, 16, 5120, 32), 63_188_200),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_paper(name: str) -> None:
    sizes, count = SIZES[name]
    model = nnx.eval_shape(lambda: WideNetViT(*sizes, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == count


@pytest.mark.parametrize(("experts", "count"), [(1, 8_928 + 32), (4, 21_632)])
def test_parameters_of_the_blocks(experts: int, count: int) -> None:
    """Attention 4,224, norms 512, experts of 4,192, and the router, which one expert has, too."""
    make = lambda: lro.layers.WideNetBlock(32, 4, 64, 4, experts, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param))
    assert sum(leaf.size for leaf in leaves) == count


def test_one_expert_is_a_dense_feed_forward_and_linen_takes_the_block() -> None:
    rngs = nnx.Rngs(0)
    ffn = lro.layers.ExpertFFN(1, WIDTH, HIDDEN, rngs=rngs)
    layer = lro.layers.MixtureOfExperts(ffn, WIDTH, Experts(1, 1), rngs=rngs)
    x = jnp.asarray(arrays()[0])
    y, statistics = layer(x)
    assert_close(y, np.asarray(ffn(x[None])[0], np.float64))
    assert statistics.balance_loss == 1
    linen = nnx.bridge.to_linen(lro.layers.WideNetBlock, WIDTH, 2, HIDDEN, 2)
    (y, routing), variables = linen.init_with_output(jax.random.key(0), x[None])
    assert y.shape == (1, TOKENS, WIDTH)
    assert routing.load.shape == (2, COUNT)
    assert set(variables) == {"params"}


def applied_one_by_one(block, x, mask):
    is_norm = lambda path, _: path[0] in ("attention_norm", "mlp_norm")
    graphdef, norms, shared = nnx.split(block, is_norm, ...)

    def run(x, norms, layers):
        for i, layer in enumerate(layers):
            own = jax.tree.map(lambda a: a[i], norms)  # noqa: B023
            one = nnx.merge(graphdef, own, layer)
            x, _ = one.apply_once(x, training=False, key=None, mask=mask)
        return x

    return run, norms, shared


def test_gradient_of_a_shared_block_is_the_sum_over_its_applications() -> None:
    block = lro.layers.WideNetBlock(8, 2, 12, 3, is_causal=True, remat=True, rngs=nnx.Rngs(0))
    move = lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)
    nnx.update(block, jax.tree.map(move, nnx.state(block, nnx.Param)))
    mask = jnp.arange(5) < jnp.array([[5], [3]])
    x = jax.random.normal(jax.random.key(1), (2, 5, 8)) * mask[..., None]
    run, norms, shared = applied_one_by_one(block, x, mask)
    weight = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    graphdef, state = nnx.split(block)

    def both(state, norms, shared):
        loss = lambda state: jnp.sum(weight * nnx.merge(graphdef, state)(x, mask=mask)[0])
        apart = lambda norms, layers: jnp.sum(weight * run(x, norms, layers))
        return (
            jax.value_and_grad(loss)(state),
            jax.value_and_grad(apart, (0, 1))(norms, [shared] * 3),
        )

    (loss, gradient), (expected, (of_norms, of_layers)) = jax.jit(both)(state, norms, shared)
    summed = jax.tree.map(lambda *layers: sum(layers), *of_layers)
    found = nnx.merge_state(of_norms, summed)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # One size for all: the biases of keys have a gradient of rounding errors alone.
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(found), strict=True):
        assert_close(a, np.asarray(b, np.float64), size=size)


def test_compiled_step_has_no_copy_of_the_block_for_each_layer() -> None:
    """From 4 to 12 layers, only inputs of layers are added to what is in memory."""
    features, tokens = 64, 16

    def peak(layers: int) -> int:
        block = nnx.eval_shape(
            lambda: lro.layers.WideNetBlock(
                features, 4, 256, layers, remat=True, rngs=nnx.Rngs(0), dtype=jnp.bfloat16
            )
        )
        graphdef, state = nnx.split(block)
        x = jax.ShapeDtypeStruct((1, tokens, features), jnp.bfloat16)
        loss = lambda state, x: nnx.merge(graphdef, state)(x, training=True)[0].mean()
        memory = jax.jit(jax.grad(loss)).lower(state, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    block_bytes = 4 * (4 * features**2 + 4 * 2 * 256 * features)
    assert peak(12) - peak(4) < 8 * 12 * tokens * features < block_bytes / 4


def test_galore_with_8_bit_states_few_bits_and_adapters_work_on_experts() -> None:
    """The moments of a shared block are those of one block; each expert has its own projection."""
    activation = functools.partial(lro.activations.gelu, bits=3)
    make = lambda: lro.layers.WideNetBlock(
        16, 2, 256, 3, activation=activation, dropout_rate=0.1, rngs=nnx.Rngs(0)
    )
    block = make()
    numbers = lro.weight_dimension_numbers(block)
    tx = lro.galore(1e-2, rank=4, state_bits=8, weight_dimension_numbers=numbers)
    params = nnx.state(block, nnx.Param)
    graphdef = nnx.graphdef(block)
    state = tx.init(params)
    moments = [x.shape for x in jax.tree.leaves(state) if x.shape[:1] == (4,)]
    assert moments
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))

    def step(params, state, key):
        def loss(params):
            y, routing = nnx.merge(graphdef, params)(x, training=True, key=key)
            return jnp.mean((y - x[:, ::-1]) ** 2) + 0.01 * routing.balance_loss.sum()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    step, losses = jax.jit(step), []
    for i in range(12):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
    assert min(losses[-3:]) < 0.8 * losses[0]
    nnx.update(block, params)

    before, _ = block(x)
    lro.adapters.attach(block, lro.adapters.LoRA(rank=2), "mlp/experts", rngs=1)
    after, _ = block(x)
    assert_close(after, np.asarray(before, np.float64))
    trained = nnx.state(block, lro.adapters.trainable)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained)} == {COUNT}
    nnx.update(block, jax.tree.map(lambda a: a + 0.1, trained))
    moved, _ = block(x)
    lro.adapters.merge(block)
    assert_close(block(x)[0], np.asarray(moved, np.float64), units=64)
    assert not np.allclose(moved, before, atol=1e-3)
