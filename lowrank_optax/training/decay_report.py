"""Reading what the monitor of weight decay recorded: numbers by group and name, and their table."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.modules.report import Report, Table
from lowrank_optax.training.decay_measurements import ABSENT, ALL, LabelRule, leaf_labels
from lowrank_optax.training.decay_monitor import MonitorWeightDecayState

Number: TypeAlias = float | np.ndarray | None

_COLUMNS = {
    "weight_norm": "norm",
    "norm_ratio": "of equilibrium",
    "rotation": "rotation",
    "rotation_ratio": "of equilibrium",
    "relative_update": "relative update",
    "effective_learning_rate": "effective rate",
    "decay_share": "decay share",
    "rounding_loss": "rounding loss",
    "decay_lost": "decay lost",
}


class Measurements(dict[str, dict[str, Number]], Report):
    """A dict from groups to their numbers by name; it prints as a table of the main ones."""

    def table(self) -> Table:
        """The last number of each column, by group."""

        def cell(number: Number) -> str | None:
            if number is None:
                return None
            last = float(np.ravel(number)[-1])
            return None if np.isnan(last) and np.ndim(number) else f"{last:.3g}"

        columns = ["group", *(f">{title}" for title in _COLUMNS.values())]
        rows = [
            (label, *(cell(numbers[name]) for name in _COLUMNS)) for label, numbers in self.items()
        ]
        return Table(columns, rows)


def measurements(opt_state: Any) -> Measurements:
    """The numbers that `monitor_weight_decay` recorded last: by group, then by name.

    In addition to its names there are ``learning_rate``, ``weight_decay``, and ``norm_ratio`` and
    ``rotation_ratio``, measured over predicted.

    Args:
      opt_state: Optimizer state with one monitor anywhere in it; also the stacked states of several
        steps, as ``jax.lax.scan`` returns them.

    Returns:
      A dict of dicts that prints as a table. Numbers are floats, or None if unknown; for stacked
      states they are arrays ``[steps]``, with NaN instead of None.

    Raises:
      ValueError: If the state has no monitor, or several.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> monitor = lro.training.monitor_weight_decay(learning_rate=0.1, weight_decay=0.05)
      >>> tx = optax.chain(optax.adamw(0.1, weight_decay=0.05), monitor)
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> numbers = lro.training.measurements(state)
      >>> print(list(numbers), f"{numbers['biases']['rotation_ratio']:.3f}")
      ['all', 'biases', 'matrices'] 0.000

    Reference:
      Kosson et al., 2023, https://arxiv.org/abs/2305.17212.
    """
    is_monitor = lambda x: isinstance(x, MonitorWeightDecayState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_monitor) if is_monitor(x)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of monitor_weight_decay; it must hold one."
        )
    state = found[0]
    array = lambda x: np.asarray(jax.tree.leaves(x)[0])
    codes = array(state.labels)
    labels = codes.reshape(-1, *codes.shape[-2:])[0]
    names = [bytes(label.tolist()).rstrip(b"\0").decode() for label in labels]
    rates = {name: array(getattr(state, name)) for name in ("learning_rate", "weight_decay")}
    measured = {name: array(values) for name, values in state.measured.items()}

    def numbers_of(group: int) -> dict[str, Number]:
        values = rates | {name: x[..., group] for name, x in measured.items()}
        numbers = {name: np.where(x == ABSENT, np.nan, x) for name, x in values.items()}
        # Only what is absent is None: NaN stays, of weights that diverged.
        absent = {name for name, x in values.items() if not x.ndim and x == ABSENT}
        for name, recorded in (("norm", "weight_norm"), ("rotation", "rotation")):
            with np.errstate(divide="ignore", invalid="ignore"):
                numbers[f"{name}_ratio"] = numbers[recorded] / numbers[f"equilibrium_{name}"]
            if f"equilibrium_{name}" in absent:
                absent.add(f"{name}_ratio")
        plain = lambda x: x if x.ndim else float(x)
        return {name: None if name in absent else plain(x) for name, x in numbers.items()}

    return Measurements({label: numbers_of(group) for group, label in enumerate(names)})


def adam_elr(
    opt_state: Any, learning_rate: Any, eps: float = 1e-8, groups: LabelRule = None
) -> dict[str, dict[str, jax.Array]]:
    r"""Adam's effective learning rate :math:`\eta / (\sqrt\nu + \epsilon)` of each group.

    As in the paper's code the second moment is used without bias correction. The median says more
    than the mean, which rare rows of an embedding dominate.

    Args:
      opt_state: Optimizer state with one second moment ``nu`` in it.
      learning_rate: Learning rate of the step, a number.
      eps: Adam's epsilon.
      groups: Groups, as in `monitor_weight_decay`.

    Returns:
      For ``"all"`` and each group ``{"median": ..., "mean": ...}`` over its elements, in float32.

    Raises:
      KeyError: If the state has no ``nu``, or several.
      TypeError: If ``nu`` is quantized.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.adam(1e-3)
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> print(f"{lro.training.adam_elr(state, 1e-3)['matrices']['median']:.4f}")
      0.0316

    Reference:
      D'Angelo et al., 2024, https://arxiv.org/abs/2310.04415, ``train.py`` of the language models.
    """
    nu = optax.tree.get(opt_state, "nu")
    if nu is None:
        raise KeyError("opt_state holds no second moment `nu`, as that of optax.adam.")
    rates: dict[str, list[jax.Array]] = {ALL: []}
    for leaf, label in zip(jax.tree.leaves(nu), leaf_labels(nu, groups), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"nu holds {leaf.dtype}, not floats: adam_elr cannot read it.")
        if label is not None:
            rate = learning_rate / (jnp.sqrt(leaf.astype(jnp.float32)) + eps)
            for name in {ALL: None, label: None}:
                rates.setdefault(name, []).append(rate.ravel())
    values = {label: jnp.concatenate(parts) for label, parts in rates.items() if parts}
    return {label: {"median": jnp.median(x), "mean": jnp.mean(x)} for label, x in values.items()}
