"""Adapters whose functions are compiled whole.

Called eagerly, a function of an adapter compiles each of its operations by itself, for each shape:
most of the time of a test. Here each function is one program, and what it returns is NumPy's, so
that indexing and arithmetic of tests compile nothing.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from lowrank_optax.adapters.layer_calls import Part, adapted_output
from lowrank_optax.adapters.operands import Lookup, Rows

OF_OPERANDS = {"layer_output", "switched_off", "times"}
FUNCTIONS = OF_OPERANDS | {
    "delta",
    "deltas",
    "init",
    "init_layers",
    "init_shared",
    "merged",
    "original",
    "removed_weight",
    "stack_arrays",
    "to_lora",
    "unmerged",
}


class Compiled:
    """An adapter's method; all but the names in `FUNCTIONS` are its own."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.method, name)
        return functools.partial(_called, self.method, name) if name in FUNCTIONS else found


def compiled(kind: type) -> Callable[..., Any]:
    """The class of a method, whose instances are `Compiled`."""
    return lambda **options: Compiled(kind(**options))


def layer_output(method: Any, p: Any, x: Any, y: Any, *, key: Any = None, **layer: Any) -> Any:
    """A layer's output with this adapter alone, as a model computes it."""
    if isinstance(method, Compiled):
        return _called(method.method, "layer_output", p, x, y, key=key, **layer)
    return adapted_output([Part(method, p, key=key)], x, y, **layer)


def switched_off(method: Any, p: Any, x: Any, y: Any) -> Any:
    """The output of a layer whose only adapter is switched off."""
    if isinstance(method, Compiled):
        return _called(method.method, "switched_off", p, x, y)
    return adapted_output([Part(method, p, None)], x, y, weight=y)


def on_host(tree: Any) -> Any:
    """The same arrays, NumPy's; those that are traced stay as they are."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else np.asarray(x), tree)


def times(x: Any, w: Any) -> np.ndarray:
    """`x @ w` by NumPy, in the dtype of x: NumPy's own product of bfloat16 is float32."""
    return np.matmul(x, w).astype(x.dtype)


def gradient(loss: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`jax.grad` as one program, NumPy's arrays."""
    return on_host(jax.jit(jax.grad(loss, **options))(*args))


def _called(method: Any, name: str, *args: Any, **options: Any) -> Any:
    args, operand = list(args), None
    if name in OF_OPERANDS:
        x = args[1]
        operand = (Rows,) if isinstance(x, Rows) else (Lookup, x.dtype)
        args[1] = x.x if isinstance(x, Rows) else x.index
    # What is no array belongs to the program: shapes, numbers of layers, flags.
    given = {str(i): x for i, x in enumerate(args)} | options
    fixed = {k: x for k, x in given.items() if isinstance(x, jax.ShapeDtypeStruct | int)}
    arrays = {k: x for k, x in given.items() if k not in fixed}
    return on_host(_run(method, name, operand, tuple(fixed.items()), arrays))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(method: Any, name: str, operand: Any, fixed: Any, arrays: dict[str, Any]) -> Any:
    given = dict(fixed) | arrays
    args = [given.pop(k) for k in sorted(filter(str.isdigit, given))]
    if operand is not None:
        kind, *rest = operand
        args[1] = kind(args[1], *rest)
    outputs = {"layer_output": layer_output, "switched_off": switched_off}
    if name in outputs:
        return outputs[name](method, *args, **given)
    return getattr(method, name)(*args, **given)
