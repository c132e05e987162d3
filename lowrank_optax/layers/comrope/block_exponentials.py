"""Exponentials of skew-symmetric blocks times a number for each position."""

import math

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.orthonormal import in_turn

_HIGHEST = jax.lax.Precision.HIGHEST


def block_exponentials(times: jax.Array, blocks: jax.Array) -> jax.Array:
    r"""Return :math:`\exp(t K)` for each time and skew-symmetric block.

    Closed forms for blocks of 2 and 4. Other blocks are diagonalized once each, and not for each
    time, so the result is right for any angle; gradients are exact also for zero blocks and equal
    frequencies, where those of eigenvectors do not exist. Second derivatives are exact there for
    blocks of 2 and 4 only: for other blocks they are NaN or wrong where frequencies are equal.

    Args:
      times: Times ``[..., h, m]``, or ``[..., 1, m]`` for the same in all ``h``.
      blocks: Skew-symmetric matrices ``[h, m, b, b]``, which is not checked.

    Returns:
      Rotations ``[..., h, m, b, b]``, in float32 at least. Exactly the identity where the time or
      the block is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.layers.comrope import block_exponentials
      >>> quarter = jnp.asarray([[[[0, -jnp.pi / 2], [jnp.pi / 2, 0]]]])
      >>> print(block_exponentials(jnp.ones((1, 1)), quarter)[0, 0].round(3) + 0.0)
      [[ 0. -1.]
       [ 1.  0.]]

    Reference:
      Yu et al., 2025, https://arxiv.org/abs/2506.03737, section 3.
    """
    dtype = jnp.promote_types(jnp.result_type(times, blocks), jnp.float32)
    times, blocks = times.astype(dtype), blocks.astype(dtype)
    times = jnp.broadcast_to(times, (*times.shape[:-2], *blocks.shape[:2]))
    sizes = {2: _exponentials_of_2, 4: _exponentials_of_4}
    return sizes.get(blocks.shape[-1], _exponentials)(times, blocks)


def _exponentials_of_2(times: jax.Array, blocks: jax.Array) -> jax.Array:
    angles = times * blocks[..., 1, 0]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([cos, -sin, sin, cos], axis=-1).reshape(*angles.shape, 2, 2)


def _exponentials_of_4(times: jax.Array, blocks: jax.Array) -> jax.Array:
    """Products of two commuting rotations, of the self-dual and the anti-self-dual part."""
    k = lambda i, j: blocks[..., i, j]
    zero = jnp.zeros_like(k(0, 1))
    dual = [
        [zero, k(2, 3), -k(1, 3), k(1, 2)],
        [-k(2, 3), zero, k(0, 3), -k(0, 2)],
        [k(1, 3), -k(0, 3), zero, k(0, 1)],
        [-k(1, 2), k(0, 2), -k(0, 1), zero],
    ]
    dual = jnp.stack([jnp.stack(row, axis=-1) for row in dual], axis=-2)
    (cos, sin, plus), (cos_, sin_, minus) = (
        _isoclinic(times, (blocks + sign * dual) / 2) for sign in (1, -1)
    )
    both = jnp.matmul(plus, minus, precision=_HIGHEST)
    identity = jnp.broadcast_to(jnp.eye(4, dtype=blocks.dtype), blocks.shape)
    tables = jnp.stack([identity, plus, minus, both], axis=-3)
    factors = jnp.stack([cos * cos_, sin * cos_, cos * sin_, sin * sin_], axis=-1)
    return _combined(factors, tables)


def _isoclinic(times: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosine, ``sin(t f) / f`` and the part, whose square is ``-f² I``."""
    squares = times**2 * jnp.sum(part**2, axis=(-2, -1)) / 4
    # Both functions are even in the angle. Unlike the root, their power series in its square have
    # all derivatives at 0.
    small = squares < 1
    angles, near = jnp.sqrt(jnp.where(small, 1, squares)), jnp.where(small, squares, 0)
    cos = jnp.where(small, _even_series(near, 0), jnp.cos(angles))
    sinc = jnp.where(small, _even_series(near, 1), jnp.sin(angles) / angles)
    return cos, times * sinc, part


def _even_series(squares: jax.Array, first: int) -> jax.Array:
    """The series of ``cos x`` (first 0) or ``sin(x) / x`` (1), of squares of x up to 1."""
    total = jnp.zeros_like(squares)
    for i in reversed(range(10)):
        total = total * squares + (-1) ** i / math.factorial(2 * i + first)
    return total


@jax.custom_jvp
def _exponentials(times: jax.Array, blocks: jax.Array) -> jax.Array:
    return _spectral(times, *_eigenvectors(blocks))


@_exponentials.defjvp
def _exponentials_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The derivative by divided differences, which are finite where eigenvalues meet."""
    (times, blocks), (times_dot, blocks_dot) = primals, tangents
    values, vectors = _eigenvectors(blocks)
    rotations = _spectral(times, values, vectors)
    of_times = jnp.matmul(blocks, rotations, precision=_HIGHEST) * times_dot[..., None, None]
    of_blocks = jax.checkpoint(_directional)(times, values, vectors, blocks_dot)
    return rotations, of_times + of_blocks


def _eigenvectors(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Real ``w [h, m, b]`` and unitary ``U`` with ``K = U diag(i w) Uᴴ``."""
    return in_turn(lambda x: tuple(jnp.linalg.eigh(x)), -1j * blocks)


def _spectral(times: jax.Array, values: jax.Array, vectors: jax.Array) -> jax.Array:
    """``I + Re U diag(exp(i t w) - 1) Uᴴ``: of cos - 1, so that zero blocks give the identity."""
    outer = jnp.einsum("hmir,hmjr->hmrij", vectors, vectors.conj(), precision=_HIGHEST)
    angles = times[..., None] * values
    factors = jnp.concatenate([-2 * jnp.sin(angles / 2) ** 2, -jnp.sin(angles)], axis=-1)
    tables = jnp.concatenate([outer.real, outer.imag], axis=-3)
    return jnp.eye(values.shape[-1], dtype=times.dtype) + _combined(factors, tables)


def _directional(
    times: jax.Array, values: jax.Array, vectors: jax.Array, direction: jax.Array
) -> jax.Array:
    """The derivative of the exponentials along a direction of the blocks."""
    middle = times[..., None, None] * (values[..., :, None] + values[..., None, :]) / 2
    half = times[..., None, None] * (values[..., :, None] - values[..., None, :]) / 2
    divided = times[..., None, None] * jnp.exp(1j * middle) * jnp.sinc(half / jnp.pi)
    inside = jnp.einsum(
        "hmir,hmij,hmjs->hmrs", vectors.conj(), direction, vectors, precision=_HIGHEST
    )
    found = jnp.einsum(
        "hmir,...hmrs,hmjs->...hmij", vectors, divided * inside, vectors.conj(), precision=_HIGHEST
    )
    return found.real


def _combined(factors: jax.Array, tables: jax.Array) -> jax.Array:
    """Sums ``[..., h, m, b, b]`` of tables ``[h, m, r, b, b]`` times factors ``[..., h, m, r]``."""
    return jnp.einsum("...hmr,hmrij->...hmij", factors, tables, precision=_HIGHEST)
