"""The figure of the page on fixed point: accuracy by word length, from the benchmark."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "fixed_point_digits.json"
WAYS = {
    "ptq_max": ("post-training, start by range", "#8a4b86"),
    "ptq_mse": ("post-training, start by error", "#c0712a"),
    "fixed": ("trained, points stay", "#3c6e9f"),
    "learned": ("trained points", "#4f8a4f"),
}


def fixed_point(figure: Any) -> None:
    """One point for each seed, a bar for their mean, in groups of one format."""
    content = json.loads(RESULTS.read_text())
    formats = content["fixed point"]
    axes = figure.subplots(1, 1)
    for index, (name, (label, colour)) in enumerate(WAYS.items()):
        places = np.arange(len(formats)) + (index - 1.5) * 0.2
        values = np.array([each[name] for each in formats.values()])
        axes.bar(places, values.mean(1), 0.18, color=colour, alpha=0.45, label=label)
        axes.plot(places, values, "o", color=colour, markersize=3)
    mean = np.mean(content["float32"]["accuracy"])
    axes.axhline(mean, color="0.3", linestyle="--", linewidth=1, label="float32")
    axes.set_ylim(85, 100)
    names = [name.replace(", weights", ",\nweights") for name in formats]
    axes.set_xticks(range(len(formats)), names)
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
