"""The figure of the page on ComRoPE: accuracy by resolution of test images, from the benchmark."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "comrope_digits.json"
KINDS = {
    "rope": ("RoPE", "0.55"),
    "ap 4": ("axial partition, $b = 4$", "#3c6e9f"),
    "ld 4": ("linearly dependent, $b = 4$", "#c0712a"),
    "ld 8": ("linearly dependent, $b = 8$", "#4b8a4a"),
    "ld 4 perturbed": ("linearly dependent, $b = 4$, moved patches", "#8a4b86"),
}


def comrope(figure: Any) -> None:
    """One line for each kind, the mean over seeds, and a point for each seed."""
    content = json.loads(RESULTS.read_text())["accuracy"]
    axes = figure.subplots(1, 1)
    for index, (kind, (label, colour)) in enumerate(KINDS.items()):
        sides = list(content[kind][0])
        values = np.array([[each[side] for side in sides] for each in content[kind]])
        places = np.arange(len(sides)) + (index - 2) * 0.06
        axes.plot(places, values.mean(0), color=colour, label=label)
        axes.plot(places, values.T, "o", color=colour, markersize=3)
    axes.set_xticks(range(len(sides)), [f"{side} × {side}" for side in sides])
    axes.set_xlabel("pixels of test images; trained at 8 × 8")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
