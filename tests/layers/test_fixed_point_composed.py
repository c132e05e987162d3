"""Fixed point with optimizers, adapters, few-bit activations and checkpoints of this library."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from flax import nnx

import lowrank_optax as lro
from lowrank_optax.layers import BinaryPoint

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.float32)


class Network(nnx.Module):
    """Two stacked layers with a few-bit activation between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(8, 8, rngs=rngs)

        self.up, self.down = make(rngs), make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return each(self.down, lro.activations.gelu(each(self.up, x), 3))


def each(stack: nnx.Linear, x: jax.Array) -> jax.Array:
    """Each layer of a stack on its own input."""
    graphdef, state = nnx.split(stack)
    return jax.vmap(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def mean_square(model: Network) -> jax.Array:
    return jnp.mean((model(X) - jnp.sin(X)) ** 2)


@pytest.fixture(scope="module")
def converted() -> Network:
    """Do not change it: take `copy.deepcopy`."""
    model = Network(nnx.Rngs(0))
    lro.layers.convert_to_fixed_point(model, 6, where="", per_channel=True)
    lro.layers.calibrate_fixed_point(model, lambda model, x: model(x), X)
    return model


def points_of(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {jax.tree_util.keystr(path): x for path, x in leaves}
    return {name: x for name, x in names.items() if "integer_bits" in name}


def test_binary_points_of_channels_are_no_matrices_and_do_not_decay(converted: Network) -> None:
    """A stack has them as [layers, channels]."""
    params = nnx.as_pure(nnx.state(converted, nnx.Param))
    assert any(x.shape == (2, 8) for x in points_of(params).values())
    state = lro.galore(1e-2, rank=2).init(params)
    bases = [x for name, x in points_of(state).items() if "basis" in name or "refresh" in name]
    assert not bases
    assert not any(points_of(lro.training.decay_mask()(params)).values())
    assert all(kind == "norms" for kind in points_of(lro.training.parameter_kinds(params)).values())


def test_a_projected_optimizer_in_8_bits_trains_weights_and_points(converted: Network) -> None:
    model = copy.deepcopy(converted)
    rule = lro.weight_dimension_numbers(model)
    galore = lro.galore(1e-2, rank=2, scale=1.0, weight_dimension_numbers=rule)
    tx = lro.low_bit(galore, 8, min_size=16)
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.as_pure(params)
    loss = lambda params: mean_square(nnx.merge(graphdef, params))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    before, state, losses = params, tx.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    moved = {
        name: float(jnp.abs(x - points_of(before)[name]).max())
        for name, x in points_of(params).items()
    }
    assert all(0 < distance < 1 for distance in moved.values())


def test_adapters_train_beside_it(converted: Network) -> None:
    model = copy.deepcopy(converted)
    start = float(mean_square(model))
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2), where="up", rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=lro.adapters.trainable)

    @nnx.jit
    def step(model: Network, optimizer: nnx.Optimizer) -> None:
        gradient = nnx.grad(mean_square, argnums=nnx.DiffState(0, lro.adapters.trainable))(model)
        optimizer.update(model, gradient)

    for _ in range(20):
        step(model, optimizer)
    assert float(mean_square(model)) < 0.9 * start


@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpoint_restores_weights_points_and_numbers(
    converted: Network, tmp_path: Path, frozen: bool
) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    model, again = copy.deepcopy(converted), Network(nnx.Rngs(1))
    # A model to restore into has the same layers and no numbers of its own yet.
    lro.layers.convert_to_fixed_point(again, 6, where="", per_channel=True)
    for each in (model, again):
        for _, module in nnx.iter_modules(each):
            point = getattr(module, "integer_bits", None)
            if frozen and isinstance(point, BinaryPoint):
                rounded = jnp.nan_to_num(jnp.round(point[...]))
                module.integer_bits = lro.layers.FrozenBinaryPoint(rounded)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", nnx.state(model))
        checkpointer.wait_until_finished()
        nnx.update(again, checkpointer.restore(tmp_path / "saved", nnx.state(again)))
    np.testing.assert_array_equal(again(X), model(X))
