"""Embeddings whose table is the output head's weight too.

An adapter of such a table changes look-ups alone, so its change must not be in the table itself.
"""

from typing import Any

from flax import nnx

from lowrank_optax.adapters.base import Adapter

_SHARED = (
    "the output head uses the same table, and would change with it. Leave the adapter unmerged "
    "beside the model (LoRA, say), attach it to other layers, or take a model whose head has a "
    "weight of its own."
)


def check_not_tied(model: Any, path: str, layer: Any, change: str) -> None:
    """Refuses to change the table of an embedding that the model's config says is the head's too.

    Args:
      model: The model; only its ``config`` is read.
      path: The layer's path, for the message.
      layer: Any layer.
      change: What would change the table, for the message.

    Raises:
      ValueError: If ``layer`` is that embedding.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not isinstance(layer, nnx.Embed):
        return
    # Tables of another length (positions) are not the head's.
    if layer.num_embeddings == getattr(config, "vocab_size", layer.num_embeddings):
        raise ValueError(f"{path}: {change}, and {_SHARED}")


def check_can_attend(layer: Any) -> None:
    """Raises ValueError if an adapter has changed the table that ``attend`` multiplies by."""
    for adapter in layer.adapters.values():
        if adapter.merged:
            change = (
                f"`attend` is called, but the adapter {adapter.name!r} is merged into the table"
            )
            raise ValueError(f"{change}: {_SHARED} `unmerge` takes it out again.")
        if adapter.method.changes_base:
            raise ValueError(
                f"`attend` is called, but {moved(adapter.method, adapter.name)}: {_SHARED}"
            )


def moved(method: Adapter, name: str) -> str:
    """What an adapter that changes the weight when it is attached does, for a message."""
    kind = type(method).__name__
    return f"the adapter {name!r} ({kind}) moves a part of the table into its arrays"
