"""Models converted to Maestro layers and back, cut to smaller ranks, and made smaller."""

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from layers.maestro_net import X, net
from layers.stacked_net import Net
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import Factors, LowRank, MaestroConv, MaestroLinear, maestro


def test_a_model_is_converted_and_merged_again() -> None:
    plain, model = Net(), net()
    rows = maestro.summary(model).rows
    assert [row.path for row in rows] == ["blocks", "out"]
    assert rows[0][1:] == ("3 × (8 × 8)", (8, 8, 8), 8, 384, 2.0)
    assert model.same[0] is model.out  # one object still
    assert_close(model(X), plain(X), 200)
    model.blocks.rank[...] = jnp.array([1, 8, 0])
    a, b = (np.asarray(x) for x in model.blocks.factors())
    masked = np.stack([a[0][:, :1] @ b[0][:1], a[1] @ b[1], np.zeros((8, 8))])
    before = model(X)
    maestro.merge(model, "blocks")
    assert type(model.blocks) is nnx.Linear
    assert isinstance(model.out, MaestroLinear)
    assert_close(model.blocks.kernel[...], masked.astype(np.float32), 100)
    assert_close(model(X), before, 200)


def test_what_cannot_be_converted_is_refused() -> None:
    model = Net()
    model.conv = nnx.Conv(2, 4, 3, feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="conv has feature_group_count=2, and must have 1"):
        maestro.convert(model, "conv")
    with pytest.raises(ValueError, match="feature_group_count=2 must be 1"):
        MaestroConv.from_conv(model.conv)
    with pytest.raises(ValueError, match="where='mlp' matches no linear layer or convolution"):
        maestro.convert(model, "mlp")
    for rank in (0, 9, 2.0, True):
        with pytest.raises(ValueError, match=f"out: rank={rank} must be an integer from 1 to 8"):
            maestro.convert(model, "out", rank=rank)  # type: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="rank=13 must be an integer from 1 to 12, the smaller"):
        MaestroConv(3, 12, (2, 2), 13, rngs=nnx.Rngs(0))
    for name, value in (
        ("preferred_element_type", jnp.float32),
        ("promote_dtype", lambda inputs, dtype: inputs),
        ("dot_general", jax.jit(jax.lax.dot_general)),
    ):
        usual = getattr(model.out, name)
        setattr(model.out, name, value)
        with pytest.raises(ValueError, match=f"it has its own {name}"):
            maestro.convert(model, "out")
        setattr(model.out, name, usual)
    model.tied = nnx.Linear(8, 12, use_bias=False, rngs=nnx.Rngs(0))
    model.tied.kernel = model.out.kernel
    for convert in (maestro.convert, lambda m, w: lro.layers.structure_linears(m, LowRank(2), w)):
        with pytest.raises(ValueError, match="out shares its kernel with another layer"):
            convert(model, "out")
    model.tied.kernel = nnx.Variable(model.out.kernel[...])  # frozen, for most optimizers
    with pytest.raises(
        ValueError, match=r"the kernel of tied is a Variable, and what .* nnx\.Param"
    ):
        maestro.convert(model, "tied")
    for convert in (maestro.convert, lambda m: lro.layers.structure_linears(m, LowRank(2))):
        with pytest.raises(ValueError, match="finds no linear layer"):
            convert(net())  # not the factors of Maestro layers
    for call in (maestro.current_ranks, maestro.penalty, maestro.merge, maestro.compact):
        with pytest.raises(ValueError, match="the Net has no MaestroLinear or MaestroConv"):
            call(model)


def test_truncation_by_prefix_and_by_svd() -> None:
    model = net()
    a, b = (np.array(x) for x in model.blocks.factors())
    rng = np.random.default_rng(2)
    a, b = a @ (mix := rng.standard_normal((8, 8)).astype(np.float32)), np.linalg.inv(mix) @ b
    model.blocks.set_factors(Factors(jnp.asarray(a), jnp.asarray(b)), jnp.array([8, 5, 2]))
    best = nnx.clone(model)
    maestro.truncate(model, 3)
    np.testing.assert_array_equal(model.blocks.rank[...], [3, 3, 2])
    assert_close(model.blocks.kernel()[0], a[0][:, :3] @ b[0][:3], 200)
    maestro.truncate(best, 3, "svd")
    np.testing.assert_array_equal(best.blocks.rank[...], [3, 3, 2])
    for i, k in enumerate((8, 5, 2)):
        u, s, vt = np.linalg.svd(np.float64(a[i][:, :k] @ b[i][:k]))
        nearest = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(best.blocks.kernel()[i], nearest, atol=1e-4 * s[0])
    assert not np.any(best.blocks.factors().first[:2, :, 3:])
    np.testing.assert_array_equal(best.blocks.factors().first[2], a[2])  # whose rank did not fall


def transformations() -> dict[str, optax.GradientTransformation]:
    is_kernel = lambda tree: jax.tree.map_with_path(lambda p, _: "kernel" in str(p), tree)
    return {
        "adam": optax.adam(0.1),
        "momentum": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        "masked": optax.masked(optax.adamw(0.1), is_kernel),
        "accumulated": optax.MultiSteps(optax.inject_hyperparams(optax.adam)(0.1), 2),
    }


@pytest.mark.parametrize(
    "name",
    [
        "accumulated",
        *(pytest.param(x, marks=pytest.mark.full) for x in ("adam", "momentum", "masked")),
    ],
)
def test_compact_keeps_the_outputs_and_cuts_the_moments(name: str) -> None:
    model, tx = net(), transformations()[name]
    rng = np.random.default_rng(3)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    state = tx.init(nnx.state(model, nnx.Param))
    state = jax.tree.map(lambda x: draw(x) if is_float(x) else x + 3, state)
    model.blocks.rank[...] = jnp.array([2, 3, 0])
    before = model(X)
    new = maestro.compact(model, state, tx.init)
    assert_close(model(X), before, 200)
    assert model.blocks.ordered_in.kernel.shape == (3, 8, 3)
    assert type(model.out) is nnx.Linear  # 8 (8 + 12) > 8 · 12
    fresh = tx.init(nnx.state(model, nnx.Param))
    assert jax.tree.structure(new) == jax.tree.structure(fresh)
    old = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(state)}
    kinds = set()
    for (path, x), start in zip(
        jax.tree.leaves_with_path(new), jax.tree.leaves(fresh), strict=True
    ):
        key = jax.tree_util.keystr(path)
        if "out" in key and "ordered" not in key:
            np.testing.assert_array_equal(x, start)
            kinds.add("dense")
        else:
            part = old[key]
            part = part[..., :3] if "ordered_in" in key else part
            part = part[:, :3] if "ordered_out" in key else part
            np.testing.assert_array_equal(x, part)
            kinds.add("cut" if part.shape != old[key].shape else "same")
    assert {"dense", "cut"} <= kinds
    updates, _ = tx.update(nnx.state(model, nnx.Param), new, nnx.state(model, nnx.Param))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, nnx.state(model, nnx.Param))


def test_layers_become_dense_only_where_factors_have_more_parameters() -> None:
    """At 3 (12 + 4) = 12 · 4 the factors stay, and one direction more makes the layer dense."""
    for rank, is_dense in ((3, False), (4, True)):
        model = nnx.Sequential(MaestroLinear(12, 4, rngs=nnx.Rngs(0)))
        assert maestro.compact(maestro.truncate(model, rank)) is None
        assert isinstance(model.layers[0], nnx.Linear) is is_dense
    model = nnx.Sequential(MaestroConv(2, 9, (3, 3), rngs=nnx.Rngs(0)))
    maestro.compact(maestro.truncate(model, 6))
    assert model.layers[0].ordered_in.kernel.shape == (3, 3, 2, 6)  # 6 (18 + 9) = 18 · 9
    layer = maestro.truncate(nnx.Sequential(MaestroLinear(8, 8, rngs=nnx.Rngs(0))), 0)
    maestro.compact(layer)
    np.testing.assert_array_equal(layer(X), np.zeros((3, 8)))


def test_compact_refuses_states_that_it_cannot_cut_and_leaves_the_model() -> None:
    model = maestro.truncate(net(), 2)
    shapes = jax.tree.map(jnp.shape, nnx.state(model))
    tx = lro.low_bit(optax.adam(0.1), bits=8, min_size=1)
    state = jax.jit(tx.init)(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=r"of opt_state is .* which cannot be cut"):
        maestro.compact(model, state, tx.init)
    with pytest.raises(ValueError, match="of opt_state is missing"):
        maestro.compact(model, optax.EmptyState(), optax.adam(0.1).init)
    assert jax.tree.map(jnp.shape, nnx.state(model)) == shapes
    with pytest.raises(TypeError, match="positional argument"):
        maestro.compact(model, state, lambda: state)
    assert jax.tree.map(jnp.shape, nnx.state(model)) == shapes
    # At full rank the basis of a square factor has that factor's shape.
    square = maestro.truncate(nnx.Sequential(MaestroLinear(8, 8, rngs=nnx.Rngs(0))), 2)
    tx = lro.galore(0.1, rank=8)
    with pytest.raises(ValueError, match=r"basis/.* cannot be cut to what init makes"):
        maestro.compact(square, jax.jit(tx.init)(nnx.state(square, nnx.Param)), tx.init)
    for options, missing in (({"opt_state": state}, "init"), ({"init": tx.init}, "opt_state")):
        with pytest.raises(ValueError, match=f"without {missing}: give compact both"):
            maestro.compact(model, **options)
    with pytest.raises(TypeError, match="call it outside jit"):
        nnx.jit(maestro.compact)(model)


class Normed(nnx.Module):
    def __init__(self) -> None:
        self.up = MaestroLinear(8, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, momentum=0.7, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.up(x))


def test_batch_norms_get_the_averages_over_batches_and_their_momentum_back() -> None:
    model = maestro.truncate(Normed(), 2)
    batches = np.random.default_rng(6).standard_normal((3, 5, 8), np.float32)
    with pytest.raises(ValueError, match="the call leaves the statistics of norm unchanged"):
        maestro.recalibrate_batch_norm(
            model, batches, lambda m, x: nnx.view(m, use_running_average=True)(x)
        )
    np.testing.assert_array_equal(model.norm.var[...], np.ones(4))
    maestro.set_ranks(model, {"up": 1})
    assert maestro.recalibrate_batch_norm(model, batches, nnx.jit(lambda m, x: m(x))) is model
    assert model.up.sampled_rank is None
    hidden = np.stack([model.up(x) for x in batches])
    assert_close(model.norm.mean[...], hidden.mean((0, 1)), 100, size=1.0)
    assert_close(model.norm.var[...], hidden.var(1).mean(0), 100)
    assert model.norm.momentum == 0.7
    with pytest.raises(ValueError, match="batches has no batch"):
        maestro.recalibrate_batch_norm(model, [], lambda m, x: m(x))
    with pytest.raises(ValueError, match=r"the MaestroLinear has no nnx\.BatchNorm"):
        maestro.recalibrate_batch_norm(model.up, batches, lambda m, x: m(x))
