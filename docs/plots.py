"""Plots of a range test and of measured weight decay, for the pages and to copy from."""

from collections.abc import Mapping, Sequence
import os
from typing import Any

from matplotlib.figure import Figure
import numpy as np

import lowrank_optax as lro

Path = str | os.PathLike[str]

COLOURS = {"minimum": "#3c6e9f", "steepest": "#c0712a", "valley": "#4b8a4a"}

# Title, what is drawn, what is dotted beside it, and whether the axis is logarithmic.
PANELS: tuple[tuple[str, str, str | None, bool], ...] = (
    ("norm of the weights", "weight_norm", "equilibrium_norm", True),
    ("rotation per step (radians)", "rotation", "equilibrium_rotation", True),
    ("effective learning rate η / ‖w‖²", "effective_learning_rate", None, True),
    ("share of decay in the update", "decay_share", None, False),
    ("share of the elements that do not move", "rounding_loss", None, False),
    ("share of the decay lost to rounding", "decay_lost", None, False),
)


def plot_lr_range_test(
    result: lro.training.RangeTestResult | lro.training.RangeTestGrid,
    path: Path | None = None,
    axes: Any = None,
) -> Any:
    """Draws the losses over the learning rates, with the suggestions, and returns the axes.

    For several weight decays: the smoothed loss of each, and the suggestions of the chosen one.
    """
    if axes is None:
        axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    if isinstance(result, lro.training.RangeTestGrid):
        results, shown = result.results, result.best
        for each in results:
            label = f"weight decay {each.weight_decay:.3g}"
            axes.plot(each.learning_rates, each.smoothed, label=label)
    else:
        results, shown = (result,), result
        axes.plot(result.learning_rates, result.losses, color="0.75", label="loss")
        axes.plot(result.learning_rates, result.smoothed, color="0.2", label="smoothed")
    for name, (rate, _) in shown.suggestions._asdict().items():
        if np.isfinite(rate):
            axes.axvline(rate, color=COLOURS[name], linestyle="--", label=f"{name}: {rate:.2g}")
    if results[0].learning_rates[0] > 0:
        axes.set_xscale("log")
    # Up to a little above the first losses: a blow-up would hide everything else.
    finite = lambda parts: np.array([x for part in parts for x in part if np.isfinite(x)])
    low = finite(x.losses for x in results).min()
    high = finite(x.losses[: 1 + len(x.losses) // 20] for x in results).max()
    margin = 0.15 * (high - low) or 1.0
    axes.set_ylim(low - margin / 3, high + margin)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    if path is not None:
        axes.figure.savefig(path)
    return axes


def plot_weight_decay(
    history: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Mapping[str, Any]]],
    path: Path | None = None,
    groups: Sequence[str] | None = None,
) -> Figure:
    """Draws norms, rotations, effective learning rates and what rounding loses, over the steps.

    Dotted lines are the predicted equilibrium. `history` is `lro.training.measurements` of stacked
    states, or a list of them. Without `groups`, all but "all" and single layers are drawn.
    """
    steps = [history] if isinstance(history, Mapping) else list(history)
    if not steps:
        raise ValueError("history is empty: give measurements of at least one step.")
    names = list(steps[0])
    if groups is None:
        groups = [name for name in names if "/" not in name and name != "all"] or names
    if not set(groups) <= set(names):
        raise ValueError(f"groups={list(groups)} must be among those measured, {names}.")

    def line(group: str, name: str) -> np.ndarray:
        return np.concatenate([np.ravel(np.array(x[group][name], float)) for x in steps])

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (title, name, beside, log) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for index, group in enumerate(groups):
            axes.plot(line(group, name), color=f"C{index % 10}", label=group)
            if beside is not None:
                axes.plot(line(group, beside), ":", color=f"C{index % 10}")
        if log and any(np.any(line(group, name) > 0) for group in groups):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.25)
        axes.set_xlabel("measurement")
    figure.axes[0].legend(fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
