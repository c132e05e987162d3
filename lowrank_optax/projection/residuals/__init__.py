"""Residual rules: what becomes of the part of a gradient outside the subspace."""

from typing import Any, Literal, TypeAlias

from lowrank_optax.projection.residuals.base import (
    QuantizedError,
    Residual,
    Step,
    drop,
    error_feedback,
    raw,
    sign,
)
from lowrank_optax.projection.residuals.scaling import Granularity, fira, gradient_scaling

ResidualSpec: TypeAlias = (
    Literal["drop", "raw", "sign", "fira", "gradient_scaling", "error_feedback"] | Residual
)

_BY_NAME = {
    rule.__name__: rule for rule in (drop, raw, sign, fira, gradient_scaling, error_feedback)
}


def residual_rule(residual: Any) -> Residual:
    """The rule meant by the argument of `scale_by_projection`: a rule, or the name of one."""
    if isinstance(residual, Residual):
        return residual
    if isinstance(residual, str) and residual in _BY_NAME:
        return _BY_NAME[residual]()
    raise ValueError(
        f"residual={residual!r} must be one of {', '.join(map(repr, _BY_NAME))}, or a rule of "
        "lowrank_optax.residuals."
    )


__all__ = [
    "Granularity",
    "QuantizedError",
    "Residual",
    "ResidualSpec",
    "Step",
    "drop",
    "error_feedback",
    "fira",
    "gradient_scaling",
    "raw",
    "residual_rule",
    "sign",
]
