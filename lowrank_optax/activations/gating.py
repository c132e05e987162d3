"""Gated nonlinearities, where two arrays meet: ``fn(gate) · up``, as in SwiGLU and GEGLU.

The backward pass needs ``fn(gate)``, ``fn'(gate)`` and ``up``. All three follow from two arrays, so
that it keeps those two, in block-wise codes: the levels of a derivative alone would not do, since
``fn(gate)`` is a factor of a gradient here.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeAlias

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lowrank_optax.activations.block_codes import block_decode, block_encode, check_bits
from lowrank_optax.activations.coded_backward import CODES, Pointwise, name_of
from lowrank_optax.quantization import Quantized

FACTORS = "few_bit_factors"
"""The name of what is kept as it is, for ``jax.checkpoint_policies.save_only_these_names``."""

_Kept: TypeAlias = tuple[Any, Any]  # of gate and up: `Quantized`, or the arrays as they are

_GELU: dict[bool, Pointwise] = {
    approximate: functools.partial(jax.nn.gelu, approximate=approximate)
    for approximate in (True, False)
}


def swiglu(gate: jax.Array, up: jax.Array, bits: int | None = 4) -> jax.Array:
    r"""SwiGLU, :math:`\mathrm{silu}(gate) \cdot up`, keeping a few bits of each for backward.

    As `gated` with ``jax.nn.silu``; the result is that of ``jax.nn.silu(gate) * up`` to the last
    bit.

    Args:
      gate: Any shape, floating point.
      up: Of the same shape and dtype.
      bits: Of an element of ``gate``, and of one of ``up``, kept for backward: 1 to 8. None keeps
        both as they are, and computes everything else again: the exact gradient from two arrays.

    Returns:
      An array like ``gate``.

    Raises:
      ValueError: If the shapes differ, or ``bits`` is none of these.
      TypeError: If the dtypes differ, or are no floating point.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, numpy as np
      >>> gate, up = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.5, 1.0, -1.0])
      >>> print(np.asarray(lro.activations.swiglu(gate, up)).round(3))
      [-0.134  0.311 -1.762]
      >>> slope = jax.grad(lambda gate, bits: lro.activations.swiglu(gate, up, bits).sum())
      >>> print(np.asarray(slope(gate, None)).round(3))
      [ 0.036  0.74  -1.091]
      >>> print(np.asarray(slope(gate, 4)).round(3))
      [ 0.045  0.697 -1.031]

    Reference:
      Shazeer, GLU Variants Improve Transformer, 2020, https://arxiv.org/abs/2002.05202, equation 6.
    """
    return gated(jax.nn.silu, gate, up, bits)


def geglu(
    gate: jax.Array, up: jax.Array, bits: int | None = 4, approximate: bool = True
) -> jax.Array:
    r"""GEGLU, :math:`\mathrm{gelu}(gate) \cdot up`, keeping a few bits of each for backward.

    As `swiglu`, with ``jax.nn.gelu(gate, approximate)``.

    Args:
      gate: Any shape, floating point.
      up: Of the same shape and dtype.
      bits: As for `swiglu`.
      approximate: Whether by tanh, or exact by the error function.

    Returns:
      An array like ``gate``.

    Raises:
      ValueError: As `swiglu`.
      TypeError: As `swiglu`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, numpy as np
      >>> gate, up = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.5, 1.0, -1.0])
      >>> print(np.asarray(lro.activations.geglu(gate, up, approximate=False)).round(3))
      [-0.079  0.346 -1.954]

    Reference:
      Shazeer, 2020, https://arxiv.org/abs/2002.05202, equation 6.
    """
    return gated(_GELU[bool(approximate)], gate, up, bits)


def gated(
    fn: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array, bits: int | None = 4
) -> jax.Array:
    r"""A gated nonlinearity, whose backward pass keeps a few bits of each input.

    .. math::
      y = f(g) \, u, \qquad \bar u = \bar y \, f(\hat g), \qquad
      \bar g = \bar y \, \hat u \, f'(\hat g)

    with :math:`\hat g`, :math:`\hat u` decoded from what is kept: codes, and a bfloat16 scale for
    each block of 64 elements of the last axis (a quarter of a bit an element). Named
    ``"few_bit_codes"``, or without ``bits`` ``"few_bit_factors"``, for
    ``jax.checkpoint_policies.save_only_these_names``.

    Args:
      fn: Elementwise, of arrays, and differentiable by JAX; hashable, closed over no traced array.
      gate: Any shape, floating point.
      up: Of the same shape and dtype.
      bits: Of an element of ``gate``, and of one of ``up``, kept for backward: 1 to 8. None keeps
        both as they are.

    Returns:
      ``fn(gate) * up``.

    Raises:
      ValueError: If the shapes differ, or ``bits`` is none of these.
      TypeError: If the dtypes differ, or are no floating point.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, numpy as np
      >>> gate, up = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.5, 1.0, -1.0])
      >>> glu = lro.activations.gated(jax.nn.sigmoid, gate, up, bits=8)
      >>> print(np.asarray(glu).round(3))
      [ 0.134  0.622 -0.881]

    Reference:
      The gradients: Shazeer, 2020, https://arxiv.org/abs/2002.05202. What is kept is this
      library's own.
    """
    _check(gate, up, bits)
    return _gated(fn, bits, gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(fn: Pointwise, bits: int | None, gate: jax.Array, up: jax.Array) -> jax.Array:
    return fn(gate) * up


def _forward(
    fn: Pointwise, bits: int | None, gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, _Kept]:
    if bits is None:
        kept, name = (gate, up), FACTORS
    else:
        kept, name = _codes(fn, bits, gate, up), CODES
    return fn(gate) * up, jax.tree.map(lambda x: checkpoint_name(x, name), kept)


def _backward(
    fn: Pointwise, bits: int | None, kept: _Kept, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    wide = gradient
    if bits is None:
        gate, up = kept
    else:
        wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        gate, up = (block_decode(x, gradient.shape, bits).astype(wide.dtype) for x in kept)
    value, pull = jax.vjp(fn, gate)
    return pull(wide * up)[0].astype(gradient.dtype), (wide * value).astype(gradient.dtype)


_gated.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _codes(fn: Pointwise, bits: int, gate: jax.Array, up: jax.Array) -> tuple[Quantized, Quantized]:
    """The codes of both, which refuse to be differentiated: integers would say 0, silently."""
    return block_encode(gate, bits), block_encode(up, bits)


@_codes.defjvp
def _no_second_derivative(fn: Pointwise, bits: int, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"few-bit gated {name_of(fn)} has no second derivatives: its backward pass knows a few "
        f"bits of gate and up only. Use bits=None where you need a Hessian."
    )


def _check(gate: jax.Array, up: jax.Array, bits: int | None) -> None:
    if jnp.shape(gate) != jnp.shape(up):
        raise ValueError(
            f"gate and up must have one shape, got {jnp.shape(gate)} and {jnp.shape(up)}."
        )
    dtypes = jnp.result_type(gate), jnp.result_type(up)
    if dtypes[0] != dtypes[1] or not jnp.issubdtype(dtypes[0], jnp.floating):
        raise TypeError(
            f"gate and up must have one floating-point dtype, got {dtypes[0]} and {dtypes[1]}."
        )
    check_bits(bits)
