"""The monitor: the last part of a chain, which changes nothing and records what decay does.

Weights on whose scale the loss does not depend are turned by gradients and shrunk by decay until
both hold the balance. How far a run is from there, and whether decay arrives at all, shows in the
weights and their final update, which the last part of a chain has both of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.schedules.weight_decay.equilibrium import Optimizer, check_optimizer
from lowrank_optax.schedules.weight_decay.groups import Groups, LabelRule, find_groups
from lowrank_optax.schedules.weight_decay.measurements import MEASURED, NONE, leaf_sums, measure
from lowrank_optax.schedules.weight_decay.rates import check_rate, learning_rate_at
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.precision import value_at


class MonitorWeightDecayState(NamedTuple):
    """State of `monitor_weight_decay`, read by `measurements`.

    Its numbers are zero before the first measurement, and -1 where there is none: of a learning
    rate or decay that is not known, and of an equilibrium where nothing decays.

    Attributes:
      count: Number of updates so far, int32.
      labels: Names of the groups, as UTF-8 padded with zeros, uint8 ``[groups, length]``.
      learning_rate: At the last measurement, float32.
      weight_decay: Likewise.
      measured: A float32 vector ``[groups]`` for each of the names.
    """

    count: Any
    labels: Any
    learning_rate: Any
    weight_decay: Any
    measured: dict[str, Any]


def monitor_weight_decay(
    groups: LabelRule = None,
    every: int = 1,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule | None = None,
    *,
    weight_decay_mask: Any = None,
    optimizer: Optimizer = "adamw",
    momentum: Any = None,
    per_layer: bool = True,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The last part of a chain: leaves updates as they are, and measures what weight decay does.

    Of each group of parameters, with weights :math:`w` of :math:`C` elements and their final update
    :math:`d`, the state records

    - ``weight_norm`` :math:`\lVert w \rVert`, ``weight_rms``, ``update_rms``, and
      ``relative_update`` :math:`\lVert d \rVert / \lVert w \rVert`;
    - ``rotation``, the angle between :math:`w` and :math:`w + d` in radians;
    - ``effective_learning_rate`` :math:`\eta / \lVert w \rVert^2`, which is what counts for SGD on
      scale-invariant weights, and ``relative_learning_rate`` :math:`\eta / \lVert w \rVert`, for
      Adam;
    - ``decay_share`` :math:`\eta \lambda \lVert w \rVert / \lVert d \rVert`, with the weights that
      decay in the numerator;
    - ``rounding_loss``, the share of the elements that their update does not move, being below half
      a step of their dtype, and ``decay_lost``, the share of :math:`\lVert w \rVert^2` (and so of
      what decay would take) that is in them;
    - ``equilibrium_norm`` and ``equilibrium_rotation``, of `equilibrium`.

    Groups are the kinds of `parameter_kinds` and ``"all"``; leaves that hold stacked layers count
    layer by layer as well, as ``"matrices/0"`` and so on. A tied embedding counts once.

    Args:
      groups: A function from the path of a parameter (``blocks/mlp/up/kernel``) to the name of its
        group, or to None to leave it out. It is called when a step is traced.
      every: Steps from one measurement to the next. In between nothing is summed; but the branch
        has its own cost, on a CPU about that of the sums.
      learning_rate: The float or schedule that the optimizer has. None: it may be passed to
        ``update(..., learning_rate=...)``, such as ``state.hyperparams["learning_rate"]`` of
        ``optax.inject_hyperparams``; without it some numbers are missing.
      weight_decay: The float or schedule :math:`\lambda`, where a step multiplies weights by
        :math:`1 - \eta\lambda`.
      weight_decay_mask: Which leaves decay, as in ``optax.adamw``; None for all.
      optimizer: Of which an equilibrium is predicted: ``"adamw"``, ``"sgd"`` or ``"sgdw"``, see
        `equilibrium`.
      momentum: Its momentum, or ``b1``: None for 0.9 with AdamW and 0 otherwise.
      per_layer: Whether stacked layers have numbers of their own.
      weight_dimension_numbers: Which leaves are (stacked) matrices, as the optimizers take it.

    Returns:
      A transformation that needs ``params``, with the state `MonitorWeightDecayState`. The state
      has the same structure from ``init`` on. With sharded parameters it is of the whole ones.

    Raises:
      ValueError: If ``every`` is below 1, a rate negative or the optimizer unknown; in ``update``,
        without ``params``.
      TypeError: If ``every`` is no int, or ``groups`` gives no name.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.chain(
      ...     optax.adamw(0.01, weight_decay=0.1),
      ...     lro.schedules.monitor_weight_decay(learning_rate=0.01, weight_decay=0.1),
      ... )
      >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> numbers = lro.schedules.measurements(state)["matrices"]
      >>> print(f"{numbers['relative_update']:.4f} {numbers['decay_share']:.4f}")
      0.0110 0.0909

    Reference:
      D'Angelo et al., Why Do We Need Weight Decay in Modern Deep Learning?, 2024,
      https://arxiv.org/abs/2310.04415; Kosson et al., Rotational Equilibrium, 2023,
      https://arxiv.org/abs/2305.17212.
    """
    _check(groups, every, learning_rate, weight_decay)
    check_optimizer(optimizer, momentum)
    if weight_decay is None:
        refuse_unused(
            monitor_weight_decay, "weight_decay=None", weight_decay_mask=weight_decay_mask
        )
    groups_of = lambda tree: find_groups(tree, groups, per_layer, weight_dimension_numbers)

    def init_fn(params: optax.Params) -> MonitorWeightDecayState:
        labels = _encode(groups_of(params).labels)
        return MonitorWeightDecayState(
            count=jnp.zeros([], jnp.int32),
            labels=jnp.asarray(labels),
            learning_rate=jnp.zeros([], jnp.float32),
            weight_decay=jnp.zeros([], jnp.float32),
            measured={name: jnp.zeros(len(labels), jnp.float32) for name in MEASURED},
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, MonitorWeightDecayState]:
        if params is None:
            raise ValueError(
                "monitor_weight_decay needs params: call tx.update(grads, state, params)."
            )
        rate = learning_rate_at(learning_rate, state.count, extra_args)
        decay = None if weight_decay is None else value_at(weight_decay, state.count)

        def measured() -> tuple[Any, ...]:
            sums = _sums(groups_of(updates), updates, params, weight_decay_mask)
            known = [jnp.float32(NONE) if x is None else x for x in (rate, decay)]
            return *known, measure(*sums, rate, decay, optimizer, momentum)

        last = (state.learning_rate, state.weight_decay, state.measured)
        if every > 1:
            numbers = jax.lax.cond(state.count % every == 0, measured, lambda: last)
        else:
            # A state that no step reads could not be donated to it.
            keep = lambda new, old: jnp.where(state.count >= 0, new, old)
            numbers = jax.tree.map(keep, measured(), last)
        updates = jax.lax.platform_dependent(
            updates, state.count, numbers, cpu=_after, default=lambda updates, *_: updates
        )
        count = optax.safe_increment(state.count)
        return updates, MonitorWeightDecayState(count, state.labels, *numbers)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _after(updates: Any, count: jax.Array, numbers: Any) -> Any:
    """Return the updates unchanged, for a CPU: they are applied after the sums read the weights.

    XLA for CPU does not order the two, and copies all weights. The predicate is true, which the
    compiler cannot infer.
    """
    measured = jax.tree.leaves(numbers)[-1]
    true = (count >= 0) | (measured[0] > 0)
    return jax.tree.map(lambda u: jnp.where(true, u, jnp.zeros_like(u)), updates)


def _sums(
    groups: Groups, updates: Any, params: Any, mask: Any
) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Of each group `leaf_sums`, the number of elements, and whether all of it decays."""
    leaves, treedef = jax.tree.flatten(updates)
    if callable(mask):
        mask = mask(updates)
    decays = [True] * len(leaves) if mask is None else jax.tree.leaves(_broadcast(mask, updates))
    weights = treedef.flatten_up_to(params)
    each = zip(weights, leaves, groups.stacked, decays, strict=True)
    parts = [(leaf_sums(w, d, s, on), bool(on)) for w, d, s, on in each if s is not None]
    if not parts:
        nothing = np.zeros(len(groups.labels))
        return jnp.zeros((len(groups.labels), 6), jnp.float32), nothing, nothing > 0
    # All in one array: on several devices one exchange.
    units = jnp.concatenate([sums for sums, _ in parts])
    held = np.concatenate([np.full(len(sums), not on) for sums, on in parts])
    sums = jax.ops.segment_sum(units[groups.units], groups.groups, len(groups.labels))
    return sums, groups.total(groups.sizes), groups.total(held.astype(float)) == 0


def _broadcast(mask: Any, updates: Any) -> Any:
    return jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), mask, updates)


def _encode(labels: tuple[str, ...]) -> np.ndarray:
    raw = [label.encode() for label in labels]
    width = max(map(len, raw))
    return np.array([list(label.ljust(width, b"\0")) for label in raw], np.uint8)


def _check(groups: Any, every: Any, learning_rate: Any, weight_decay: Any) -> None:
    if groups is not None and not callable(groups):
        raise TypeError(f"groups={groups!r} must be a function from paths to names, or None.")
    if isinstance(every, jax.core.Tracer) or not isinstance(every, int | np.integer):
        raise TypeError(
            f"every={every!r} must be a Python int: with optax.inject_hyperparams list it in "
            "static_args."
        )
    if every < 1:
        raise ValueError(f"every={every} must be at least 1.")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        check_rate(name, value)
