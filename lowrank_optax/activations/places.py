"""Where in a program an equation of its jaxpr comes from."""

from pathlib import Path
import re

from jax.extend import core

# What of JAX, Flax and this library calls the lines of a model.
_OTHERS = re.compile(r"[/\\](jax|flax|lowrank_optax[/\\](activations|layers|adapters))[/\\]")


def modules(equation: core.JaxprEqn) -> str:
    """The names around it, ``blocks/mlp``: Linen's modules, and those of ``jax.named_scope``."""
    return re.sub(r"\w+\(([^()]*)\)", r"\1", str(equation.source_info.name_stack)).strip("/")


def line(equation: core.JaxprEqn) -> str:
    """The function and line of the program: ``MLP.__call__ decoder.py:55``; "" if not known."""
    found = frame(equation)
    return "" if found is None else f"{found[0].partition('.<locals>')[0]} {found[1]}"


def frame(equation: core.JaxprEqn) -> tuple[str, str] | None:
    """The function, with those it is defined in, and ``decoder.py:55``; None if not known."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else []:
        if not _OTHERS.search(frame.file_name):
            return frame.function_name, f"{Path(frame.file_name).name}:{frame.line_num}"
    return None
