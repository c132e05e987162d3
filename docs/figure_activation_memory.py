"""The figure of the page on what backward keeps: counted by name, and compiled."""

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.layers import Sketch, randomize
from lowrank_optax.models import Decoder, decoder_config
from lowrank_optax.planning import SavedResidualsReport, saved_residuals

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "activation_memory.json"
SHAPE = (16, 256)  # as in the results
# What is kept, by what its name has in it; the first that fits counts.
GROUPS: dict[str, Callable[[str], bool]] = {
    "few_bit_codes": lambda name: name == "few_bit_codes",
    "linear_sketch": lambda name: name == "linear_sketch",
    "in MLP": lambda name: "in MLP" in name,
    "in RMSNorm": lambda name: "in RMSNorm" in name,
    "in Attention": lambda name: "in Attention" in name or "in rotate" in name,
    "blocks' inputs": lambda name: "scan carry" in name,
    "loss and others": lambda name: True,
}
COLOURS = ("#c0712a", "#e0b050", "#3c6e9f", "#8fb3d3", "#4b8a4a", "#7d5ba6", "0.75")


def activation_memory(figure: Any) -> None:
    """Bytes by name for five ways to run llama-350m; predicted against compiled temporaries."""
    counted, compiled = figure.subplots(1, 2, width_ratios=(1, 1.1))
    bars(counted, reports())
    if RESULTS.exists():
        peaks(compiled, json.loads(RESULTS.read_text())["decoder"]["rows"])
    for axes in (counted, compiled):
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def reports() -> dict[str, SavedResidualsReport]:
    """What is counted; no weight is made for it."""
    sketch = Sketch(fraction=1 / 8)
    return {
        "plain": report(),
        "remat, full": report(remat="full"),
        "4 bits": report(activation_bits=4),
        "randomized 1/8": report(sketch),
        "randomized 1/8, 4 bits": report(sketch, activation_bits=4),
    }


def report(sketch: Sketch | None = None, **options: Any) -> SavedResidualsReport:
    """Of a decoder in bfloat16."""

    def make() -> Decoder:
        types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        model = Decoder(decoder_config("llama-350m"), rngs=nnx.Rngs(0), **types, **options)
        if sketch is not None:
            randomize(model, sketch, rngs=0)
        return model

    def loss(model: Decoder, tokens: jax.Array) -> jax.Array:
        each = optax.losses.softmax_cross_entropy_with_integer_labels(model(tokens), tokens)
        return each.mean()

    tokens = jax.ShapeDtypeStruct(SHAPE, jnp.int32)
    return saved_residuals(loss, nnx.eval_shape(make), tokens, compiled=False)


def bars(axes: Any, reports: dict[str, SavedResidualsReport]) -> None:
    """Stacked, a bar a report."""
    places, left = np.arange(len(reports)), np.zeros(len(reports))
    sums = [dict.fromkeys(GROUPS, 0.0) for _ in reports]
    for one, own in zip(reports.values(), sums, strict=True):
        for name, size in one.bytes_by_name().items():
            own[next(group for group, fits in GROUPS.items() if fits(name))] += size / 2**30
    for group, colour in zip(GROUPS, COLOURS, strict=True):
        width = np.array([own[group] for own in sums])
        axes.barh(places, width, left=left, color=colour, label=group, height=0.65)
        left = left + width
    axes.set_yticks(places, list(reports), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("kept for backward, GiB")
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(GROUPS),
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
        handlelength=1.2,
    )


def peaks(axes: Any, rows: dict[str, Any]) -> None:
    """The compiler's temporaries, and what is predicted of them by what is counted."""
    places = np.arange(len(rows))
    gibibytes = lambda n: n / 2**30
    measured = [gibibytes(row["temporary_bytes"]) for row in rows.values()]
    axes.barh(places, measured, color="0.75", height=0.65, label="compiled")
    predicted = {}
    for place, row in zip(places, rows.values(), strict=True):
        if base := rows.get(row["against"]):
            less = base["kept_bytes"] - row["kept_bytes"]
            predicted[place] = gibibytes(base["temporary_bytes"] - less)
    marks = {"color": COLOURS[0], "markersize": 9, "markeredgewidth": 2, "label": "predicted"}
    axes.plot(list(predicted.values()), list(predicted), "|", **marks)
    axes.set_yticks(places, list(rows), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(measured))
    axes.set_xlabel("temporaries of a train step on a v5e, GiB")
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.79))
