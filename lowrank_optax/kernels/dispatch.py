"""One rule for which implementation of an operation runs.

An operation has a reference in plain jax.numpy, and kernels for some kinds of devices. By default
the first kernel that supports the arguments runs, and otherwise the reference. An implementation
asked for by name runs, or an error says why it cannot.
"""

from collections.abc import Callable, Sequence
import functools
import importlib
from typing import Any, Literal, TypeAlias, get_args

import jax
from jax.sharding import AxisType

from lowrank_optax.kernels.choice import choose_when_lowered

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
