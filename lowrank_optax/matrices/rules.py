"""Which leaves of a parameter tree are matrices: rules, and how they are matched to the leaves."""

from collections.abc import Callable
import re
from typing import Any, TypeAlias

import jax
import optax

from lowrank_optax.matrices.flax_layers import is_linen_module, is_nnx_module
from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.matrices.views import WeightDimensionNumbers, is_dimension_numbers, matrix_shape

DimensionNumbersRule: TypeAlias = WeightDimensionNumbers | Callable[[Any], Any] | Any | None
"""One spec for all leaves, a tree of specs (prefixes, None and MaskedNode allowed), or a callable
that makes either from the parameters; None stands for the rule by names, `default_rule`."""

VECTOR_OF_NORM = re.compile(
    r"(norm|(^|[/_])(ln|rms))[^/]*(/(scale|weight|gamma|bias|beta))?$", re.IGNORECASE
)
_CONVOLUTION = re.compile(r"(^|_)conv(?!e)", re.IGNORECASE)


def is_weight(path: str) -> bool:
    """Whether a leaf is, by its names, a weight that a low-rank method is meant for."""
    return named_kind(path) is None


def default_rule(params: Any, is_weight: Callable[[str], bool] = is_weight) -> Any:
    """Dimension numbers by names and shapes alone.

    A leaf is a matrix if its names allow it (``is_weight``) and one of these holds:

    - it has two axes;
    - it is a ``kernel`` of Flax's attention: of ``query``, ``key`` or ``value``
      ``[d, heads, head_dim]`` beside an ``out`` ``[heads, head_dim, d]``, or these stacked;
    - it is the ``kernel`` of a convolution by name (``Conv_0``, ``conv1``): all axes but the last
      are rows;
    - it is stacked, and each layer is one of these. A subtree is known to be stacked by the norms
      in it, whose vectors have a second axis, the size of which all its leaves share in front; a
      ``kernel`` also by its ``bias``.

    Everything else, such as a leaf of three axes that nothing explains, is not a matrix. Axes are
    counted from the end.

    Args:
      params: Any tree of arrays or ``jax.ShapeDtypeStruct``.
      is_weight: Function of a leaf's path: whether it may be a matrix. By default it may if
        `matrices.names.named_kind` is None: embeddings, norms, biases, output heads and the arrays
        of adapters, which have no rank to lose, are not.

    Returns:
      A tree like ``params`` with a spec, or None, for each leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.zeros((4, 3))}, "embed": {"table": jnp.zeros((9, 4))}}
      >>> default_rule(params)["up"]
      {'kernel': WeightDimensionNumbers(reduction_axis=-2, output_axis=-1)}
      >>> print(default_rule(params)["embed"]["table"])
      None
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = _one_layer({normalised_path(path): tuple(leaf.shape) for path, leaf in leaves})

    def spec(path: Any, leaf: Any) -> WeightDimensionNumbers | None:
        if not is_weight(path_string(path)):
            return None
        return _spec_by_name(normalised_path(path), shapes)

    return jax.tree_util.tree_map_with_path(spec, params)


_Shapes: TypeAlias = dict[tuple[str, ...], tuple[int, ...]]


def _one_layer(shapes: _Shapes) -> _Shapes:
    """The shapes, without the first axis where norms show it to be that of stacked layers."""
    stacked = set()
    for names, shape in shapes.items():
        if len(shape) != 2 or not VECTOR_OF_NORM.search("/".join(names[-2:])):
            continue
        for depth in range(len(names)):
            beneath = [s for other, s in shapes.items() if other[:depth] == names[:depth]]
            if len(beneath) > 1 and all(len(s) > 1 and s[0] == shape[0] for s in beneath):
                stacked.add(names[:depth])
                break
    in_stack = lambda names: any(names[:depth] in stacked for depth in range(len(names)))
    return {names: shape[1:] if in_stack(names) else shape for names, shape in shapes.items()}


def _spec_by_name(names: tuple[str, ...], shapes: _Shapes) -> WeightDimensionNumbers | None:
    shape, parent, module = shapes[names], names[:-2], names[-2] if len(names) > 1 else ""
    if len(shape) == 2:
        return WeightDimensionNumbers(-2, -1)
    if len(shape) < 2 or names[-1] != "kernel":
        return None
    bias = shapes.get((*names[:-1], "bias"))
    if _CONVOLUTION.search(module):
        stack_axes = len(bias) - 1 if bias else 0
        window_and_inputs = tuple(range(stack_axes - len(shape), -1))
        return WeightDimensionNumbers(window_and_inputs, -1) if len(window_and_inputs) > 1 else None
    if module in ("query", "key", "value", "out") and _heads_are_axes(parent, shapes):
        if module == "out":
            return WeightDimensionNumbers((-3, -2), -1)
        return WeightDimensionNumbers(-3, (-2, -1))
    if bias == (*shape[:-2], shape[-1]) and bias != shape[1:]:
        return WeightDimensionNumbers(-2, -1)
    return None


def _heads_are_axes(attention: tuple[str, ...], shapes: _Shapes) -> bool:
    """Whether query ``[d, heads, head_dim]`` fits out ``[heads, head_dim, d]``, and could not as
    well be stacked matrices ``[layers, d, heads * head_dim]``."""
    query = shapes.get((*attention, "query", "kernel"), ())
    out = shapes.get((*attention, "out", "kernel"), ())
    if len(query) != len(out) or len(query) not in (3, 4):
        return False
    fits = query[:-3] == out[:-3] and query[-2:] == out[-3:-1]
    fits_stacked = query[:-2] == out[:-2] and query[-1] == out[-2]
    return fits and not fits_stacked


def _is_rule_leaf(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode) or is_dimension_numbers(x)


def resolve_dimension_numbers(
    rule: DimensionNumbersRule, params: Any
) -> list[WeightDimensionNumbers | None]:
    """The dimension numbers of each leaf of ``params``, in the order of ``jax.tree.leaves``.

    A tree of specs is matched by paths, not by tree structure: the tree that an NNX model gives
    before an update (with Variables) and the one inside the update (without) both find their spec,
    and so does a subset of the parameters, or one with ``MaskedNode`` holes.

    Args:
      rule: A spec for every leaf that has at least two axes; a tree of specs, in which a spec (or
        None, "not a matrix") may stand for a whole subtree; a callable of ``params`` that gives
        either; or None for the rule by names, `default_rule`.
      params: Any tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A list with a spec, or None for "not a matrix", for each leaf.

    Raises:
      ValueError: If a tree of specs says nothing of a leaf, or a spec does not fit its leaf.
      TypeError: If the rule is none of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
      >>> resolve_dimension_numbers(None, params)
      [None, WeightDimensionNumbers(reduction_axis=-2, output_axis=-1)]

    Reference:
      The three forms are those of ``optax.contrib.muon``: https://optax.readthedocs.io
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if is_nnx_module(rule) or is_linen_module(rule):
        raise TypeError(
            f"weight_dimension_numbers is a model, {type(rule).__name__}: pass "
            "lro.weight_dimension_numbers(model)."
        )
    if rule is None:
        rule = default_rule
    if callable(rule) and not is_dimension_numbers(rule):
        rule = rule(params)
    if is_dimension_numbers(rule):
        specs = [rule if leaf.ndim >= 2 else None for _, leaf in leaves]
    else:
        specs = _match_by_path(rule, [path for path, _ in leaves])
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        if spec is not None:
            matrix_shape(leaf.shape, spec, path_string(path))
    return specs


def _match_by_path(rule: Any, paths: list[Any]) -> list[WeightDimensionNumbers | None]:
    entries = jax.tree_util.tree_leaves_with_path(rule, is_leaf=_is_rule_leaf)
    for path, entry in entries:
        if not _is_rule_leaf(entry):
            held = "an array" if hasattr(entry, "dtype") else repr(entry)
            raise TypeError(
                f"weight_dimension_numbers holds {held} at {path_string(path)!r}; it takes "
                "WeightDimensionNumbers (or optax's), None, or a tree or callable of these."
            )
    table = {normalised_path(path): entry for path, entry in entries}
    specs = []
    for path in paths:
        names = normalised_path(path)
        prefix = next((names[:n] for n in range(len(names), -1, -1) if names[:n] in table), None)
        if prefix is None:
            raise ValueError(
                f"weight_dimension_numbers says nothing of the parameter {path_string(path)!r}; "
                "give it dimension numbers, or None if it is not a matrix."
            )
        found = table[prefix]
        specs.append(None if isinstance(found, optax.MaskedNode) else found)
    return specs
