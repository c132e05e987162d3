"""Layers that are no more than what Flax makes, so that something else may compute the same."""

from typing import Any

import jax


def check_plain_layer(path: str, layer: Any, also: tuple[type, ...] = ()) -> None:
    """Raises ValueError if a layer is more than an ``nnx.Linear`` or ``nnx.Conv``.

    That is if it has adapters, a mask, or a call or product of its own, or if layers are stacked
    along other axes than the first ones.

    Args:
      path: Path of the layer, for messages.
      layer: An ``nnx.Linear`` or ``nnx.Conv``.
      also: Subclasses that count as plain layers.
    """
    from flax import nnx

    kind = "nnx.Conv" if isinstance(layer, nnx.Conv) else "nnx.Linear"
    plain = {
        "dot_general": jax.lax.dot_general,
        "conv_general_dilated": jax.lax.conv_general_dilated,
        "mask": None,
        "preferred_element_type": None,
    }
    own = [name for name, value in plain.items() if getattr(layer, name, value) is not value]
    if type(layer) not in (nnx.Linear, nnx.Conv, *also) or own:
        has = f"its own {own[0]}" if own else f"a call of its own, of {type(layer).__name__}"
        has = "adapters" if hasattr(layer, "adapters") else has
        raise ValueError(
            f"{path} is more than an {kind} (it has {has}): convert plain layers, or leave it out "
            "by where."
        )
    groups = getattr(layer, "feature_group_count", 1)
    window = getattr(layer, "kernel_size", ())
    shape = (*window, layer.in_features // groups, layer.out_features)
    if layer.kernel.shape[-len(shape) :] != shape:
        raise ValueError(
            f"the kernel of {path} has shape {layer.kernel.shape}, and one layer has {shape}: "
            "stack layers along the first axis."
        )
