"""The figure of the page on random-feature attention: time by length, error by features."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "random_feature_attention.json"
COLOURS = {"positive": "#3c6e9f", "positive_pm": "#4b8a4a", "trig": "#c0712a"}


def random_feature_attention(figure: Any) -> None:
    """Milliseconds of both kinds of attention; error of each kind of features for two norms.

    Without trigonometric features of large vectors, whose error is far above all others.
    """
    content = json.loads(RESULTS.read_text())
    time, error = figure.subplots(1, 2)
    lengths = [int(length) for length in content["times"]]
    for name, colour in (("softmax", "0.55"), ("features", "#3c6e9f")):
        label = "softmax" if name == "softmax" else "128 random features"
        times = [each[name] for each in content["times"].values()]
        time.loglog(lengths, times, "o-", color=colour, label=label)
    time.set_xticks(lengths, [str(length) for length in lengths])
    time.minorticks_off()
    time.set_xlabel("length of the text")
    time.set_ylabel("ms, outputs and gradients")
    for name, errors in content["errors"].items():
        kind, norm = name.split()
        if name == "trig 4":
            continue
        counts = [int(count) for count in errors]
        means = [100 * np.mean(values) for values in errors.values()]
        style = "o-" if norm == "1" else "s--"
        label = f"{kind}, norm {norm}"
        error.loglog(counts, means, style, color=COLOURS[kind], label=label, markersize=4)
    error.set_xticks(counts, [str(count) for count in counts])
    error.minorticks_off()
    error.set_xlabel("random directions")
    error.set_ylabel("error of the output (%)")
    for axes in (time, error):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
