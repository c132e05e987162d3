"""Tucker decompositions of stacks of matrices: two bases for all of them, a small core for each.

Stacks may be of many layers: they are read one layer at a time, and no unfolding is formed.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.base import product
from lowrank_optax.adapters.spectra import truncated_svd
from lowrank_optax.matrices.orthonormal import in_turn, leading_directions, orthonormalize

_OVERSAMPLE = 8


class TuckerFactors(NamedTuple):
    """Matrices as ``A core[s] Bᵀ``, float32: the arrays of a `LoTR` with ``alpha=None``.

    Attributes:
      A: ``[d_in, r]``, with orthonormal columns; zero ones beyond ``d_in``.
      core: ``[L, r, r]``.
      B: ``[d_out, r]``, as ``A``.
      error: Frobenius norm of the error of all matrices together, a scalar.
      bound: Upper bound of the error: the root of the squared singular values that were left out of
        both unfoldings.
    """

    A: jax.Array
    core: jax.Array
    B: jax.Array
    error: jax.Array
    bound: jax.Array


def lotr_from_updates(
    updates: jax.Array | Sequence[jax.Array], rank: int, *, sweeps: int = 2
) -> TuckerFactors:
    r"""The factors of a `LoTR` nearest to given updates of weights of one shape.

    :math:`A` and :math:`B` are the leading left singular vectors of the two unfoldings,
    :math:`[\Delta W_1 \ldots \Delta W_L]` and :math:`[\Delta W_1^\top \ldots \Delta W_L^\top]`
    (HOSVD), the cores :math:`A^\top \Delta W_s B`. Each sweep of alternating least squares then
    finds the best :math:`A` for this :math:`B` and the best :math:`B` for that :math:`A`.

    Args:
      updates: ``[L, d_in, d_out]``, or a sequence of matrices or such stacks. Read one matrix at
        a time.
      rank: Columns of ``A`` and ``B``.
      sweeps: Number of sweeps; two are nearly always enough.

    Returns:
      The factors, with their error and its bound. For a `LoTR` with an ``alpha``, divide the core
      by ``alpha / rank``.

    Raises:
      ValueError: If shapes differ, there is no matrix, or ``rank`` or ``sweeps`` is too small.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> updates = jnp.array([[[3.0, -3.0], [6.0, -6.0]], [[-1.0, 1.0], [-2.0, 2.0]]])
      >>> found = lro.adapters.lotr_from_updates(updates, rank=1)
      >>> print(found.A.shape, found.core.shape, found.B.shape, f"{found.error:.3f}")
      (2, 1) (2, 1, 1) (2, 1) 0.000

    References:
      Bershatsky et al., LoTR, 2024, https://arxiv.org/abs/2402.01376.
      De Lathauwer, De Moor and Vandewalle, On the best rank-1 and rank-(R1, ..., RN) approximation
      of higher-order tensors, 2000.
    """
    if rank < 1 or sweeps < 0:
        raise ValueError(f"rank={rank} must be at least 1, and sweeps={sweeps} not negative.")
    return _decomposed(_stacks("updates", updates), sweeps, rank)


def lotr_from_lora(
    factors: Iterable[tuple[jax.Array, jax.Array]], rank: int, *, sweeps: int = 2
) -> TuckerFactors:
    """`lotr_from_updates` of products of thin factors, no product of which is formed.

    The concatenated factors of ``L`` layers span ``L k`` directions: the decomposition is that of
    ``L`` matrices ``[L k, L k]`` in these, and exact from ``rank = L k`` on.

    Args:
      factors: For each layer what ``method.to_lora(p)`` of any low-rank adapter gives,
        ``[d_in, k]`` and ``[k, d_out]``, or stacks of them, ``[L, d_in, k]`` and ``[L, k, d_out]``.
        Ranks may differ.
      rank: Columns of ``A`` and ``B``.
      sweeps: As for `lotr_from_updates`.

    Returns:
      As `lotr_from_updates`.

    Raises:
      ValueError: As `lotr_from_updates`, and if two factors do not fit each other.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> first, second = jnp.ones((3, 4, 1)), jnp.arange(15.0).reshape(3, 1, 5)
      >>> found = lro.adapters.lotr_from_lora([(first, second)], rank=2)
      >>> rebuilt = found.A @ found.core @ found.B.T
      >>> print(bool(jnp.allclose(rebuilt, first @ second, atol=1e-5)))
      True
    """
    pairs = [(_as_stack(first), _as_stack(second)) for first, second in factors]
    for first, second in pairs:
        if (first.shape[0], first.shape[2]) != second.shape[:2]:
            raise ValueError(
                f"factors of shapes {first.shape} and {second.shape} must be [L, d_in, k] and "
                "[L, k, d_out]."
            )
    firsts = _stacks("factors", [first for first, _ in pairs], axes=(1,))
    seconds = _stacks("factors", [second for _, second in pairs], axes=(2,))
    q_in, small, q_out = _in_few_directions(firsts, seconds)
    a, core, b, error, bound = lotr_from_updates(small, rank, sweeps=sweeps)
    return TuckerFactors(product(q_in, a), core, product(q_out, b), error, bound)


@functools.partial(jax.jit, static_argnames=("rank", "power_iterations"))
def unfolding_vectors(
    stacks: Sequence[jax.Array],
    rank: int,
    *,
    power_iterations: int | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The leading left singular vectors of matrices put side by side, ``[W_1 W_2 ...]``.

    Args:
      stacks: ``[L, d, n]``; ``d`` is common to all.
      rank: Number of vectors.
      power_iterations: None for exact ones, by a QR of ``[d + n, d]`` for each layer; the number of
        steps (and one more) of subspace iteration from a random start, which needs products with
        ``rank + 8`` columns alone.
      key: PRNG key of the random start.

    Returns:
      ``[d, rank]`` float32, columns beyond ``d`` zero, and singular values in descending order:
      all ``[d]`` if exact, else the leading ones.
    """
    d = stacks[0].shape[-2]
    if power_iterations is None:
        stacked = _scan(_append_rows, jnp.zeros((d, d)), stacks)
        _, values, vectors = in_turn(lambda x: tuple(jnp.linalg.svd(x)), stacked)
        return _columns(vectors.T, rank), values
    if key is None:
        raise ValueError("key=None: a random start needs a key of jax.random.")
    q = jax.random.normal(key, (d, min(d, rank + _OVERSAMPLE)))
    for _ in range(power_iterations + 1):
        q = _scan(lambda sum_, w, q=q: sum_ + product(w, product(w.T, q)), 0 * q, stacks)
        q = orthonormalize(q)
    zero = jnp.zeros((q.shape[1], q.shape[1]))
    inner = lambda x: product(x.T, x)
    gram = _scan(lambda sum_, w: sum_ + inner(product(w.T, q)), zero, stacks)
    values = jnp.sqrt(jnp.maximum(in_turn(jnp.linalg.eigvalsh, gram)[::-1], 0))
    return _columns(leading_directions(q, gram, min(rank, q.shape[1])), rank), values


@functools.partial(jax.jit, static_argnums=2)
def _decomposed(stacks: Sequence[jax.Array], sweeps: jax.Array | int, rank: int) -> TuckerFactors:
    """HOSVD and sweeps of alternating least squares."""
    transposed = [x.mT for x in stacks]
    (a, values_a), (b, values_b) = (unfolding_vectors(x, rank) for x in (stacks, transposed))
    bound = jnp.sqrt(jnp.sum(values_a[rank:] ** 2) + jnp.sum(values_b[rank:] ** 2))

    def best_side(stacks: Sequence[jax.Array], other: jax.Array) -> jax.Array:
        inside = [jax.lax.map(lambda w: product(w, other), stack) for stack in stacks]
        return _columns(truncated_svd(_side_by_side(inside), rank).u, rank)

    def sweep(_: jax.Array, sides: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a = best_side(stacks, sides[1])
        return a, best_side(transposed, a)

    a, b = jax.lax.fori_loop(0, sweeps, sweep, (a, b))

    def of_layer(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        core = product(product(a.T, w), b)
        lost = w.astype(jnp.float32) - product(product(a, core), b.T)
        return core, jnp.sum(lost**2)

    found = [jax.lax.map(of_layer, stack) for stack in stacks]
    error = jnp.sqrt(sum(jnp.sum(lost) for _, lost in found))
    return TuckerFactors(a, jnp.concatenate([core for core, _ in found]), b, error, bound)


@jax.jit
def _in_few_directions(
    firsts: Sequence[jax.Array], seconds: Sequence[jax.Array]
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Bases of all rows and columns of products of factors, and the products in these."""
    basis = lambda matrices: in_turn(lambda x: jnp.linalg.qr(x)[0], _side_by_side(matrices))
    q_in, q_out = basis(firsts), basis([x.mT for x in seconds])
    small = [
        product(product(q_in.T, first), product(second, q_out))
        for first, second in zip(firsts, seconds, strict=True)
    ]
    return q_in, small, q_out


def _append_rows(r: jax.Array, w: jax.Array) -> jax.Array:
    # R of a QR: RᵀR is the Gram matrix of all unfoldings so far, without squaring its condition.
    rows = jnp.concatenate([r, w.T.astype(r.dtype)])
    return in_turn(lambda x: jnp.linalg.qr(x, mode="r"), rows)


def _scan(
    step: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    stacks: Iterable[jax.Array],
) -> jax.Array:
    """``step`` over the layers of all stacks."""
    for stack in stacks:
        start, _ = jax.lax.scan(lambda carry, w: (step(carry, w), None), start, stack)
    return start


def _side_by_side(stacks: Sequence[jax.Array]) -> jax.Array:
    """``[d, sum of L n]`` of stacks ``[L, d, n]``, float32."""
    flat = [jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(jnp.float32) for x in stacks]
    return jnp.concatenate(flat, axis=1)


def _columns(vectors: jax.Array, count: int) -> jax.Array:
    """The first ``count`` columns, zero ones where there are fewer."""
    found = vectors[:, :count]
    return jnp.pad(found, ((0, 0), (0, count - found.shape[1])))


def _as_stack(x: jax.Array) -> jax.Array:
    return x[None] if jnp.ndim(x) == 2 else jnp.asarray(x)


def _stacks(
    name: str, matrices: jax.Array | Sequence[jax.Array], axes: tuple[int, ...] = (1, 2)
) -> list[jax.Array]:
    """Stacks ``[L, d_in, d_out]`` of equal size along ``axes``."""
    given = [matrices] if isinstance(matrices, jax.Array | np.ndarray) else list(matrices)
    stacks = [_as_stack(x) for x in given]
    if not stacks or any(x.ndim != 3 or x.shape[0] == 0 for x in stacks):
        shapes = [tuple(x.shape) for x in stacks]
        raise ValueError(f"{name} must be matrices or stacks [L, d_in, d_out], got {shapes}.")
    if len({tuple(x.shape[i] for i in axes) for x in stacks}) > 1:
        shapes = [tuple(x.shape[1:]) for x in stacks]
        raise ValueError(f"{name} must be of one shape to share factors, got {shapes}.")
    return stacks
