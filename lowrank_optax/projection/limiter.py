"""A limit on how fast the norm of an update may grow from step to step (Fira)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import (
    DimensionNumbersRule,
    explicit_sharding,
    from_matrix,
    matrix_partition,
    resolve_dimension_numbers,
    to_matrix,
)
from lowrank_optax.projection.view import compute_dtype

_TINY = 1e-8


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`.

    Attributes:
      norm: Last norm after limiting, float32 (float64 of float64 updates): ``[*batch]`` for a stack
        of matrices, a scalar for other leaves; zero at first.
    """

    norm: Any


def limit_norm_growth(
    gamma: float = 1.01, weight_dimension_numbers: DimensionNumbersRule = None
) -> optax.GradientTransformation:
    r"""Scales each update down to at most ``gamma`` times the norm of the last one.

    .. math::
      S \leftarrow S \cdot \min(1, \; \gamma \, \lVert S_{t-1} \rVert_F / \lVert S \rVert_F)

    The first update passes, and so does one after an update of norm zero. The layers of a stack are
    limited one by one; the state is one float per matrix.

    Args:
      gamma: Largest growth from one step to the next: 1.01 in Fira and APOLLO, 1.1 in SUMO.
      weight_dimension_numbers: Which leaves are (stacks of) matrices, and how: see
        ``lowrank_optax.matrices.resolve_dimension_numbers``. Other leaves have one norm each.

    Raises:
      ValueError: If `gamma` is not positive.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np
      >>> tx = lro.limit_norm_growth(gamma=2.0)
      >>> state = tx.init({"kernel": jnp.zeros((1, 2))})
      >>> for size in (1.0, 10.0):
      ...     updates, state = tx.update({"kernel": jnp.array([[3.0, 4.0]]) * size}, state)
      >>> print(np.asarray(updates["kernel"]).round(3))  # of norm 10, not 50
      [[6. 8.]]

    Reference:
      Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623, Algorithm 1 (norm-growth limiter).
    """
    if isinstance(gamma, int | float) and gamma <= 0:
        raise ValueError(f"gamma={gamma!r} must be positive.")

    def init_fn(params: optax.Params) -> LimitNormGrowthState:
        specs = resolve_dimension_numbers(weight_dimension_numbers, params)
        leaves, treedef = jax.tree.flatten(params)
        norms = [_zero_norms(x, spec) for x, spec in zip(leaves, specs, strict=True)]
        return LimitNormGrowthState(treedef.unflatten(norms))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LimitNormGrowthState]:
        del params
        specs = resolve_dimension_numbers(weight_dimension_numbers, updates)
        leaves, treedef = jax.tree.flatten(updates)
        rows = zip(leaves, specs, treedef.flatten_up_to(state.norm), strict=True)
        pairs = [_limited(*row, gamma) for row in rows]
        new, norms = (treedef.unflatten([pair[i] for pair in pairs]) for i in (0, 1))
        return new, LimitNormGrowthState(norms)

    return optax.GradientTransformation(init_fn, update_fn)


def growth_factor(
    norm: jax.Array, previous: jax.Array, gamma: float
) -> tuple[jax.Array, jax.Array]:
    """The factor that limits a norm, and the norm to save; all of one shape and dtype."""
    allowed = gamma * (previous + _TINY)
    limited = (previous > 0) & (norm > allowed)
    factor = jnp.where(limited, allowed / jnp.where(limited, norm, 1), 1)
    return factor, jnp.where(jnp.isfinite(norm), norm * factor, previous)


def _zero_norms(leaf: jax.Array, spec: Any) -> jax.Array:
    if spec is None:
        return jnp.zeros((), compute_dtype(leaf.dtype))
    matrix = to_matrix(leaf, spec)
    partition = explicit_sharding.partition_of_batch(matrix)
    return explicit_sharding.zeros(matrix.shape[:-2], compute_dtype(leaf.dtype), partition)


def _limited(
    leaf: jax.Array, spec: Any, previous: jax.Array, gamma: float
) -> tuple[jax.Array, jax.Array]:
    matrix = leaf if spec is None else to_matrix(leaf, spec)
    squares = jnp.square(matrix.astype(compute_dtype(leaf.dtype)))
    norm = jnp.sqrt(jnp.sum(squares, axis=None if spec is None else (-2, -1)))
    factor, norm = growth_factor(norm, previous, gamma)
    norm = norm.astype(previous.dtype)
    if spec is None:
        return (leaf * factor).astype(leaf.dtype), norm
    limited = (matrix * factor[..., None, None]).astype(leaf.dtype)
    limited = explicit_sharding.constrain(limited, matrix_partition(leaf, spec))
    return from_matrix(limited, spec, leaf), norm
