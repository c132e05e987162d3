"""The rows of the harness of adapters: every host's tests of a method run for each."""

from lowrank_optax import adapters

METHODS = {
    "LoRA": adapters.LoRA(rank=2, alpha=6),
    "LoTR": adapters.LoTR(rank=2, alpha=4),
    "PiSSA": adapters.PiSSA(rank=2, alpha=5),
    "VeRA": adapters.VeRA(rank=3),
    "DoRA": adapters.DoRA(rank=2, alpha=3),
    "FlyLoRA": adapters.FlyLoRA(rank=4, active=2),
}
MERGEABLE = {name: method for name, method in METHODS.items() if method.has_delta}
