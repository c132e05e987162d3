"""Layers that are no more than what Flax makes, so that something else may compute the same."""

from collections import Counter
from collections.abc import Mapping
import inspect
from typing import Any

from lowrank_optax.matrices.selection import Path, path_string

_OWN = ("dot_general", "conv_general_dilated", "mask", "preferred_element_type", "promote_dtype")
"""Arguments that replace a part of what a layer computes."""


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

    kind: Any = nnx.Conv if isinstance(layer, nnx.Conv) else nnx.Linear
    usual = inspect.signature(kind.__init__).parameters
    own = [n for n in _OWN if n in usual and getattr(layer, n) is not usual[n].default]
    if type(layer) not in (kind, *also) or own:
        has = f"its own {own[0]}" if own else f"a call of its own, of {type(layer).__name__}"
        has = "adapters" if hasattr(layer, "adapters") else has
        raise ValueError(
            f"{path} is more than an nnx.{kind.__name__} (it has {has}): convert plain layers, or "
            "leave it out by where."
        )
    groups = getattr(layer, "feature_group_count", 1)
    window = getattr(layer, "kernel_size", ())
    shape = (*window, layer.in_features // groups, layer.out_features)
    if layer.kernel.shape[-len(shape) :] != shape:
        raise ValueError(
            f"the kernel of {path} has shape {layer.kernel.shape}, and one layer has {shape}: "
            "stack layers along the first axis."
        )


def check_own_kernels(chosen: Mapping[Path, Any], layers: Mapping[Path, Any]) -> None:
    """Raises ValueError if a kernel to be replaced is another layer's, too, or no ``nnx.Param``."""
    from flax import nnx

    users = Counter(id(layer.kernel) for layer in layers.values())
    for path, layer in chosen.items():
        if type(layer.kernel) is not nnx.Param:
            raise ValueError(
                f"the kernel of {path_string(path)} is a {type(layer.kernel).__name__}, and what "
                "replaces it would be an nnx.Param, which optimizers may train: leave it out by "
                "where."
            )
        if users[id(layer.kernel)] > 1:
            raise ValueError(
                f"{path_string(path)} shares its kernel with another layer, and each would have "
                "factors of its own: share the layer instead, or leave both out by where."
            )
