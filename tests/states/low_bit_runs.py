"""What the tests of low-bit states run, and on what."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from tests.quantization.tables import assert_same_codes

SHAPE = (16, 64)


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def kernel(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> dict[str, jax.Array]:
    return {"kernel": normal(shape, seed)}


def low_bit(inner: Any, bits: Any = 8, **options: Any) -> Any:
    return lro.low_bit(inner, bits, **{"min_size": 0, **options})


def run(tx: Any, params: Any, steps: int) -> tuple[Any, Any]:
    """Parameters and state after normal gradients."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        gradient = jax.tree.map(lambda p: jax.random.normal(key, p.shape).astype(p.dtype), params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def whole(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0]

    return jax.jit(whole)(params)


def assert_same_state(found: Any, wanted: Any, bits: int) -> None:
    """Of two programs: to rounding, which decides some codes."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if y.dtype == np.uint8:
            assert_same_codes(x, y, bits)
        else:
            assert_close(x, y)
