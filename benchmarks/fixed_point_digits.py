"""Fixed point on scikit-learn's digits: trained binary points against post-training quantization.

    python benchmarks/fixed_point_digits.py             # whatever is missing in the results file
    python benchmarks/fixed_point_digits.py --markdown  # the table as Markdown

A small residual network with batch norms is trained in float32, and then each of its tensors is a
fixed-point number: inputs, weights, biases and outputs of convolutions, norms, shortcut and head.
Binary points start by their range or by their squared error, from 256 training images, and then
stay, or the weights are trained on with them, or both are trained. The integers of each trained
network run in NumPy over all test images and are compared with the JAX network bit for bit. Some
ten minutes of two cores; a stopped run goes on after the last result.
"""

import argparse
from collections.abc import Callable
import copy
import functools
from pathlib import Path
import time
from typing import Any

from family_table import Column, print_columns
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from projection_family import RESULTS, Results

import lowrank_optax as lro
from lowrank_optax.layers import FixedPointFormat, IntegerArray, LayerFormats

BITS = (4, 6, 8)
ONES = (1,)
BATCH = 64


class Network(nnx.Module):
    """A stem, a residual convolution, a convolution of stride 2 and a head, with batch norms."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.stem_norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.add = lro.layers.FixedPointSum()
        self.down = nnx.Conv(16, 16, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.head = nnx.Linear(144, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits ``[n, 10]`` of images ``[n, 8, 8, 1]``, in JAX or in integers."""
        x = self.stem_norm(self.stem(x)).clip(0)
        x = self.add(x, self.norm(self.conv(x))).clip(0)
        return self.head(self.down(x).clip(0).reshape(-1, 144))


@functools.cache
def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of 0 to 16 and labels: 1347 images to train on, 450 to test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    pixels, labels = bunch.images[order, ..., None].astype(np.int64), bunch.target[order]
    cut = 3 * len(order) // 4
    return pixels[:cut], labels[:cut], pixels[cut:], labels[cut:]


def to_numbers(pixels: np.ndarray) -> jax.Array:
    """Pixels as float32 in 0 to 1, exactly."""
    return jnp.asarray(pixels / 16, jnp.float32)


def mean_loss(model: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def fit(model: Network, seed: int, steps: int, rate: float, point_rate: float = 0.0) -> None:
    """Trains a model in place by Adam, its binary points with a learning rate of their own."""
    pixels, labels, _, _ = load()
    x, labels = to_numbers(pixels), jnp.asarray(labels)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    kinds = {"weights": optax.adam(rate), "points": optax.adam(point_rate)}
    kind = lambda path, _: "points" if "integer_bits" in jax.tree_util.keystr(path) else "weights"
    tx = optax.partition(kinds, lambda tree: jax.tree_util.tree_map_with_path(kind, tree))

    def step(carry: Any, key: jax.Array) -> Any:
        params, rest, state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, len(labels))

        def loss(params: Any) -> Any:
            model = nnx.merge(graphdef, params, rest, copy=True)
            value = mean_loss(model, x[chosen], labels[chosen])
            return value, nnx.state(model, nnx.Not(nnx.Param))

        gradient, rest = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), rest, state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    params, rest, _ = run((params, rest, tx.init(params)))
    nnx.update(model, params, rest)


@functools.cache
def float_network(seed: int, steps: int) -> Network:
    """Trained in float32; copy it."""
    model = Network(nnx.Rngs(seed))
    fit(model, seed, steps, 3e-3)
    model.eval()
    return model


predict = nnx.jit(lambda model, x: model(x))


def accuracy(model: Network) -> float:
    """Share of test images whose largest logit is their label's, in %."""
    _, _, pixels, labels = load()
    found = np.asarray(predict(model, to_numbers(pixels))).argmax(-1)
    return round(100 * float((found == labels).mean()), 2)


def different_logits(model: Network) -> int:
    """How many of the test images' logits are not those of the integers in NumPy."""
    _, _, pixels, _ = load()
    logits = Network.__call__(lro.layers.to_integers(model), IntegerArray(pixels, 4))
    exact = np.ldexp(logits.integers.astype(np.float64), -logits.fraction_bits)
    return int((exact != np.asarray(predict(model, to_numbers(pixels)), np.float64)).sum())


def converted(seed: int, steps: int, formats: Any, rule: Any) -> Network:
    """The float network in fixed point, after training."""
    model = copy.deepcopy(float_network(seed, steps))
    lro.layers.convert_to_fixed_point(model, formats, "", rule=rule)
    calibrate = to_numbers(load()[0][:256])
    lro.layers.calibrate_fixed_point(model, lambda m, x: m(x), calibrate, rule=rule)
    return model


def compare(seed: int, steps: int, formats: Any) -> dict[str, Any]:
    """Test accuracies in % of post-training and trained networks, from one float network."""
    pixels, labels, _, _ = load()
    x, labels = to_numbers(pixels), jnp.asarray(labels)
    ptq = {rule: converted(seed, steps, formats, rule) for rule in ("max", "mse")}
    found: dict[str, Any] = {f"ptq_{rule}": accuracy(model) for rule, model in ptq.items()}
    checked = list(ptq.values())
    for name, rate in (("fixed", 0.0), ("learned", 1e-2)):
        model = copy.deepcopy(ptq["mse"])
        before = _points(model)
        fit(model, seed + 100, steps // 2, 1e-3, rate)
        if rate:
            found["largest_move"] = round(float(np.abs(_points(model) - before).max()), 2)
            found["learned_not_frozen"] = accuracy(model)
            lro.layers.freeze_binary_points(model, lambda model: mean_loss(model, x, labels))
        found[name] = accuracy(model)
        checked.append(model)
    return found | {"different_logits": sum(map(different_logits, checked))}


def _points(model: Network) -> np.ndarray:
    return np.array([float(x) for x in jax.tree.leaves(nnx.state(model, lro.layers.BinaryPoint))])


def run(seeds: int, steps: int, formats: Any) -> dict[str, Any]:
    """The accuracies of every seed, by name."""
    began = time.perf_counter()
    found = [compare(seed, steps, formats) for seed in range(seeds)]
    seconds = round(time.perf_counter() - began, 1)
    return {name: [each[name] for each in found] for name in found[0]} | {"seconds": seconds}


def settings() -> dict[str, Any]:
    """All formats, by name."""
    eight = FixedPointFormat(8)
    few = lambda ones: LayerFormats(weight=FixedPointFormat(8, ones=ones), bias=eight)
    by_bits: dict[str, Any] = {f"{bits} bits": bits for bits in BITS}
    return by_bits | {f"8 bits, weights of {k} one{'s' * (k > 1)}": few(k) for k in ONES}


def print_table(content: dict[str, Any], markdown: bool) -> None:
    """Test accuracies, means and ranges over seeds."""

    def both(name: str) -> Callable[[Any], str]:
        def cell(row: Any) -> str:
            values = row[1][name]
            return f"{np.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"

        return cell

    names = {
        "ptq_max": "post-training, range",
        "ptq_mse": "post-training, error",
        "fixed": "trained, points stay",
        "learned": "trained points",
    }
    columns = [
        Column("format", lambda row: row[0]),
        *(Column(title, both(name)) for name, title in names.items()),
        Column("logits that differ", lambda row: str(sum(row[1]["different_logits"]))),
    ]
    print_columns("Test accuracy in %, mean and range over seeds", content, columns, markdown)


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "fixed_point_digits.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"steps": args.steps, "seeds": args.seeds, "batch_size": BATCH}
    results = Results(args.output, setting, args.log)
    in_float = lambda: [accuracy(float_network(seed, args.steps)) for seed in range(args.seeds)]
    results.once(("float32", "accuracy"), in_float)
    for name, formats in settings().items():
        results.once(("fixed point", name), lambda f=formats: run(args.seeds, args.steps, f))
    print("float32:", results.content["float32"]["accuracy"])
    print_table(list(results.content["fixed point"].items()), args.markdown)


if __name__ == "__main__":
    main()
