"""A Maestro layer, and a model of such layers, for the tests of these."""

import functools

from flax import nnx
import jax.numpy as jnp
from layers.stacked_net import Net
import numpy as np

from lowrank_optax.layers import MaestroLinear, maestro

X = np.random.default_rng(0).standard_normal((3, 8), np.float32)


def linear() -> MaestroLinear:
    return nnx.clone(_linear())


@functools.cache
def _linear() -> MaestroLinear:
    layer = MaestroLinear(8, 12, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(12.0)
    return layer


@functools.cache
def _net() -> Net:
    model = Net()
    maestro.convert(model, "blocks|out")
    return model


def net() -> Net:
    return nnx.clone(_net())
