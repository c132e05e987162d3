"""Compiled peaks of one step of every optimizer, as ratios to AdamW's.

    python benchmarks/peaks.py                     # whatever is missing in the results file
    python benchmarks/peaks.py --only galore fira  # optimizers with such names
    python benchmarks/peaks.py --markdown          # the table as Markdown

Compiles the step alone for four stacks of 16 matrices [1024, 1024], in float32 and in bfloat16, and
runs nothing. Four forms of the step, whose gradients are arguments:

- `update_whole`: as `update`, without slices;
- `update`: `tx.update`, gradients and state donated, so that updates are written over gradients as
  in a training step;
- `update_and_apply`: `tx.update` and `optax.apply_updates`, parameters and state donated: gradients
  that the step may not write over are copied where updates are made in a loop;
- `in_slices`: `lro.apply_in_slices`, or `step` of `lro.fused_adamw`, parameters and state donated.

The peak of a form is arguments, temporaries, and outputs that do not alias an argument, in
parentheses over that of `optax.adamw` in the same form. An optimizer that slices would change has
no peak in slices.
"""

import argparse
from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any, NamedTuple
import warnings

from family_table import Column, print_columns
import jax
import jax.numpy as jnp
import optax
from optimizer_recipes import BASELINE, DTYPES, RANK, RECIPES, Recipe
from projection_family import RESULTS, Results

import lowrank_optax as lro

HEADINGS = {
    "update_whole": "`tx.update`, whole leaves",
    "update": "`tx.update`",
    "in_slices": "`lro.apply_in_slices`",
}
REFUSABLE = ("update_whole", "in_slices")


def weights(args: argparse.Namespace, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters."""
    shape = (args.layers, args.side, args.side)
    return {f"stack_{i}": jax.ShapeDtypeStruct(shape, dtype) for i in range(args.stacks)}


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree of shapes."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


class Form(NamedTuple):
    """A function to compile, the shapes of its arguments, and which of them it may write over."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = (0, 1)


def forms(tx: Any, params: Any, state: Any, gradients: Any) -> dict[str, Form]:
    """Each form of the step."""
    kept = (params, state, gradients)
    if hasattr(tx, "step"):  # lro.fused_adamw
        return {"in_slices": Form(tx.step, (gradients, state, params), (1, 2))}

    def update_whole(gradients: Any, state: Any, params: Any) -> Any:
        return lro.in_slices(tx, slices="off").update(gradients, state, params)

    def update_and_apply(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return {
        # Gradients come first, or JAX pairs the updates with a moment's memory.
        "update_whole": Form(update_whole, (gradients, state, params)),
        "update": Form(tx.update, (gradients, state, params)),
        "update_and_apply": Form(update_and_apply, kept),
        "in_slices": Form(functools.partial(lro.apply_in_slices, tx), kept),
    }


def allocated(form: Form) -> int:
    """Bytes that the compiled form allocates."""
    jitted = jax.jit(form.step, donate_argnums=form.donated, keep_unused=True)
    with warnings.catch_warnings():
        # Outputs of other dtypes than what is donated: the peak counts them.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        lowered = jitted.lower(*form.arguments)
    memory = lowered.compile().memory_analysis()
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new_outputs + memory.temp_size_in_bytes


def measure(recipe: Recipe, gradients: Any) -> dict[str, int | None]:
    """State bytes and the peak of each form; gradients have the shapes of the weights."""
    tx = recipe.make()
    params = jax.eval_shape(lro.to_int8_weights, gradients) if recipe.int8_weights else gradients
    state = jax.eval_shape(tx.init, params)
    figures: dict[str, int | None] = {
        "weight_bytes": nbytes(params),
        "state_bytes": nbytes(state),
    }
    for name, form in forms(tx, params, state, gradients).items():
        try:
            figures[name] = allocated(form)
        except ValueError as error:
            if name not in REFUSABLE:
                raise
            print(f"refused: {error}")
            figures[name] = None
    return figures


def columns(runs: dict[str, Any], dtype: str) -> list[Column]:
    """State, and the peak of each form with its ratio to AdamW's of the same form."""

    def cell(name: str, key: str) -> str:
        value = runs.get(name, {}).get(dtype, {}).get(key)
        base = runs[BASELINE][dtype][key]
        if value is None:
            return ""
        size = f"{value / 2**20:,.0f}"
        return size if key == "state_bytes" else f"{size} ({value / base:.2f})"

    column = lambda heading, key: Column(heading, lambda name: cell(name, key))
    return [
        Column("optimizer", lambda name: f"`{name}`"),
        column("state", "state_bytes"),
        *(column(heading, form) for form, heading in HEADINGS.items()),
    ]


def main() -> None:
    """Compiles what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="optimizers with such a name")
    parser.add_argument("--stacks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "peaks.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    sizes = {name: getattr(args, name) for name in ("stacks", "layers", "side")}
    results = Results(args.output, {**sizes, "rank": RANK, "device": device}, args.log)
    names = [name for name in RECIPES if any(part in name for part in args.only)]
    for name in dict.fromkeys([BASELINE, *names]):
        for dtype in RECIPES[name].dtypes:
            run = lambda name=name, dtype=dtype: measure(RECIPES[name], weights(args, dtype))
            results.once(("runs", name, dtype), run)
    runs = results.content["runs"]
    for dtype in DTYPES:
        measured = [name for name in names if dtype in RECIPES[name].dtypes]
        print_columns(f"{dtype}, MiB", measured, columns(runs, dtype), args.markdown)


if __name__ == "__main__":
    main()
