"""Adapters for any JAX function of a tree of parameters.

No layer is known here, only leaves: `init` makes the arrays, and the function is called with a tree
in which adapted leaves are replaced, by their sum with the change (`effective`, `apply`) or by
objects that multiply without forming it (`factored`).
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter, counts_of, parameter_count
from lowrank_optax.adapters.factored import FactoredWeight
from lowrank_optax.adapters.folding import check_invertible
from lowrank_optax.adapters.layer_calls import on_derivative, refuse
from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.matrices.rules import (
    DimensionNumbersRule,
    default_rule,
    resolve_dimension_numbers,
)
from lowrank_optax.matrices.selection import Path, Where, path_string
from lowrank_optax.matrices.views import (
    WeightDimensionNumbers,
    from_matrix,
    matrix_shape,
    to_matrix,
)
from lowrank_optax.modules.select import select

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


class Leaf(NamedTuple):
    """An adapted leaf.

    Attributes:
      path: Its path.
      spec: Its axes of inputs and outputs, counted from the end.
      method: The method with the rank of this leaf.
      group: The key of the arrays that it shares with others.
      batch: The axes of its matrices, sizes of the stacks.
    """

    path: Path
    spec: WeightDimensionNumbers
    method: Adapter
    group: str
    batch: tuple[int, ...]

    @property
    def name(self) -> str:
        """The path as patterns see it."""
        return path_string(self.path)

    def repeated(self, p: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The arrays with the axes of the leaf's matrices in front, also shared ones."""
        return {
            name: jnp.broadcast_to(x, (*self.batch, *x.shape)) if name in self.method.shared else x
            for name, x in p.items()
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PytreeAdapter:
    """An adapter on a tree of parameters; itself a pytree.

    Attributes:
      trainable: ``PATH/ARRAY`` in nested dictionaries; ``adapter_groups/GROUP/ARRAY`` for those
        that leaves share.
      frozen: Likewise, what is not trained.
      base: By path, leaves that the method has changed (PiSSA's): they are used instead of the
        parameters' own, which may be dropped.
      leaves: What it is attached to.
    """

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    base: dict[str, jax.Array]
    leaves: tuple[Leaf, ...] = dataclasses.field(metadata={"static": True})

    def replace(self, trainable: dict[str, Any]) -> "PytreeAdapter":
        """The same adapter with other trained arrays."""
        return dataclasses.replace(self, trainable=trainable)

    def arrays(self) -> dict[Path, dict[str, jax.Array]]:
        """The arrays of each leaf by its path, shared ones too."""
        own = groups.layers_of(self.trainable, self.frozen)
        shared = groups.shared_of(self.trainable, self.frozen)
        return {x.path: {**own.get(x.path, {}), **shared.get(x.group, {})} for x in self.leaves}


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
      key: PRNG key.
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
      TypeError: If ``method`` is not an adapter.

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
    found = _matrices(params, where, weight_dimension_numbers)
    stacks = [groups.Stack(path, to_matrix(x, spec)) for path, (spec, x) in found.items()]
    trees = groups.init_trees(key, method, stacks, rank_pattern, alpha_pattern)
    base, leaves = {}, []
    for stack, (spec, x) in zip(stacks, found.values(), strict=True):
        own = groups.method_at(method, stack.name, rank_pattern, alpha_pattern)
        group = groups.group_of(own, stack.name, stack.weights.shape)
        leaves.append(Leaf(stack.path, spec, own, group, stack.weights.shape[:-2]))
        if stack.path in trees.base:
            base[stack.name] = from_matrix(trees.base[stack.path], spec, x).astype(x.dtype)
    return PytreeAdapter(trees.trainable, trees.frozen, base, tuple(leaves))


def effective(params: Any, adapter: PytreeAdapter) -> Any:
    r"""The parameters with their changes added: :math:`W + \Delta`, for a function of any kind.

    This costs a copy of all adapted weights, and backward a gradient of that size for each (a
    temporary, one after the other unless the function scans over a stack). The changes themselves
    are not saved. `apply` spares the copy of the backward pass; `factored` all of it.

    Args:
      params: The tree `init` was given.
      adapter: The result of `init`.

    Returns:
      The tree with adapted leaves replaced, in their dtype.

    Raises:
      ValueError: If it is differentiated with respect to arrays of a method that collects
        statistics of inputs (PRILoRA).
    """

    def one(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        summed = jax.checkpoint(_sum, static_argnums=0)(leaf, value, p)
        statistics = {name: p[name] for name in leaf.method.statistics & p.keys()}
        message = _NO_STATISTICS.format(leaf.name, type(leaf.method).__name__)
        return on_derivative(refuse, message, summed, statistics) if statistics else summed

    return _replaced(params, adapter, one)


_NO_STATISTICS = (
    "{0}: a gradient by the statistics of {1} is asked for, which needs the inputs that the weight "
    "is multiplied by, and a sum with the weight has no such inputs: use `factored`."
)


def apply(
    f: Callable[..., Any], params: Any, adapter: PytreeAdapter, *args: Any, **kwargs: Any
) -> Any:
    """``f(effective(params, adapter), *args, **kwargs)``; weights are computed again for backward.

    Between the forward and the backward pass no array of an adapted weight's shape is saved, except
    ``params``; an activation that happens to have such a shape is computed again too.

    Args:
      f: Any function of parameters and more.
      params: The tree `init` was given.
      adapter: The result of `init`.
      args: Further arguments of ``f``.
      kwargs: Keyword arguments of ``f``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, x, pytree = {"w": jnp.eye(2)}, jnp.ones(2), lro.adapters.pytree
      >>> adapter = pytree.init(jax.random.key(0), params, lro.adapters.LoRA(rank=1))
      >>> print(pytree.apply(lambda params, x: params["w"].T @ x, params, adapter, x))
      [1. 1.]
    """
    values = _by_path(params)
    shapes = set()  # those of a weight, of its stack of matrices, and of their parts
    for leaf in adapter.leaves:
        whole = tuple(values[leaf.path].shape)
        for shape in (whole, (*leaf.batch, *matrix_shape(whole, leaf.spec)[-2:])):
            shapes |= {shape[n:] for n in range(len(leaf.batch) + 1)}

    def saved(primitive: Any, *avals: Any, **params: Any) -> bool:
        result, _ = primitive.abstract_eval(*avals, **params)
        results = result if primitive.multiple_results else [result]
        return not any(getattr(x, "shape", None) in shapes for x in results)

    run = lambda adapter: f(effective(params, adapter), *args, **kwargs)
    return jax.checkpoint(run, policy=saved)(adapter)


def factored(params: Any, adapter: PytreeAdapter) -> Any:
    """The parameters with each adapted leaf replaced by a `FactoredWeight`.

    For functions that use the adapted leaves as ``x @ weight`` alone (or ``x @ weight.T``, for
    leaves whose dimension numbers say that outputs come first), also inside ``jax.lax.scan``. No
    matrix of the weight's size is made, forward or backward. Arrays shared by a group are repeated
    along the stacks. Arguments are those of `effective`.

    Raises:
      ValueError: If a leaf's inputs and outputs are not its last two axes.
    """

    def one(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> FactoredWeight:
        inputs, outputs = leaf.spec.reduction_axis, leaf.spec.output_axis
        if {inputs, outputs} != {(-2,), (-1,)}:
            raise ValueError(
                f"the leaf {leaf.name} of shape {value.shape} has inputs and outputs {leaf.spec}: "
                "`factored` needs the last two axes. Use `effective`."
            )
        return FactoredWeight(value, leaf.repeated(p), leaf.method, transposed=inputs == (-1,))

    return _replaced(params, adapter, one)


def merge(params: Any, adapter: PytreeAdapter) -> Any:
    """The parameters with the adapter folded in: summed in float32, rounded once to their dtype.

    The numbers and the arguments are those of `effective`, without its rematerialisation.
    """
    return _replaced(params, adapter, _sum)


def unmerge(merged: Any, adapter: PytreeAdapter) -> Any:
    """The parameters before `merge` with this adapter, to the rounding of their dtype.

    Raises:
      ValueError: If a change that depends on the weight has no inverse (not checked under a
        transformation, where the leaf is NaN).
    """

    def one(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        matrix, p = to_matrix(value, leaf.spec), leaf.repeated(p)
        before = leaf.method.original(p, leaf.method.unmerged(p, matrix))
        check_invertible(leaf.name, leaf.method, before)
        return from_matrix(before, leaf.spec, value)

    return _replaced(merged, dataclasses.replace(adapter, base={}), one)


def to_lora(adapter: PytreeAdapter) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Each leaf's change as two factors: ``{path: ([*batch, d_in, r], [*batch, r, d_out])}``.

    Raises:
      TypeError: If the method's change is not of low rank.
    """
    arrays = adapter.arrays()
    return {x.name: x.method.to_lora(x.repeated(arrays[x.path])) for x in adapter.leaves}


def summary(params: Any, adapter: PytreeAdapter) -> Any:
    """What is attached where, with counts and bytes: an `AdapterSummary`, to print or to read.

    Arguments are those of `effective`, or their shapes.
    """
    from lowrank_optax.adapters.summaries import AdapterSummary, SummaryRow, row_of  # needs Flax

    trees, values, rows = (adapter.trainable, adapter.frozen), _by_path(params), []
    for leaf in adapter.leaves:
        arrays = (groups.layers_of(tree, {}).get(leaf.path, {}) for tree in trees)
        matrix = matrix_shape(values[leaf.path].shape, leaf.spec)
        rows.append(row_of(leaf.name, matrix, "default", leaf.method, arrays, 1.0))
    for group in groups.shared_of(*trees):
        counts = counts_of(*(groups.shared_of(tree, {}).get(group, {}) for tree in trees))
        label = f"{groups.GROUPS}/{group}"
        rows.append(SummaryRow(label, "–", "default", "shared", None, *counts, ""))
    return AdapterSummary(rows, parameter_count(params))


def _by_path(params: Any) -> dict[Path, Any]:
    return {normalised_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}


def _matrices(
    params: Any, where: Where, rule: DimensionNumbersRule
) -> dict[Path, tuple[WeightDimensionNumbers, jax.Array]]:
    """The leaves that are meant, by path: their dimension numbers from the end, and values."""
    leaves = _by_path(params)
    specs = dict(zip(leaves, resolve_dimension_numbers(rule, params), strict=True))
    default = {path for path, spec in specs.items() if spec is not None}
    unclear: set[Path] = set()
    if rule is None:
        no_matrices = ("biases", "scales")
        if where is not None:
            # A pattern may mean embeddings and heads too; stacked biases only look like matrices.
            may_be = lambda path: named_kind(path) not in no_matrices
            every = resolve_dimension_numbers(lambda p: default_rule(p, may_be), params)
            specs = {path: specs[path] or spec for path, spec in zip(leaves, every, strict=True)}
        # Weights of three axes or more without dimension numbers; embeddings only if asked for.
        excluded = ("adapters", *no_matrices, "norms")
        meant = lambda kind: kind is None if where is None else kind not in excluded
        unclear = {
            path
            for path, x in leaves.items()
            if specs[path] is None and x.ndim > 2 and meant(named_kind(path_string(path)))
        }
    things = {path: x for path, x in leaves.items() if specs[path] is not None or path in unclear}
    found = select(things, where, groups.KIND, default=[path for path in things if path in default])
    for path in things if where is None else found:
        if path in unclear:
            message = (
                f"{path_string(path)} {leaves[path].shape}, of which names and shapes don't tell "
                "the axes of inputs and outputs: give weight_dimension_numbers, as "
                "WeightDimensionNumbers(-2, -1) for stacks of [d_in, d_out]."
            )
            if where is not None:
                raise ValueError(f"where={where!r} matches {message}")
            warnings.warn(f"no adapter is attached to {message}", stacklevel=3)
            break

    def from_the_end(spec: Any, ndim: int) -> WeightDimensionNumbers:
        axes = ((a,) if isinstance(a, int) else a for a in (spec.reduction_axis, spec.output_axis))
        return WeightDimensionNumbers(*(tuple(n % ndim - ndim for n in each) for each in axes))

    return {path: (from_the_end(specs[path], x.ndim), x) for path, x in found.items()}


def _replaced(
    params: Any,
    adapter: PytreeAdapter,
    one: Callable[[Leaf, jax.Array, dict[str, jax.Array]], Any],
) -> Any:
    """The tree with ``one(leaf, value, arrays)`` instead of each adapted leaf.

    Raises:
      ValueError: If the tree has no such leaf.
    """
    arrays, leaves, paths = adapter.arrays(), {x.path: x for x in adapter.leaves}, _by_path(params)
    for leaf in adapter.leaves:
        if leaf.path not in paths:
            raise ValueError(f"params has no leaf {leaf.name}: the adapter is that of other ones.")

    def new(path: Any, value: Any) -> Any:
        leaf = leaves.get(normalised_path(path))
        if leaf is None:
            return value
        return one(leaf, adapter.base.get(leaf.name, value), arrays[leaf.path])

    return jax.tree_util.tree_map_with_path(new, params)


def _sum(leaf: Leaf, value: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    summed = leaf.method.merged(leaf.repeated(p), to_matrix(value, leaf.spec)).weight
    return from_matrix(summed, leaf.spec, value)
