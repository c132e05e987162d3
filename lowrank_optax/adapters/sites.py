"""Where in a Flax layer an adapter sits: its weight as a matrix, its input, its output as rows.

One description serves NNX and Linen: `weight_of` reads a layer's type (or, of layers that Flax
does not know, the shape of an einsum), `view_call` one call of it.
"""

from collections.abc import Callable
import copy
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.operands import Lookup, Operand, Patches, Rows
from lowrank_optax.compat.flax import set_class
from lowrank_optax.matrices.flax_layers import Kernel, is_linen_module, read_layer


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
      x: Its input.
      rows: ``rows(y)``: the layer's output as ``[..., d_out]``.
      unrows: Its inverse.
    """

    x: Operand
    rows: Callable[[jax.Array], jax.Array]
    unrows: Callable[[jax.Array], jax.Array]


def weight_of(module: Any) -> Kernel | None:
    """The weight of a layer that an adapter can be attached to; None for other modules.

    Those are Flax's linear layers, einsums, convolutions without groups and embeddings, subclasses
    of them, and modules of other packages that have ``einsum_str`` and ``shape``, with one
    parameter of that shape.
    """
    kernels = read_layer(module)
    if kernels is not None:
        # Grouped convolutions are block-diagonal, transposed ones no product of patches.
        usable = [k for k in kernels if len(k.path) == 1 and _is_kind(module, *_KINDS)]
        if usable and _is_kind(module, "Conv") and not usable[0].by_default:
            return None
        return usable[0] if usable else None
    return _foreign_einsum(module)


def view_call(
    module: Any, kernel: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any], y: jax.Array
) -> Call:
    """What went into a call of the layer and what came out, as an adapter sees it.

    Args:
      module: The layer.
      kernel: Its weight, not stacked.
      args: Of the call.
      kwargs: Of the call.
      y: The layer's output.
    """
    given = [a for a in args if not isinstance(a, str)]  # Gemma's einsums take an equation first
    x = given[0] if given else kwargs.get("inputs", kwargs.get("x"))
    same = lambda rows: rows
    if _is_kind(module, "Embed"):
        return Call(Lookup(x, y.dtype), same, same)
    x = x.astype(_compute_dtype(module, x, kernel))
    if _is_kind(module, "Conv"):
        return Call(Patches(x, _convolution(module, kernel)), same, same)
    if _is_kind(module, "Linear", "Dense"):
        return Call(Rows(x), same, same)
    if _is_kind(module, "LinearGeneral", "DenseGeneral"):
        equation = _general_equation(module, x.ndim, kernel.ndim)
    else:
        equation = einsum_equation(module, args, kwargs)
        _check_same_axes(module, equation, kernel.ndim)
    return _einsum_call(equation, x, kernel, y)


def einsum_equation(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The equation of an einsum layer: its own, or the call's."""
    at_call = [a for a in (*args, *kwargs.values()) if isinstance(a, str) and "->" in a]
    return at_call[0] if at_call else module.einsum_str


def _check_same_axes(module: Any, equation: str, ndim: int) -> None:
    own = getattr(module, "einsum_str", None)
    if own and kernel_axes(own, ndim) != kernel_axes(equation, ndim):
        raise ValueError(
            f"einsum {equation!r} has other inputs and outputs than {own!r}, for which the layer's "
            "adapters were made."
        )


_KINDS = ("Linear", "LinearGeneral", "Einsum", "Embed", "Conv", "Dense", "DenseGeneral")


def _is_kind(module: Any, *names: str) -> bool:
    """Whether the module is of one of Flax's own layers of these names, or of a subclass."""
    return any(
        t.__name__ in names and t.__module__.startswith("flax.") for t in type(module).__mro__
    )


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
    if len(found) != 1:
        return None
    reduction, output = kernel_axes(equation, len(shape))
    if not reduction or not output:
        return None
    return Kernel((found[0],), tuple(shape), reduction, output)


def kernel_axes(equation: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of inputs and of outputs of the second operand of an einsum."""
    x, kernel, result = _letters(equation, None, ndim)
    reduction = tuple(i for i, c in enumerate(kernel) if c in x and c not in result)
    output = tuple(i for i, c in enumerate(kernel) if c in result and c not in x)
    return reduction, output


def _letters(equation: str, x_ndim: int | None, kernel_ndim: int) -> tuple[str, str, str]:
    """The three operands of an equation, ellipses spelled out."""
    operands, result = equation.replace(" ", "").split("->")
    x, kernel = operands.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c not in equation]
    hidden = 0
    if "..." in x and x_ndim is not None:
        hidden = x_ndim - len(x.replace("...", ""))
    if "..." in kernel:
        hidden = kernel_ndim - len(kernel.replace("...", ""))
    letters = "".join(spare[:hidden])
    return tuple(s.replace("...", letters) for s in (x, kernel, result))  # type: ignore[return-value]


def _general_equation(module: Any, x_ndim: int, kernel_ndim: int) -> str:
    """The einsum that a LinearGeneral or DenseGeneral is."""
    as_tuple = lambda a: tuple(a) if isinstance(a, tuple | list) else (a,)
    if is_linen_module(module):
        batch = tuple(a % x_ndim for a in as_tuple(module.batch_dims))
    else:
        batch = tuple(a % x_ndim for a in module.batch_axis)
    axis = tuple(a % x_ndim for a in as_tuple(module.axis))
    x = "abcdefghijkl"[:x_ndim]
    outputs = "ABCDEFGHIJKL"[: kernel_ndim - len(batch) - len(axis)]
    of_batch, summed = "".join(x[a] for a in batch), "".join(x[a] for a in axis)
    # Linen leaves batch dimensions where they were, XLA and NNX put them first.
    rest = "".join(c for c in x if c not in summed + of_batch)
    return f"{x},{of_batch}{summed}{outputs}->{of_batch}{rest}{outputs}"


def _einsum_call(equation: str, x: jax.Array, kernel: jax.Array, y: jax.Array) -> Call:
    of_x, of_kernel, of_y = _letters(equation, x.ndim, kernel.ndim)
    batch = [c for c in of_kernel if c in of_x and c in of_y]
    summed = [c for c in of_kernel if c in of_x and c not in of_y]
    outputs = [c for c in of_kernel if c in of_y and c not in of_x]
    rest = [c for c in of_x if c in of_y and c not in of_kernel]
    if len(batch) + len(summed) + len(rest) != len(of_x):
        raise ValueError(f"einsum {equation!r} sums an axis of its input alone: no adapter for it.")
    size = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_kernel, kernel.shape, strict=True))
    sizes = lambda letters: tuple(size[c] for c in letters)
    # Matrices with batch axes of their own want rows in one axis.
    middle = (math.prod(sizes(rest)),) if batch else sizes(rest)
    ordered = jnp.einsum(f"{of_x}->{''.join(batch + rest + summed)}", x)
    flat = ordered.reshape(*sizes(batch), *middle, math.prod(sizes(summed)))
    natural = "".join(batch + rest + outputs)

    def rows(y: jax.Array) -> jax.Array:
        turned = jnp.einsum(f"{of_y}->{natural}", y)
        return turned.reshape(*sizes(batch), *middle, math.prod(sizes(outputs)))

    def unrows(rows: jax.Array) -> jax.Array:
        apart = rows.reshape(*sizes(batch), *sizes(rest), *sizes(outputs))
        return jnp.einsum(f"{natural}->{of_y}", apart)

    return Call(Rows(flat), rows, unrows)


def _convolution(module: Any, kernel: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A convolution with the layer's window, strides and padding, and another kernel."""

    def convolve(x: jax.Array, matrix: jax.Array) -> jax.Array:
        window = matrix.reshape(*kernel.shape[:-1], matrix.shape[-1])
        if is_linen_module(module):
            plain = module.clone(
                features=matrix.shape[-1], use_bias=False, parent=None, name=None, mask=None
            )
            return plain.apply({"params": {"kernel": window}}, x)
        from flax import nnx

        plain = copy.copy(module)
        set_class(plain, nnx.Conv)
        own = {"kernel": nnx.Param(window), "bias": None, "use_bias": False, "mask": None}
        vars(plain).update(own, kernel_shape=window.shape, out_features=window.shape[-1])
        return nnx.Conv.__call__(plain, x)

    return convolve


def _compute_dtype(module: Any, x: jax.Array, kernel: jax.Array) -> jnp.dtype:
    dtype = getattr(module, "dtype", None)
    return jnp.promote_types(x.dtype, kernel.dtype) if dtype is None else jnp.dtype(dtype)
