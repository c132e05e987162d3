"""The picture of a run: losses, batch sizes where they follow the noise, and bytes of states."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

from _run_folder import read_log, write_atomically
import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt

COLORS = ("#1f5fa8", "#d1495b", "#2a9d5c", "#8d5fb0", "#d98a29", "#5b6770")
COLORS += ("#3fb5c4", "#e377a8", "#9aa62f", "#8c564b", "#1b1b1b", "#b59ce0")
Records = dict[str, list[dict[str, Any]]]  # of the logs, by optimizer


def plot(path: Path, logs: dict[str, Path], results: dict[str, dict[str, Any]]) -> None:
    """Draws the losses of all optimizers, and beside them the bytes of their states.

    Where the noise of the gradient was measured, it and the batch size are drawn between them.
    """
    records = {name: read_log(log) for name, log in logs.items()}
    colors = dict(zip(records, color_cycle(len(records)), strict=True))
    noisy = any("noise_scale" in r for each in records.values() for r in each)
    figure, axes = plt.subplots(
        1,
        2 + noisy,
        figsize=(10 + 4 * noisy, 4.5),
        width_ratios=(3, 2, 1) if noisy else (3, 1),
        layout="constrained",
    )
    draw_losses(axes[0], records, colors)
    _draw_bytes(axes[-1], results)
    if noisy:
        _draw_batch_sizes(axes[1], records, colors)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    for each in axes[:-1]:
        each.grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, picture.getvalue())


def _places(records: list[dict[str, Any]]) -> dict[int, int]:
    """Where each step is drawn: sequences read until then; with a fixed batch, steps."""
    made = [r for r in records if "loss" in r]
    ends = itertools.accumulate(r.get("batch_size", 1) for r in made)
    return {0: 0} | dict(zip((r["step"] for r in made), ends, strict=True))


def draw_losses(axes: Any, records: Records, colors: dict[str, str]) -> None:
    """Draws training and held-out losses by step."""
    for name, each in records.items():
        place = _places(each)
        train = [(place[r["step"]], r["loss"]) for r in each if "loss" in r]
        held_out = [(place[r["step"]], r["held_out_loss"]) for r in each if "held_out_loss" in r]
        at, losses = zip(*train, strict=True)
        axes.plot(at, _smooth(losses), color=colors[name], alpha=0.45, linewidth=1)
        dots = {"linewidth": 1.8, "markersize": 4, "label": name}
        axes.plot(*zip(*held_out, strict=True), "o-", color=colors[name], **dots)
    _limit_losses(axes, records)
    axes.set(xlabel=_unit(records), ylabel="loss (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("held-out loss (dots), training loss (thin, smoothed)", fontsize=10)
    axes.legend(frameon=False)


def _unit(records: Records) -> str:
    adaptive = any("batch_size" in r for each in records.values() for r in each)
    return "sequences read" if adaptive else "step"


def _draw_batch_sizes(axes: Any, records: Records, colors: dict[str, str]) -> None:
    for name, each in records.items():
        place = _places(each)
        line = lambda key, each=each, place=place: (
            [place[r["step"]] for r in each if r.get(key)],
            [r[key] for r in each if r.get(key)],
        )
        axes.plot(*line("noise_scale"), color=colors[name], alpha=0.45, linewidth=1)
        axes.plot(*line("batch_size"), color=colors[name], linewidth=1.8, drawstyle="steps-mid")
    axes.set_yscale("log")
    axes.set(xlabel=_unit(records), ylabel="sequences")
    axes.set_title("gradient noise scale (thin), batch size", fontsize=10)


def _draw_bytes(axes: Any, results: dict[str, dict[str, Any]]) -> None:
    sizes = [r["optimizer_state_bytes"] / 2**20 for r in results.values()]
    drawn = axes.bar(list(results), sizes, color=color_cycle(len(results)), width=0.6)
    axes.bar_label(drawn, fmt="%.2f", padding=2)
    axes.set_ylabel("MiB")
    axes.set_title("optimizer state", fontsize=10)
    if len(results) > 2:
        axes.tick_params(axis="x", rotation=45)


def color_cycle(count: int) -> list[str]:
    """As many colors, from the start again after the last."""
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _limit_losses(axes: Any, records: Records) -> None:
    """Cuts the steep first steps off the picture, for the differences are at the end."""
    logged = itertools.chain.from_iterable(records.values())
    held_out = [r["held_out_loss"] for r in logged if "held_out_loss" in r]
    finite = [x for x in held_out if math.isfinite(x)]
    if len(finite) > 2 and max(finite) > min(finite):
        margin = max(finite) - min(finite)
        axes.set_ylim(min(finite) - 0.15 * margin, max(finite) + 0.35 * margin)


def _smooth(values: tuple[float, ...], span: int = 20) -> list[float]:
    """Exponential moving average, which starts as a plain mean."""
    smoothed, mean = [], 0.0
    for index, value in enumerate(values):
        mean += (value - mean) * max(1 / (index + 1), 1 / span)
        smoothed.append(mean)
    return smoothed
