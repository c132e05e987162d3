"""Time of a linear layer's forward and backward pass, from sketches of its input against all of it.

    python benchmarks/randomized_step.py
    python benchmarks/randomized_step.py --rows 16384 --dtype bfloat16   # on a GPU or TPU

Both the kernel's gradient and the input's are formed. All take turns in one run; times
are given over the dense layer's. Results are kept in `results/randomized_step.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from timing import Stepper, milliseconds, print_table

import lowrank_optax as lro

RESULTS = Path(__file__).parent / "results" / "randomized_step.json"
KINDS = ("rows", "stratified", "norm_weighted", "rademacher", "gaussian", "srht")
FRACTIONS = (0.5, 0.2, 0.1)


def step_of(sketch: lro.layers.Sketch | None) -> Any:
    """``step(carry, x, kernel, y, key)``: the output and the gradients, in the carry's place."""

    def step(carry: Any, x: jax.Array, kernel: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        del carry

        def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
            if sketch is None:
                return x @ kernel
            return lro.layers.randomized_linear(x, kernel, key=key, sketch=sketch)

        out, vjp = jax.vjp(linear, x, kernel)
        return (out, *vjp(y))

    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by kind and fraction, and of the dense layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (args.rows, args.inputs), (args.inputs, args.outputs), (args.rows, args.outputs)
    draw = lambda key, shape: jax.random.normal(key, shape, args.dtype)
    x, kernel, y = map(draw, keys, shapes)
    arguments = x, kernel, y, jax.random.key(1)
    steppers = {"dense": Stepper(step_of(None), (y, x, kernel), *arguments)}
    for kind in KINDS:
        for fraction in FRACTIONS:
            sketch = lro.layers.Sketch(kind, fraction=fraction)
            steppers[f"{kind} {fraction}"] = Stepper(step_of(sketch), (y, x, kernel), *arguments)
    return {
        "device": jax.devices()[0].device_kind,
        "shape": [args.rows, args.inputs, args.outputs],
        "dtype": args.dtype,
        "rounds": args.rounds,
        "milliseconds": milliseconds(steppers, args.rounds),
    }


def main() -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON is kept")
    parser.add_argument("--markdown", action="store_true", help="print what is kept, as Markdown")
    args = parser.parse_args()
    if not args.markdown:
        args.results.write_text(json.dumps(measure(args), indent=1) + "\n")
    kept = json.loads(args.results.read_text())
    times = kept["milliseconds"]
    columns = ["sketch", *(f"p = {fraction} B" for fraction in FRACTIONS)]
    rows = [[k, *(f"{times[f'{k} {f}'] / times['dense']:.2f}" for f in FRACTIONS)] for k in KINDS]
    if args.markdown:
        lines = [columns, ["---", *["---:"] * len(FRACTIONS)], *rows]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    size = " x ".join(map(str, kept["shape"]))
    title = f"Time over the dense layer's, {times['dense']:.3g} ms ({size}, {kept['dtype']})"
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()
