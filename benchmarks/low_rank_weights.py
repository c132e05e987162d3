"""The baseline to measure projected optimizers against: weights that are low-rank themselves.

Each kernel ``[m, n]`` is a product ``b a`` of a ``[m, r]`` and a ``[r, n]`` matrix, both trained.
Weights, gradients and optimizer state are all of the factors' size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import (
    DimensionNumbersRule,
    from_matrix,
    resolve_dimension_numbers,
    to_matrix,
)


def factorize(
    key: jax.Array, params: optax.Params, rule: DimensionNumbersRule, rank: int
) -> optax.Params:
    """New factors in the place of every matrix, whose product has the spread of its entries.

    ``b`` has entries of variance ``1/m``, as He et al. (https://arxiv.org/abs/1502.01852) scale a
    linear layer, and ``a`` what remains.

    Args:
      key: Seeds the factors.
      params: The full weights; of the matrices only shapes and spread are used.
      rule: Which leaves are matrices: see `resolve_dimension_numbers`.
      rank: Size of the axis between the factors.

    Returns:
      The tree with ``{"b": [*batch, m, r], "a": [*batch, r, n]}`` in the place of each matrix.
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    specs = resolve_dimension_numbers(rule, params)
    return treedef.unflatten(
        leaf if spec is None else _factors(one, to_matrix(leaf, spec), rank)
        for one, leaf, spec in zip(keys, leaves, specs, strict=True)
    )


def _factors(key: jax.Array, matrix: jax.Array, rank: int) -> dict[str, jax.Array]:
    *batch, m, n = matrix.shape
    r = min(rank, m, n)
    left, right = jax.random.split(key)
    spread = jnp.std(matrix) * math.sqrt(m / r)
    return {
        "b": jax.random.normal(left, (*batch, m, r), matrix.dtype) / math.sqrt(m),
        "a": jax.random.normal(right, (*batch, r, n), matrix.dtype) * spread,
    }


def multiply(factors: optax.Params, like: Any, rule: DimensionNumbersRule) -> optax.Params:
    """The full weights: the inverse of `factorize` where the weights have that rank.

    Args:
      factors: A tree of `factorize`.
      like: A tree with the shapes and dtypes of the full weights.
      rule: As for `factorize`.
    """
    leaves, treedef = jax.tree.flatten(like)
    specs = resolve_dimension_numbers(rule, like)
    return treedef.unflatten(
        own if spec is None else from_matrix(own["b"] @ own["a"], spec, leaf)
        for own, leaf, spec in zip(treedef.flatten_up_to(factors), leaves, specs, strict=True)
    )
