"""Errors and warnings for derivatives that an adapted layer should not be asked for.

They come while the program is traced.
"""

from collections.abc import Callable
import functools
from typing import Any
import warnings

import jax


def refuse_derivative(message: str, y: jax.Array, arrays: Any) -> jax.Array:
    """The output ``y`` as it is; raises ValueError if a derivative by ``arrays`` is asked for.

    Args:
      message: Text of the error.
      y: Any array.
      arrays: Tree of arrays.
    """
    return _watched(functools.partial(_refuse, message), y, arrays)


def warn_of_derivative(message: str, y: jax.Array, arrays: Any) -> jax.Array:
    """The output ``y`` as it is; issues a UserWarning if a derivative by ``arrays`` is asked for.

    Args:
      message: Text of the warning.
      y: Any array.
      arrays: Tree of arrays.
    """
    return _watched(functools.partial(_warn, message), y, arrays)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _watched(say: Callable[[], None], y: jax.Array, arrays: Any) -> jax.Array:
    del say, arrays
    return y


def _watched_jvp(say: Callable[[], None], primals: Any, tangents: Any) -> tuple[Any, Any]:
    (y, _), (y_dot, dots) = primals, tangents
    zero = jax.custom_derivatives.SymbolicZero
    if not all(isinstance(dot, zero) for dot in jax.tree.leaves(dots)):
        say()
    return y, y_dot


_watched.defjvp(_watched_jvp, symbolic_zeros=True)
