"""What is known of a layer once and for all: its weight, its axes, the kind of its call."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.flax_layers import Kernel, infer_axes, kernel_axes, read_layer
from lowrank_optax.matrices.views import WeightDimensionNumbers
from lowrank_optax.modules.wrap import own_class

Kind: TypeAlias = Literal["linear", "general", "einsum", "convolution", "embedding"]
"""How a layer uses its weight: ``x @ W``, a contraction of several axes, an einsum, a convolution,
or a look-up of rows."""

BESIDE = "lora_adapters"
"""Name of the arrays of adapters beside the weight of a Linen layer, in its scope."""

_KINDS: dict[str, Kind] = {
    "Linear": "linear",
    "Dense": "linear",
    "LinearGeneral": "general",
    "DenseGeneral": "general",
    "Einsum": "einsum",
    "Conv": "convolution",
    "Embed": "embedding",
}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer, or stack of layers, as its constructor and its weight's shape describe it.

    It holds inside a scan over the stack too: axes are counted from the end.

    Attributes:
      weight: Name of the weight, an attribute of the layer.
      axes: Which of its axes are inputs and outputs.
      ndim: Number of its axes in one layer of the stack.
      kind: How the layer uses it.
      by_default: Whether it is a matrix without being asked for by name.
    """

    weight: str
    axes: WeightDimensionNumbers
    ndim: int
    kind: Kind
    by_default: bool

    def stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The leading sizes of a weight's shape, along which layers are stacked."""
        return tuple(shape[: len(shape) - self.ndim])


def without_beside(tree: Any, name: str = BESIDE) -> Any:
    """The variables of a Linen model without what is beside its weights under this name."""
    if isinstance(tree, Mapping):
        return {k: without_beside(v, name) for k, v in tree.items() if k != name}
    return tree


def kernel_spec(kernel: Kernel, kind: Kind) -> LayerSpec:
    """The spec of one layer whose weight is not stacked, or stacked along leading axes."""
    ndim = len(kernel.shape)
    from_end = lambda axes: tuple(axis - ndim for axis in axes)
    axes = WeightDimensionNumbers(from_end(kernel.reduction), from_end(kernel.output))
    return LayerSpec(kernel.path[0], axes, ndim, kind, kernel.by_default)


def kind_of(module: Any) -> Kind | None:
    """The kind of one of Flax's own layers, or of a subclass; None for other modules."""
    names = (t.__name__ for t in type(module).__mro__ if t.__module__.startswith("flax."))
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def has_other_weights(module: Any) -> bool:
    """Whether a module, or those inside it, may multiply by other weights than their parameters.

    A subclass of a Flax layer with its own call may, and so may a layer that was given its own
    ``dot_general``, ``conv_general_dilated``, ``einsum_op`` or ``promote_dtype``; Flax's
    normalization of weights and its convolutions with a mask do. Any class can say it itself, by an
    attribute or property ``plain_weights`` beside its ``__call__``, and any of these functions by
    an attribute of this name; a class does not speak for a function that its layer was given.
    """
    cls = own_class(module)
    defines = next((t for t in cls.__mro__ if "__call__" in vars(t)), cls)
    if "plain_weights" in vars(defines):
        given = kind_of(module) is not None and _has_own_product(module)
        return given or not module.plain_weights
    if defines.__module__.startswith("flax."):
        masked = kind_of(module) == "convolution" and getattr(module, "mask", None) is not None
        norm = defines.__name__ in ("SpectralNorm", "WeightNorm")
        return masked or norm or _has_own_product(module)
    return kind_of(module) is not None


def _has_own_product(module: Any) -> bool:
    """Whether a Flax layer was given a function of its weight that does not say it is plain."""
    plain = (None, jax.lax.dot_general, jax.lax.conv_general_dilated, jnp.einsum)
    for name in ("dot_general", "conv_general_dilated", "einsum_op", "promote_dtype"):
        own = getattr(module, f"{name}_cls", None) or getattr(module, name, None)
        own = getattr(own, "func", own)  # a functools.partial only gives options
        where = getattr(own, "__module__", None) or ""
        of_flax = name == "promote_dtype" and where.startswith("flax.")
        if own not in plain and not of_flax and not getattr(own, "plain_weights", False):
            return True
    return False


def usable_weight(module: Any) -> Kernel | None:
    """The weight of a layer whose product with its input is known; None for other modules.

    Those are Flax's linear layers, einsums, convolutions without groups and embeddings, subclasses
    of them, and modules of other packages that have ``einsum_str`` and ``shape``, with one
    parameter of that shape.
    """
    kernels = read_layer(module)
    if kernels is None:
        return _foreign_einsum(module)
    kind = kind_of(module)
    usable = [k for k in kernels if len(k.path) == 1 and kind is not None]
    # Grouped convolutions are block-diagonal.
    if not usable or (kind == "convolution" and not usable[0].by_default):
        return None
    return usable[0]


def layer_spec(layer: Any, path: str = "a layer") -> LayerSpec:
    """What is known of an NNX layer.

    Args:
      layer: The layer; stacked ones have leading axes.
      path: Its path in the model, for messages.

    Raises:
      TypeError: If it is no layer with a usable weight.
      ValueError: If the layer's own axes cannot be told from those it is stacked along, or these do
        not lead.
    """
    kernel = usable_weight(layer)
    if kernel is None:
        raise TypeError(f"{path} is a {type(layer).__name__}, no layer whose product is known.")
    shape = getattr(layer, kernel.path[0]).shape
    bias = getattr(getattr(layer, "bias", None), "shape", None)
    inferred = infer_axes(kernel, shape, bias)
    if inferred is None or len(shape) != len(inferred[1]) + len(kernel.shape):
        raise ValueError(
            f"the weight of {path} has shape {shape}, of which a {type(layer).__name__} of its own "
            f"has {kernel.shape}: stack layers along their first axis."
        )
    kind = kind_of(layer) or "einsum"
    return LayerSpec(kernel.path[0], inferred[0], len(kernel.shape), kind, kernel.by_default)


def _foreign_einsum(module: Any) -> Kernel | None:
    equation, shape = getattr(module, "einsum_str", None), getattr(module, "shape", None)
    if not isinstance(equation, str) or shape is None:
        return None
    from flax import nnx

    found = [
        name
        for name, x in vars(module).items()
        if isinstance(x, nnx.Param) and tuple(x.shape[-len(shape) :]) == tuple(shape)
    ]
    reduction, output = kernel_axes(equation, len(shape))
    if len(found) != 1 or not reduction or not output:
        return None
    return Kernel((found[0],), tuple(shape), reduction, output)
