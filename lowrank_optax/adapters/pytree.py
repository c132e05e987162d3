"""Adapters for any JAX function of a tree of parameters.

No layer is known here, only leaves: `init` makes the arrays, and the function is called with a tree
in which adapted leaves are replaced, by their sum with the change (`effective`, `apply`) or by
objects that multiply without forming it (`factored`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.factored import FactoredWeight
from lowrank_optax.adapters.pytree_leaves import (
    Leaf,
    PytreeAdapter,
    keeping_none_of,
    matrices_of,
    replaced,
    summary_of,
)
from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.matrices.rules import DimensionNumbersRule
from lowrank_optax.matrices.selection import Where
from lowrank_optax.matrices.views import from_matrix, to_matrix

__all__ = [
    "FactoredWeight",
    "PytreeAdapter",
    "apply",
    "effective",
    "factored",
    "init",
    "merge",
    "summary",
    "to_lora",
    "unmerge",
]


def init(
    key: jax.Array,
    params: Any,
    method: Adapter,
    where: Where = None,
    weight_dimension_numbers: DimensionNumbersRule = None,
    *,
    rank_pattern: Mapping[str, int | tuple[int, ...]] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> PytreeAdapter:
    """The arrays of an adapter on leaves of a tree of parameters.

    Args:
      key: Of ``jax.random``.
      params: Any tree of arrays; nothing is changed in it.
      method: What to attach, for example ``lro.adapters.LoRA(rank=8)``.
      where: Which leaves: a regular expression found in a path such as ``blocks/0/up/kernel`` (or a
        list), or a function of path and leaf; None for all matrices except embeddings and heads.
      weight_dimension_numbers: Which axes of a leaf are inputs and outputs; other axes are stacks.
        As for `lro.scale_by_projection`; None for the rule by names and shapes.
      rank_pattern: Other ranks for leaves by regular expressions found in their paths.
      alpha_pattern: Likewise other values of ``alpha``.

    Returns:
      The adapter. Take gradients of its ``trainable``.

    Raises:
      ValueError: If ``where`` matches no leaf that is a matrix (the message lists near ones), or a
        leaf of three axes or more whose inputs and outputs only ``weight_dimension_numbers`` can
        tell (where it is None, a warning names such a weight); a pattern matches none of those
        chosen; or the method drops inputs, for which there is no key here.
      TypeError: If ``method`` is none.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 4))}}
      >>> f = lambda params, x: jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
      >>> method, pytree = lro.adapters.LoRA(rank=2), lro.adapters.pytree
      >>> adapter, x = pytree.init(jax.random.key(0), params, method, "up"), jnp.ones((1, 4))
      >>> loss = lambda trainable: f(pytree.factored(params, adapter.replace(trainable)), x).sum()
      >>> print(jax.tree.map(jnp.shape, jax.grad(loss)(adapter.trainable)))
      {'up': {'kernel': {'A': (4, 2), 'B': (2, 8)}}}
    """
    groups.check_method(method)
    if getattr(method, "dropout", 0):
        raise ValueError(
            f"dropout={method.dropout} of {type(method).__name__} would do nothing here, where no "
            "call has a key: leave it out, or adapt a Flax model."
        )
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    found = matrices_of(params, where, weight_dimension_numbers)
    stacks = [groups.Stack(path, to_matrix(x, spec)) for path, (spec, x) in found.items()]
    trees = groups.init_trees(key, method, stacks, rank_pattern, alpha_pattern)
    base, leaves = {}, []
    for stack, (spec, x) in zip(stacks, found.values(), strict=True):
        own = groups.method_at(method, stack.name, rank_pattern, alpha_pattern)
        group = groups.group_of(own, stack.name, stack.weights.shape)
        leaves.append(Leaf(stack.path, spec, own, group, stack.weights.shape[:-2]))
        if stack.path in trees.base:
            base[stack.name] = from_matrix(trees.base[stack.path], spec, like=x).astype(x.dtype)
    return PytreeAdapter(trees.trainable, trees.frozen, base, tuple(leaves))


def effective(params: Any, adapter: PytreeAdapter) -> Any:
    r"""The parameters with their changes added: :math:`W + \Delta`, for a function of any kind.

    Every adapted weight is made anew, so this costs a copy of them all, and backward a gradient of
    that size for each (a temporary, one after the other unless the function scans over a stack).
    The changes themselves are not kept. `apply` spares the copy of the backward pass; `factored`
    all of it.

    Args:
      params: The tree `init` was given.
      adapter: Of `init`.

    Returns:
      The tree with adapted leaves replaced, in their dtype.
    """

    def one(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        return jax.checkpoint(_sum, static_argnums=0)(leaf, value, p)

    return replaced(params, adapter, one)


def apply(
    f: Callable[..., Any], params: Any, adapter: PytreeAdapter, *args: Any, **kwargs: Any
) -> Any:
    """``f(effective(params, adapter), *args, **kwargs)``; weights are made again for backward.

    Between the forward and the backward pass no array of an adapted weight's shape is kept, but
    ``params``; an activation that happens to have such a shape is computed again too.

    Args:
      f: Any function of parameters and more.
      params: The tree `init` was given.
      adapter: Of `init`.
      args: Of ``f``.
      kwargs: Of ``f``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, x, pytree = {"w": jnp.eye(2)}, jnp.ones(2), lro.adapters.pytree
      >>> adapter = pytree.init(jax.random.key(0), params, lro.adapters.LoRA(rank=1))
      >>> print(pytree.apply(lambda params, x: params["w"].T @ x, params, adapter, x))
      [1. 1.]
    """
    values = {normalised_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    policy = keeping_none_of({shape for x in adapter.leaves for shape in x.shapes(values[x.path])})
    run = lambda adapter: f(effective(params, adapter), *args, **kwargs)
    return jax.checkpoint(run, policy=policy)(adapter)


def factored(params: Any, adapter: PytreeAdapter) -> Any:
    """The parameters with each adapted leaf replaced by a `FactoredWeight`.

    For functions that use the adapted leaves as ``x @ weight`` alone (or ``x @ weight.T``, for
    leaves whose dimension numbers say that outputs come first), also inside ``jax.lax.scan``. No
    matrix of the weight's size is made, forward or backward. Arrays shared by a group are repeated
    along the stacks.

    Args:
      params: The tree `init` was given.
      adapter: Of `init`.

    Raises:
      ValueError: If a leaf's inputs and outputs are not its last two axes.
    """

    def one(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> FactoredWeight:
        transposed = leaf.is_transposed()
        if transposed is None:
            raise ValueError(
                f"the leaf {leaf.name} of shape {value.shape} has inputs and outputs {leaf.spec}: "
                "`factored` needs the last two axes. Use `effective`."
            )
        return FactoredWeight(value, leaf.repeated(p), leaf.method, transposed)

    return replaced(params, adapter, one)


def merge(params: Any, adapter: PytreeAdapter) -> Any:
    """The parameters with the adapter folded in: summed in float32, rounded once to their dtype.

    The numbers are those of `effective`, without its rematerialisation.

    Args:
      params: The tree `init` was given.
      adapter: Of `init`.
    """
    return replaced(params, adapter, _sum)


def unmerge(merged: Any, adapter: PytreeAdapter) -> Any:
    """The parameters before `merge`, to the rounding of their dtype.

    Args:
      merged: Of `merge`.
      adapter: As it was then.
    """

    def one(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        matrix, p = to_matrix(value, leaf.spec), leaf.repeated(p)
        before = leaf.method.original(p, leaf.method.unmerged(p, matrix))
        return from_matrix(before, leaf.spec, like=value)

    return replaced(merged, adapter, one, from_base=False)


def to_lora(adapter: PytreeAdapter) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Each leaf's change as two factors: ``{path: ([*batch, d_in, r], [*batch, r, d_out])}``.

    Raises:
      TypeError: If the method's change is of no low rank.
    """
    arrays = adapter.arrays()
    return {x.name: x.method.to_lora(x.repeated(arrays[x.path])) for x in adapter.leaves}


def summary(params: Any, adapter: PytreeAdapter) -> Any:
    """What is attached where, with counts and bytes: an `AdapterSummary`, to print or to read.

    Args:
      params: The tree `init` was given, or its shapes.
      adapter: Of `init`, or its shapes.
    """
    return summary_of(params, adapter)


def _sum(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    matrix = to_matrix(value, leaf.spec)
    summed = leaf.method.merged(leaf.repeated(p), matrix).weight
    return from_matrix(summed, leaf.spec, like=value)
