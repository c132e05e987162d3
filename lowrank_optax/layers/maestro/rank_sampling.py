"""Which prefix of its directions each layer uses in a step."""

from collections.abc import Iterator, Mapping
import math
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
      ValueError: If there is no layer or no such mode, a rank is not an integer, or ranks that are
        not traced are negative or all 0.

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
    flat = _checked(ranks)
    if mode == "one_layer":
        total = jnp.maximum(jnp.sum(flat), 1)
        # One integer counts the pairs; floats would miss some ranks.
        return _of_pair(ranks, flat, jax.random.randint(key, (), 0, total, jnp.int32))
    drawn = jax.random.randint(key, flat.shape, 1, jnp.maximum(flat, 1) + 1, jnp.int32)
    return _by_path(ranks, jnp.minimum(drawn, flat))


def shuffled_ranks(
    key: jax.Array, ranks: Mapping[str, ArrayLike]
) -> Iterator[dict[str, jax.Array]]:
    """Yield ranks for as many steps as there are pairs of a layer and a rank, each pair once.

    These are the draws of the mode ``"one_layer"`` without replacement, in random order, as in the
    official code. Start again with another key after the last of them, and when ranks have changed.

    Args:
      key: PRNG key.
      ranks: Current rank of each layer, as for `sample_ranks`, not traced.

    Yields:
      Ranks of a step, for `set_ranks`: arguments of a compiled step.

    Raises:
      ValueError: As `sample_ranks`.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> steps = lro.layers.maestro.shuffled_ranks(jax.random.key(0), {"up": 2, "down": 1})
      >>> sorted((int(ranks["up"]), int(ranks["down"])) for ranks in steps)
      [(1, 1), (2, 1), (2, 1)]

    Reference:
      https://github.com/SamuelHorvath/Maestro-LoD, ``maestro/samplers``.
    """
    flat = _checked(ranks)
    for pair in np.asarray(jax.random.permutation(key, int(flat.sum()))):
        yield _of_pair(ranks, flat, pair)


def _checked(ranks: Mapping[str, ArrayLike]) -> jax.Array:
    """The ranks of all layers, one after another."""
    if not ranks:
        raise ValueError("ranks={} has no layer to sample: give current_ranks(model).")
    for name, rank in ranks.items():
        if not jnp.issubdtype(jnp.result_type(rank), jnp.integer):
            raise ValueError(f"the rank of {name} must be an integer, got {rank!r}.")
    arrays = [jnp.asarray(rank, jnp.int32) for rank in ranks.values()]
    flat = jnp.concatenate([x.ravel() for x in arrays])
    if not isinstance(flat, jax.core.Tracer):
        if jnp.any(flat < 0):
            negative = [name for name, x in zip(ranks, arrays, strict=True) if jnp.any(x < 0)]
            raise ValueError(f"ranks must not be negative, and those of {', '.join(negative)} are.")
        if not jnp.any(flat):
            raise ValueError("all ranks are 0, so there is nothing to sample.")
    return flat


def _of_pair(
    ranks: Mapping[str, ArrayLike], flat: jax.Array, pair: ArrayLike
) -> dict[str, jax.Array]:
    """The ranks of a step by the number of its pair of a layer and a rank."""
    ends = jnp.cumsum(flat)
    starts = ends - flat
    is_drawn = (starts <= pair) & (pair < ends)
    return _by_path(ranks, jnp.where(is_drawn, pair - starts + 1, flat))


def _by_path(ranks: Mapping[str, ArrayLike], flat: jax.Array) -> dict[str, jax.Array]:
    shapes = [jnp.shape(rank) for rank in ranks.values()]
    parts = jnp.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    both = zip(parts, shapes, strict=True)
    return dict(zip(ranks, (part.reshape(shape) for part, shape in both), strict=True))
