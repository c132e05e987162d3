"""Any transformation in slices, and a whole step in slices."""

from collections.abc import Sequence
from typing import Any

import optax

from lowrank_optax.slices.call import Call
from lowrank_optax.slices.independence import check_leaves, is_elementwise
from lowrank_optax.slices.plan import Budget, Slices, sliced_leaves
from lowrank_optax.slices.update import applied, updated
from lowrank_optax.slices.whole import CannotCutError, Whole


def in_slices(
    tx: optax.GradientTransformation,
    *,
    slices: Slices = None,
    budget_bytes: int | None = None,
    before: Sequence[optax.GradientTransformation] = (),
) -> optax.GradientTransformationExtraArgs:
    """``tx`` run slice by slice: with the temporaries of one layer, not of a stack of them.

    Leaves that are large are cut along their first axis, into runs of stacked layers or of an
    embedding's rows, and updated one slice after another, in a loop that writes each update over
    its gradient and each slice of the state over itself. The results are those of ``tx``, whose
    state is kept as it is. What is cut is decided when the update is traced. Leaves whose slices
    are not independent, as those of a single matrix under ``optax.contrib.muon``, run whole; so do
    those of element-wise transformations of optax, which take no temporaries.

    Outside of ``jax.jit`` only a number of ``slices`` cuts anything. To differentiate an update,
    take ``slices="off"``.

    The optimizers of this library run in slices by themselves. Around one of them, ``slices`` and
    ``budget_bytes`` change how.

    Args:
      tx: An optax transformation whose leaves are independent: without a norm of the whole tree.
      slices: Into how many slices each leaf is cut; ``"off"`` for none at all, also by what is
        inside; None for as few as ``budget_bytes`` allow.
      budget_bytes: How large the temporaries of a slice may be, in bytes; None for a 64th of the
        parameters, and at least 16 MiB.
      before: Transformations that run first, on the whole tree, such as
        ``optax.clip_by_global_norm``; the state is then that of an ``optax.chain``.

    Returns:
      The transformation, with the state of ``tx``.

    Raises:
      ValueError: If an argument is out of range, or a part of ``tx`` looks at all leaves or at
        whole ones; in ``update``, if an unknown one does, or if ``slices`` is a number and there is
        no leaf to cut.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.in_slices(optax.contrib.muon(0.1), slices=2)
      >>> tx = lro.in_slices(optax.adamw(0.1), before=[optax.clip_by_global_norm(1.0)])
      >>> params = {"kernel": jnp.ones((4, 8, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape)
      (4, 8, 8)

    Reference:
      Copy insertion in XLA, which decides what a loop may write in place:
      https://openxla.org/xla
    """
    tx, budget = _checked(tx, slices, budget_bytes)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if slices == "off":
            whole = (whole or Whole())._replace(settled=True)
        if whole is not None and whole.settled:
            return tx.update(updates, state, params, whole=whole, **extra_args)
        call = Call.of(tx, updates, state, params, whole, extra_args)
        leaves = _leaves(call, budget)
        if leaves:
            return updated(call, leaves, state)
        return tx.update(updates, state, params, whole=whole, **extra_args)

    sliced = optax.GradientTransformationExtraArgs(tx.init, update_fn)
    return optax.chain(*before, sliced) if before else sliced


def apply_in_slices(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    gradients: optax.Updates,
    *,
    slices: Slices = None,
    budget_bytes: int | None = None,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """A whole step in slices: ``tx.update`` and ``optax.apply_updates`` in one pass.

    Of the updates, too, there is one slice at a time. That counts where they are larger than the
    gradients, as the float32 ones that `round_updates` gives for bfloat16. Jit the step, and donate
    parameters and state.

    Args:
      tx: As of `in_slices`. What needs the whole tree, such as a clipped norm, is to be applied to
        the gradients before.
      params: The parameters.
      state: The state of ``tx``.
      gradients: The gradients.
      slices: As of `in_slices`.
      budget_bytes: As of `in_slices`.
      **extra_args: Passed on to ``tx.update``.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError: As `in_slices` does.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.in_float32(optax.adam(0.1)), lro.round_updates())
      >>> step = jax.jit(functools.partial(lro.apply_in_slices, tx), donate_argnums=(0, 1))
      >>> params = {"kernel": jnp.ones((4, 8, 8), jnp.bfloat16)}
      >>> gradients = jax.tree.map(jnp.ones_like, params)
      >>> params, state = step(params, tx.init(params), gradients)
      >>> print(params["kernel"].dtype, params["kernel"].shape)
      bfloat16 (4, 8, 8)

    Reference:
      Copy insertion in XLA, which decides what a loop may write in place:
      https://openxla.org/xla
    """
    tx, budget = _checked(tx, slices, budget_bytes)
    call = Call.of(tx, gradients, state, params, None, extra_args)
    leaves = _leaves(call, budget)
    if leaves:
        return applied(call, leaves, state)
    told = Whole(settled=True) if slices == "off" else None
    updates, state = tx.update(gradients, state, params, whole=told, **extra_args)
    return optax.apply_updates(params, updates), state


def _checked(
    tx: optax.GradientTransformation, slices: Any, budget_bytes: Any
) -> tuple[optax.GradientTransformationExtraArgs, Budget]:
    """The transformation and the budget that are meant, if they are any good."""
    for name, value in (("slices", slices), ("budget_bytes", budget_bytes)):
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (number or value is None or (name == "slices" and value == "off")):
            also = ", 'off'" if name == "slices" else ""
            raise ValueError(f"{name}={value!r} must be an int of at least 1{also}, or None.")
    if slices is not None and budget_bytes is not None:
        raise ValueError(
            f"slices={slices!r} leaves nothing for budget_bytes={budget_bytes!r} to decide; give "
            "one of them."
        )
    if slices != "off":
        check_leaves(tx)
    return optax.with_extra_args_support(tx), Budget(slices, budget_bytes)


def _leaves(call: Call, budget: Budget) -> Any:
    worth = lambda call: [budget != Budget() or not is_elementwise(call.tx)] * len(call.gradients)
    leaves = sliced_leaves(call, budget, worth, [call.tx])
    if not leaves and isinstance(budget.slices, int) and budget.slices > 1:
        raise CannotCutError(
            f"slices={budget.slices} can cut no leaf: none has two axes or more whose rows are "
            "independent under the transformation."
        )
    return leaves
