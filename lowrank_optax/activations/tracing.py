"""A call of any function as a program."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Traced(NamedTuple):
    """A function as a program.

    Attributes:
      program: Its jaxpr.
      inputs: The arrays among the leaves of its arguments.
      places: Which leaves they are.
      result: From the program's results to what the function returns.
    """

    program: core.ClosedJaxpr
    inputs: list[Any]
    places: list[int]
    result: Callable[[list[jax.Array]], Any]


def traced_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Traced:
    """The program of ``fn(*args, **kwargs)``."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    # Only JAX arrays become tracers: a flag, or a NumPy array, is seen by the function as it is.
    kinds = (jax.Array, jax.ShapeDtypeStruct)
    places = [i for i, x in enumerate(leaves) if isinstance(x, kinds)]
    returned: list[Any] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        whole = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            whole[i] = x
        own_args, own_kwargs = jax.tree.unflatten(tree, whole)
        returned[:] = jax.tree.flatten(fn(*own_args, **own_kwargs))
        return [x for x in returned[0] if isinstance(x, jax.Array)]

    inputs = [leaves[i] for i in places]
    program = jax.make_jaxpr(flat)(*inputs)
    outputs, output_tree = returned

    def result(arrays: list[jax.Array]) -> Any:
        left = iter(arrays)
        whole = [next(left) if isinstance(x, jax.Array) else x for x in outputs]
        return jax.tree.unflatten(output_tree, whole)

    return Traced(program, inputs, places, result)
