"""A model as embedding, a stack of equal blocks, and head: three functions, or an NNX model's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lowrank_optax.matrices.flax_layers import is_nnx_module
from lowrank_optax.matrices.paths import normalised_path

METHODS = ("before_blocks", "through_block", "after_blocks")


class LayeredFunctions(NamedTuple):
    """A model in three functions, whose parameters are a dictionary with an entry ``"blocks"``.

    That entry is the tree of one block's parameters, each stacked ``[layers, ...]``, or a list of
    the blocks' trees, which may differ. All other entries, such as ``"embed"`` and ``"head"``, go
    to ``embed`` and to ``head``, as a dictionary without the blocks; what both use, as a tied
    embedding, may be anywhere in it.

    Frozen weights are a second dictionary of this form, ``frozen`` of the step. Each function gets
    one tree of both, so it is the same whatever is trained.

    Attributes:
      embed: ``embed(params, batch, key) -> x``, the input of the first block, an array.
      block: ``block(layer, x, batch, key) -> x``, of one block's parameters; the result has the
        shape and the dtype of ``x``.
      head: ``head(params, x, batch, key) -> loss``, a scalar, or ``(loss, metrics)``, with a
        dictionary of numbers that are not differentiated.
    """

    embed: Callable[[Any, Any, Any], jax.Array]
    block: Callable[[Any, jax.Array, Any, Any], jax.Array]
    head: Callable[[Any, jax.Array, Any, Any], Any]


class LayeredModel(NamedTuple):
    """What the passes through a model call, whatever it was given as.

    Attributes:
      embed: As of `LayeredFunctions`.
      block: ``block(number, layer, params, x, batch, key) -> x``: the number of a listed block, and
        what is outside of the blocks, come in addition.
      head: As of `LayeredFunctions`.
      frozen: ``frozen(given)``, the dictionary of frozen weights of what the step is given.
      reads_outside: Whether a block may use parameters outside of it.
    """

    embed: Callable[..., jax.Array]
    block: Callable[..., jax.Array]
    head: Callable[..., Any]
    frozen: Callable[[Any], Mapping[str, Any]]
    reads_outside: bool


def layered_model(model: Any, loss: Callable[..., Any] | None, wrt: Any) -> LayeredModel:
    """The functions of a model; checks what `update_in_backward` is given."""
    if is_nnx_module(model):
        from lowrank_optax.training.layered_modules import model_of_module

        return model_of_module(model, loss, wrt)
    if not isinstance(model, LayeredFunctions):
        raise TypeError(
            f"model={model!r} must be a LayeredFunctions, or an nnx.Module with the methods "
            f"{', '.join(METHODS)}."
        )
    if loss is not None:
        raise ValueError(f"loss={loss!r} is for an nnx.Module; here model.head returns the loss.")
    if wrt is not None:
        raise ValueError(f"wrt={wrt!r} is for an nnx.Module; here a step's frozen= is not trained.")
    return LayeredModel(
        model.embed,
        lambda number, layer, params, *others: model.block(layer, *others),
        model.head,
        _frozen_tree,
        reads_outside=False,
    )


def _frozen_tree(given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"frozen is a {type(given).__name__}, and must be a dictionary as params.")
    return given


def joined(trained: Any, frozen: Any) -> Any:
    """One tree of both: dictionaries are joined by their names; None stands for what is missing.

    Raises:
      ValueError: If both have something at one place that is not a dictionary, or lists of
        different lengths.
    """
    if _is_empty(frozen):
        return frozen if trained is None else trained
    if _is_empty(trained):
        return frozen
    if isinstance(trained, Mapping) and isinstance(frozen, Mapping):
        names = dict.fromkeys([*trained, *frozen])
        return {name: joined(trained.get(name), frozen.get(name)) for name in names}
    if jax.tree_util.all_leaves([trained]) or jax.tree_util.all_leaves([frozen]):
        raise ValueError("params has an array where frozen has a dictionary, or the reverse.")
    check_same_length(trained, frozen)
    is_child = lambda x: x is not trained  # one level: either may have None for a whole tree
    return jax.tree.map(joined, trained, frozen, is_leaf=is_child)


def check_same_length(trained: Any, frozen: Any) -> None:
    """Raises ValueError for two lists of which one goes on where the other ends."""
    if not (isinstance(trained, list | tuple) and isinstance(frozen, list | tuple)):
        return
    if len(trained) != len(frozen):
        raise ValueError(
            f"params has a list of {len(trained)} where frozen has one of {len(frozen)}: give both "
            "the same length, with None for an entry that the other has."
        )


def _is_empty(tree: Any) -> bool:
    return tree is None or (isinstance(tree, Mapping) and not tree)


def is_in_stack(params: Any) -> Callable[[Any], bool]:
    """Whether the leaf of a path is stacked ``[layers, ...]``; none is in a list of blocks."""
    stacked = listed_blocks(params.get("blocks", {})) is None
    return lambda path: stacked and normalised_path(path)[0] == "blocks"


def listed_blocks(blocks: Any) -> Mapping[int, Any] | None:
    """The blocks of a list, or of a dictionary with numbers as NNX has it; None for a stack."""
    if type(blocks) in (list, tuple):  # a named tuple is one block's tree
        return dict(enumerate(blocks))
    is_list = isinstance(blocks, Mapping) and all(isinstance(name, int) for name in blocks)
    return blocks if is_list else None
