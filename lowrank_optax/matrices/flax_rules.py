"""Dimension numbers of a whole model, read off the types of its layers."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import jax

from lowrank_optax.compat.flax import is_nnx_state, linen_children
from lowrank_optax.matrices.flax_layers import (
    Kernel,
    infer_axes,
    is_linen_module,
    is_nnx_module,
    read_layer,
)
from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.matrices.rules import default_rule, is_weight
from lowrank_optax.matrices.selection import check_patterns
from lowrank_optax.matrices.views import WeightDimensionNumbers

_Path: TypeAlias = tuple[str, ...]


def weight_dimension_numbers(
    model_or_params: Any, *, include: str | None = None, exclude: str | None = None
) -> Any:
    """Which leaves of a model are matrices, and how: a tree of specs to read, edit and pass on.

    Every optimizer of this library takes the result as ``weight_dimension_numbers=``;
    `selection_table` prints it.

    What is known of a leaf depends on what is given:

    - *An NNX module*: the layers' types tell. ``Linear`` ``[in, out]``; ``LinearGeneral``, and with
      it ``MultiHeadAttention`` (query, key, value ``[d, heads, head_dim]``: ``d`` rows; out
      ``[heads, head_dim, d]``: ``d`` columns); ``Einsum`` (axes that are summed with the input are
      rows, axes of the output alone columns, axes of both batch); ``Conv`` and ``ConvTranspose``
      (window and input channels are rows). Subclasses count. Axes beyond those, of ``nnx.vmap`` or
      ``nnx.scan``, are batch axes: in front if that fits the layer's features, else where they
      must be; None if that cannot be told. Parameters of other modules go by names, as below. A
      shared parameter appears once, where ``nnx.state`` has it.
    - *A bound Linen module* (``module.bind(variables)``): the types tell of submodules made in
      ``setup`` or passed in. Those made in a ``@nn.compact`` method exist only while it runs, and
      go by names, which Flax derives from the types (``Dense_0``, ``Conv_0``); the projections of
      ``MultiHeadDotProductAttention`` are known all the same. A Linen layer does not know its input
      features: with a stack axis other than the first, its bias tells, or nothing does.
    - *A tree of parameters* (dict, ``nnx.State``, arrays or ``jax.ShapeDtypeStruct``): names and
      shapes tell, see ``matrices.rules.default_rule``; so they do in an optimizer whose
      ``weight_dimension_numbers`` is None.

    Left out unless included: embeddings; output heads, by their names; of parameters without a
    known layer whatever ``matrices.names.named_kind`` names; the factors of ``nnx.LoRA``, which are
    of low rank already; convolutions in groups, which are block-diagonal (included, they are
    ``[window * in / groups, out]``). Norms and biases are never matrices.

    Args:
      model_or_params: One of the above.
      include: Regular expression; leaves in whose path (``blocks/mlp/up/kernel``) it is found are
        matrices after all.
      exclude: Regular expression; leaves in whose path it is found are none. It wins over
        ``include``.

    Returns:
      The tree of parameters (for a module, the plain dict of ``nnx.Param`` or of the collection
      ``params``) with a `WeightDimensionNumbers` or None for each leaf.

    Raises:
      ValueError: If a pattern is no regular expression or matches no leaf, if none that ``include``
        matches can be seen as a matrix, or if a Linen module is not bound.

    Example:
      >>> from flax import nnx
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.embed = nnx.Embed(100, 8, rngs=rngs)
      ...         self.attention = nnx.MultiHeadAttention(2, 8, use_bias=False, rngs=rngs)
      >>> specs = weight_dimension_numbers(Net(nnx.Rngs(0)))
      >>> specs["attention"]["query"]["kernel"]
      WeightDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
      >>> specs["attention"]["out"]["kernel"]
      WeightDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
      >>> print(specs["embed"]["embedding"])
      None

    References:
      Layouts of the kernels: https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn
    """
    params, layers = _open(model_or_params)
    leaves = [(normalised_path(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    included = _matching("include", include, shapes)
    excluded = _matching("exclude", exclude, shapes)
    specs, stacks = _read_layers(layers, shapes, included)

    def one_layer(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        names = normalised_path(path)
        stack = () if names in specs else stack_around(names, tuple(leaf.shape), stacks)
        return jax.ShapeDtypeStruct(leaf.shape[len(stack) :], leaf.dtype)

    wanted = {"/".join(names) for names in included}
    by_names = default_rule(
        jax.tree_util.tree_map_with_path(one_layer, params),
        lambda path: is_weight(path) or path in wanted,
    )
    # ``None`` is a leaf of the answer but a subtree for JAX, so the answer is made from params.
    is_spec = lambda x: isinstance(x, WeightDimensionNumbers)
    found = jax.tree_util.tree_leaves_with_path(by_names, is_leaf=is_spec)
    by_name = {normalised_path(path): spec for path, spec in found}
    chosen = {n: None if n in excluded else specs.get(n, by_name.get(n)) for n in shapes}
    _check_included(include, included - excluded, chosen, shapes)
    return jax.tree_util.tree_map_with_path(lambda path, _: chosen[normalised_path(path)], params)


def _open(model_or_params: Any) -> tuple[Any, dict[_Path, list[Kernel] | None]]:
    """The pure tree of parameters, and of each module in it what is known of its weights."""
    if is_nnx_module(model_or_params):
        from flax import nnx

        modules = nnx.iter_modules(model_or_params)
        layers = {tuple(map(str, path)): read_layer(module) for path, module in modules}
        return nnx.to_pure_dict(nnx.state(model_or_params, nnx.Param)), layers
    if is_linen_module(model_or_params):
        from flax import linen

        if model_or_params.scope is None:
            raise ValueError(
                f"the Linen module {type(model_or_params).__name__} is not bound, so it has no "
                "parameters: give module.bind(variables), or the parameters."
            )
        params = linen.meta.unbox(model_or_params.variables.get("params", {}))
        return params, dict(_linen_layers(model_or_params, len(model_or_params.path)))
    if is_nnx_state(model_or_params):
        from flax import nnx

        model_or_params = nnx.to_pure_dict(model_or_params)
    return model_or_params, {}


def _linen_layers(module: Any, root: int) -> Iterator[tuple[_Path, list[Kernel] | None]]:
    kernels = read_layer(module)
    yield module.path[root:], kernels
    if kernels is not None:
        return
    for child in linen_children(module):
        yield from _linen_layers(child, root)


def _read_layers(
    layers: dict[_Path, list[Kernel] | None],
    shapes: dict[_Path, tuple[int, ...]],
    included: set[_Path],
) -> tuple[dict[_Path, WeightDimensionNumbers | None], dict[_Path, tuple[int, ...]]]:
    """Specs of the leaves whose innermost module is known, and the stack sizes of its weights."""
    specs: dict[_Path, WeightDimensionNumbers | None] = {}
    stacks: dict[_Path, tuple[int, ...]] = {}
    for names in shapes:
        prefixes = (names[:n] for n in range(len(names) - 1, -1, -1))
        owner = next((prefix for prefix in prefixes if prefix in layers), None)
        if owner is None or (kernels := layers[owner]) is None:
            continue
        specs[names] = None
        for kernel in kernels:
            if (*owner, *kernel.path) != names:
                continue
            inferred = infer_axes(kernel, shapes[names], shapes.get((*names[:-1], "bias")))
            if inferred is None:
                continue
            # The layer's type says that it is no norm or embedding, whatever its name.
            of_head = named_kind("/".join(names)) == "head"
            wanted = kernel.by_default and not of_head
            stacks[names] = inferred[1]
            specs[names] = inferred[0] if wanted or names in included else None
    return specs, stacks


def stack_around(
    names: _Path, shape: tuple[int, ...], stacks: dict[_Path, tuple[int, ...]]
) -> tuple[int, ...]:
    """Stack sizes of the nearest layers whose types are known, if they and the shape agree."""
    for depth in range(len(names) - 1, -1, -1):
        around = {stack for other, stack in stacks.items() if other[:depth] == names[:depth]}
        if around:
            stack = around.pop()
            return stack if not around and shape[: len(stack)] == stack else ()
    return ()


def _matching(argument: str, pattern: str | None, paths: dict[_Path, Any]) -> set[_Path]:
    if pattern is None:
        return set()
    (compiled,) = check_patterns(argument, [pattern], paths, "parameter")
    return {names for names in paths if compiled.search("/".join(names))}


def _check_included(
    include: str | None, included: set[_Path], chosen: dict[_Path, Any], shapes: dict[_Path, Any]
) -> None:
    if included and all(chosen[names] is None for names in included):
        names = min(included)
        raise ValueError(
            f"include={include!r} matches {'/'.join(names)!r} of shape {shapes[names]}, whose "
            "inputs and outputs cannot be told: put its WeightDimensionNumbers into the tree "
            "that this function returns."
        )
