"""Attention by features of queries and keys, in linear time and with a state of constant size."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.explicit_sharding import vary_like

FeatureMap: TypeAlias = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Features ``[..., F]`` of vectors ``[..., d]`` and the logarithms of their scales ``[...]``."""

NOTHING = -1e30  # the logarithm of the scale before the first key: finite, so that differences are
LEAST_LOG_GATE = -80.0


class LinearAttentionState(NamedTuple):
    """All that attention by features remembers of the keys and values so far, in float32.

    Attributes:
      sums: Sums ``[..., F, d_v + 1]`` of features times values, and of features in the last
        column, divided by ``exp(log_scale)``.
      log_scale: Logarithms ``[...]`` of the scales of the sums.
    """

    sums: jax.Array
    log_scale: jax.Array


def empty_state(*shape: int) -> LinearAttentionState:
    """The state before the first key: sums of a shape ``[..., F, d_v + 1]``."""
    return LinearAttentionState(
        jnp.zeros(shape, jnp.float32), jnp.full(shape[:-2], NOTHING, jnp.float32)
    )


def causal_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap,
    state: LinearAttentionState,
    *,
    visible: jax.Array | None = None,
    gate: jax.Array | None = None,
    chunk_size: int = 128,
) -> tuple[jax.Array, LinearAttentionState]:
    """Compute causal attention of one head of keys by chunks of positions.

    Position ``t`` has the mean of the values up to ``t`` with weights ``φ(q_t) · φ(k_s)``, times
    ``(1 - g_s) g_{s+1} … g_t`` with a gate. No intermediate of a position depends on a later one,
    and the state is saved only at the starts of chunks for the backward pass.

    Args:
      query: Queries ``[G, T, d]`` of a group of heads that share the keys.
      key: Keys ``[T, d]``.
      value: Values ``[T, d_v]``.
      feature_map: Function of vectors that returns features and the logarithms of their scales,
        such as `scaled_features` with a projection.
      state: State of the positions before, or `empty_state`.
      visible: Booleans ``[T]``: which keys count.
      gate: Numbers ``[T]`` in [0, 1]: the part of the state that each position keeps.
      chunk_size: Number of positions of a chunk.

    Returns:
      The output ``[G, T, d_v]``, in float32 at least, and the state after the last position. The
      output is 0 where no key is visible.
    """
    length = key.shape[0]
    size = max(1, min(chunk_size, length))
    chunks = -(-length // size)
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    visible = jnp.ones(length, bool) if visible is None else visible
    gate = None if gate is None else gate.astype(dtype)

    def chunked(x: jax.Array, axis: int = 0) -> jax.Array:
        widths = [(0, chunks * size - length if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # A padded position has no key, and keeps the state.
    log_keep, log_add = (jnp.zeros(length, dtype),) * 2 if gate is None else _log_gates(gate)
    operands = (
        chunked(query, 1),
        *map(chunked, (key, with_ones(value, dtype), visible, log_keep, log_add)),
    )

    @jax.checkpoint
    def body(
        state: LinearAttentionState, operands: tuple[jax.Array, ...]
    ) -> tuple[LinearAttentionState, jax.Array]:
        query, key, values, visible, log_keep, log_add = operands
        (phi_q, _), (phi_k, scale) = feature_map(query), feature_map(key)
        kept = jnp.cumsum(log_keep)
        level = jnp.where(visible, scale + log_add - kept, -jnp.inf)
        # The scale of each position is the largest so far: a later key never changes it.
        top = jnp.maximum(state.log_scale, jax.lax.cummax(jax.lax.stop_gradient(level)))
        seen = jnp.tril(jnp.ones((size, size), bool))
        weights = jnp.exp(jnp.where(seen, level[None, :] - top[:, None], -jnp.inf))
        within = jnp.einsum("gtf,sf->gts", phi_q, phi_k) * weights
        before = jnp.exp(state.log_scale - top)[:, None] * (phi_q @ state.sums.astype(dtype))
        sums = jnp.exp(state.log_scale - top[-1]) * state.sums + phi_k.T @ (
            jnp.exp(level - top[-1])[:, None] * values
        )
        new = LinearAttentionState(sums, top[-1] + kept[-1])
        new = jax.tree.map(lambda n, old: n.astype(old.dtype), new, state)
        return new, within @ values + before

    state = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, dtype)), state)
    state = jax.tree.map(lambda x: vary_like(x, (state, operands)), state)
    state, sums = jax.lax.scan(body, state, operands)
    sums = jnp.moveaxis(sums, 0, 1).reshape(query.shape[0], chunks * size, -1)[:, :length]
    return quotient(sums), state


def full_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap,
    *,
    visible: jax.Array | None = None,
) -> jax.Array:
    """Compute attention in which each query sees all visible keys; as `causal_linear_attention`.

    Here there may be other numbers of queries ``[G, T, d]`` than of keys ``[S, d]``.
    """
    (phi_q, _), (phi_k, level) = feature_map(query), feature_map(key)
    if visible is not None:
        level = jnp.where(visible, level, -jnp.inf)
    top = jnp.maximum(NOTHING, jnp.max(jax.lax.stop_gradient(level), initial=NOTHING))
    values = with_ones(value, jnp.promote_types(value.dtype, jnp.float32))
    return quotient(phi_q @ (phi_k.T @ (jnp.exp(level - top)[:, None] * values)))


def with_ones(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Values with a column of ones, whose sums are the denominators."""
    return jnp.concatenate([value.astype(dtype), jnp.ones((*value.shape[:-1], 1), dtype)], axis=-1)


def quotient(sums: jax.Array) -> jax.Array:
    """Sums of values divided by the sums of weights in the last column; 0 where these are 0."""
    total = jax.lax.stop_gradient(sums[..., -1:])
    is_zero = jnp.abs(total) < jnp.finfo(total.dtype).tiny
    # Scaled to a total of 1, whose square in the derivative does not underflow.
    scaled = sums / jnp.where(is_zero, 1, total)
    return jnp.where(is_zero, 0, scaled[..., :-1] / jnp.where(is_zero, 1, scaled[..., -1:]))


def _log_gates(gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logarithms of what is kept of the state, and of the weight of the new key."""
    keep, add = (jnp.where(x > 0, x, 1) for x in (gate, 1 - gate))
    floor = jnp.where(gate > 0, jnp.maximum(jnp.log(keep), LEAST_LOG_GATE), LEAST_LOG_GATE)
    return floor, jnp.where(gate < 1, jnp.log(add), -jnp.inf)
