"""A Maestro layer, and a model of a stack of three and one more, for the tests of these."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
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


class Net(nnx.Module):
    """A stack of three layers, one of them alone and one twice."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(1)
        make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
        self.out = nnx.Linear(8, 12, use_bias=False, rngs=rngs)
        self.same = nnx.List([self.out])

    def __call__(self, x: jax.Array) -> jax.Array:
        graph, state = nnx.split(self.blocks)
        step = lambda x, state: (nnx.merge(graph, state)(x), None)
        return self.same[0](jax.lax.scan(step, x, state)[0])


@functools.cache
def _net() -> Net:
    model = Net()
    maestro.convert(model, "blocks|out")
    return model


def net() -> Net:
    return nnx.clone(_net())
