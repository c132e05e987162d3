"""Programs inside of operations of a traced program."""

from collections.abc import Iterator
from typing import Any

# Operations that call one program.
CALLS = (
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat",
    "remat2",
)


def called(equation: Any) -> Any:
    """The program that an operation calls once, with its own operands and results; or None."""
    if equation.primitive.name not in CALLS:
        return None
    for program in programs_in(equation):
        own = getattr(program, "jaxpr", program)
        if len(own.invars) == len(equation.invars) and len(own.outvars) == len(equation.outvars):
            return program
    return None


def programs_in(equation: Any) -> Iterator[Any]:
    """All programs among the parameters of an operation, such as the bodies of a loop."""
    for value in equation.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            if hasattr(getattr(x, "jaxpr", x), "eqns"):
                yield x
