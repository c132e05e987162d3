"""Gated nonlinearities of two arrays: ``fn(gate) · up``, as in SwiGLU and GEGLU.

The backward pass needs ``fn(gate)``, ``fn'(gate)`` and ``up``. All three follow from two arrays,
which are saved in block-wise codes. The levels of a derivative are not enough here, since
``fn(gate)`` is a factor of a gradient.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeAlias

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lowrank_optax.activations.block_codes import (
    block_decode,
    block_encode,
    check_bits,
    codes_name,
)
from lowrank_optax.activations.coded_backward import CODES, Pointwise, name_of
from lowrank_optax.quantization import Quantized

FACTORS = "few_bit_factors"
"""The name of gate and up, saved as they are, for ``jax.checkpoint_policies``."""

_Saved: TypeAlias = tuple[Any, Any]  # of gate and up: `Quantized`, or the arrays as they are
_Names: TypeAlias = tuple[str, ...] | None

_GELU: dict[bool, Pointwise] = {
    approximate: functools.partial(jax.nn.gelu, approximate=approximate)
    for approximate in (True, False)
}


def swiglu(
    gate: jax.Array,
    up: jax.Array,
    bits: int | None = 4,
    names: Sequence[str] | None = None,
) -> jax.Array:
    r"""SwiGLU, :math:`\mathrm{silu}(gate) \cdot up`, that saves a few bits of each.

    As `gated` with ``jax.nn.silu``; the result is that of ``jax.nn.silu(gate) * up`` to the last
    bit.

    Args:
      gate: Any shape, floating point.
      up: Same shape and dtype as ``gate``.
      bits: Bits that are saved of each element of ``gate``, and of ``up``: 1 to 8. None saves both
        as they are, and computes everything else again: the exact gradient from two arrays.
      names: Names of ``gate`` and of ``up`` in the table of a `policy`, where their numbers of bits
        are this one.

    Returns:
      An array like ``gate``.

    Raises:
      ValueError: If the shapes differ, ``bits`` is not 1 to 8 or None, or ``names`` are not two.
      TypeError: If the dtypes differ, or are not floating point.

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
    return gated(jax.nn.silu, gate, up, bits, names)


def geglu(
    gate: jax.Array,
    up: jax.Array,
    bits: int | None = 4,
    approximate: bool = True,
    names: Sequence[str] | None = None,
) -> jax.Array:
    r"""GEGLU, :math:`\mathrm{gelu}(gate) \cdot up`, that saves a few bits of each.

    As `swiglu`, with ``jax.nn.gelu(gate, approximate)``.

    Args:
      gate: Any shape, floating point.
      up: Same shape and dtype as ``gate``.
      bits: As for `swiglu`.
      approximate: Whether gelu is computed with tanh, or exactly with the error function.
      names: As for `swiglu`.

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
    return gated(_GELU[bool(approximate)], gate, up, bits, names)


def gated(
    fn: Callable[[jax.Array], jax.Array],
    gate: jax.Array,
    up: jax.Array,
    bits: int | None = 4,
    names: Sequence[str] | None = None,
) -> jax.Array:
    r"""A gated nonlinearity that saves a few bits of each input for the backward pass.

    .. math::
      y = f(g) \, u, \qquad \bar u = \bar y \, f(\hat g), \qquad
      \bar g = \bar y \, \hat u \, f'(\hat g)

    with :math:`\hat g`, :math:`\hat u` decoded from what is saved: codes, and a bfloat16 scale for
    each block of 64 elements of the last axis (a quarter of a bit an element). Named
    ``"few_bit_codes"``, or without ``bits`` ``"few_bit_factors"``, for
    ``jax.checkpoint_policies.save_only_these_names``.

    Args:
      fn: Elementwise function of arrays, differentiable by JAX; hashable, and not closed over
        traced arrays.
      gate: Any shape, floating point.
      up: Same shape and dtype as ``gate``.
      bits: As for `swiglu`.
      names: As for `swiglu`.

    Returns:
      ``fn(gate) * up``.

    Raises:
      ValueError: As `swiglu`.
      TypeError: As `swiglu`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, numpy as np
      >>> gate, up = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.5, 1.0, -1.0])
      >>> glu = lro.activations.gated(jax.nn.sigmoid, gate, up, bits=8)
      >>> print(np.asarray(glu).round(3))
      [ 0.134  0.622 -0.881]

    Reference:
      The gradients: Shazeer, 2020, https://arxiv.org/abs/2002.05202. What is saved is this
      library's own.
    """
    _check(gate, up, bits)
    if names is not None and (isinstance(names, str) or len(names) != 2):
        raise ValueError(f"names={names!r} must be two names, of gate and of up.")
    return _gated(fn, bits, None if names is None else tuple(names), gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gated(
    fn: Pointwise, bits: int | None, names: _Names, gate: jax.Array, up: jax.Array
) -> jax.Array:
    return fn(gate) * up


def _forward(
    fn: Pointwise, bits: int | None, names: _Names, gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, _Saved]:
    saved: _Saved = (gate, up) if bits is None else _codes(fn, bits, gate, up)
    if names is not None:
        own = names if bits is None else [codes_name(name, bits) for name in names]
        saved = (checkpoint_name(saved[0], own[0]), checkpoint_name(saved[1], own[1]))
    return fn(gate) * up, checkpoint_name(saved, FACTORS if bits is None else CODES)


def _backward(
    fn: Pointwise, bits: int | None, names: _Names, saved: _Saved, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dtype = gradient.dtype
    if bits is None:
        gate, up = saved
    else:
        gradient = gradient.astype(jnp.promote_types(dtype, jnp.float32))
        gate, up = (block_decode(x, gradient.shape, bits).astype(gradient.dtype) for x in saved)
    value, pull = jax.vjp(fn, gate)
    return pull(gradient * up)[0].astype(dtype), (gradient * value).astype(dtype)


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
