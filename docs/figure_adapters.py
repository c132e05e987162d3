"""The figure of the page on which adapter: what was learned for how many numbers, and forgotten."""

import json
from operator import itemgetter
from pathlib import Path
import statistics
from typing import Any

LOSS = itemgetter(3)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "adapters.json"


def adapters(figure: Any) -> None:
    """Held-out losses of `benchmarks/adapters.py` by trained numbers, and by what was forgotten."""
    results = json.loads(RESULTS.read_text())
    before, rows = results["before"], []
    for name, rate in results["best"].items():
        runs = [r for r in results["runs"].values() if (r["adapter"], r["rate"]) == (name, rate)]
        losses = [r["held_out_loss"] for r in runs]
        forgotten = statistics.mean(r["old_text_loss"] for r in runs) - before["old_text_loss"]
        mean, spread = statistics.mean(losses), statistics.stdev(losses)
        rows.append((name, runs[0]["trained"], forgotten, mean, spread))
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, trained, forgotten, loss, spread) in enumerate(sorted(rows, key=LOSS)):
        style = {"color": f"C{number % 4}", "marker": "os^Dv"[number // 4 % 5], "ms": 5}
        for axes, x in ((left, trained), (right, forgotten)):
            label = name if axes is left else None
            axes.errorbar(x, loss, spread, ls="", ecolor="0.7", label=label, **style)
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    left.set_xscale("log")
    left.set_xlabel("trained numbers")
    left.set_ylabel("held-out loss")
    right.set_xlabel("rise of the loss on the old text")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
