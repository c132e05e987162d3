"""The product of a Flax layer, sketched: what NNX and Linen call in the place of XLA's."""

from collections.abc import Callable
import copy
from typing import Any

import jax

from lowrank_optax.layers.randomized.linear import randomized_linear
from lowrank_optax.layers.randomized.sketch import Sketch


def call_sketched(
    call: Callable[..., jax.Array],
    layer: Any,
    *args: Any,
    key: jax.Array,
    sketch: Sketch,
    valid: jax.Array | None,
) -> jax.Array:
    """One call of a layer with a sketched product; promotion and bias are Flax's own.

    Args:
      call: The plain layer's ``__call__``.
      layer: The layer.
      *args: Arguments of the call.
      key: PRNG key of this call alone.
      sketch: Kind and size of the sketch.
      valid: Which rows count, booleans ``[...]``; None if all do.

    Raises:
      RuntimeError: If the layer does not multiply by its attribute ``dot_general``.
    """
    products = 0

    def product(
        x: jax.Array,
        kernel: jax.Array,
        dimension_numbers: Any,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        del dimension_numbers  # those of x @ kernel: checked layers are plain linear ones
        nonlocal products
        products += 1
        if out_sharding is not None:
            raise ValueError(
                f"out_sharding={out_sharding} cannot be given to a randomized layer; use "
                "jax.sharding.reshard on its output."
            )
        return randomized_linear(
            x,
            kernel,
            key=key,
            sketch=sketch,
            valid=valid,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    # The same layer with another product. Not setattr: NNX would refuse it where the layer belongs
    # to an enclosing trace, and Linen's modules are frozen.
    sketched = copy.copy(layer)
    vars(sketched)["dot_general"] = product
    outputs = call(sketched, *args)
    if products != 1:
        raise RuntimeError(
            f"{type(layer).__name__} of this version of Flax called its attribute dot_general "
            f"{products} times instead of once, so its input would not be sketched."
        )
    return outputs


def check_sketch(sketch: Any) -> Sketch:
    """The sketch; raises TypeError unless it is one."""
    if not isinstance(sketch, Sketch):
        raise TypeError(
            f"sketch={sketch!r} must be a lro.layers.Sketch, for example Sketch(fraction=0.1)."
        )
    return sketch


def check_dot_general(dot_general: Any, of: str) -> None:
    """Raises ValueError unless a layer's product is XLA's."""
    if dot_general not in (None, jax.lax.dot_general):
        raise ValueError(
            f"dot_general={dot_general!r} of {of}: a randomized layer has a product of its own, so "
            "leave jax.lax.dot_general there."
        )
