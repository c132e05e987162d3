"""One rule for which implementation of an operation runs.

An operation has a reference in plain jax.numpy, and kernels for some kinds of devices, each with
what it supports. Left alone, the rule takes the first kernel that fits, and otherwise the
reference; an implementation asked for by its name runs, or an error says why it cannot.
"""

from collections.abc import Callable, Sequence
import functools
import importlib
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
from jax.sharding import AxisType

from lowrank_optax.kernels.choice import choose_when_lowered

ImplementationName = Literal["xla", "mosaic_tpu", "triton"]
Implementation: TypeAlias = ImplementationName | Sequence[ImplementationName] | None

PLATFORMS = {"mosaic_tpu": "tpu", "triton": "cuda"}
NAMES = get_args(ImplementationName)


class Operation(NamedTuple):
    """A function with kernels.

    Attributes:
      name: Its name in errors.
      reference: The plain function.
      kernels: Modules by the name of the implementation, imported where they are needed. Each has
        ``supports(*args, **options)``, which returns None or a reason against, and
        ``run(*args, **options, interpret=False)``.
    """

    name: str
    reference: Callable[..., Any]
    kernels: dict[str, str]

    def module(self, implementation: str) -> ModuleType:
        return importlib.import_module(self.kernels[implementation])


def dispatch(
    operation: Operation,
    implementation: Implementation,
    interpret: Any,
    *args: Any,
    **options: Any,
) -> Any:
    """The operation of ``args``, trees of arrays, and static ``options``, as one implementation.

    Args:
      operation: Which.
      implementation: None for the first that fits, ending with ``"xla"``, the reference; a name;
        or names in the order to try, of which one must fit.
      interpret: For a kernel named alone: runs it without its device, in the generic interpreter
        (True) or that of `jax.experimental.pallas.tpu.InterpretParams`.

    Raises:
      ValueError: If there is no such implementation, or ``interpret`` goes with no single kernel.
      NotImplementedError: If none of those asked for can serve; with the reason of each.
    """
    names = _names(operation, implementation)
    if interpret and (len(names) > 1 or names[0] == "xla"):
        raise ValueError(
            f"interpret={interpret!r} is for one kernel: name it, implementation={implementation!r}"
            " does not."
        )
    run: dict[str, Callable[..., Any]] = {"xla": operation.reference}
    reasons = {}
    for name in names:
        reason = None if name == "xla" else _reason_against(operation, name, args, options)
        if reason is not None:
            reasons[name] = reason
        elif name != "xla":
            run[name] = operation.module(name).run
    usable = [name for name in names if name not in reasons]
    if not usable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"{operation.name} cannot run as asked: {why}.")
    if len(names) == 1 and usable[0] != "xla":
        return run[usable[0]](*args, interpret=interpret, **options)
    before_xla = usable[: usable.index("xla")] if "xla" in usable else usable
    kernels = {PLATFORMS[name]: run[name] for name in before_xla}
    if not kernels:
        return run["xla"](*args, **options)
    if "xla" not in usable:
        given = {name: functools.partial(kernel, **options) for name, kernel in kernels.items()}
        return jax.lax.platform_dependent(*args, **given)
    return choose_when_lowered(kernels, run["xla"], *args, **options)


def _names(operation: Operation, implementation: Implementation) -> tuple[str, ...]:
    if implementation is None:
        return (*operation.kernels, "xla")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in NAMES for name in names):
        raise ValueError(
            f"implementation={implementation!r} must be None, or one or some of {', '.join(NAMES)}."
        )
    return names


def _reason_against(
    operation: Operation, name: str, args: Sequence[Any], options: dict[str, Any]
) -> str | None:
    if name not in operation.kernels:
        return f"{operation.name} has no such kernel"
    try:
        module = operation.module(name)
    except ImportError as error:  # backends of Pallas come and go with versions of JAX
        return f"jax {jax.__version__} does not have what it is compiled by ({error})"
    return reason_of_sharding(args) or module.supports(*args, **options)


def reason_of_sharding(args: Any) -> str | None:
    """Why no kernel may take these arrays, for how they lie on devices, as far as it is known yet.

    Inside `jax.shard_map` over all axes of its mesh an array is of one device. What only the
    compiler finds out, `choose_when_lowered` looks at.
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
