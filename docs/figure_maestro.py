"""The figure of the page on Maestro: accuracy of networks cut to ranks, from the benchmark."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "maestro_digits.json"
RANKS = (4, 8, 16, 32)
COLOURS = {
    "dense": "#8a4b86",
    "factors, all directions in each step": "#c0712a",
    "sampled ranks": "#3c6e9f",
    "sampled ranks, penalty 1e-3": "#4f8a4f",
}


def maestro(figure: Any) -> None:
    """Left, accuracy with the first directions; right, with those of the SVD of each weight."""
    found = json.loads(RESULTS.read_text())["digits"]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, method, title in zip(
        panels, ("prefix", "svd"), ("the first directions", "SVD of the weight"), strict=True
    ):
        for name, colour in COLOURS.items():
            if method not in found[name]:
                continue
            values = np.array(found[name][method])
            axes.plot(RANKS, values.mean(0), "o-", color=colour, label=name)
            axes.fill_between(RANKS, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axes.set_xlabel("rank of each layer")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy (%)")
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
