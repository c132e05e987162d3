"""One MLIR context for many programs of the tests.

JAX makes a new context for every program that it lowers, which takes as long as to lower a small
one. Contexts keep what was uniqued in them, constants too, so each serves a limited number.
"""

import threading
from typing import Any

PROGRAMS = 200


def share_contexts() -> None:
    """Lets JAX use a thread's context again; a version that makes them elsewhere is left alone."""
    # Interfaces without a promise, on which the speed of tests alone depends.
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir

    make = getattr(mlir, "make_ir_context", None)
    if make is None:
        return
    local = threading.local()

    def shared() -> Any:
        if ir.Context.current is not None:  # within a program: a copy would become a part of it
            return make()
        used = getattr(local, "used", PROGRAMS)
        if used >= PROGRAMS:
            local.context, used = make(), 0
        local.used = used + 1
        return local.context

    mlir.make_ir_context = shared
