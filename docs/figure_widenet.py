"""The figure of the page on WideNet: accuracy by size, loads, and memory by depth."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "widenet_digits.json"
BLUE, ORANGE, GREY = "#3c6e9f", "#c0712a", "0.55"
MODELS = {
    "nothing shared": (GREY, "nothing shared"),
    "one dense block": ("0.25", "one dense block"),
    "WideNet": (BLUE, "WideNet"),
    "WideNet, no balance loss": (ORANGE, "WideNet, no balance loss"),
}


def widenet(figure: Any) -> None:
    """A point for each seed, one for each expert and layer, and one line for each kind."""
    content = json.loads(RESULTS.read_text())
    accuracy, load, memory = figure.subplots(1, 3)
    for place, (name, (colour, label)) in enumerate(MODELS.items()):
        runs = content["models"][name]
        values = np.array([run["accuracy"] for run in runs])
        size = runs[0]["parameters"] / 1e3
        size += 1.6 if place == 3 else 0  # beside, not on, the third
        accuracy.plot([size] * len(values), values, "o", color=colour, markersize=3)
        accuracy.plot(size, values.mean(), "_", color=colour, markersize=16, label=label)
        loads = np.array([run["load"] for run in runs])
        if loads.shape[-1] > 1:
            layers = np.arange(1, loads.shape[1] + 1) + (place - 2.5) * 0.24
            places = np.broadcast_to(layers[None, :, None], loads.shape)
            load.plot(places.ravel(), loads.ravel(), "o", color=colour, markersize=3)
    accuracy.set_xlim(0, 40)
    accuracy.set_ylim(84, 92.5)
    accuracy.set_xlabel("parameters of the blocks (thousand)")
    accuracy.set_ylabel("test accuracy (%)")
    accuracy.legend(frameon=False, fontsize=7, loc="lower left")
    load.axhline(0.25, color=GREY, linewidth=0.8)
    load.set_xticks(range(1, 5))
    load.set_xlabel("layer")
    load.set_ylabel("load of each expert")
    load.set_ylim(0.1, 0.4)
    for kind, colour in (("separate blocks", GREY), ("one shared block", BLUE)):
        rows = content["memory"][kind]
        depths = [int(depth) for depth in rows]
        held = [row["weights_gradients_state_mib"] for row in rows.values()]
        temporary = [row["temporaries_mib"] for row in rows.values()]
        memory.plot(depths, held, "o-", color=colour, markersize=4, label=kind)
        memory.plot(depths, temporary, "o--", color=colour, markersize=4, alpha=0.7)
    memory.plot([], [], "-", color="0.3", label="weights, gradients, AdamW")
    memory.plot([], [], "--", color="0.3", label="temporaries of the step")
    memory.set_xticks(depths)
    memory.set_xlabel("layers")
    memory.set_ylabel("MiB")
    memory.set_ylim(0)
    memory.legend(frameon=False, fontsize=7)
    for axes in (accuracy, load, memory):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
