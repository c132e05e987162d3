"""Singular values and vectors of weights: what PiSSA, LaMDA, SVFit and LoTR start from."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.orthonormal import in_turn, orthonormalize

# Singular values this far below the largest are rounding errors of float32.
ZERO = 1e-6


class Spectrum(NamedTuple):
    """Leading singular triplets of matrices ``[..., m, n]``, in descending order, float32.

    Attributes:
      u: Left vectors ``[..., m, r]``, each with its largest entry positive.
      s: Values ``[..., r]``.
      v: Right vectors ``[..., n, r]``.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array


@functools.partial(jax.jit, static_argnames=("rank", "power_iterations", "oversample"))
def truncated_svd(
    weights: jax.Array,
    rank: int,
    *,
    power_iterations: int | None = None,
    oversample: int = 8,
    key: jax.Array | None = None,
) -> Spectrum:
    r"""The ``rank`` leading singular triplets, or all if there are fewer.

    The matrices of a stack are decomposed one after the other: no more is held than what is
    returned and the workspace of one. Vectors of equal singular values are any basis of their
    space, those of zero any of what is left; all are orthonormal.

    Args:
      weights: ``[..., m, n]``; computed in float32.
      rank: Number of triplets.
      power_iterations: None for LAPACK's SVD; the number of iterations of a randomized one, whose
        cost is products of ``O(m n r)`` and small QRs. With singular values
        :math:`\sigma_j = j^{-1/2}` and rank 16, the relative error of :math:`U S V^\top` is 0.3
        after one, 0.05 after four and 3e-4 after sixteen.
      oversample: Further directions of the random sketch, dropped at the end.
      key: PRNG key of the random sketch; each matrix of a stack gets its own.

    Raises:
      ValueError: If an argument is out of range; ``key`` is missing.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.adapters.spectra import truncated_svd
      >>> u, s, v = truncated_svd(jnp.array([[1.0, 1.0], [3.0, 3.0]]), 1)
      >>> print(*(np.asarray(x).ravel().round(3) for x in (u, s, v)))
      [0.316 0.949] [4.472] [0.707 0.707]

    Reference:
      Halko, Martinsson and Tropp, Finding structure with randomness, 2011,
      https://arxiv.org/abs/0909.4061, Algorithms 4.4 and 5.1.
    """
    if weights.ndim < 2:
        raise ValueError(f"weights of shape {weights.shape} must be matrices [..., m, n].")
    if rank < 1:
        raise ValueError(f"rank={rank!r} must be at least 1.")
    check_power_iterations(power_iterations)
    if oversample < 0:
        raise ValueError(f"oversample={oversample!r} must be at least 0.")
    if power_iterations is not None and key is None:
        raise ValueError("key=None: a randomized SVD needs a key of jax.random.")
    rank = min(rank, *weights.shape[-2:])

    def one(of_one: tuple[jax.Array, jax.Array | None]) -> Spectrum:
        w, key = of_one[0].astype(jnp.float32), of_one[1]
        if key is None or power_iterations is None:
            u, s, vt = _svd(w)
        else:
            u, s, vt = _randomized(w, min(rank + oversample, *w.shape), power_iterations, key)
        u, s, v = u[:, :rank], s[:rank], vt.mT[:, :rank]
        # The largest entry of each left vector is positive.
        largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0, keepdims=True), axis=0)
        sign = jnp.where(largest < 0, -1.0, 1.0)
        return Spectrum(u * sign, s, v * sign)

    if weights.ndim == 2:
        return one((weights, key))
    stack = weights.reshape(-1, *weights.shape[-2:])
    keys = None if key is None else jax.random.split(key, stack.shape[0])
    found = jax.lax.map(one, (stack, keys))
    return jax.tree.map(lambda x: x.reshape(*weights.shape[:-2], *x.shape[1:]), found)


@jax.jit
def singular_values(weights: jax.Array) -> jax.Array:
    """All singular values ``[..., min(m, n)]`` of ``[..., m, n]``, descending, float32."""
    one = lambda w: in_turn(lambda w: jnp.linalg.svd(w, compute_uv=False), w.astype(jnp.float32))
    values = jax.lax.map(one, weights.reshape(-1, *weights.shape[-2:]))
    return values.reshape(*weights.shape[:-2], -1)


def nonzero(s: jax.Array) -> jax.Array:
    """Which of the descending values ``[..., r]`` are more than rounding errors of the first."""
    return s > ZERO * s[..., :1]


def values_of(weights: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """The weights; raises TypeError if it is a shape alone."""
    if isinstance(weights, jax.ShapeDtypeStruct):
        raise TypeError(f"weights={weights} are a shape alone: their singular values are needed.")
    return jnp.asarray(weights)


def check_power_iterations(power_iterations: int | None) -> None:
    """Raises ValueError unless it is None or a number from zero on."""
    if power_iterations is not None and power_iterations < 0:
        raise ValueError(
            f"power_iterations={power_iterations!r} must be at least 0, or None for an exact SVD."
        )


def _randomized(
    w: jax.Array, columns: int, power_iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    q = orthonormalize(times(w, jax.random.normal(key, (w.shape[1], columns))))

    def closer(_: int, q: jax.Array) -> jax.Array:
        return orthonormalize(times(w, orthonormalize(times(w.mT, q))))

    q = jax.lax.fori_loop(0, power_iterations, closer, q)
    u, s, vt = _svd(times(q.mT, w))
    return times(q, u), s, vt


def _svd(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return in_turn(lambda w: tuple(jnp.linalg.svd(w, full_matrices=False)), w)
