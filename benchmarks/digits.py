"""scikit-learn's digits, three small models of them, and a training loop that `jax.vmap` can map.

1797 grey images of 8 × 8 pixels in ten classes, three quarters of them for training. Training is a
pure function of its key and learning rate, so one compiled program trains a whole grid:

    run = jax.jit(jax.vmap(lambda rate: train(CNN, optax.sgd(rate), key, data, 300)))
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Digits(NamedTuple):
    """Images ``[n, 8, 8, 1]`` with mean 0 and variance 1 over all, labels ``[n]`` int32."""

    images: jax.Array
    labels: jax.Array


class Split(NamedTuple):
    """What is trained on, and what is held out."""

    train: Digits
    test: Digits


class Model(NamedTuple):
    """``init(key) -> params`` and ``apply(params, images) -> logits [batch, 10]``."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


@functools.cache
def load(seed: int = 0) -> Split:
    """The data, split at random by the seed: 1347 images to train on and 450 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images - bunch.images.mean()) / bunch.images.std()
    order = np.random.default_rng(seed).permutation(len(images))
    parts = np.split(order, [3 * len(images) // 4])
    return Split(
        *(
            Digits(
                jnp.asarray(images[part, ..., None], jnp.float32),
                jnp.asarray(bunch.target[part], jnp.int32),
            )
            for part in parts
        )
    )


def _dense(key: jax.Array, fan_in: int, fan_out: int, gain: float = 2.0) -> dict[str, jax.Array]:
    kernel = jax.random.truncated_normal(key, -2, 2, (fan_in, fan_out)) * (gain / fan_in) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def _affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _flat(images: jax.Array) -> jax.Array:
    return images.reshape(len(images), -1)


def logistic() -> Model:
    """Logistic regression; starts at zero."""
    zeros = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    return Model(lambda key: {"out": zeros}, lambda p, x: _affine(p["out"], _flat(x)))


def mlp(
    hidden: tuple[int, ...] = (300, 100),
    affine: Callable[[dict[str, jax.Array], jax.Array], jax.Array] = _affine,
) -> Model:
    """ReLU layers, of the sizes of LeNet-300-100 by default; ``affine`` is what a layer does."""
    sizes = (64, *hidden, 10)
    names = [*(f"hidden_{i}" for i in range(len(hidden))), "out"]

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(names))
        widths = itertools.pairwise(sizes)
        return {n: _dense(k, *w) for n, k, w in zip(names, keys, widths, strict=True)}

    def apply(params: Any, images: jax.Array) -> jax.Array:
        x = _flat(images)
        for name in names[:-1]:
            x = jax.nn.relu(affine(params[name], x))
        return affine(params["out"], x)

    return Model(init, apply)


def cnn(
    channels: int = 16,
    blocks: int = 2,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> Model:
    """A small residual network: a stem, blocks of two 3 × 3 convolutions, mean pooling, a head.

    Convolutions are products with the nine shifted images, which a CPU does several times faster
    than small convolutions under `jax.vmap`; kernels are ``[9 * channels_in, channels_out]``. The
    second convolution of a block starts small, so that no normalisation is needed.
    """

    def convolve(layer: Any, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return _affine(layer, jnp.concatenate(shifted, axis=-1))

    def init(key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, 2 + 2 * blocks))
        wide = 9 * channels
        params = {"stem": _dense(next(keys), 9, channels)}
        for i in range(blocks):
            params[f"block_{i}"] = {
                "first": _dense(next(keys), wide, channels),
                "second": _dense(next(keys), wide, channels, gain=0.2),
            }
        return {**params, "out": _dense(next(keys), channels * 4, 10, gain=1.0)}

    def apply(params: Any, images: jax.Array) -> jax.Array:
        x = activation(convolve(params["stem"], images))
        for i in range(blocks):
            block = params[f"block_{i}"]
            x = x + convolve(block["second"], activation(convolve(block["first"], x)))
            if i == 0:
                x = x.reshape(len(x), 4, 2, 4, 2, -1).mean((2, 4))
        pooled = x.reshape(len(x), 2, 2, 2, 2, -1).mean((2, 4)) if blocks else x.mean((1, 2))
        return _affine(params["out"], _flat(activation(pooled)))

    return Model(init, apply)


def loss(model: Model, params: Any, batch: Digits) -> jax.Array:
    """Mean cross entropy."""
    logits = model.apply(params, batch.images)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def accuracy(model: Model, params: Any, data: Digits) -> jax.Array:
    """Share of images whose largest logit is their label's."""
    return jnp.mean(model.apply(params, data.images).argmax(-1) == data.labels)


def batch_at(data: Digits, key: jax.Array, size: int) -> Digits:
    """A random batch, drawn with replacement."""
    chosen = jax.random.randint(key, (size,), 0, len(data.labels))
    return Digits(data.images[chosen], data.labels[chosen])


class Trained(NamedTuple):
    """Parameters after training, and the loss of each step's batch ``[steps]``."""

    params: Any
    losses: jax.Array


def train(
    model: Model,
    tx: optax.GradientTransformation,
    key: jax.Array,
    data: Digits,
    steps: int,
    batch_size: int = 64,
    full: Callable[[Any], Any] = lambda trained: trained,
    start: Callable[[Any], Any] = lambda params: params,
    noisy_loss: Callable[[Any, Digits, jax.Array], jax.Array] | None = None,
) -> Trained:
    """Trains from the weights that the key draws.

    Args:
      model: One of the models here.
      tx: The optimizer; its learning rate may be traced.
      key: Draws the weights and the batches.
      data: What to train on.
      steps: Steps of the optimizer.
      batch_size: Images in a step.
      full: From what is trained to the model's weights (a reparameterisation, say).
      start: From the model's weights at the start to what is trained.
      noisy_loss: ``noisy_loss(params, batch, key)``, what is differentiated in the place of `loss`.
    """
    weights_key, batches_key = jax.random.split(key)
    trained = start(model.init(weights_key))

    def step_loss(trained: Any, batch: Digits, step_key: jax.Array) -> jax.Array:
        if noisy_loss is None:
            return loss(model, full(trained), batch)
        return noisy_loss(full(trained), batch, jax.random.fold_in(step_key, 1))

    def step(carry: Any, step_key: jax.Array) -> Any:
        trained, state = carry
        batch = batch_at(data, step_key, batch_size)
        value, gradient = jax.value_and_grad(step_loss)(trained, batch, step_key)
        updates, state = tx.update(gradient, state, trained)
        return (optax.apply_updates(trained, updates), state), value

    keys = jax.random.split(batches_key, steps)
    (trained, _), losses = jax.lax.scan(step, (trained, tx.init(trained)), keys)
    return Trained(trained, losses)
