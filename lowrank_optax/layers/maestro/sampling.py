"""Which prefix of its directions each layer uses in a step."""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

SamplingMode: TypeAlias = Literal["one_layer", "independent"]
"""How ranks are drawn, see `sample_ranks`."""


def sample_ranks(
    key: jax.Array, ranks: Mapping[str, ArrayLike], mode: SamplingMode = "one_layer"
) -> dict[str, jax.Array]:
    """Draw the rank of each layer for one step, uniformly.

    Draw once per step, outside of ``jax.vmap`` over examples. Devices that share a batch need the
    same key, such as ``jax.random.fold_in(key, step)``.

    Args:
      key: PRNG key of this step.
      ranks: Current rank of each layer, a scalar, or an array for stacked layers: what
        `current_ranks` returns. They may be traced.
      mode: ``"one_layer"`` draws one pair of a layer and a rank among all of them: a layer is
        drawn in proportion to its rank, then a rank from 1 to its own, and the other layers keep
        theirs. ``"independent"`` draws a rank from 1 to its own for each layer. Layers of rank 0
        keep it.

    Returns:
      Ranks like ``ranks``, int32, for `set_ranks`.

    Raises:
      ValueError: If there is no layer or no such mode, or ranks that are not traced are negative or
        all 0.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> ranks = {"up": 64, "down": 32}
      >>> drawn = lro.layers.maestro.sample_ranks(jax.random.key(0), ranks)
      >>> sum(int(drawn[name]) < rank for name, rank in ranks.items()) <= 1
      True

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929. The modes are ``per_layer`` and
      ``across_layers`` of https://github.com/SamuelHorvath/Maestro-LoD.
    """
    if mode not in get_args(SamplingMode):
        raise ValueError(f"mode must be 'one_layer' or 'independent', got {mode!r}.")
    arrays = [jnp.asarray(rank, jnp.int32) for rank in ranks.values()]
    if not arrays:
        raise ValueError("ranks={} has no layer to sample: give current_ranks(model).")
    flat = jnp.concatenate([x.ravel() for x in arrays])
    if not isinstance(flat, jax.core.Tracer):
        if jnp.any(flat < 0):
            negative = [name for name, x in zip(ranks, arrays, strict=True) if jnp.any(x < 0)]
            raise ValueError(f"ranks of {', '.join(negative)} are negative.")
        if not jnp.any(flat):
            raise ValueError("all ranks are 0, so there is nothing to sample.")
    drawn = _one_layer(key, flat) if mode == "one_layer" else _independent(key, flat)
    parts = jnp.split(drawn, np.cumsum([x.size for x in arrays])[:-1])
    both = zip(parts, arrays, strict=True)
    return dict(zip(ranks, (part.reshape(x.shape) for part, x in both), strict=True))


def _one_layer(key: jax.Array, ranks: jax.Array) -> jax.Array:
    ends = jnp.cumsum(ranks)
    # One integer counts the pairs; floats would miss some ranks.
    pair = jax.random.randint(key, (), 0, jnp.maximum(ends[-1], 1), jnp.int32)
    starts = ends - ranks
    is_drawn = (starts <= pair) & (pair < ends)
    return jnp.where(is_drawn, pair - starts + 1, ranks)


def _independent(key: jax.Array, ranks: jax.Array) -> jax.Array:
    drawn = jax.random.randint(key, ranks.shape, 1, jnp.maximum(ranks, 1) + 1, jnp.int32)
    return jnp.minimum(drawn, ranks)
