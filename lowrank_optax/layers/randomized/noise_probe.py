"""A layer's noise, measured inside the backward pass, where its input and its cotangent meet.

The figures come out as the "gradient" of an array of zeros, so that neither input nor cotangent
has to leave a scan or a rematerialised block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.layers.randomized.variances import (
    alignment,
    minibatch_variance,
    sketch_variance,
)

FIGURES = ("calls", "rows", "size", "variance", "minibatch_variance", "alignment")
"""What the gradient of a probe has, in this order, added up over the layer's calls."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def probed(
    sketch: Sketch, y: jax.Array, x: jax.Array, valid: jax.Array | None, probe: jax.Array
) -> jax.Array:
    """The layer's output y itself; the gradient of ``probe`` is its `FIGURES`, float32.

    Args:
      sketch: The layer's.
      y: Its output, ``[..., M]``.
      x: Its input, ``[..., N]``; nothing flows back to it here.
      valid: Which rows count, booleans ``[...]``; the others count as rows of zeros.
      probe: ``[len(FIGURES)]``, whose values do not matter.
    """
    del sketch, x, valid, probe
    return y


def _forward(sketch: Sketch, y: jax.Array, x: jax.Array, valid: Any, probe: jax.Array) -> Any:
    del sketch, probe
    return y, (x, valid)


def _backward(sketch: Sketch, kept: Any, gradient: jax.Array) -> Any:
    x, valid = kept
    y = gradient
    if valid is not None:
        x, y = (jnp.where(valid[..., None], v, 0) for v in (x, y))
    count = y.size // max(y.shape[-1], 1)
    size = sketch.rows(count)
    of_batch = minibatch_variance(x, y) if count > 1 else jnp.nan
    figures = (1, count, size, sketch_variance(x, y, size, sketch.kind), of_batch, alignment(x, y))
    return gradient, None, None, jnp.stack([jnp.asarray(f, jnp.float32) for f in figures])


probed.defvjp(_forward, _backward)
