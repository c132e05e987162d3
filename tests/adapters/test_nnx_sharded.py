"""Adapters on sharded weights: their arrays are sharded as the weights' inputs and outputs."""

from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.adapters.nnx_models import call, loss_of, randomized

WIDTH = 8


def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


class Model(nnx.Module):
    """A stack of two layers, heads, and a layer whose weight is whole."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        make = lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.layers = nnx.vmap(make)(rngs.split(2))
        self.heads = nnx.LinearGeneral(WIDTH, (4, 2), rngs=rngs)
        self.out = nnx.LinearGeneral((4, 2), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.out(self.heads(run(self.layers, x)))


def sharded() -> Model:
    model, on = Model(), mesh()
    put = lambda variable, *spec: variable.set_value(
        jax.device_put(variable[...], NamedSharding(on, P(*spec)))
    )
    put(model.layers.kernel, None, "data", "model")
    put(model.heads.kernel, "data", "model", None)
    put(model.out.kernel, "model", None, "data")
    return model


def specs(model: Model, layer: str) -> dict[str, P]:
    arrays = getattr(model, layer).adapters["default"].arrays
    return {name: arrays[name][...].sharding.spec for name in arrays}


@pytest.mark.slow
def test_a_is_sharded_as_the_inputs_and_b_as_the_outputs() -> None:
    model = lro.adapters.attach(sharded(), lro.adapters.LoRA(rank=2), rngs=0)
    stacked = {"A": P(None, "data", None), "B": P(None, None, "model")}
    assert specs(model, "layers") == stacked
    assert specs(model, "heads") == {"A": P("data", None), "B": P(None, "model")}
    assert specs(model, "out") == {"A": P("model", None), "B": P(None, "data")}


def test_shared_factors_are_sharded_and_cores_are_whole() -> None:
    model = lro.adapters.attach(sharded(), lro.adapters.LoTR(rank=2), "layers", rngs=0)
    (group,) = model.adapter_groups["default"].values()
    assert group["A"][...].sharding.spec == P("data", None)
    assert group["B"][...].sharding.spec == P("model", None)
    assert specs(model, "layers") == {"core": P(None, None, None)}


def test_metadata_of_logical_axes_is_passed_on() -> None:
    layer = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(layer.kernel[...], out_sharding=("embed", "mlp"), eager_sharding=False)
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), ".*", rngs=0)
    arrays = layer.adapters["default"].arrays
    assert arrays["A"].get_metadata()["out_sharding"] == ("embed", None)
    assert arrays["B"].get_metadata()["out_sharding"] == (None, "mlp")


@pytest.mark.slow
def test_a_sharded_model_trains_and_merges_as_on_one_device() -> None:
    results = []
    for model in (Model(), sharded()):
        lro.adapters.attach(model, lro.adapters.LoRA(rank=2), rngs=0)
        randomized(model)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=lro.adapters.trainable)

        @nnx.jit
        def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array) -> None:
            wrt = nnx.DiffState(0, lro.adapters.trainable)
            optimizer.update(model, nnx.grad(loss_of, argnums=wrt)(model, x))

        x = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
        step(model, optimizer, x)
        before = call(model, x)
        lro.adapters.merge(model)
        results.append((before, call(model, x), model.layers.kernel[...]))
    assert results[1][2].sharding.spec == P(None, "data", "model")
    for one, eight in zip(*results, strict=True):
        np.testing.assert_allclose(one, eight, atol=1e-5)
    np.testing.assert_allclose(results[0][0], results[0][1], atol=1e-5)
    assert jnp.isfinite(results[0][0]).all()


def test_arrays_of_a_file_are_sharded_as_those_that_are_attached(tmp_path) -> None:
    pytest.importorskip("safetensors")
    names = {"layers/{}": "layers.{}", "heads": "heads"}
    of = lambda model: nnx.to_flat_state(nnx.state(model, nnx.PathContains("default")))
    for number, method in enumerate((lro.adapters.LoRA(rank=2), lro.adapters.VeRA(rank=2))):
        attached = lro.adapters.attach(sharded(), method, "layers|heads", rngs=0)
        lro.adapters.save_peft(attached, tmp_path / str(number), names=names)
        loaded = lro.adapters.load_peft(sharded(), tmp_path / str(number), names=names)
        for (path, x), (_, expected) in zip(of(loaded), of(attached), strict=True):
            assert x[...].sharding == expected[...].sharding, path
            np.testing.assert_array_equal(x[...], expected[...])


FACTORS = {"A": P("data", None), "B": P(None, "model")}
OF_METHODS = {
    lro.adapters.LoRA(rank=16): FACTORS,
    lro.adapters.DoRA(rank=16): FACTORS | {"magnitude": P("model"), "norm_squared": P("model")},
    lro.adapters.AFLoRA(rank=16): FACTORS | {"d": P(None), "b": P("model")},
    lro.adapters.LaMDA(rank=16): FACTORS | {"S": P(None, None), "principal": FACTORS["B"]},
    lro.adapters.MiSS(rank=8): {"D": P(None, "model"), "row": P("data")},
    lro.adapters.PiSSA(rank=16): FACTORS | {f"{name}_0": at for name, at in FACTORS.items()},
    lro.adapters.SVFit(rank=16): {"U": FACTORS["A"], "V": P("model", None), "t": P(None)},
}


@pytest.mark.parametrize("method", OF_METHODS, ids=lambda method: type(method).__name__)
def test_a_capped_rank_is_not_taken_for_the_inputs(method: lro.adapters.Adapter) -> None:
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)))
    on = NamedSharding(mesh(), P("data", "model"))
    kernel = model.layers[0].kernel
    kernel.set_value(jax.device_put(kernel[...], on))
    lro.adapters.attach(model, method, rngs=0)
    arrays = model.layers[0].adapters["default"].arrays
    assert {name: arrays[name][...].sharding.spec for name in arrays} == OF_METHODS[method]


def test_axes_that_are_not_those_of_the_arrays_are_refused() -> None:
    class Turned(lro.adapters.LoRA):
        axes: ClassVar = {"A": ("out", None)}

    rngs = nnx.Rngs(0)
    # The square layer would pass, and is the first.
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 6, rngs=rngs))
    graphdef = nnx.graphdef(model)
    with pytest.raises(
        ValueError, match=r"Turned.axes says .* 'A' are \('out', None\) of a weight"
    ):
        lro.adapters.attach(model, Turned(rank=2), ".*", rngs=0)
    assert nnx.graphdef(model) == graphdef  # refused before anything is changed
