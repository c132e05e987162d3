"""Dead ranks are cut out of adapters: the function stays, the arrays shrink."""

from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import lowrank_optax as lro
from tests.adapters.nnx_models import Scanned, Unrolled, call, gradients, randomized, tokens

SoRA, compact = lro.adapters.SoRA, lro.adapters.compact


def with_gates(model: Any, gates: Any, where: str = "up|down", **options: Any) -> Any:
    """The model with SoRA, its arrays random and its gates of ones and zeros by path."""
    lro.adapters.attach(model, SoRA(rank=3, alpha=6, **options), where, rngs=0)
    randomized(model)
    for path, values in gates.items():
        layer = model
        for name in path.split("/"):
            layer = layer[int(name)] if name.isdigit() else getattr(layer, name)
        gate = layer.adapters["default"].arrays["gate"]
        gate.set_value(gate[...] * jnp.asarray(values, jnp.float32))
    return model


@pytest.mark.slow
def test_an_unrolled_model_keeps_its_function_and_loses_what_is_dead() -> None:
    gates = {
        "blocks/0/up": [0, 1, 0],
        "blocks/0/down": [0, 0, 0],
        "blocks/1/up": [1, 1, 0],
    }
    model = with_gates(Unrolled(2, nnx.Rngs(0)), gates)
    before = np.asarray(call(model, tokens()))
    report = compact(model)
    np.testing.assert_allclose(call(model, tokens()), before, atol=2e-6)
    rows = {row.path: row for row in report.rows}
    assert {path: row.ranks for path, row in rows.items()} == {
        "blocks/0/up": (1,),
        "blocks/0/down": (0,),
        "blocks/1/up": (2,),
        "blocks/1/down": (3,),
    }
    # 6 × 12 weights in float32: 18 numbers for each rank, and the gates before.
    assert rows["blocks/0/up"][2:] == (4 * (3 * 18 + 3), 4 * 18)
    assert rows["blocks/0/down"].bytes == 0
    assert not hasattr(model.blocks[0].down, "adapters")
    assert type(model.blocks[0].down) is nnx.Linear
    assert lro.adapters.summary(model).trained == 18 * (1 + 2 + 3)
    assert lro.adapters.summary(model).bytes == sum(row.bytes for row in report.rows)
    assert all(x.any() for x in jax.tree.leaves(gradients(model, tokens())))


@pytest.mark.slow
def test_a_stack_is_padded_to_its_largest_rank_and_layers_without_one_stay_without() -> None:
    model = with_gates(
        Scanned(3, nnx.Rngs(0)),
        {"blocks/up": [[0, 1, 1], [0, 0, 0], [0, 0, 1]], "blocks/down": [[0, 1, 0]] * 3},
    )
    before = np.asarray(call(model, tokens()))
    report = compact(model)
    np.testing.assert_allclose(call(model, tokens()), before, atol=2e-6)
    assert [row.ranks for row in report.rows] == [(1, 1, 1), (2, 0, 1)]
    up, down = (getattr(model.blocks, n).adapters["default"] for n in ("up", "down"))
    assert up.arrays["A"].shape == (3, 6, 2)
    np.testing.assert_array_equal(up.arrays["rank_scale"][...], [[1, 1], [0, 0], [1, 0]])
    assert (down.method.rank, set(down.arrays)) == (1, {"A", "B"})
    slopes = gradients(model, tokens())["blocks"]["up"]["adapters"]["default"]["arrays"]
    for layer, rank in enumerate((2, 0, 1)):  # what is padding is not trained
        assert np.all(np.any(slopes["A"][layer] != 0, axis=0) == (np.arange(2) < rank))


def test_the_compacted_model_is_saved_restored_and_read_as_a_lora(tmp_path: Any) -> None:
    model = with_gates(
        Scanned(3, nnx.Rngs(0)), {"blocks/up": [[0, 1, 1], [0, 0, 0], [0, 0, 1]]}, "up"
    )
    report = compact(model)
    expected = np.asarray(call(model, tokens()))
    again, ranks = Scanned(3, nnx.Rngs(0)), report.rank_pattern
    assert ranks == {"^blocks/up$": (2, 1, 1)}
    lro.adapters.attach(again, lro.adapters.LoRA(), list(ranks), rngs=1, rank_pattern=ranks)
    nnx.update(again, nnx.state(model))
    np.testing.assert_allclose(call(again, tokens()), expected, atol=1e-6)
    names = {"blocks/{}/up": "h.{}.up", "blocks/{}/down": "h.{}.down", "embed": "e", "head": "o"}
    lro.adapters.save_peft(model, tmp_path / "a", names=names)
    loaded = Scanned(3, nnx.Rngs(0))
    lro.adapters.load_peft(loaded, tmp_path / "a", names=names)
    np.testing.assert_allclose(call(loaded, tokens()), expected, atol=1e-6)
    lro.adapters.merge(model)
    np.testing.assert_allclose(call(model, tokens()), expected, atol=2e-6)


def test_other_adapters_dropout_and_methods_with_zero_ranks() -> None:
    model = Unrolled(1, nnx.Rngs(0))
    lro.adapters.attach(model, lro.adapters.LoRA(rank=1, initial="random"), "up", rngs=0, name="b")
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2, dropout=0.5, alpha=3), "up|down", rngs=1)
    arrays = model.blocks[0].up.adapters["default"].arrays
    arrays["B"].set_value(arrays["B"][...].at[1].set(2.0))
    model.eval()
    before = np.asarray(call(model, tokens()))
    report = compact(model)
    np.testing.assert_allclose(call(model, tokens()), before, atol=2e-6)
    assert {row.path: row.ranks for row in report.rows} == {
        "blocks/0/up": (1,),
        "blocks/0/down": (0,),
    }
    assert list(model.blocks[0].up.adapters) == ["b", "default"]
    assert model.blocks[0].up.adapters["default"].method.dropout == 0.5
    model.train()
    assert np.abs(call(model, tokens()) - before).max() > 1e-3


def test_experts_and_bfloat16_arrays() -> None:
    layer = nnx.Einsum("ebd,edf->ebf", (3, 4, 5), rngs=nnx.Rngs(0))
    model, x = nnx.Sequential(layer), np.ones((3, 2, 4), np.float32)
    lro.adapters.attach(model, SoRA(rank=2, param_dtype=jnp.bfloat16), rngs=0)
    randomized(model)
    arrays = layer.adapters["default"].arrays
    arrays["gate"].set_value(jnp.array([[1.0, 0.0], [0.5, -2.0], [0.0, 1.0]]))
    before = np.asarray(model(x))
    compact(model)
    left = layer.adapters["default"].arrays
    assert (left["A"].dtype, left["B"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(model(x), before, atol=2**-7)  # the gates are rounded into B
    assert layer.adapters["default"].method.rank == (1, 2, 1)


def test_a_linen_model_is_compacted_by_its_arrays() -> None:
    model, x = nn.Sequential([nn.Dense(5)]), np.ones((2, 4), np.float32)
    adapted = lro.adapters.linen.Adapted(model, SoRA(rank=3, alpha=6, initial="random"))
    variables = adapted.init(jax.random.key(0), x)
    arrays = variables["adapters"]["default"]["layers_0"]
    arrays["gate"] = arrays["gate"].at[1].set(0.0)
    before = adapted.apply(variables, x)
    batched = jax.tree.map(lambda a: a[None], arrays)
    ranks, method, params = lro.adapters.compact_arrays(SoRA(rank=3, alpha=6), batched)
    assert ranks == (2,)
    small = lro.adapters.linen.Adapted(model, method)
    own = jax.tree.map(lambda a: a[0], params.trainable)
    after = small.apply({**variables, "adapters": {"default": {"layers_0": own}}}, x)
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_what_cannot_be_compacted_is_refused_and_nothing_is_changed() -> None:
    model = with_gates(Unrolled(1, nnx.Rngs(0)), {})
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        compact(model, "other")
    lro.adapters.merge(model)
    with pytest.raises(ValueError, match="blocks/0/down is merged: unmerge"):
        compact(model)
    start = Unrolled(1, nnx.Rngs(0))
    lro.adapters.attach(start, SoRA(rank=2), rngs=0)  # B is zero
    with pytest.raises(ValueError, match="all ranks of the adapter 'default' are zero"):
        compact(start)
    assert start.blocks[0].up.adapters["default"].method == SoRA(rank=2)
    for method, message in (
        (lro.adapters.VeRA(rank=2), "VeRA shares arrays"),
        (lro.adapters.PiSSA(rank=2), "PiSSA changes the weight"),
        (lro.adapters.DoRA(rank=2), "DoRA rescales"),
    ):
        other = lro.adapters.attach(Unrolled(1, nnx.Rngs(0)), method, rngs=0)
        with pytest.raises(TypeError, match=message):
            compact(other)
    p = {"A": jnp.ones((1, 2, 1)), "B": jnp.ones((1, 1, 2)), "gate": jnp.ones((1, 1))}
    with pytest.raises(TypeError, match="arrays are traced"):
        jax.jit(lambda p: lro.adapters.compact_arrays(SoRA(rank=1), p).ranks)(p)


@pytest.mark.slow
def test_arrays_that_are_left_are_sharded_as_the_weights_are() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    kernel = model.layers[0].kernel
    kernel.set_value(jax.device_put(kernel[...], NamedSharding(mesh, P("a", "b"))))
    lro.adapters.attach(model, SoRA(rank=3, initial="random"), rngs=0)
    arrays = model.layers[0].adapters["default"].arrays
    arrays["gate"].set_value(arrays["gate"][...].at[1].set(0.0))
    before = np.asarray(model(np.eye(8, dtype=np.float32)))
    assert compact(model).rows[0].ranks == (2,)
    np.testing.assert_allclose(model(np.eye(8, dtype=np.float32)), before, atol=1e-6)
    arrays = model.layers[0].adapters["default"].arrays
    assert arrays["A"][...].sharding.spec == P("a", None)
    assert arrays["B"][...].sharding.spec == P(None, "b")
