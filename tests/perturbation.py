"""Noise in every product: what another order of summation does, made visible on any machine.

With `--perturb SEED` each float32 result of `dot_general` on CPU is off by up to two units of
`eps * (abs(x) @ abs(w))`, as large as rounding is. Sums, convolutions and products in other dtypes
are as they are. The noise depends on the numbers, and on which product compiled in this test it is:
two programs which compute the same differ, while a program that was compiled gives the same. A
test that fails has a bound that only holds on some machines. Only a test of equal bits by
construction, marked `bitwise`, may.
"""

from itertools import count
from typing import Any
import zlib

import jax
from jax._src.interpreters.mlir import _platform_specific_lowerings  # the rule that is replaced
from jax._src.lib.mlir.dialects import hlo
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import mlir
import jax.numpy as jnp
import numpy as np

UNITS = 2.0


def noisy(x: jax.Array, size: jax.Array, salt: int) -> jax.Array:
    """`x`, off by up to `UNITS` of `eps * size`; bits of x and the salt choose by how much."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ np.uint32(salt & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    chance = (bits >> 8).astype(jnp.float32) * np.float32(2**-23) - 1
    noise = np.float32(UNITS * jnp.finfo(jnp.float32).eps) * chance * size
    return jnp.where(jnp.isfinite(x + noise), x + noise, x)


salts = count()


def start_noise(name: str) -> None:
    """Starts the sequence of noises that belongs to this name."""
    global salts
    salts = count(zlib.crc32(name.encode()))


def perturb_products() -> None:
    """Makes every float32 product that is compiled for CPUs from now on a noisy one."""
    exact = _platform_specific_lowerings["cpu"][dot_general_p].rule

    def lower(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        products = exact(ctx, lhs, rhs, **params)
        (aval,) = ctx.avals_out
        is_float = all(jnp.issubdtype(x.dtype, jnp.floating) for x in ctx.avals_in)
        if aval.dtype != jnp.float32 or not is_float:
            return products
        sizes = exact(ctx, hlo.abs(lhs), hlo.abs(rhs), **params)
        salt = next(salts)
        rule = mlir.lower_fun(lambda x, size: noisy(x, size, salt), multiple_results=False)
        inner = ctx.replace(primitive=None, avals_in=[aval, aval], avals_out=[aval])
        return rule(inner, *products, *sizes)

    mlir.register_lowering(dot_general_p, lower, platform="cpu", cacheable=False)
