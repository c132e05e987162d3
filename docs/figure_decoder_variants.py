"""The figure of the decoder's variants at equal training FLOPs, from the benchmark."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "decoder_variants.json"
GREY, PLAIN, GUIDED = "0.45", "#3c6e9f", "#c0712a"


def decoder_variants(figure: Any) -> None:
    """Held-out loss of each variant, a point for each seed; and parameters against the mean."""
    runs = json.loads(RESULTS.read_text())["runs"]
    losses = {name: [x["held_out_loss"] for x in each.values()] for name, each in runs.items()}
    mean_size = lambda runs: np.mean([x["parameters"] for x in runs.values()])
    weights = {name: mean_size(each) for name, each in runs.items()}
    order = sorted(losses, key=lambda name: -np.mean(losses[name]))
    by_name, by_size = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for place, name in enumerate(order):
        colour = GREY if name.startswith("dense") else (GUIDED if "guided" in name else PLAIN)
        by_name.plot(losses[name], [place] * len(losses[name]), "o", color=colour, markersize=4)
        by_name.plot(np.mean(losses[name]), place, "|", color=colour, markersize=14)
        by_size.plot(weights[name] / 1e6, np.mean(losses[name]), "o", color=colour)
    by_name.set_yticks(range(len(order)), order, fontsize=8)
    by_name.set_xlabel("held-out loss")
    by_size.set_xlabel("parameters of the final model (million)")
    by_size.set_ylabel("mean held-out loss")
    for axes in (by_name, by_size):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
