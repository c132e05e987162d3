"""Attention in chunks of queries and keys: the matrix of all pairs is never in memory."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lowrank_optax.layers.attention.attention_arguments import (
    CONTEXT,
    Window,
    check_arguments,
    name_context,
)
from lowrank_optax.matrices.explicit_sharding import (
    constrain,
    in_whole_runs,
    merge_axes,
    partition_of,
    split_axis,
    vary_alike,
)

# Bytes of one chunk of scores, float32: on a CPU what its caches hold, elsewhere enough work for
# each turn of the loop. Products of fewer rows than the least leave a TPU's matrix unit idle;
# chunks of more rows than the most compute many pairs that no query sees.
CPU_CHUNK_BYTES, CHUNK_BYTES = 2**20, 2**24
LEAST_CHUNK, MOST_CHUNK = 128, 512


def chunked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Window = None,
    chunk_bytes: int | None = None,
) -> jax.Array:
    r"""Compute ``jax.nn.dot_product_attention`` without the scores ``[B, N, T, S]`` in memory.

    Chunks of queries meet chunks of keys with a running maximum :math:`m` and sum :math:`\ell` of
    each query's softmax. The inputs, the output and :math:`m + \log \ell`, ``[B, N, T]``, are
    saved for the backward pass, which computes the scores again. Pairs of chunks in which no query
    sees a key are skipped, so that causal attention does about half of the work. Products are in
    the dtype of the inputs with float32 sums. ``jax.jvp`` of it raises, and so does ``jax.grad`` of
    its gradient; ``jax.jvp`` of its gradient, a product with the Hessian, is exact. On explicit
    axes of a mesh the queries' batch and whole groups of heads stay sharded, and the rest is
    gathered.

    Args:
      query: Queries ``[B, T, N, H]``.
      key: Keys ``[B, S, K, H]``; each group of ``N / K`` heads of the query shares one.
      value: Values ``[B, S, K, H]``.
      mask: Booleans that broadcast to ``[B, N, T, S]``: whether a query sees a key.
      scale: Factor of the scores, not traced; :math:`1 / \sqrt{H}` by default.
      is_causal: Whether query ``i`` sees only keys up to ``i``.
      local_window_size: How many keys before and after its own position a query sees, as a pair or
        as one number for both.
      chunk_bytes: Most bytes of a chunk of scores, in float32; chunks have at least 128 queries
        and 128 keys. 1 MiB by default where JAX's default backend is a CPU, else 16 MiB.

    Returns:
      The output ``[B, T, N, H]`` in the query's dtype. It is 0 where a query sees no key, where
      ``jax.nn.dot_product_attention`` has the mean of all values.

    Raises:
      ValueError: If shapes or dtypes do not fit, or a number is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 16))
      >>> out = lro.layers.chunked_attention(q, k, v, is_causal=True)
      >>> plain = jax.nn.dot_product_attention(q, k, v, is_causal=True)
      >>> print(out.shape, bool(jnp.allclose(out, plain, atol=1e-5)))
      (1, 256, 2, 16) True

    Reference:
      Rabe and Staats, 2021, https://arxiv.org/abs/2112.05682; the backward pass is that of Dao et
      al., 2022, https://arxiv.org/abs/2205.14135, algorithm 4.
    """
    window = check_arguments(query, key, value, mask, local_window_size, scale)
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if jax.default_backend() == "cpu" else CHUNK_BYTES
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1.")
    batch, queries, heads, width = query.shape
    keys = key.shape[1]
    if not (query.size and key.size):
        return jnp.zeros_like(query)
    before, after = window or (queries, keys)
    sizes = chunk_sizes(batch * heads, queries, keys, chunk_bytes)
    plan = _Plan(
        queries=queries,
        keys=keys,
        query_chunk=sizes[0],
        key_chunk=sizes[1],
        before=before,
        after=min(after, 0) if is_causal else after,
        scale=float(1 / np.sqrt(width) if scale is None else scale),
    )
    output = _attention(plan, *vary_alike(*_grouped(query, key, value, mask)))
    output = merge_axes(output, 2, 2)
    return constrain(output, partition_of(query))


def _grouped(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> Any:
    """Queries ``[B, T, K, G, H]``, keys, values and the mask, whose heads become two axes too.

    On explicit axes of a mesh all are sharded alike, by the queries' batch and whole groups of
    heads.
    """
    group = query.shape[2] // key.shape[2]
    in_groups = lambda x, axis: split_axis(in_whole_runs(x, axis, group), axis, (group,))
    query = in_groups(query, 2)
    if mask is not None:
        mask = in_groups(mask, 1) if mask.shape[1] > 1 else mask[:, None]
    partition = partition_of(query)
    if partition is not None:
        batch, _, heads = partition[:3]
        query = constrain(query, PartitionSpec(batch, None, heads, None, None))
        key, value = (constrain(x, PartitionSpec(batch, None, heads, None)) for x in (key, value))
        if mask is not None:
            sides = zip((batch, heads, None, None, None), mask.shape, strict=True)
            mask = constrain(mask, PartitionSpec(*(None if n == 1 else a for a, n in sides)))
    return query, key, value, mask


def chunk_sizes(heads: int, queries: int, keys: int, chunk_bytes: int) -> tuple[int, int]:
    """How many queries and keys a chunk has, for scores ``[heads, queries, keys]``."""
    sides = [LEAST_CHUNK, LEAST_CHUNK]
    while True:
        # The shorter side grows first, that of the keys if both are the same.
        side = 0 if sides[0] < sides[1] else 1
        if 2 * sides[side] > MOST_CHUNK or 8 * heads * sides[0] * sides[1] > chunk_bytes:
            return min(sides[0], queries), min(sides[1], keys)
        sides[side] *= 2


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static numbers of a call: query ``i`` sees keys ``i - before`` to ``i + after``."""

    queries: int
    keys: int
    query_chunk: int
    key_chunk: int
    before: int
    after: int
    scale: float

    @property
    def hides_pairs(self) -> bool:
        """Whether some pairs of a chunk are not seen, those with padding included."""
        is_ragged = self.keys % self.key_chunk > 0
        return is_ragged or self.before < self.queries - 1 or self.after < self.keys - 1

    def key_chunks(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last (exclusive) chunk of keys that the queries of each chunk see."""
        first_query = np.arange(0, self.queries, self.query_chunk)
        last_query = np.minimum(first_query + self.query_chunk, self.queries) - 1
        first_key = np.clip(first_query - self.before, 0, self.keys)
        last_key = np.clip(last_query + self.after, -1, self.keys - 1)
        stops = np.where(first_key > last_key, 0, last_key // self.key_chunk + 1)
        return (first_key // self.key_chunk).astype(np.int32), stops.astype(np.int32)


class _Queries(NamedTuple):
    """What goes with a chunk of queries; in front, the chunks."""

    query: jax.Array  # [chunks, B, K, G, rows, H]
    first_row: jax.Array  # [chunks]
    start: jax.Array  # [chunks]
    stop: jax.Array  # [chunks]
    mask: jax.Array | None  # [chunks, B or 1, K or 1, G or 1, rows or 1, S or 1]


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis in chunks of ``size``, padded with zeros: the chunks come first."""
    short = -x.shape[axis] % size
    if short:
        x = jnp.pad(x, [(0, short * (a == axis)) for a in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split` for the last axis but one, which becomes the second."""
    x = jnp.moveaxis(x, (0, -2), (1, 2))  # [B, chunks, rows, ...]
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _in_chunks(plan: _Plan, query: jax.Array, mask: jax.Array | None) -> _Queries:
    rows = plan.query_chunk
    start, stop = plan.key_chunks()
    if mask is not None:
        whole = jnp.broadcast_to(mask[None], (len(start), *mask.shape))
        mask = whole if mask.shape[3] == 1 else _split(mask, 3, rows)
    chunks = jnp.moveaxis(_split(query, 1, rows), 2, 4)
    first_row = rows * jnp.arange(len(start), dtype=jnp.int32)
    return _Queries(chunks, first_row, jnp.asarray(start), jnp.asarray(stop), mask)


def _key_chunks(plan: _Plan, x: jax.Array) -> jax.Array:
    """``[B, S, K, H]`` as ``[chunks, B, K, keys, H]``."""
    return jnp.moveaxis(_split(x, 1, plan.key_chunk), 2, 3)


def _product(expression: str, a: jax.Array, b: jax.Array) -> jax.Array:
    sums = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(expression, a, b.astype(a.dtype), preferred_element_type=sums)


def _scores(plan: _Plan, part: _Queries, keys: jax.Array, j: jax.Array) -> jax.Array:
    """Scaled scores of a chunk of queries and the ``j``-th of keys, -inf where nothing is seen."""
    scores = plan.scale * _product("bkgth,bksh->bkgts", part.query, keys)
    if plan.hides_pairs:
        row = part.first_row + jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], 0)
        column = j * plan.key_chunk + jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], 1)
        seen = (column >= row - plan.before) & (column <= row + plan.after) & (column < plan.keys)
        scores = jnp.where(seen, scores, -jnp.inf)
    if part.mask is not None:
        mask = part.mask
        if mask.shape[-1] > 1:
            short = -plan.keys % plan.key_chunk
            mask = jnp.pad(mask, [(0, 0)] * 4 + [(0, short)]) if short else mask
            mask = jax.lax.dynamic_slice_in_dim(mask, j * plan.key_chunk, plan.key_chunk, -1)
        scores = jnp.where(mask, scores, -jnp.inf)
    return scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: _Plan, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """The output ``[B, T, K, G, H]`` of grouped queries of that shape."""
    return _forward(plan, query, key, value, mask)[0]


def _forward(
    plan: _Plan, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, Any]:
    keys, values = _key_chunks(plan, key), _key_chunks(plan, value)
    sums = jnp.promote_types(query.dtype, jnp.float32)

    def of_queries(_: None, part: _Queries) -> tuple[None, tuple[jax.Array, jax.Array]]:
        def of_keys(j: jax.Array, carry: Any) -> Any:
            maximum, total, output = carry
            scores = _scores(plan, part, keys[j], j)
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            shrink = jnp.exp(maximum - new_maximum)
            products = _product("bkgts,bksh->bkgth", weights.astype(values.dtype), values[j])
            output = output * shrink[..., None] + products
            return new_maximum, total * shrink + weights.sum(-1), output

        output = jnp.zeros_like(part.query, sums)
        total = jnp.zeros_like(part.query[..., 0], sums)
        # Finite, so that a row that has seen nothing yet has exp(-inf - maximum) = 0.
        lowest = jnp.full_like(total, jnp.finfo(sums).min)
        maximum, total, output = jax.lax.fori_loop(
            part.start, part.stop, of_keys, (lowest, total, output)
        )
        is_blind = total == 0
        output = output / jnp.where(is_blind, 1, total)[..., None]
        # The backward pass gives weights of exp(-inf - inf) = 0 to a query that sees nothing.
        log_total = jnp.where(is_blind, jnp.inf, maximum + jnp.log(total))
        return None, (output.astype(query.dtype), log_total)

    _, (output, log_total) = jax.lax.scan(of_queries, None, _in_chunks(plan, query, mask))
    log_total = jnp.moveaxis(log_total, 0, 3)  # [B, K, G, chunks, rows]
    log_total = merge_axes(log_total, 3, 2)[..., : plan.queries]
    output = name_context(_join(output, plan.queries), 3)
    # One name, because a policy that saves only one of them recomputes everything for the other.
    log_total = checkpoint_name(log_total, CONTEXT)
    return output, (query, key, value, mask, output, log_total)


def _backward(plan: _Plan, saved: Any, gradient: jax.Array) -> Any:
    query, key, value, mask, output, log_total = saved
    keys, values = _key_chunks(plan, key), _key_chunks(plan, value)
    sums = jnp.promote_types(query.dtype, jnp.float32)
    in_chunks = lambda x: jnp.moveaxis(_split(x, 1, plan.query_chunk), 2, 4)
    of_rows = (in_chunks(gradient), in_chunks(output), _split(log_total, 3, plan.query_chunk))

    def of_queries(carry: Any, parts: Any) -> tuple[Any, jax.Array]:
        part, (gradient, output, log_total) = parts
        # The sum over keys of weight times its gradient.
        mean = jnp.sum(output.astype(sums) * gradient.astype(sums), -1)

        def of_keys(j: jax.Array, carry: Any) -> Any:
            d_query, d_keys, d_values = carry
            scores = _scores(plan, part, keys[j], j)
            weights = jnp.exp(scores - log_total[..., None])
            d_weights = _product("bkgth,bksh->bkgts", gradient, values[j])
            d_scores = weights * (d_weights - mean[..., None])
            d_scores = (plan.scale * d_scores).astype(query.dtype)
            weights = weights.astype(query.dtype)
            d_values = d_values.at[j].add(_product("bkgts,bkgth->bksh", weights, gradient))
            d_keys = d_keys.at[j].add(_product("bkgts,bkgth->bksh", d_scores, part.query))
            d_query = d_query + _product("bkgts,bksh->bkgth", d_scores, keys[j])
            return d_query, d_keys, d_values

        carry = (jnp.zeros_like(part.query, sums), *carry)
        d_query, *carry = jax.lax.fori_loop(part.start, part.stop, of_keys, carry)
        return tuple(carry), d_query.astype(query.dtype)

    carry = (jnp.zeros_like(keys, sums), jnp.zeros_like(values, sums))
    given = (_in_chunks(plan, query, mask), of_rows)
    (d_keys, d_values), d_query = jax.lax.scan(of_queries, carry, given)
    d_key, d_value = (_join(x, plan.keys).astype(key.dtype) for x in (d_keys, d_values))
    return _join(d_query, plan.queries), d_key, d_value, None


_attention.defvjp(_forward, _backward)
