"""Few-bit GELUs and randomized linear layers on scikit-learn's digits, against exact training.

    python benchmarks/few_bit_digits.py             # whatever is missing in the results file
    python benchmarks/few_bit_digits.py --markdown  # the tables as Markdown

A small residual network with GELU whose backward pass keeps 1 to 4 bits, with codebooks for a
uniform and for a normal density; and a perceptron all of whose layers keep a sketch of their input,
of three kinds and sizes. Three seeds each, the same weights and batches as in exact training; what
is compared is the loss over the whole run and at its end, and the test accuracy. Some eight minutes
of one core; a stopped run goes on after the last result.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
import time
from typing import Any

import digits
from family_table import Column, print_columns
import jax
import jax.numpy as jnp
import numpy as np
import optax
from projection_family import RESULTS, Results

import lowrank_optax as lro

CODEBOOKS = [(bits, density) for density in ("uniform", "normal") for bits in (4, 3, 2, 1)]
SKETCHES = [(kind, part) for kind in ("stratified", "rows", "gaussian") for part in (0.5, 0.2, 0.1)]
RATE = 1e-3
Loss = Callable[[Any, digits.Digits, jax.Array], jax.Array]


def few_bit_cnn(bits: int, density: str) -> digits.Model:
    """The network with a quantised derivative of its GELU."""
    book = lro.activations.codebook(jax.nn.gelu, bits, density=density)
    return digits.cnn(activation=lro.activations.few_bit(jax.nn.gelu, bits, codebook=book))


def sketched_loss(sketch: lro.layers.Sketch) -> Loss:
    """The perceptron's loss, with a sketch for each layer from keys of its own."""

    def loss(params: Any, batch: digits.Digits, key: jax.Array) -> jax.Array:
        keys = iter(jax.random.split(key, len(params)))

        def affine(layer: Any, x: jax.Array) -> jax.Array:
            kernel, bias = layer["kernel"], layer["bias"]
            return lro.layers.randomized_linear(x, kernel, bias, key=next(keys), sketch=sketch)

        return digits.loss(digits.mlp(affine=affine), params, batch)

    return loss


def run(
    model: digits.Model, seeds: int, steps: int, noisy_loss: Loss | None = None
) -> dict[str, Any]:
    """Trains from every seed at once.

    Returns:
      By seed: ``loss_of_run``, the mean of all steps' batches; ``loss`` of all training images and
      ``accuracy`` on the test images after the last step.
    """
    began = time.perf_counter()
    data = digits.load()

    def one(seed: jax.Array) -> tuple[jax.Array, ...]:
        trained = digits.train(
            model, optax.adam(RATE), jax.random.key(seed), data.train, steps, noisy_loss=noisy_loss
        )
        return (
            trained.losses.mean(),
            digits.loss(model, trained.params, data.train),
            digits.accuracy(model, trained.params, data.test),
        )

    figures = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    named = zip(("loss_of_run", "loss", "accuracy"), figures, strict=True)
    return {
        **{name: [float(f"{x:.5g}") for x in np.asarray(values)] for name, values in named},
        "seconds": round(time.perf_counter() - began, 1),
    }


def run_all(results: Results, seeds: int, steps: int) -> None:
    """Runs what the results do not have yet."""
    cnn = digits.cnn(activation=jax.nn.gelu)
    results.once(("network", "exact"), lambda: run(cnn, seeds, steps))
    for bits, density in CODEBOOKS:
        quantised = lambda b=bits, d=density: run(few_bit_cnn(b, d), seeds, steps)
        results.once(("network", _codebook_name(bits, density)), quantised)
    mlp = digits.mlp()
    results.once(("perceptron", "exact"), lambda: run(mlp, seeds, steps))
    for kind, fraction in SKETCHES:
        loss = sketched_loss(lro.layers.Sketch(kind, fraction=fraction))
        sketched = lambda loss=loss: run(mlp, seeds, steps, loss)
        results.once(("perceptron", _sketch_name(kind, fraction)), sketched)


def _codebook_name(bits: int, density: str) -> str:
    return f"{bits} bit{'s' if bits > 1 else ''}, {density}"


def _sketch_name(kind: str, fraction: float) -> str:
    return f"{kind}, {fraction:g} of the rows"


def print_table(title: str, runs: dict[str, Any], markdown: bool) -> None:
    """A table of all runs of one model; differences are of each seed to its exact run."""

    def difference(row: Any, name: str) -> str:
        change = 100 * (np.array(row[1][name]) / np.array(runs["exact"][name]) - 1)
        return "" if row[0] == "exact" else f"{change.mean():+.2f}% ± {_std(change):.2f}"

    def both(row: Any, name: str, scale: float, digits_: int) -> str:
        values = scale * np.array(row[1][name])
        return f"{values.mean():.{digits_}f} ± {_std(values):.{digits_}f}"

    columns = [
        Column(title, lambda row: row[0]),
        Column("loss of the run", lambda row: both(row, "loss_of_run", 1, 4)),
        Column("difference", lambda row: difference(row, "loss_of_run")),
        Column("loss at the end", lambda row: both(row, "loss", 1, 4)),
        Column("difference ", lambda row: difference(row, "loss")),
        Column("test accuracy, %", lambda row: both(row, "accuracy", 100, 2)),
    ]
    print_columns(
        f"{title}: mean ± standard deviation over seeds", list(runs.items()), columns, markdown
    )


def _std(values: np.ndarray) -> float:
    """Of a sample; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "few_bit_digits.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"steps": args.steps, "seeds": args.seeds, "batch_size": 64, "rate": RATE}
    results = Results(args.output, setting, args.log)
    run_all(results, args.seeds, args.steps)
    print_table("network", results.content["network"], args.markdown)
    print_table("perceptron", results.content["perceptron"], args.markdown)


if __name__ == "__main__":
    main()
