"""Arguments that are optax transformations."""

from typing import Any

import optax


def transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """The argument of this name, as a transformation that takes extra arguments.

    Raises:
      TypeError: If it is no transformation.

    Example:
      >>> import optax
      >>> transformation("inner", optax.adam)
      Traceback (most recent call last):
        ...
      TypeError: inner=adam must be an optax transformation, as the function adam returns: call it.
    """
    if all(callable(getattr(value, method, None)) for method in ("init", "update")):
        return optax.with_extra_args_support(value)
    must = "must be an optax transformation, as"
    if callable(value) and hasattr(value, "__name__") and not isinstance(value, type):
        called = value.__name__
        raise TypeError(f"{name}={called} {must} the function {called} returns: call it.")
    shown = repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
    raise TypeError(f"{name}={shown} {must} optax.adam(1e-3).")
