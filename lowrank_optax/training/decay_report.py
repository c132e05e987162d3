"""Reading what was recorded: numbers by group and name, and a table of them."""

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.matrices.printing import printed
from lowrank_optax.training.decay_measurements import ABSENT as NONE
from lowrank_optax.training.decay_measurements import ALL, LabelRule, leaf_labels
from lowrank_optax.training.decay_monitor import MonitorWeightDecayState

if TYPE_CHECKING:
    from rich.table import Table

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


class Measurements(dict[str, dict[str, Number]]):
    """A dict from groups to their numbers by name; printed, a table of the most important ones."""

    def __rich__(self) -> "Table":
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("group")
        for column in _COLUMNS.values():
            table.add_column(column, justify="right")
        for label, numbers in self.items():
            table.add_row(label, *(_cell(numbers[name]) for name in _COLUMNS))
        return table

    def __str__(self) -> str:
        return printed(self)


def measurements(opt_state: Any) -> Measurements:
    """The numbers that `monitor_weight_decay` recorded last: by group, then by name.

    To its names come ``learning_rate``, ``weight_decay``, and ``norm_ratio`` and
    ``rotation_ratio``, measured over predicted.

    Args:
      opt_state: The state of an optimizer with one monitor in it, wherever that is; also states of
        several steps stacked, as ``jax.lax.scan`` returns them.

    Returns:
      A dict of dicts that prints as a table. Numbers are floats, None where there is none; of
      stacked states they are arrays ``[steps]`` with nan in its place.

    Raises:
      ValueError: If the state holds no monitor, or several.

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
    state = _find(opt_state)
    array = lambda x: np.asarray(jax.tree.leaves(x)[0])
    codes = array(state.labels)
    labels = codes.reshape(-1, *codes.shape[-2:])[0]
    names = [bytes(label.tolist()).rstrip(b"\0").decode() for label in labels]
    rates = {name: array(getattr(state, name)) for name in ("learning_rate", "weight_decay")}
    measured = {name: array(values) for name, values in state.measured.items()}
    return Measurements(
        {
            label: _numbers(rates | {name: x[..., group] for name, x in measured.items()})
            for group, label in enumerate(names)
        }
    )


def adam_elr(
    opt_state: Any, learning_rate: Any, eps: float = 1e-8, groups: LabelRule = None
) -> dict[str, dict[str, jax.Array]]:
    r"""Adam's effective learning rate :math:`\eta / (\sqrt\nu + \epsilon)` of each group.

    As the paper's code logs it, with the second moment as it is stored, without bias correction.
    Look at the median: rows of an embedding that are rarely met make the mean.

    Args:
      opt_state: The state of an optimizer, with one second moment ``nu`` in it.
      learning_rate: The step's, a number.
      eps: Adam's.
      groups: As in `monitor_weight_decay`.

    Returns:
      For ``"all"`` and each group ``{"median": ..., "mean": ...}`` over its elements, in float32.

    Raises:
      KeyError: If the state has no ``nu``, or several.
      TypeError: If it is stored in few bits.

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
    rates: dict[str, list[jax.Array]] = {}
    for leaf, label in zip(jax.tree.leaves(nu), leaf_labels(nu, groups), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"nu holds {leaf.dtype}, not floats: adam_elr cannot read it.")
        if label is not None:
            own = learning_rate / (jnp.sqrt(leaf.astype(jnp.float32)) + eps)
            rates.setdefault(label, []).append(own.ravel())
    joined = {ALL: [x for parts in rates.values() for x in parts]} | rates if rates else {}
    return {label: _median_and_mean(parts) for label, parts in joined.items()}


def _median_and_mean(parts: list[jax.Array]) -> dict[str, jax.Array]:
    values = jnp.concatenate(parts)
    return {"median": jnp.median(values), "mean": jnp.mean(values)}


def _find(opt_state: Any) -> MonitorWeightDecayState:
    is_monitor = lambda x: isinstance(x, MonitorWeightDecayState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_monitor) if is_monitor(x)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of monitor_weight_decay; give one that has one."
        )
    return found[0]


def _numbers(values: dict[str, np.ndarray]) -> dict[str, Number]:
    absent = {name: np.where(x == NONE, np.nan, x) for name, x in values.items()}
    for name, measured in (("norm", "weight_norm"), ("rotation", "rotation")):
        with np.errstate(divide="ignore", invalid="ignore"):
            absent[f"{name}_ratio"] = absent[measured] / absent[f"equilibrium_{name}"]
    plain = {name: x if x.ndim else float(x) for name, x in absent.items()}
    # A measured nan (weights that diverged) stays one; None is said of what is not there.
    missing = {name for name, x in values.items() if not x.ndim and x == NONE}
    missing |= {f"{n}_ratio" for n in ("norm", "rotation") if f"equilibrium_{n}" in missing}
    return {name: None if name in missing else x for name, x in plain.items()}


def _cell(number: Number) -> str:
    if number is None:
        return "–"
    last = float(np.ravel(number)[-1])
    return "–" if np.isnan(last) and np.ndim(number) else f"{last:.3g}"
