"""Memory that one compiled update of an optimizer needs."""

from typing import Any
import warnings

import jax
import optax


def update_peak_bytes(transformation: optax.GradientTransformation, params: Any) -> int | None:
    """Bytes that one compiled ``transformation.update`` allocates on one device.

    The update is compiled for shapes alone, with gradients of the parameters' shapes and dtypes.
    Gradients and state are donated, so that updates and the new state are written over them.

    Args:
      transformation: The optax transformation.
      params: Tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      Arguments (parameters, gradients and state), temporaries, and outputs that do not fit into
      donated arguments. None if the backend does not report them.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.eval_shape(transformation.init, shapes)
    # An update that does not read the parameters still has them in memory.
    update = jax.jit(transformation.update, donate_argnums=(0, 1), keep_unused=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        memory = update.lower(shapes, state, shapes).compile().memory_analysis()
    if memory is None:
        return None
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new_outputs + memory.temp_size_in_bytes
