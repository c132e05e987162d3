"""Random-feature attention with the shapes of ``jax.nn.dot_product_attention``."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lowrank_optax.layers.attention.attention_arguments import check_arguments
from lowrank_optax.layers.random_features.feature_maps import RandomFeatures, scaled_features
from lowrank_optax.layers.random_features.linear_attention import (
    LinearAttentionState,
    causal_linear_attention,
    empty_state,
    full_linear_attention,
)
from lowrank_optax.matrices.explicit_sharding import (
    constrain,
    in_whole_runs,
    merge_axes,
    partition_of,
    split_axis,
)


def random_feature_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    features: RandomFeatures | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    gate: jax.Array | None = None,
) -> jax.Array:
    r"""Approximate ``jax.nn.dot_product_attention`` in time linear in the length.

    The softmax's kernel ``exp(scale q · k)`` is estimated, without bias, by products of random
    features; its variance grows with the norms of queries and keys, and falls as ``1 / m``. For
    causal attention the positions are computed in chunks, in float32 at least.

    Args:
      query: Queries ``[B, T, N, H]``.
      key: Keys ``[B, S, K, H]``; each group of ``N / K`` heads of the query shares one.
      value: Values ``[B, S, K, H]``.
      mask: Booleans that broadcast to ``[B, 1, 1, S]``: which keys all queries see.
      features: Number and kind of the features; `RandomFeatures()` by default.
      scale: Positive factor of the scores, not traced; :math:`1 / \sqrt{H}` by default.
      is_causal: Whether query ``i`` sees only keys up to ``i``; then ``T = S``.
      gate: Numbers ``[B, T, K]`` in [0, 1], for causal attention: the part of earlier keys that
        each position keeps; its own key has the weight ``1 - gate``.

    Returns:
      The output ``[B, T, N, H]`` in the query's dtype, 0 where a query sees no key. With positive
      features it is a mean of values with positive weights.

    Raises:
      ValueError: If shapes or dtypes do not fit, the mask depends on the query, a gate is given
        without `is_causal` or is outside [0, 1], or the scale is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 16)) / 2
      >>> features = lro.layers.RandomFeatures(num_features=1024)
      >>> out = lro.layers.random_feature_attention(q, k, v, features=features, is_causal=True)
      >>> plain = jax.nn.dot_product_attention(q, k, v, is_causal=True)
      >>> print(out.shape, bool(jnp.abs(out - plain).mean() < 0.01))
      (1, 256, 2, 16) True

    Reference:
      Peng et al., 2021, https://arxiv.org/abs/2103.02143, equations 5 and 8; Choromanski et al.,
      2020, https://arxiv.org/abs/2009.14794.
    """
    features = RandomFeatures() if features is None else features
    visible = _check(query, key, value, mask, scale)
    if gate is not None and not is_causal:
        raise ValueError("gate is for causal attention: give is_causal=True, too.")
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            "is_causal=True needs the same number of queries and keys, got "
            f"{query.shape[1]} and {key.shape[1]}."
        )
    if not (query.size and key.size):
        return jnp.zeros_like(query)
    if is_causal:
        state = init_random_feature_state(features, key.shape[0], key.shape[2], key.shape[3])
        return _causal(query, key, value, visible, gate, features, scale, state)[0]
    feature_map = _feature_map(features, query.shape[3], scale)
    heads = lambda q, k, v, m: full_linear_attention(q, k, v, feature_map, visible=m)
    per_head = jax.vmap(heads, in_axes=(0, 0, 0, None))
    q, k, v = _by_head(query, key, value)
    out = jax.vmap(per_head)(q, k, v, _like_key(visible, k, 1))
    return _to_layout(out, query)


def decode_random_features(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: LinearAttentionState,
    *,
    features: RandomFeatures | None = None,
    scale: float | None = None,
    gate: jax.Array | None = None,
) -> tuple[jax.Array, LinearAttentionState]:
    """Continue causal `random_feature_attention` by one position or more.

    Args:
      query: Queries ``[B, T, N, H]`` of the new positions.
      key: Their keys ``[B, T, K, H]``.
      value: Their values ``[B, T, K, H]``.
      state: State of all positions before, from `init_random_feature_state` or the last call.
      features: As for the positions before.
      scale: As for the positions before.
      gate: Gates ``[B, T, K]`` of the new positions.

    Returns:
      The output ``[B, T, N, H]`` in the query's dtype, and the state, whose size is constant.

    Raises:
      ValueError: If shapes or dtypes do not fit, or the state is that of other features.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 16))
      >>> features = lro.layers.RandomFeatures(num_features=32)
      >>> state, outputs = lro.layers.init_random_feature_state(features, 1, 2, 16), []
      >>> for t in range(5):
      ...     new = (x[:, t : t + 1] for x in (q, k, v))
      ...     out, state = lro.layers.decode_random_features(*new, state, features=features)
      ...     outputs.append(out)
      >>> whole = lro.layers.random_feature_attention(q, k, v, features=features, is_causal=True)
      >>> print(bool(jnp.allclose(jnp.concatenate(outputs, 1), whole, atol=1e-5)))
      True

    Reference:
      Peng et al., 2021, https://arxiv.org/abs/2103.02143, section 3.1.
    """
    features = RandomFeatures() if features is None else features
    _check(query, key, value, None, scale)
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            "decoding needs the same number of queries and keys, got "
            f"{query.shape[1]} and {key.shape[1]}."
        )
    expected = (key.shape[0], key.shape[2], features.width(), key.shape[3] + 1)
    if state.sums.shape != expected or state.log_scale.shape != expected[:2]:
        raise ValueError(
            f"state has shapes {state.sums.shape} and {state.log_scale.shape}; for these keys and "
            f"features they are {expected} and {expected[:2]}: it is of other features."
        )
    if not query.size:
        return jnp.zeros_like(query), state
    visible = jnp.ones(key.shape[:2], bool)
    return _causal(query, key, value, visible, gate, features, scale, state)


def init_random_feature_state(
    features: RandomFeatures, batch: int, num_heads: int, width: int
) -> LinearAttentionState:
    """Return the state of `decode_random_features` before the first position.

    Args:
      features: Number and kind of the features.
      batch: Number ``B`` of texts.
      num_heads: Number ``K`` of heads of the keys.
      width: Width ``H`` of a head's values.

    Returns:
      Sums ``[B, K, F, H + 1]`` and logarithms of scales ``[B, K]``, float32.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.layers.init_random_feature_state(lro.layers.RandomFeatures(), 2, 4, 64).sums.shape
      (2, 4, 128, 65)
    """
    return empty_state(batch, num_heads, features.width(), width + 1)


def _causal(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    gate: jax.Array | None,
    features: RandomFeatures,
    scale: float | None,
    state: LinearAttentionState,
) -> tuple[jax.Array, LinearAttentionState]:
    feature_map = _feature_map(features, query.shape[3], scale)
    gate = None if gate is None else jnp.moveaxis(_check_gate(gate, key), 2, 1)

    def head(q: Any, k: Any, v: Any, state: Any, gate: Any, visible: Any) -> Any:
        options = {"visible": visible, "gate": gate, "chunk_size": features.chunk_size}
        return causal_linear_attention(q, k, v, feature_map, state, **options)

    per_head = jax.vmap(head, in_axes=(0, 0, 0, 0, 0, None))
    q, k, v = _by_head(query, key, value)
    state, gate = jax.tree.map(lambda x: _like_key(x, k, 2), (state, gate))
    out, state = jax.vmap(per_head)(q, k, v, state, gate, _like_key(visible, k, 1))
    return _to_layout(out, query), state


def _feature_map(features: RandomFeatures, width: int, scale: float | None) -> Any:
    projection = jnp.asarray(features.projection(width))
    root = (width**-0.5 if scale is None else float(scale)) ** 0.5

    def feature_map(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return scaled_features(x * root, projection, features.kind)

    return feature_map


def _by_head(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries ``[B, K, G, T, H]``, keys and values ``[B, K, S, H]``.

    On explicit axes of a mesh all are sharded alike, by the queries' batch and whole groups.
    """
    group = query.shape[2] // key.shape[2]
    grouped = split_axis(in_whole_runs(query, 2, group), 2, (group,))
    q, k, v = jnp.moveaxis(grouped, 1, 3), jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)
    return q, _like_key(k, q, 2), _like_key(v, q, 2)


def _like_key(x: jax.Array, key: jax.Array, axes: int) -> jax.Array:
    """``x``, on explicit axes sharded as the key's first axes, and not on the others."""
    partition = partition_of(key)
    if partition is None:
        return x
    return constrain(x, PartitionSpec(*partition[:axes], *[None] * (x.ndim - axes)))


def _to_layout(out: jax.Array, query: jax.Array) -> jax.Array:
    return merge_axes(jnp.moveaxis(out, 3, 1), 2, 2).astype(query.dtype)


def _check(query: Any, key: Any, value: Any, mask: Any, scale: Any) -> jax.Array:
    """Raise ValueError unless all fits; which keys ``[B, S]`` are visible."""
    check_arguments(query, key, value, mask, None, scale)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be positive, as its root scales queries and keys.")
    shape = (key.shape[0], key.shape[1])
    if mask is None:
        return jnp.ones(shape, bool)
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(
            f"mask must have shape [B, 1, 1, S], got {mask.shape}: random features have no scores "
            "to mask for each query. Use is_causal=True, or dot_product_attention."
        )
    return jnp.broadcast_to(mask[:, 0, 0, :], shape)


def _check_gate(gate: Any, key: jax.Array) -> jax.Array:
    if gate.shape != key.shape[:3]:
        raise ValueError(f"gate must have shape {key.shape[:3]}, got {gate.shape}.")
    if not isinstance(gate, jax.core.Tracer):
        least, most = float(np.min(gate)), float(np.max(gate))
        if not (least >= 0 and most <= 1):
            raise ValueError(f"gate must be in [0, 1], got numbers from {least} to {most}.")
    return gate
