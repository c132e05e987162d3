"""A model of stacked and shared linear layers, for the tests of conversions."""

from flax import nnx
import jax


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
