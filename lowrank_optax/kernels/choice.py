"""A primitive that chooses between a kernel and its reference when the program is lowered.

A custom kernel runs on one kind of device and cannot be partitioned by the compiler. Neither the
platform nor the number of devices is known while a function is traced: it may be exported for other
platforms, or called with arrays that `jax.jit` finds to be sharded.
`jax.lax.platform_dependent` lowers every branch for every platform of an export, which kernels
refuse, and does not look at devices. This primitive keeps the programs side by side until lowering,
and lowers a kernel if there is one platform, its own, and nothing to partition.
"""

from collections.abc import Callable, Hashable, Sequence
import functools
from typing import Any

import jax

from lowrank_optax.compat.jax import (
    Primitive,
    jaxpr_as_fun,
    lower_jaxpr,
    set_batching,
    set_lowering,
    single_platform,
)

_choice = Primitive("kernel_or_reference")
_choice.multiple_results = True


def choose_when_lowered(
    kernels: dict[str, Callable[..., Any]],
    fallback: Callable[..., Any],
    *args: Any,
    **options: Hashable,
) -> Any:
    """``kernels[platform](*args)`` where that can run, ``fallback(*args)`` elsewhere.

    Args:
      kernels: Functions by platform: ``"tpu"``, ``"cuda"`` or ``"rocm"``.
      fallback: A function for any platform and sharding, with results of the same types.
      *args: Trees of arrays.
      **options: Keyword arguments of all functions. With the same functions and options, a call
        outside of `jax.jit` is compiled once.
    """
    return _chosen(tuple(kernels.items()), fallback, tuple(options.items()), *args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _chosen(
    kernels: tuple[tuple[str, Callable[..., Any]], ...],
    fallback: Callable[..., Any],
    options: tuple[tuple[str, Hashable], ...],
    *args: Any,
) -> Any:
    program = lambda fn, **how: jax.make_jaxpr(functools.partial(fn, **dict(options)), **how)(*args)
    leaves = jax.tree.leaves(args)
    traced, result = program(fallback, return_shape=True)
    branches = {name: program(kernel) for name, kernel in kernels}
    out = _choice.bind(*leaves, fallback=traced, **branches)
    return jax.tree.unflatten(jax.tree.structure(result), out)


def _bind_each(*args: jax.Array, fallback: Any, **kernels: Any) -> list[jax.Array]:
    return _choice.bind(*args, fallback=fallback, **kernels)


def _lower(ctx: Any, *args: Any, fallback: Any, **kernels: Any) -> Any:
    return lower_jaxpr(ctx, kernels.get(single_platform(ctx) or "", fallback), *args)


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], **programs: Any) -> Any:
    mapped = {
        name: jax.make_jaxpr(jax.vmap(jaxpr_as_fun(program), list(dims)))(*args)
        for name, program in programs.items()
    }
    out = _choice.bind(*args, **mapped)
    return out, [0] * len(out)


_choice.def_impl(
    lambda *args, **programs: jax.jit(_bind_each, static_argnames=(*programs,))(*args, **programs)
)
_choice.def_abstract_eval(lambda *args, fallback, **kernels: fallback.out_avals)
set_lowering(_choice, _lower)
set_batching(_choice, _batch)
