"""The last part of a chain, which records what weight decay does and changes no update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.precision import value_at
from lowrank_optax.training.decay_measurements import (
    ABSENT,
    MEASURED,
    Groups,
    LabelRule,
    find_groups,
    leaf_sums,
    measure,
)
from lowrank_optax.training.weight_decay import check_rate, learning_rate_at
from lowrank_optax.training.weight_decay_equilibrium import Optimizer, check_optimizer


class MonitorWeightDecayState(NamedTuple):
    """State of `monitor_weight_decay`, read by `measurements`.

    Numbers are zero before the first measurement, and -1 if they are unknown: without a learning
    rate or weight decay, and for the equilibrium of a group that does not decay.

    Attributes:
      count: Number of updates so far, int32.
      labels: Names of the groups, as UTF-8 padded with zeros, uint8 ``[groups, length]``.
      learning_rate: Learning rate at the last measurement, float32.
      weight_decay: Weight decay at the last measurement, float32.
      measured: A float32 vector ``[groups]`` for each measured number.
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
    r"""The last part of a chain: measures what weight decay does, and changes no update.

    For each group of parameters, with weights :math:`w` and their final update :math:`d`, the state
    records

    - ``weight_norm`` :math:`\lVert w \rVert`, ``weight_rms``, ``update_rms``, and
      ``relative_update`` :math:`\lVert d \rVert / \lVert w \rVert`;
    - ``rotation``, the angle between :math:`w` and :math:`w + d` in radians;
    - ``effective_learning_rate`` :math:`\eta / \lVert w \rVert^2`, which matters for SGD on
      scale-invariant weights, and ``relative_learning_rate`` :math:`\eta / \lVert w \rVert`, which
      matters for Adam;
    - ``decay_share`` :math:`\eta \lambda \lVert w \rVert / \lVert d \rVert`, with only the
      weights that decay in the numerator;
    - ``rounding_loss``, the fraction of elements whose update is rounded away in their dtype, and
      ``decay_lost``, their fraction of :math:`\lVert w \rVert^2` and so of the decay;
    - ``equilibrium_norm`` and ``equilibrium_rotation``, the predictions of `equilibrium`.

    Groups are the kinds of `parameter_kinds` and ``"all"``; stacked layers are also groups of their
    own, ``"matrices/0"`` and so on. A tied embedding counts once.

    Args:
      groups: Function from the path of a parameter (``blocks/mlp/up/kernel``) to the name of its
        group, or to None to leave it out. It is called when a step is traced.
      every: Number of steps from one measurement to the next. The other steps sum nothing, but the
        branch has its own cost, on a CPU about that of the sums.
      learning_rate: The optimizer's learning rate, a float or schedule. None: pass it to
        ``update(..., learning_rate=...)``, for instance ``state.hyperparams["learning_rate"]`` of
        ``optax.inject_hyperparams``; without it some numbers are missing.
      weight_decay: Weight decay :math:`\lambda`, a float or schedule, where a step multiplies
        weights by :math:`1 - \eta\lambda`.
      weight_decay_mask: Which leaves decay, as in ``optax.adamw``; None for all.
      optimizer: Optimizer whose equilibrium is predicted: ``"adamw"``, ``"sgd"`` or ``"sgdw"``, see
        `equilibrium`.
      momentum: Its momentum, or ``b1``; None for 0.9 with AdamW and 0 otherwise.
      per_layer: Whether stacked layers have numbers of their own.
      weight_dimension_numbers: Which leaves are (stacked) matrices, as in the optimizers.

    Returns:
      A transformation that needs ``params``, with the state `MonitorWeightDecayState`. Sharded
      parameters are measured whole.

    Raises:
      ValueError: If ``every`` is below 1, a rate is negative or the optimizer unknown; in
        ``update``, without ``params``.
      TypeError: If ``every`` is not an int, or ``groups`` returns something else than a name.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.chain(
      ...     optax.adamw(0.01, weight_decay=0.1),
      ...     lro.training.monitor_weight_decay(learning_rate=0.01, weight_decay=0.1),
      ... )
      >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> numbers = lro.training.measurements(state)["matrices"]
      >>> print(f"{numbers['relative_update']:.4f} {numbers['decay_share']:.4f}")
      0.0110 0.0909

    Reference:
      D'Angelo et al., Why Do We Need Weight Decay in Modern Deep Learning?, 2024,
      https://arxiv.org/abs/2310.04415; Kosson et al., Rotational Equilibrium, 2023,
      https://arxiv.org/abs/2305.17212.
    """
    if groups is not None and not callable(groups):
        raise TypeError(f"groups={groups!r} must be a function from paths to names, or None.")
    if isinstance(every, jax.core.Tracer) or not isinstance(every, int | np.integer):
        raise TypeError(
            f"every={every!r} must be a Python int: with optax.inject_hyperparams list it in "
            "static_args."
        )
    if every < 1:
        raise ValueError(f"every={every} must be at least 1.")
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    check_optimizer(optimizer, momentum)
    if weight_decay is None:
        refuse_unused(
            monitor_weight_decay, "weight_decay=None", weight_decay_mask=weight_decay_mask
        )
    groups_of = lambda tree: find_groups(tree, groups, per_layer, weight_dimension_numbers)

    def init_fn(params: optax.Params) -> MonitorWeightDecayState:
        labels = [label.encode() for label in groups_of(params).labels]
        width = max(map(len, labels))
        return MonitorWeightDecayState(
            count=jnp.zeros([], jnp.int32),
            labels=jnp.asarray(np.array([list(x.ljust(width, b"\0")) for x in labels], np.uint8)),
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
            known = [jnp.float32(ABSENT) if x is None else x for x in (rate, decay)]
            return *known, measure(*sums, rate, decay, optimizer, momentum)

        last = (state.learning_rate, state.weight_decay, state.measured)
        if every > 1:
            numbers = jax.lax.cond(state.count % every == 0, measured, lambda: last)
        else:
            # A state that no step reads could not be donated to it.
            read = lambda new, old: jnp.where(state.count >= 0, new, old)
            numbers = jax.tree.map(read, measured(), last)
        updates = jax.lax.platform_dependent(
            updates, state.count, numbers, cpu=_after, default=lambda updates, *_: updates
        )
        count = optax.safe_increment(state.count)
        return updates, MonitorWeightDecayState(count, state.labels, *numbers)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _after(updates: Any, count: jax.Array, numbers: Any) -> Any:
    """The updates, for a CPU, where they must be applied after the sums have read the weights.

    XLA for CPU does not order the two, and copies all weights. The predicate is true, which the
    compiler cannot infer.
    """
    measured = jax.tree.leaves(numbers)[-1]
    true = (count >= 0) | (measured[0] > 0)
    return jax.tree.map(lambda u: jnp.where(true, u, jnp.zeros_like(u)), updates)


def _sums(
    groups: Groups, updates: Any, params: Any, mask: Any
) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """`leaf_sums` of each group, its number of elements, and whether all of it decays."""
    leaves, treedef = jax.tree.flatten(updates)
    mask = mask(updates) if callable(mask) else mask
    decays = jax.tree.leaves(jax.tree.broadcast(True if mask is None else mask, updates))
    each = zip(treedef.flatten_up_to(params), leaves, groups.stacked, decays, strict=True)
    parts = [(leaf_sums(w, d, s, on), bool(on)) for w, d, s, on in each if s is not None]
    if not parts:
        nothing = np.zeros(len(groups.labels))
        return jnp.zeros((len(groups.labels), 6), jnp.float32), nothing, nothing > 0
    # All in one array: one exchange between devices.
    units = jnp.concatenate([sums for sums, _ in parts])
    undecayed = np.concatenate([np.full(len(sums), float(not on)) for sums, on in parts])
    sums = jax.ops.segment_sum(units[groups.units], groups.groups, len(groups.labels))
    return sums, groups.total(groups.sizes), groups.total(undecayed) == 0
