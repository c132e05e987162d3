"""One rule for which implementation of an operation runs.

An operation has a reference in plain jax.numpy, and kernels for some kinds of devices. By default
the first kernel that supports the arguments runs, and otherwise the reference. An implementation
asked for by name runs, or an error says why it cannot.
"""

from collections.abc import Callable, Hashable, Sequence
import functools
import importlib
from typing import Any, Literal, TypeAlias, get_args

import jax
from jax.sharding import AxisType

from lowrank_optax.compat.jax import (
    Primitive,
    jaxpr_as_fun,
    lower_jaxpr,
    set_batching,
    set_lowering,
    single_platform,
)

ImplementationName = Literal["xla", "mosaic_tpu", "triton"]
Implementation: TypeAlias = ImplementationName | Sequence[ImplementationName] | None

PLATFORMS = {"mosaic_tpu": "tpu", "triton": "cuda"}
NAMES = get_args(ImplementationName)


def dispatch(
    operation: str,
    reference: Callable[..., Any],
    modules: dict[str, str],
    implementation: Implementation,
    interpret: Any,
    *args: Any,
    **options: Any,
) -> Any:
    """Runs one implementation of an operation.

    Args:
      operation: Its name, for errors.
      reference: Plain jax.numpy function.
      modules: Module of each kernel by its name, imported on use, with ``supports(*args,
        **options)``, which returns None or a reason against, and
        ``run(*args, **options, interpret=False)``.
      implementation: None for the first kernel that fits, or else ``"xla"``, the reference; a name;
        or names in the order to try, of which one must fit.
      interpret: Runs a kernel named alone without its device, in the generic interpreter (True) or
        that of `jax.experimental.pallas.tpu.InterpretParams`.
      *args: Trees of arrays.
      **options: Static keyword arguments.

    Raises:
      ValueError: If there is no such implementation, or `interpret` is given without one kernel.
      NotImplementedError: If no implementation asked for supports the arguments; with each reason.
    """
    names = _names(modules, implementation)
    if interpret and (len(names) > 1 or names[0] == "xla"):
        raise ValueError(
            f"interpret={interpret!r} is for one kernel: name it, implementation={implementation!r}"
            " does not."
        )
    run: dict[str, Callable[..., Any]] = {}
    reasons = {}
    for name in names:
        if name == "xla":
            continue
        if name not in modules:
            reasons[name] = "there is no such kernel"
            continue
        try:
            module = importlib.import_module(modules[name])
        except ImportError as error:  # backends of Pallas come and go with versions of JAX
            reasons[name] = f"jax {jax.__version__} does not have what compiles it ({error})"
            continue
        reason = reason_of_sharding(args) or module.supports(*args, **options)
        if reason is None:
            run[name] = module.run
        else:
            reasons[name] = reason
    if not run and "xla" not in names:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"{operation} cannot run as asked: {why}.")
    if len(names) == 1 and run:
        return run[names[0]](*args, interpret=interpret, **options)
    if "xla" in names:  # what comes after it is never tried
        before = names[: names.index("xla")]
        kernels = {PLATFORMS[name]: kernel for name, kernel in run.items() if name in before}
        if not kernels:
            return reference(*args, **options)
        return choose_when_lowered(kernels, reference, *args, **options)
    given = {PLATFORMS[k]: functools.partial(kernel, **options) for k, kernel in run.items()}
    return jax.lax.platform_dependent(*args, **given)


def _names(modules: dict[str, str], implementation: Implementation) -> tuple[str, ...]:
    if implementation is None:
        return (*modules, "xla")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in NAMES for name in names):
        raise ValueError(
            f"implementation={implementation!r} must be None, or one or some of {', '.join(NAMES)}."
        )
    return names


def reason_of_sharding(args: Any) -> str | None:
    """Why no kernel can take these arrays as they are sharded, as far as tracing can tell.

    Inside `jax.shard_map` over all axes of its mesh an array lies on one device. What only the
    compiler finds out is left to `choose_when_lowered`.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
    for mesh in [jax.sharding.get_abstract_mesh(), *meshes]:
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        free = [name for name, kind in types if kind != AxisType.Manual]
        if free and mesh.size > 1:
            return f"a kernel cannot be partitioned over the mesh axes {free}: use jax.shard_map"
    for x in jax.tree.leaves(args):
        if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
            devices = len(x.sharding.device_set)
            if devices > 1:
                return f"a kernel cannot be partitioned, and an argument lies on {devices} devices"
    return None


_choice = Primitive("kernel_or_reference")
_choice.multiple_results = True


def choose_when_lowered(
    kernels: dict[str, Callable[..., Any]],
    fallback: Callable[..., Any],
    *args: Any,
    **options: Hashable,
) -> Any:
    """``kernels[platform](*args)`` where that can run, ``fallback(*args)`` elsewhere.

    A kernel runs on one kind of device and cannot be partitioned by the compiler. Neither the
    platform nor the number of devices is known while a function is traced, and
    `jax.lax.platform_dependent` lowers every branch for every platform of an export, which kernels
    refuse. This primitive keeps the programs side by side until lowering, and lowers a kernel if
    there is one platform, its own, and nothing to partition.

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
