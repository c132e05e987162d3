"""Small Flax NNX models that adapters are attached to, and what is asked of them."""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro

WIDTH = 6


class Block(nnx.Module):
    """Two linear layers with a residual."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, **options)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


class Unrolled(nnx.Module):
    """Blocks one after another, below an embedding."""

    def __init__(self, depth: int, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.embed = nnx.Embed(11, WIDTH, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, dtype) for _ in range(depth)])
        self.head = nnx.Linear(WIDTH, 11, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scanned(nnx.Module):
    """The same, the blocks stacked and run by a scan."""

    def __init__(
        self, depth: int, rngs: nnx.Rngs, dtype: Any = jnp.float32, remat: bool = False
    ) -> None:
        self.embed = nnx.Embed(11, WIDTH, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.blocks = nnx.vmap(lambda rngs: Block(rngs, dtype))(rngs.split(depth))
        self.head = nnx.Linear(WIDTH, 11, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens: jax.Array) -> jax.Array:
        run = lambda block, x: block(x)
        run = nnx.remat(run) if self.remat else run
        scan = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(scan(self.blocks, self.embed(tokens)))


call = nnx.jit(lambda model, x: model(x))
"""The model's output as one program; eagerly, each operation is one, and each scan a new one."""


def tokens(batch: int = 2, length: int = 5) -> np.ndarray:
    """Token numbers."""
    return np.arange(batch * length, dtype=np.int32).reshape(batch, length) % 11


def randomized(model: Any, seed: int = 0) -> Any:
    """The model, with its adapters' trained arrays drawn at random, in place."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, lro.adapters.AdapterParam)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
    nnx.update(model, jax.tree.map(draw, state))
    return model


def weights(model: Any) -> dict[str, np.ndarray]:
    """The model's own parameters by path."""
    own = nnx.All(nnx.Param, nnx.Not(lro.adapters.AdapterParam))
    flat = nnx.to_flat_state(nnx.state(model, own))
    return {"/".join(map(str, path)): np.asarray(x[...]) for path, x in flat}


def loss_of(model: Any, x: jax.Array) -> jax.Array:
    """Some scalar of the output."""
    return jnp.mean(jnp.sin(model(x).astype(jnp.float32)) ** 2)


def gradients(model: Any, x: jax.Array, wrt: Any = lro.adapters.trainable) -> Any:
    """Gradients of `loss_of`, a plain dict."""
    return loss_and_gradients(model, x, wrt)[1]


def loss_and_gradients(model: Any, x: jax.Array, wrt: Any = lro.adapters.trainable) -> Any:
    """`loss_of` and its gradients, by one program."""
    loss, grads = _compiled_gradient(wrt)(model, x)
    return loss, nnx.to_pure_dict(grads)


@functools.cache
def _compiled_gradient(wrt: Any) -> Any:
    return nnx.jit(nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt)))
