"""How much noise the randomized layers of a model add to their gradients, and what would do."""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.randomized.noise_probe import FIGURES
from lowrank_optax.layers.randomized.replacing import randomized_modules
from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.matrices.selection import path_string


class SketchNoise(NamedTuple):
    """The noise of one layer; of a stack of layers, arrays with its shape.

    Attributes:
      rows: B, of its input.
      size: p, of its sketch.
      variance: D², what the sketch adds; see `sketch_variance`.
      minibatch_variance: D²_SGD, that of the gradient as one of a sample; see there. NaN for
        B = 1.
      ratio: Of the two, D² / D²_SGD.
      alignment: α; see there.
      wanted_size: The p that brings the ratio to ``noise_ratio``, at most B.
    """

    rows: np.ndarray
    size: np.ndarray
    variance: np.ndarray
    minibatch_variance: np.ndarray
    ratio: np.ndarray
    alignment: np.ndarray
    wanted_size: np.ndarray


class NoiseProbe(nnx.Variable):
    """An array of zeros, whose gradient has a layer's figures."""


def sketch_noise(
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    *batch: Any,
    noise_ratio: float = 1.0,
    has_aux: bool = False,
) -> dict[str, SketchNoise]:
    r"""The noise of each randomized layer's gradient on a batch, against the batch's own noise.

    One exact forward and backward pass, under ``jit``, in which each layer's input x and the
    cotangent :math:`\bar y` of its output go into the exact variances. The model does not change,
    nor do its random streams. Call it every few hundred steps and log it; give the same function
    each time, or it is compiled anew.

    Args:
      model: A model with randomized layers.
      loss_fn: ``loss_fn(model, *batch)``, the loss that training has; the scale of both variances
        is that of its gradient, squared.
      *batch: Arrays.
      noise_ratio: The ratio that ``wanted_size`` is to bring, above 0.
      has_aux: Whether the function gives more beside the loss.

    Returns:
      By the layer's path. Layers that the loss does not call are absent; of one that it calls
      several times, variances are sums over the calls, and rows, sizes and alignment means.
      ``wanted_size`` supposes that D² falls with p as :math:`(B - p)/p`, or as :math:`1/p` for
      ``gaussian``, ``rademacher`` and ``norm_weighted``: exact for these and ``rows`` and ``dct``.

    Raises:
      ValueError: If no layer is randomized, or ``noise_ratio`` is not above 0.

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
    kinds = {path_string(path): x.sketch for path, x in randomized_modules(model).items()}
    if not kinds:
        raise ValueError("no layer of the model is randomized: see lro.layers.randomize.")
    graphdef, probes, rest = nnx.split(_with_probes(model), NoiseProbe, ...)
    measured = nnx.to_flat_state(_measure(loss_fn, has_aux, graphdef, probes, rest, batch))
    noise = {}
    for path, probe in measured:
        name = path_string(map(str, path[:-1]))
        figures = np.asarray(probe[...], np.float64)
        if figures[..., FIGURES.index("calls")].any():
            noise[name] = _noise(figures, kinds[name], noise_ratio)
    return noise


def choose_sketches(model: nnx.Module, *noises: dict[str, SketchNoise]) -> dict[str, Sketch]:
    """Sketches of the sizes that a model's layers want: what to give to `randomize`.

    Args:
      model: The randomized model that was measured.
      *noises: What `sketch_noise` gave, of one batch or several. The largest size that a layer
        wants counts, also of the layers of a stack, which have one sketch.

    Returns:
      By patterns of whole paths, each layer's sketch of the same kind and with the wanted size,
      within its own bounds (``min_size``, ``max_size``).

    Raises:
      ValueError: If nothing was measured, or of other layers than the model's randomized ones.

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
      path      weight  sketch  kept
      layers/0  4 × 3   rows    40 rows
    """
    known = {path_string(path): layer for path, layer in randomized_modules(model).items()}
    wanted: dict[str, int] = {}
    for noise in noises:
        for path, figures in noise.items():
            if path not in known:
                raise ValueError(f"noise of {path!r}, which is no randomized layer of the model.")
            wanted[path] = max(wanted.get(path, 1), int(np.max(figures.wanted_size)))
    if not wanted:
        raise ValueError("no noise was measured: give what lro.layers.sketch_noise returns.")
    return {
        f"^{re.escape(path)}$": dataclasses.replace(known[path].sketch, fraction=None, size=size)
        for path, size in wanted.items()
    }


def _with_probes(model: nnx.Module) -> nnx.Module:
    """A model of the same arrays, the randomized layers of which are measured."""
    copied = nnx.merge(*nnx.split(model))
    for layer in randomized_modules(copied).values():
        stack = layer.kernel.shape[:-2]
        layer.noise_probe = NoiseProbe(jnp.zeros((*stack, len(FIGURES)), jnp.float32))
    return copied


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
    loss_fn: Callable[..., Any], has_aux: bool, graphdef: Any, probes: Any, rest: Any, batch: Any
) -> Any:
    def loss(probes: Any) -> jax.Array:
        answer = loss_fn(nnx.merge(graphdef, probes, rest, copy=True), *batch)
        return answer[0] if has_aux else answer

    return jax.grad(loss)(probes)


def _noise(figures: np.ndarray, sketch: Sketch, noise_ratio: float) -> SketchNoise:
    of = dict(zip(FIGURES, np.moveaxis(figures, -1, 0), strict=True))
    calls = np.maximum(of["calls"], 1)
    rows, size = (np.rint(of[name] / calls).astype(int) for name in ("rows", "size"))
    variance, of_batch = of["variance"], of["minibatch_variance"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(variance == 0, 0.0, variance / of_batch)
    wanted = _wanted_size(rows, size, ratio, sketch, noise_ratio)
    return SketchNoise(rows, size, variance, of_batch, ratio, of["alignment"] / calls, wanted)


def _wanted_size(
    rows: np.ndarray, size: np.ndarray, ratio: np.ndarray, sketch: Sketch, noise_ratio: float
) -> np.ndarray:
    """The size at which the ratio, which is known at one size, is another."""
    excess = ratio / noise_ratio
    if sketch.kind in ("gaussian", "rademacher", "norm_weighted"):
        wanted = size * excess  # D² in proportion to 1 / p
    else:  # to (B - p) / p, which is 1 / relative at the size that is
        relative = size / np.maximum(rows - size, 1)
        wanted = rows * excess * relative / (1 + excess * relative)
    # An infinite or unknown ratio: all rows. Nothing to go by, a size of B: that.
    wanted = np.where(size >= rows, rows, np.where(np.isfinite(wanted), wanted, rows))
    return np.clip(np.ceil(wanted - 1e-4), 1, rows).astype(int)
