"""A plot of a range test."""

from pathlib import Path
from typing import Any

import numpy as np

from lowrank_optax.schedules.range_test import RangeTestGrid, RangeTestResult

COLOURS = {"minimum": "#3c6e9f", "steepest": "#c0712a", "valley": "#4b8a4a"}


def plot_lr_range_test(
    result: RangeTestResult | RangeTestGrid, path: str | Path | None = None, axes: Any = None
) -> Any:
    """Draws the losses over the learning rates, with the suggestions.

    Of several weight decays, it draws the smoothed loss of each, and the suggestions of the chosen
    one. The axis is logarithmic, unless learning rates rose linearly from 0.

    Args:
      result: Of `lr_range_test`.
      path: Where to save the figure, if anywhere.
      axes: Matplotlib axes to draw into; None for a new figure.

    Returns:
      The axes; ``axes.figure`` is the figure.

    Raises:
      ImportError: Without matplotlib.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> step_fn = lambda x, batch, learning_rate: (x - learning_rate * x, 0.5 * x**2)
      >>> result = lro.schedules.lr_range_test(step_fn, jnp.ones([]), None)
      >>> axes = lro.schedules.plot_lr_range_test(result)
      >>> print(axes.get_xlabel(), axes.get_xscale())
      learning rate log
    """
    if axes is None:
        axes = _new_axes()
    if isinstance(result, RangeTestGrid):
        results, shown = result.results, result.best
        for each in results:
            label = f"weight decay {each.weight_decay:.3g}"
            axes.plot(each.learning_rates, each.smoothed, label=label)
    else:
        results, shown = (result,), result
        axes.plot(result.learning_rates, result.losses, color="0.75", label="loss")
        axes.plot(result.learning_rates, result.smoothed, color="0.2", label="smoothed")
    _mark_suggestions(axes, shown)
    if results[0].learning_rates[0] > 0:
        axes.set_xscale("log")
    axes.set_ylim(*_limits(results))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    if path is not None:
        axes.figure.savefig(path)
    return axes


def _mark_suggestions(axes: Any, result: RangeTestResult) -> None:
    for name, suggestion in result.suggestions._asdict().items():
        rate = suggestion.learning_rate
        if np.isfinite(rate):
            axes.axvline(rate, color=COLOURS[name], linestyle="--", label=f"{name}: {rate:.2g}")


def _limits(results: tuple[RangeTestResult, ...]) -> tuple[float | None, float | None]:
    """From the lowest loss to a little above the first ones: a blow-up would hide the rest."""
    losses = np.concatenate([x.losses for x in results])
    first = np.concatenate([x.losses[: 1 + len(x.losses) // 20] for x in results])
    losses, first = losses[np.isfinite(losses)], first[np.isfinite(first)]
    if not losses.size or not first.size:
        return None, None
    margin = 0.15 * (first.max() - losses.min()) or 1.0
    return float(losses.min() - margin / 3), float(first.max() + margin)


def _new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_lr_range_test needs matplotlib: pip install 'lowrank_optax[examples]'"
        ) from error
    return Figure(figsize=(6, 4), layout="constrained").subplots()
