"""Decoders whose blocks are one, to and from decoders whose blocks have weights of their own."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices.paths import path_string
from lowrank_optax.models.decoder import Decoder
from lowrank_optax.models.decoder_block import NORMS


def unshare_blocks(model: Decoder) -> Decoder:
    """A decoder with the same outputs, each of whose blocks has its own copy of the weights.

    For continued training without sharing, and for Hugging Face's files, which have no shared
    blocks.

    Args:
        model: a decoder made with `share_blocks=True`; it stays as it is.

    Returns:
        The new decoder, `num_hidden_layers` times as large in its blocks.

    Raises:
        ValueError: its blocks are not shared.

    Example:
        >>> from flax import nnx
        >>> from lowrank_optax.models import Decoder, decoder_config, unshare_blocks
        >>> config = decoder_config("llama-tiny", vocab_size=257)
        >>> model = Decoder(config, rngs=nnx.Rngs(0), share_blocks=True)
        >>> model.blocks.mlp.up.kernel.shape
        (128, 344)
        >>> unshare_blocks(model).blocks.mlp.up.kernel.shape
        (4, 128, 344)
    """
    if not model.share_blocks:
        raise ValueError("the blocks of this decoder have weights of their own already")
    model = nnx.clone(model)
    model.share_blocks = False
    if isinstance(model.blocks, nnx.List):
        model.blocks = nnx.List([nnx.clone(block) for block in model.blocks])
        return model
    graphdef, norms, shared = nnx.split(model.blocks, _is_norm, ...)
    count = model.config.num_hidden_layers
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), shared)
    model.blocks = nnx.merge(graphdef, norms, copies)
    return model


def share_blocks(model: Decoder) -> Decoder:
    """The reverse of `unshare_blocks`, for a decoder whose blocks are equal but for their norms.

    Args:
        model: a decoder without shared blocks; it stays as it is.

    Returns:
        The new decoder.

    Raises:
        ValueError: its blocks are shared already, or differ: the error names the first weight that
            does.

    Example:
        See `unshare_blocks`.
    """
    if model.share_blocks or model.first_block is not None:
        raise ValueError("the blocks of this decoder are shared already, or not of one kind")
    model = nnx.clone(model)
    model.share_blocks = True
    if isinstance(model.blocks, nnx.List):
        states = [nnx.split(block, _is_norm, ...)[2] for block in model.blocks]
        _check_equal(jax.tree.map(lambda *layers: np.stack(layers), *states))
        first = model.blocks[0]
        for block in model.blocks:
            block.attention, block.mlp = first.attention, first.mlp
        return model
    graphdef, norms, stacked = nnx.split(model.blocks, _is_norm, ...)
    _check_equal(stacked)
    model.blocks = nnx.merge(graphdef, norms, jax.tree.map(lambda x: x[0], stacked))
    return model


def _is_norm(path: Any, _: Any) -> bool:
    return path[0] in NORMS


def _check_equal(stacked: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(stacked):
        layers = np.asarray(leaf)
        differs = (layers != layers[:1]).reshape(len(layers), -1).any(axis=1)
        if differs.any():
            raise ValueError(
                f"{path_string(path)} of block {int(differs.argmax())} is not that of block 0: "
                "blocks with different weights cannot become one"
            )
