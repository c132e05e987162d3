"""Bases in fewer bits: any rule, its basis narrow between steps."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View
from lowrank_optax.quantization import Affine, BlockFormat, code_map, dequantize, quantize

BasisBits = Literal[16, 8, 4]

BLOCK_SIZE = 256


def quantized(rule: base.Subspace, bits: BasisBits = 16) -> base.Subspace:
    """``rule`` with its basis stored in 16, 8 or 4 bits.

    16 bits are bfloat16; 8 and 4 are codes evenly spaced between the extremes of groups of 256
    elements, along the rows of the basis one after the other. Products are still in float32, of the
    basis as it is stored, which is then orthonormal to about 0.4%, 1% and 10%: projecting and
    lifting remain adjoint.

    Args:
      rule: One of ``lowrank_optax.subspaces``: for 16 bits any that keeps arrays of floats, for 8
        and 4 one that keeps nothing but its basis.
      bits: 16, 8 or 4.

    Raises:
      TypeError: If ``rule`` is no subspace rule.
      ValueError: If ``bits`` is another number, or the rule keeps no such basis.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> rule = lro.subspaces.quantized(lro.subspaces.randomized_svd(rank=8), bits=4)
      >>> tx = lro.scale_by_projection(optax.scale_by_adam(), rule)
      >>> state = tx.init({"kernel": jnp.ones((64, 128))})
      >>> print(state.basis.codes["kernel"].shape, state.basis.scales["kernel"].shape)
      (32, 8) (2,)

    Reference:
      Zhang et al., Q-GaLore, 2024, https://arxiv.org/abs/2407.08296, section 3.2: four bits.
    """
    if not isinstance(rule, base.Subspace):
        raise TypeError(f"rule={rule!r} must be a subspace rule.")
    if bits not in get_args(BasisBits):
        raise ValueError(f"bits={bits!r} must be 16, 8 or 4.")
    if rule.shared or (bits < 16 and (not rule.keeps_one_array or rule.track is not None)):
        raise ValueError(
            f"bits={bits} needs a rule that keeps "
            + ("arrays of floats." if bits == 16 else "nothing but its basis between refreshes.")
        )
    encode, decode = (_narrowed, _widened) if bits == 16 else (_coder(bits), _decoder(bits))

    def refresh(key: jax.Array, matrix: Any, basis: Any, momentum: Any, view: View) -> Any:
        return encode(rule.refresh(key, matrix, decode(basis, view), momentum, view), view)

    def track(basis: Any, matrix: jax.Array, projected: jax.Array, view: View) -> Any:
        assert rule.track is not None
        return encode(rule.track(decode(basis, view), matrix, projected, view), view)

    def turn(
        old: Any, new: Any, projected: jax.Array, view: View, squared: bool = False
    ) -> jax.Array:
        return rule.turn(decode(old, view), decode(new, view), projected, view, squared)

    return rule._replace(
        init=lambda view: encode(rule.init(view), view),
        refresh=refresh,
        project=lambda basis, matrix, view: rule.project(decode(basis, view), matrix, view),
        lift=lambda basis, projected, view: rule.lift(decode(basis, view), projected, view),
        turn=turn,
        track=None if rule.track is None else track,
        orthonormal=False,
        kept=rule.kept if bits == 16 else Affine(0, 0, 0),
    )


def _narrowed(basis: Any, view: View) -> Any:
    del view
    _check_floats(basis)
    narrow = lambda x: x.astype(jnp.bfloat16) if _is_float(x) and jnp.ndim(x) > 1 else x
    return jax.tree.map(narrow, basis)


def _widened(basis: Any, view: View) -> Any:
    return jax.tree.map(lambda x: x.astype(view.dtype) if x.dtype == jnp.bfloat16 else x, basis)


def _coder(bits: Any) -> Any:
    fmt = BlockFormat(code_map("affine", bits), BLOCK_SIZE)

    def encode(basis: jax.Array, view: View) -> Affine:
        _check_floats(basis)

        def one(matrix: jax.Array) -> Affine:
            codes = quantize(matrix, fmt)
            # Codes can not tell that a basis is no good; scales can.
            bad = jnp.where(jnp.all(jnp.isfinite(matrix)), 0.0, jnp.nan)
            return codes._replace(scales=codes.scales + bad)

        return _for_each(one, view)(basis)

    return encode


def _decoder(bits: Any) -> Any:
    fmt = BlockFormat(code_map("affine", bits), BLOCK_SIZE)

    def decode(basis: Affine, view: View) -> jax.Array:
        shape = (view.length, view.rank)
        one = lambda codes: dequantize(codes, fmt, shape)
        return _for_each(one, view)(basis).astype(view.dtype)

    return decode


def _for_each(function: Any, view: View) -> Any:
    """For each matrix of the batch alone, so that stacked and separate weights agree."""
    for _ in view.batch:
        function = jax.vmap(function)
    return function


def _check_floats(basis: Any) -> None:
    if not any(_is_float(x) for x in jax.tree.leaves(basis)):
        raise ValueError("the rule keeps no basis of floats that could be stored in fewer bits.")


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
