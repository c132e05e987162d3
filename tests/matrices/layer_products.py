"""Whether a layer multiplies by the matrix that a spec sees in its kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices import to_matrix


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers from NumPy: nothing to compile."""
    return jnp.asarray(normal(*shape), dtype)


def assert_is_product(y: jax.Array, x: np.ndarray, kernel: jax.Array, spec: Any) -> None:
    """``flatten(y) = flatten(x) @ matrix``, the examples in front."""
    matrix = np.asarray(to_matrix(kernel, spec))
    flat = lambda z, width: np.asarray(z).reshape(*matrix.shape[:-2], -1, width)
    expected = flat(x, matrix.shape[-2]) @ matrix
    np.testing.assert_allclose(flat(y, matrix.shape[-1]), expected, rtol=1e-4, atol=1e-4)
