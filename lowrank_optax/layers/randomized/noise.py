"""How much noise the randomized layers of a model add to their gradients, and the sizes to choose.

A layer's noise is measured inside the backward pass, where its input and its cotangent meet. The
figures come out as the "gradient" of an array of zeros, so that neither input nor cotangent has to
leave a scan or a rematerialised block.
"""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.randomized.randomize import RandomizedLinear, randomized_modules
from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.layers.randomized.variances import (
    alignment,
    minibatch_variance,
    sketch_variance,
)
from lowrank_optax.matrices.selection import path_string
from lowrank_optax.modules.wrap import own_class, wrap

_FIGURES = ("calls", "rows", "size", "variance", "minibatch_variance", "alignment")
"""The entries of a probe's gradient, summed over the layer's calls."""


class SketchNoise(NamedTuple):
    """The noise of one layer; for a stack of layers, arrays with its shape.

    Attributes:
      rows: Number of rows B of its input.
      size: Number of rows p of its sketch.
      variance: D², which the sketch adds; see `sketch_variance`.
      minibatch_variance: D²_SGD of the gradient over a sample; see there. NaN if B is 1.
      ratio: D² / D²_SGD.
      alignment: α; see there.
      wanted_size: The p with which the ratio is ``noise_ratio``, at most B.
    """

    rows: np.ndarray
    size: np.ndarray
    variance: np.ndarray
    minibatch_variance: np.ndarray
    ratio: np.ndarray
    alignment: np.ndarray
    wanted_size: np.ndarray


def sketch_noise(
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    *batch: Any,
    noise_ratio: float = 1.0,
    has_aux: bool = False,
) -> dict[str, SketchNoise]:
    r"""Measure the noise of each randomized layer's gradient on a batch, and the batch's own noise.

    One exact forward and backward pass, under ``jit``, computes the exact variances from each
    layer's input x and the cotangent :math:`\bar y` of its output. The model and its random
    streams do not change. Call it every few hundred steps and log it, with the same function each
    time, so that it is compiled once.

    Args:
      model: Model with randomized layers.
      loss_fn: ``loss_fn(model, *batch)``, the training loss; both variances are in units of its
        squared gradient.
      *batch: Arrays.
      noise_ratio: Ratio that ``wanted_size`` aims at, above 0.
      has_aux: Whether ``loss_fn`` returns a pair of the loss and something else.

    Returns:
      The noise by the layer's path, without layers that the loss does not call. If it calls a layer
      several times, variances are sums over the calls; rows, sizes and alignment are means.
      ``wanted_size`` supposes that D² falls with p as :math:`(B - p)/p`, or as :math:`1/p` for
      ``gaussian``, ``rademacher`` and ``norm_weighted``: exact for these and ``rows`` and ``dct``.

    Raises:
      ValueError: If no layer is randomized or one has its own call, or ``noise_ratio`` is not
        above 0.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> sketch = lro.layers.Sketch("rows", fraction=0.1)
      >>> layer = lro.layers.RandomizedLinear(4, 3, sketch=sketch, rngs=nnx.Rngs(0))
      >>> model = nnx.Sequential(layer)
      >>> x = jax.random.normal(jax.random.key(0), (200, 4))
      >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
      >>> noise = lro.layers.sketch_noise(model, loss, x, noise_ratio=4.0)["layers/0"]
      >>> print(noise.rows, noise.size, f"{noise.ratio:.2f}", noise.wanted_size)
      200 20 9.00 40

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195, Section 3.
    """
    if not noise_ratio > 0:
        raise ValueError(f"noise_ratio={noise_ratio!r} must be above 0.")
    sketches = {}
    for path, layer in randomized_modules(model).items():
        name, cls = path_string(path), own_class(layer)
        if cls.__call__ not in (nnx.Linear.__call__, RandomizedLinear.__call__):
            raise ValueError(
                f"{name} has a call of its own, of {cls.__name__}, which sketch_noise cannot "
                "measure: measure a model with RandomizedLinear there."
            )
        sketches[name] = layer.sketch
    if not sketches:
        raise ValueError("no layer of the model is randomized: see lro.layers.randomize.")
    model = nnx.merge(*nnx.split(model))  # other modules with the same arrays
    for layer in randomized_modules(model).values():
        stack = layer.kernel.shape[:-2]
        layer.noise_probe = _NoiseProbe(jnp.zeros((*stack, len(_FIGURES)), jnp.float32))
        wrap(layer, "sketch_noise", _measure_call, innermost=True)
    graphdef, probes, rest = nnx.split(model, _NoiseProbe, ...)
    measured = nnx.to_flat_state(_measure(loss_fn, has_aux, graphdef, probes, rest, batch))
    noise = {}
    for path, probe in measured:
        name = path_string(map(str, path[:-1]))
        by_figure = np.moveaxis(np.asarray(probe[...], np.float64), -1, 0)
        figures = dict(zip(_FIGURES, by_figure, strict=True))
        if figures["calls"].any():
            noise[name] = _noise(figures, sketches[name], noise_ratio)
    return noise


def choose_sketches(model: nnx.Module, *noises: dict[str, SketchNoise]) -> dict[str, Sketch]:
    """Choose sketches of the measured ``wanted_size``, as an argument for `randomize`.

    Args:
      model: Randomized model that was measured.
      *noises: Results of `sketch_noise` on one batch or several. The largest size of a layer
        counts, also among the layers of a stack, which have one sketch.

    Returns:
      Sketches by patterns of whole paths: each layer's kind, with the wanted size within its own
      bounds (``min_size``, ``max_size``).

    Raises:
      ValueError: If nothing was measured, or a layer that is not a randomized one of the model.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> _ = lro.layers.randomize(model, lro.layers.Sketch("rows", fraction=0.1), rngs=1)
      >>> x = jax.random.normal(jax.random.key(0), (200, 4))
      >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
      >>> noise = lro.layers.sketch_noise(model, loss, x, noise_ratio=4.0)
      >>> sketches = lro.layers.choose_sketches(model, noise)
      >>> print(lro.layers.randomize(model, sketches, rngs=1))
      path      weight  sketch  saved
      layers/0  4 × 3   rows    40 rows
    """
    known = {path_string(path): layer for path, layer in randomized_modules(model).items()}
    wanted: dict[str, int] = {}
    for noise in noises:
        for path, figures in noise.items():
            if path not in known:
                raise ValueError(f"noise of {path!r}, which is not a randomized layer.")
            wanted[path] = max(wanted.get(path, 1), int(np.max(figures.wanted_size)))
    if not wanted:
        raise ValueError("no noise was measured: give what lro.layers.sketch_noise returns.")
    return {
        f"^{re.escape(path)}$": dataclasses.replace(known[path].sketch, fraction=None, size=size)
        for path, size in wanted.items()
    }


class _NoiseProbe(nnx.Variable):
    """An array of zeros, whose gradient holds a layer's `_FIGURES`."""


def _measure_call(
    _: Any, layer: Any, inputs: Any, out_sharding: Any = None, *, valid: Any = None, **__: Any
) -> jax.Array:
    """Run instead of a randomized layer's call: the exact layer, measured."""
    outputs = nnx.Linear.__call__(layer, inputs, out_sharding)
    return _probed(layer.sketch, outputs, inputs, valid, layer.noise_probe[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probed(
    sketch: Sketch, y: jax.Array, x: jax.Array, valid: jax.Array | None, probe: jax.Array
) -> jax.Array:
    """Return y; the gradient of ``probe`` is the noise of a layer with input x and output y."""
    del sketch, x, valid, probe
    return y


def _probed_forward(sketch: Any, y: jax.Array, x: jax.Array, valid: Any, probe: Any) -> Any:
    del sketch, probe
    return y, (x, valid)


def _probed_backward(sketch: Sketch, saved: Any, gradient: jax.Array) -> Any:
    x, valid = saved
    y = gradient
    if valid is not None:  # the other rows count as zeros
        x, y = (jnp.where(valid[..., None], v, 0) for v in (x, y))
    count = y.size // max(y.shape[-1], 1)
    size = sketch.rows(count)
    of_batch = minibatch_variance(x, y) if count > 1 else jnp.nan
    figures = (1, count, size, sketch_variance(x, y, size, sketch.kind), of_batch, alignment(x, y))
    return gradient, None, None, jnp.stack([jnp.asarray(f, jnp.float32) for f in figures])


_probed.defvjp(_probed_forward, _probed_backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
    loss_fn: Callable[..., Any], has_aux: bool, graphdef: Any, probes: Any, rest: Any, batch: Any
) -> Any:
    def loss(probes: Any) -> jax.Array:
        answer = loss_fn(nnx.merge(graphdef, probes, rest, copy=True), *batch)
        return answer[0] if has_aux else answer

    return jax.grad(loss)(probes)


def _noise(figures: dict[str, np.ndarray], sketch: Sketch, noise_ratio: float) -> SketchNoise:
    calls = np.maximum(figures["calls"], 1)
    rows, size = (np.rint(figures[name] / calls).astype(int) for name in ("rows", "size"))
    variance, of_batch = figures["variance"], figures["minibatch_variance"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(variance == 0, 0.0, variance / of_batch)
    # The size at which the ratio, known at one size, is noise_ratio.
    excess = ratio / noise_ratio
    if sketch.kind in ("gaussian", "rademacher", "norm_weighted"):
        wanted = size * excess  # D² is proportional to 1 / p
    else:  # to (B - p) / p, which is 1 / relative at the current size
        relative = size / np.maximum(rows - size, 1)
        wanted = rows * excess * relative / (1 + excess * relative)
    # All rows, if the ratio is infinite or unknown, and if the size is B already.
    wanted = np.where((size < rows) & np.isfinite(wanted), wanted, rows)
    wanted = np.clip(np.ceil(wanted - 1e-4), 1, rows).astype(int)
    return SketchNoise(rows, size, variance, of_batch, ratio, figures["alignment"] / calls, wanted)
