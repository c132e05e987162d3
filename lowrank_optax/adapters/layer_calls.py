"""A call of a layer with adapters: its input and output as rows, and what adapters add to it."""

from collections.abc import Callable, Sequence
import copy
import functools
import math
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import Adapter, Arrays
from lowrank_optax.adapters.operands import Lookup, Operand, Patches, Rows
from lowrank_optax.compat.flax import set_class
from lowrank_optax.matrices.flax_layers import einsum_letters, is_linen_module, kernel_axes
from lowrank_optax.modules.spec import Kind


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
      x: Its input.
      rows: ``rows(y)``: the layer's output as ``[..., d_out]``.
      unrows: Its inverse.
      bias: ``bias(b)``: the layer's bias as ``[d_out]``, and as ``[*batch, 1, d_out]`` of a weight
        with batch axes.
    """

    x: Operand
    rows: Callable[[jax.Array], jax.Array]
    unrows: Callable[[jax.Array], jax.Array]
    bias: Callable[[jax.Array], jax.Array] = lambda bias: bias.reshape(-1)


def view_call(
    module: Any,
    kind: Kind,
    kernel: jax.Array,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: jax.Array,
) -> Call:
    """What went into a call of a layer and what came out.

    Args:
      module: The layer, of NNX or Linen.
      kind: How it uses its weight.
      kernel: Its weight, not stacked.
      args: Positional arguments of the call.
      kwargs: Keyword arguments of the call.
      y: The layer's output.
    """
    given = [a for a in args if not isinstance(a, str)]  # Gemma's einsums take an equation first
    x = given[0] if given else kwargs.get("inputs", kwargs.get("x"))
    same = lambda rows: rows
    if kind == "embedding":
        return Call(Lookup(x, y.dtype), same, same)
    dtype = getattr(module, "dtype", None)
    x = x.astype(jnp.promote_types(x.dtype, kernel.dtype) if dtype is None else dtype)
    if kind == "convolution":
        return Call(Patches(x, _convolution(module, kernel)), same, same)
    if kind == "linear":
        return Call(Rows(x), same, same)
    if kind == "general":
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
    of_x, of_kernel, of_y = einsum_letters(equation, x.ndim, kernel.ndim)
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
    flat = jnp.einsum(f"{of_x}->{''.join(batch + rest + summed)}", x)
    flat = flat.reshape(*sizes(batch), *middle, math.prod(sizes(summed)))
    natural = "".join(batch + rest + outputs)

    def rows(y: jax.Array) -> jax.Array:
        ordered = jnp.einsum(f"{of_y}->{natural}", y)
        return ordered.reshape(*sizes(batch), *middle, math.prod(sizes(outputs)))

    def unrows(rows: jax.Array) -> jax.Array:
        apart = rows.reshape(*sizes(batch), *sizes(rest), *sizes(outputs))
        return jnp.einsum(f"{natural}->{of_y}", apart)

    def own_bias(bias: jax.Array) -> jax.Array:
        # Flax reads it, whatever its shape, in the order of the output's axes.
        of_bias = "".join(c for c in of_y if c in of_kernel)
        ordered = jnp.einsum(f"{of_bias}->{''.join(batch + outputs)}", bias.reshape(sizes(of_bias)))
        one_row = (1,) if batch else ()
        return ordered.reshape(*sizes(batch), *one_row, math.prod(sizes(outputs)))

    return Call(Rows(flat), rows, unrows, own_bias)


def _convolution(module: Any, kernel: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A convolution with the layer's window, strides and padding, and another kernel.

    It is in the dtype of its input: squares of a bfloat16 layer's input stay float32.
    """

    def convolve(x: jax.Array, matrix: jax.Array) -> jax.Array:
        window = matrix.reshape(*kernel.shape[:-1], matrix.shape[-1])
        if is_linen_module(module):
            plain = module.clone(
                features=matrix.shape[-1],
                use_bias=False,
                parent=None,
                name=None,
                mask=None,
                dtype=x.dtype,
            )
            return plain.apply({"params": {"kernel": window}}, x)
        from flax import nnx

        plain = copy.copy(module)
        set_class(plain, nnx.Conv)
        own = {"kernel": nnx.Param(window), "bias": None, "use_bias": False, "mask": None}
        sizes = {"kernel_shape": window.shape, "out_features": window.shape[-1]}
        vars(plain).update(own | sizes, dtype=x.dtype, preferred_element_type=None)
        return nnx.Conv.__call__(plain, x)

    return convolve


class Part(NamedTuple):
    """One adapter in one call of a layer.

    Attributes:
      method: The adapter's method.
      p: Its arrays.
      strength: Factor of its change; None if it is switched off.
      key: PRNG key for dropout.
    """

    method: Adapter
    p: Arrays
    strength: float | None = 1.0
    key: jax.Array | None = None


def adapted_output(
    parts: Sequence[Part],
    x: Operand,
    y: jax.Array,
    *,
    weight: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    r"""The output :math:`y + \sum_i s_i \, \mathrm{branch}_i + (1 - s_i) \, \mathrm{removed}_i`.

    It is summed in float32, except where one adapter alone is active, at strength 1.

    Args:
      parts: The adapters.
      x: The layer's input.
      y: Its own output ``[..., d_out]``.
      weight: Its weight ``[d_in, d_out]``.
      bias: Its bias ``[d_out]``.
    """
    active = [part.strength for part in parts if part.strength is not None]
    dtype = y.dtype if active == [1] else jnp.float32

    def plus(total: jax.Array, strength: float, change: jax.Array | None) -> jax.Array:
        if change is None:
            return total
        change = change.astype(dtype)
        return total + (change if strength == 1 else strength * change)

    own = y.astype(dtype)
    for part in parts:
        if part.strength is None:
            own = plus(own, 1, part.method.removed(part.p, x))
    total = own
    for method, p, strength, key in parts:
        if strength is not None:
            branch = method.branch(p, x, y=own, weight=weight, bias=bias, key=key)
            total = plus(total, strength, branch)
            if strength != 1:
                total = plus(total, 1 - strength, method.removed(p, x))
    return total.astype(y.dtype)


def refuse(message: str) -> None:
    """What `on_derivative` does about a derivative that would be wrong."""
    raise ValueError(message)


def warn(message: str) -> None:
    """What `on_derivative` does about a derivative that nobody needs."""
    warnings.warn(message, UserWarning, stacklevel=2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def on_derivative(say: Callable[[str], None], message: str, y: jax.Array, arrays: Any) -> jax.Array:
    """The output ``y`` as it is; ``say(message)`` runs if a derivative by ``arrays`` is asked for.

    Args:
      say: `refuse` or `warn`.
      message: Text of the error or the warning.
      y: Any array.
      arrays: Tree of arrays.
    """
    del say, message, arrays
    return y


def _on_derivative_jvp(
    say: Callable[[str], None], message: str, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    (y, _), (y_dot, dots) = primals, tangents
    zero = jax.custom_derivatives.SymbolicZero
    if not all(isinstance(dot, zero) for dot in jax.tree.leaves(dots)):
        say(message)
    return y, y_dot


on_derivative.defjvp(_on_derivative_jvp, symbolic_zeros=True)
