"""ComRoPE against RoPE on scikit-learn's digits, tested at resolutions it was not trained at.

    python benchmarks/comrope_digits.py             # whatever is missing in the results file
    python benchmarks/comrope_digits.py --markdown  # the tables as Markdown

A small vision transformer on patches of 2 × 2 pixels is trained on images of 8 × 8 pixels, and
tested on the same images resized; positions are those of patch centres in an image scaled to 1.
RoPE is axial, with fixed frequencies. Then the time of a step of a wider transformer at 14 × 14
patches, each kind in turn with RoPE. Some ten minutes of one core; a stopped run goes on after the
last result.
"""

import argparse
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

from lowrank_optax.layers import ComRoPE
from lowrank_optax.layers.comrope import grid_positions
from lowrank_optax.models.rotary import rotate

KINDS = ("rope", "ap 4", "ld 4", "ld 8", "ld 4 perturbed")
TIMED = ("ap 4", "ld 4", "ld 8")
SIDES = (8, 12, 16)  # of test images
BATCH = 64


class AxialRoPE(nnx.Module):
    """RoPE with fixed frequencies, half of them on each axis."""

    def __init__(self, heads: int, width: int) -> None:
        self.frequencies = 4 * 100.0 ** (-np.arange(0, width, 4) / width)

    def __call__(self, query: Any, key: Any, positions: Any) -> Any:
        """Both, rotated by positions ``[n, 2]``."""
        angles = (positions[:, :, None] * self.frequencies).reshape(len(positions), 1, -1)
        rotary = jnp.cos(angles), jnp.sin(angles)
        return rotate(query, rotary), rotate(key, rotary)


def make_rope(kind: str, heads: int, width: int, rngs: nnx.Rngs) -> Any:
    """The positions of one layer."""
    if kind == "rope":
        return AxialRoPE(heads, width)
    variant, size = kind.split()[:2]
    return ComRoPE(heads, width, num_axes=2, block_size=int(size), variant=variant, rngs=rngs)


class Layer(nnx.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, kind: str, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm, self.mlp_norm = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.projection = nnx.Linear(width, 3 * width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(*sides, rngs=rngs) for sides in ((width, 4 * width), (4 * width, width))
        )
        self.rope = make_rope(kind, heads, width // heads, rngs)
        self.heads = heads

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens ``[batch, n, width]``, mixed."""
        split = self.projection(self.norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = (split[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(*self.rope(query, key, positions), value)
        x = x + self.output(mixed.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """Patches and a class token through layers, to logits."""

    def __init__(
        self, kind: str, rngs: nnx.Rngs, width: int = 32, heads: int = 2, layers: int = 2
    ) -> None:
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.layers = nnx.List([Layer(kind, width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Logits of images ``[batch, side, side]``; a key moves the positions of the patches."""
        side = images.shape[1] // 2
        patches = images.reshape(-1, side, 2, side, 2).swapaxes(2, 3).reshape(-1, side * side, 4)
        token = jnp.broadcast_to(self.token[...], (len(patches), 1, self.token.shape[-1]))
        x = jnp.concatenate([token, self.embed(patches)], axis=1)
        positions = grid_positions((side, side), class_token=True, key=key)
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(self.norm(x[:, 0]))


@functools.cache
def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Images of 0 to 1 and labels: 1347 to train on, 450 to test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    images = jnp.asarray(bunch.images[order] / 16, jnp.float32)
    labels = jnp.asarray(bunch.target[order])
    cut = 3 * len(order) // 4
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def train_step(graphdef: Any, tx: Any, params: Any, state: Any, batch: Any, key: Any) -> Any:
    """One step on images and labels; a key moves the positions."""

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graphdef, params)(batch[0], key)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def accuracies(kind: str, seed: int, steps: int) -> dict[str, float]:
    """Test accuracies in % of a trained transformer, by the side of the test images."""
    images, labels, test_images, test_labels = load()
    graphdef, params = nnx.split(Transformer(kind, nnx.Rngs(seed)))
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps))

    def step(carry: Any, key: jax.Array) -> Any:
        chosen = jax.random.randint(key, (BATCH,), 0, len(labels))
        moving = jax.random.fold_in(key, 1) if kind.endswith("perturbed") else None
        batch = images[chosen], labels[chosen]
        return train_step(graphdef, tx, *carry, batch, moving), None

    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), keys)[0][0])
    params = run(params)
    found = {}
    for side in SIDES:
        resized = jax.image.resize(test_images, (len(test_images), side, side), "bilinear")
        logits = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, resized)
        found[str(side)] = round(100 * float((logits.argmax(-1) == test_labels).mean()), 2)
    return found


def step_times(kind: str, repeats: int) -> dict[str, float]:
    """Medians of the seconds of a step with RoPE and with this kind, in turn, and their ratio."""
    images = jax.random.uniform(jax.random.key(0), (8, 28, 28))
    batch, tx, steps = (images, jnp.arange(8)), optax.adamw(1e-3), {}
    for name in ("rope", kind):
        model = Transformer(name, nnx.Rngs(0), width=192, heads=3, layers=4)
        graphdef, params = nnx.split(model)
        state = tx.init(params)
        run = functools.partial(train_step, graphdef, tx)
        compiled = jax.jit(run).lower(params, state, batch, None).compile()
        steps[name] = functools.partial(compiled, params, state, batch, None)
        jax.block_until_ready(steps[name]())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, call in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    ratio = float(np.median(np.divide(seconds[kind], seconds["rope"])))
    return {
        "rope": round(medians["rope"], 4),
        kind: round(medians[kind], 4),
        "ratio": round(ratio, 3),
    }


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=11, help="timed steps of each kind")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "comrope_digits.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"steps": args.steps, "seeds": args.seeds, "batch_size": BATCH}
    results = Results(args.output, setting, args.log)
    for kind in TIMED:
        results.once(("seconds", kind), lambda k=kind: step_times(k, args.repeats))
    for kind in KINDS:
        run = lambda k=kind: [accuracies(k, seed, args.steps) for seed in range(args.seeds)]
        results.once(("accuracy", kind), run)

    def cell(side: int) -> Any:
        def of(row: Any) -> str:
            values = [each[str(side)] for each in row[1]]
            return f"{np.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"

        return of

    columns = [Column(f"{side} × {side}", cell(side)) for side in SIDES]
    accuracy = list(results.content["accuracy"].items())
    title = "Test accuracy in % by resolution, mean and range over seeds"
    print_columns(
        title, accuracy, [Column("positions", lambda row: row[0]), *columns], args.markdown
    )
    columns = [
        Column("positions", lambda row: row[0]),
        Column("seconds", lambda row: f"{row[1][row[0]]:.3f}"),
        Column("RoPE's", lambda row: f"{row[1]['rope']:.3f}"),
        Column("ratio", lambda row: f"{row[1]['ratio']:.2f}"),
    ]
    seconds = list(results.content["seconds"].items())
    print_columns("Time of a training step", seconds, columns, args.markdown)


if __name__ == "__main__":
    main()
