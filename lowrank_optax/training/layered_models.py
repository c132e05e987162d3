"""A model as embedding, a stack of equal blocks, and head: three functions, or an NNX model's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.flax_layers import is_nnx_module
from lowrank_optax.matrices.paths import path_string

METHODS = ("before_blocks", "through_block", "after_blocks")


class LayeredFunctions(NamedTuple):
    """A model in three functions, whose parameters are a dictionary with an entry ``"blocks"``.

    That entry is the tree of one block's parameters, each stacked ``[layers, ...]``, or a list of
    the blocks' trees. All other entries, such as ``"embed"`` and ``"head"``, go to ``embed`` and to
    ``head``, as a dictionary without the blocks; what both use, as a tied embedding, may be
    anywhere in it.

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


def layered_functions(model: Any, loss: Callable[..., Any] | None) -> LayeredFunctions:
    """The three functions of a model; checks what `update_in_backward` is given."""
    if is_nnx_module(model):
        return _of_nnx(model, loss)
    if not isinstance(model, LayeredFunctions):
        raise TypeError(
            f"model={model!r} must be a LayeredFunctions, or an nnx.Module with the methods "
            f"{', '.join(METHODS)}."
        )
    if loss is not None:
        raise ValueError(f"loss={loss!r} is for an nnx.Module; here model.head returns the loss.")
    return model


def _of_nnx(model: Any, loss: Callable[..., Any] | None) -> LayeredFunctions:
    from flax import nnx

    missing = [name for name in ("blocks", *METHODS) if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} has no {missing[0]!r}: an nnx.Module for update_in_backward "
            f"has an attribute blocks and the methods {', '.join(METHODS)}."
        )
    if not callable(loss):
        raise TypeError(f"loss={loss!r} must be a function loss(model, hidden, targets).")
    others = nnx.state(model.blocks, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
    if names := [path_string(path) for path, _ in jax.tree.leaves_with_path(others)]:
        raise ValueError(
            f"blocks/{names[0]} is neither a parameter nor a random stream: blocks cannot have "
            "frozen weights or statistics here."
        )
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    graph, params, streams, rest = nnx.split(model, nnx.Param, nnx.RngState, ...)
    shapes = jax.tree.map(shape, nnx.as_pure(params))
    # For what it is built of: its weights are not read.
    skeleton = nnx.merge(graph, shapes, streams, rest)
    stacked = not isinstance(model.blocks, nnx.List)
    blocks = [model.blocks] if stacked else list(model.blocks)
    block_graph, _, block_streams = nnx.split(blocks[0], nnx.Param, ...)
    for i, each in enumerate(blocks):
        if not stacked and i not in shapes["blocks"]:
            raise ValueError(f"blocks/{i} has no parameters of its own: blocks cannot share any.")
        if nnx.graphdef(each) != block_graph:
            raise ValueError(
                f"blocks/{i} differs from blocks/0 in its structure or its settings: blocks must "
                "be equal but for the values of their parameters."
            )
    if stacked:
        block_streams = jax.tree.map(lambda x: x[0], block_streams)

    def outside(params: Any, key: Any) -> Any:
        others = {**params, "blocks": shapes["blocks"]}
        return nnx.merge(graph, others, _streams(streams, key), rest)

    def embed(params: Any, batch: Any, key: Any) -> jax.Array:
        return outside(params, key).before_blocks(batch[0])

    def block(layer: Any, x: jax.Array, batch: Any, key: Any) -> jax.Array:
        del batch
        module = nnx.merge(block_graph, layer, _streams(block_streams, key))
        return skeleton.through_block(module, x)

    def head(params: Any, x: jax.Array, batch: Any, key: Any) -> Any:
        module = outside(params, key)
        return loss(module, module.after_blocks(x), batch[1])

    return LayeredFunctions(embed, block, head)


def _streams(variables: Any, key: Any) -> Any:
    """Variables of NNX's random streams, which start again, from this key."""
    if key is None:
        return variables
    leaves, structure = jax.tree.flatten(variables)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    new = [
        jax.random.fold_in(key, i) if is_key(x) else jnp.zeros_like(x) for i, x in enumerate(leaves)
    ]
    return structure.unflatten(new)
