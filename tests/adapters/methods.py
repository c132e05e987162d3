"""The rows of the harness of adapters: every host's tests of a method run for each."""

from collections.abc import Mapping
from typing import Any

import pytest

from lowrank_optax import adapters

METHODS = {
    "LoRA": adapters.LoRA(rank=2, alpha=6),
    "LoTR": adapters.LoTR(rank=2, alpha=4),
    "MiSS": adapters.MiSS(rank=3),
    "MiSSBat": adapters.MiSSBat(rank=2),
    "PiSSA": adapters.PiSSA(rank=2, alpha=5),
    "RandLoRA": adapters.RandLoRA(rank=3, alpha=4),
    "PRILoRA": adapters.PRILoRA(rank=2, scale=1.5),
    "SoRA": adapters.SoRA(rank=3, alpha=4),
    "VeRA": adapters.VeRA(rank=3),
    "SaRA": adapters.SaRA(fraction=0.3),
    "DoRA": adapters.DoRA(rank=2, alpha=3),
    "FlyLoRA": adapters.FlyLoRA(rank=4, active=2),
}
MERGEABLE = {name: method for name, method in METHODS.items() if method.has_delta}

# What methods ask of a host: shared arrays, a changed base, a dependence on weights, routing. The
# others run in the full tier: LoRA is what other tests of hosts run.
_STANDARD = {"PiSSA", "VeRA", "SaRA", "DoRA", "FlyLoRA"}


def cases(methods: Mapping[str, Any]) -> list[Any]:
    """The methods' names, as cases of a test of a host."""
    rare = methods.keys() & METHODS.keys() - _STANDARD
    return [pytest.param(name, marks=[pytest.mark.full] * (name in rare)) for name in methods]
