"""A picture of what the monitor recorded."""

from collections.abc import Mapping, Sequence
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Title, what is drawn, what is dotted beside it, and whether the axis is logarithmic.
_PANELS: tuple[tuple[str, str, str | None, bool], ...] = (
    ("norm of the weights", "weight_norm", "equilibrium_norm", True),
    ("rotation per step (radians)", "rotation", "equilibrium_rotation", True),
    ("effective learning rate η / ‖w‖²", "effective_learning_rate", None, True),
    ("share of decay in the update", "decay_share", None, False),
    ("share of the elements that do not move", "rounding_loss", None, False),
    ("share of the decay lost to rounding", "decay_lost", None, False),
)


def plot_weight_decay(
    history: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Mapping[str, Any]]],
    path: str | os.PathLike[str] | None = None,
    groups: Sequence[str] | None = None,
) -> "Figure":
    """Draws norms, rotations, effective learning rates and what rounding loses, over the steps.

    Dotted lines are the equilibrium that theory predicts.

    Args:
      history: `measurements` of states stacked by a scan, or a list of `measurements`.
      path: Where to save the picture, if anywhere; the ending chooses the format.
      groups: Which groups are drawn; None for all but single layers and "all".

    Returns:
      The figure of matplotlib.

    Raises:
      ModuleNotFoundError: Without matplotlib.
      ValueError: If the history is empty, or has no such group.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.schedules.monitor_weight_decay(learning_rate=0.1, weight_decay=0.05)
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> state, history = tx.init(params), []
      >>> for _ in range(3):
      ...     _, state = tx.update({"kernel": jnp.full((2, 3), -0.01)}, state, params)
      ...     history.append(lro.schedules.measurements(state))
      >>> figure = lro.schedules.plot_weight_decay(history)
      >>> print(len(figure.axes))
      6

    Reference:
      The curves of D'Angelo et al., 2024, https://arxiv.org/abs/2310.04415, and Kosson et al.,
      2023, https://arxiv.org/abs/2305.17212.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_weight_decay needs matplotlib, which comes with the extra `examples`: "
            "pip install 'lowrank-optax[examples]'"
        ) from error
    series = _series(history)
    if groups is None:
        groups = [name for name in series if "/" not in name and name != "all"] or list(series)
    if not series or not set(groups) <= set(series):
        raise ValueError(f"groups={list(groups)} must be among those measured, {list(series)}.")
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (title, name, beside, log) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for index, group in enumerate(groups):
            axes.plot(series[group][name], color=f"C{index % 10}", label=group)
            if beside is not None:
                axes.plot(series[group][beside], ":", color=f"C{index % 10}")
        drawn = [series[group][name] for group in groups]
        if log and any(np.any(line > 0) for line in drawn):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.25)
        axes.set_xlabel("measurement")
    figure.axes[0].legend(fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _series(history: Any) -> dict[str, dict[str, np.ndarray]]:
    """Arrays over the steps, by group and name, with nan for None."""
    steps = [history] if isinstance(history, Mapping) else list(history)
    if not steps:
        raise ValueError("history is empty: give measurements of at least one step.")
    number = lambda x: np.ravel(np.array(x, float))  # None becomes nan
    return {
        group: {
            name: np.concatenate([number(step[group][name]) for step in steps]) for name in numbers
        }
        for group, numbers in steps[0].items()
    }
