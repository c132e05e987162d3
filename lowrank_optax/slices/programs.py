"""Programs inside of operations of a traced program."""

from collections.abc import Iterator
from typing import Any

import jax

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
    "xla_metadata_call",
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


def scan_operands(equation: Any) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried.

    Raises:
      NotImplementedError: If this version of JAX says it in no known way.
    """
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:  # jax 0.12: a tree of three parts, the third of what is scanned over
        operands = params["ft_in"].update(range(len(equation.invars)))
        consts, carried, _ = (len(list(part)) for part in operands.unpack())
        return consts, carried
    raise NotImplementedError(
        f"jax {jax.__version__} says in no known way what a scan carries; its parameters are "
        f"{', '.join(sorted(params))}."
    )


def programs_in(equation: Any) -> Iterator[Any]:
    """All programs among the parameters of an operation, such as the bodies of a loop."""
    for value in equation.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            if hasattr(getattr(x, "jaxpr", x), "eqns"):
                yield x
