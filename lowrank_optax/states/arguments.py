"""Arguments that are optax transformations, and those that have no effect beside another one."""

from collections.abc import Callable
import inspect
from typing import Any

import jax
import numpy as np
import optax


def transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """The argument of this name, as a transformation that takes extra arguments, or a TypeError."""
    if all(callable(getattr(value, method, None)) for method in ("init", "update")):
        return optax.with_extra_args_support(value)
    must = "must be an optax transformation, as"
    if callable(value) and hasattr(value, "__name__") and not isinstance(value, type):
        called = value.__name__
        raise TypeError(f"{name}={called} {must} the function {called} returns: call it.")
    shown = repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
    raise TypeError(f"{name}={shown} {must} optax.adam(1e-3).")


def refuse_unused(function: Callable[..., Any], because: str, **values: Any) -> None:
    """Raise ValueError for arguments of ``function`` that were given but have no effect.

    Traced numbers are accepted: under ``optax.inject_hyperparams`` defaults are traced too.

    Example:
      >>> import lowrank_optax as lro
      >>> refuse_unused(lro.galore, "inner", b1=0.8)
      Traceback (most recent call last):
        ...
      ValueError: b1=0.8 has no effect with inner: leave it out.
    """
    parameters = inspect.signature(function).parameters
    for name, value in values.items():
        default: Any = parameters[name].default
        if value is default or isinstance(value, jax.core.Tracer):
            continue
        if isinstance(value, jax.Array | np.generic) and isinstance(default, int | float):
            differs = np.any(np.asarray(value) != np.asarray(default, value.dtype))
        else:
            differs = value != default
        if differs:
            raise ValueError(f"{name}={value!r} has no effect with {because}: leave it out.")
