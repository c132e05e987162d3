"""Updates slice by slice: what an optimizer needs at its peak is one layer, not a stack of them.

A transformation works on whole leaves, and a leaf is often a stack of all layers. Whatever it
computes besides its results (decoded moments, back-projections, float32 copies) then has the size
of all layers. Here large leaves are cut along their first axis, into runs of layers or of an
embedding's rows, and the same transformation runs on one slice after another, in a loop that
writes updates over gradients, and the state over itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.slices.call import Call, CannotCutError, Path, Whole
from lowrank_optax.slices.known_transformations import check_leaves, is_elementwise
from lowrank_optax.slices.loop import run
from lowrank_optax.slices.plan import Budget, SlicedLeaf, Slices, sliced_leaves


def in_slices(
    tx: optax.GradientTransformation,
    *,
    slices: Slices = None,
    budget_bytes: int | None = None,
    before: Sequence[optax.GradientTransformation] = (),
) -> optax.GradientTransformationExtraArgs:
    """``tx`` run slice by slice: with the temporaries of one layer, not of a stack of them.

    Large leaves are cut along their first axis, into runs of stacked layers or of an embedding's
    rows, and updated one slice after another, in a loop that writes each update over its gradient
    and each slice of the state over itself. The results and the state are those of ``tx``. What is
    cut is decided when the update is traced. Leaves whose slices are not independent, such as a
    single matrix under ``optax.contrib.muon``, run whole; so do those of element-wise
    transformations of optax, which take no temporaries.

    Outside of ``jax.jit`` only a number of ``slices`` cuts anything. To differentiate an update,
    set ``slices="off"``. The optimizers of this library run in slices by themselves; around one of
    them, ``slices`` and ``budget_bytes`` change how.

    Args:
      tx: An optax transformation whose leaves are independent: without a norm of the whole tree.
      slices: Number of slices of each leaf; ``"off"`` for none, also within ``tx``; None for as few
        as ``budget_bytes`` allow.
      budget_bytes: Size of the temporaries of a slice, in bytes; None for a 64th of the parameters,
        and at least 16 MiB.
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
    update = _update(tx, lambda call: fitting_leaves(call, budget))

    def whole_update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        whole = (extra_args.pop("whole", None) or Whole())._replace(settled=True)
        return tx.update(updates, state, params, whole=whole, **extra_args)

    sliced = optax.GradientTransformationExtraArgs(
        tx.init, whole_update if slices == "off" else update
    )
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

    Updates, too, exist for one slice at a time. That counts where they are larger than the
    gradients, as the float32 ones that `round_updates` gives for bfloat16. Jit the step, and donate
    parameters and state.

    Args:
      tx: As in `in_slices`. Apply what needs the whole tree, such as a clipped norm, to the
        gradients before.
      params: The parameters.
      state: The state of ``tx``.
      gradients: The gradients.
      slices: As in `in_slices`.
      budget_bytes: As in `in_slices`.
      **extra_args: Keyword arguments of ``tx.update``.

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
    if leaves := fitting_leaves(call, budget):
        new, arrays = applied(call, leaves)
        return call.treedef.unflatten(new), rebuilt(state, arrays)
    whole = Whole(settled=True) if slices == "off" else None
    updates, state = tx.update(gradients, state, params, whole=whole, **extra_args)
    return optax.apply_updates(params, updates), state


def update_in_slices(
    tx: optax.GradientTransformationExtraArgs,
    chosen: Callable[[Call], Sequence[bool]],
    parts: Sequence[optax.GradientTransformation],
) -> Callable[..., tuple[Any, Any]]:
    """``tx.update`` that runs large leaves slice by slice, where it gives the same.

    Args:
      tx: A transformation that takes the extra argument ``whole``.
      chosen: For each leaf of a call whether slices save memory.
      parts: Transformations that ``tx`` was given, of which it depends whether its leaves, and
        their slices, are independent.
    """

    def leaves_of(call: Call) -> list[SlicedLeaf]:
        try:
            return sliced_leaves(call, Budget(), chosen, parts)
        except CannotCutError:
            return []

    return _update(tx, leaves_of)


def _update(
    tx: optax.GradientTransformationExtraArgs, leaves_of: Callable[[Call], Sequence[SlicedLeaf]]
) -> Callable[..., tuple[Any, Any]]:
    """``tx.update``, with these leaves in slices, in the memory of the gradients if they fit."""

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if whole is None or not whole.settled:
            call = Call.of(tx, updates, state, params, whole, extra_args)
            if leaves := leaves_of(call):
                new, arrays = _each(call, leaves, _over_gradient)
                return call.treedef.unflatten(new), rebuilt(state, arrays)
        return tx.update(updates, state, params, whole=whole, **extra_args)

    return update


def _checked(
    tx: optax.GradientTransformation, slices: Any, budget_bytes: Any
) -> tuple[optax.GradientTransformationExtraArgs, Budget]:
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


def fitting_leaves(call: Call, budget: Budget) -> list[SlicedLeaf]:
    saves = budget != Budget() or not is_elementwise(call.tx)
    chosen = lambda call: [saves] * len(call.gradients)
    failures: list[Exception] = []
    leaves = sliced_leaves(call, budget, chosen, [call.tx], failures)
    if not leaves and isinstance(budget.slices, int) and budget.slices > 1:
        raise CannotCutError(
            f"slices={budget.slices} can cut no leaf: none has two axes or more whose rows are "
            "independent under the transformation."
        ) from next(iter(failures), None)
    return leaves


def applied(call: Call, leaves: Sequence[SlicedLeaf]) -> tuple[list[Any], dict[Path, Any]]:
    """The new parameters, and the new state by its paths, with these leaves in slices."""
    new, arrays = _each(call, leaves, _over_param)
    cut = {leaf.index for leaf in leaves}
    new = [x if i in cut else optax.apply_updates(call.params[i], x) for i, x in enumerate(new)]
    return new, arrays


def rebuilt(state: Any, arrays: Mapping[Path, Any]) -> Any:
    """The state, with these arrays instead of its own, by their paths."""
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    return structure.unflatten([arrays[path] for path, _ in paths])


def _each(
    call: Call, leaves: Sequence[SlicedLeaf], run_leaf: Callable[..., Any]
) -> tuple[list[Any], dict[Path, Any]]:
    """The result for each leaf, and the new state by its paths."""
    results, arrays = call.without({leaf.index for leaf in leaves})
    for leaf in leaves:
        results[leaf.index], own = run_leaf(call, leaf)
        arrays |= zip(leaf.own, own, strict=True)
    return [results[i] for i in range(len(results))], arrays


def _over_gradient(call: Call, leaf: SlicedLeaf) -> tuple[Any, list[Any]]:
    """The update of a leaf and its own new state, in the memory of the gradient if it fits."""
    gradient, param = call.gradients[leaf.index], call.params[leaf.index]
    new = leaf.emitted
    fits = isinstance(new, jax.ShapeDtypeStruct) and (
        (new.shape[1:], new.dtype) == (gradient.shape[1:], gradient.dtype)
    )

    def step(carried: Any, read: Any, row: jax.Array) -> Any:
        (buffer, own), (gradient, param) = carried, read
        gradient = buffer if fits else gradient
        return of_slice(call, leaf, gradient, param if call.has_params else gradient, own, row)

    carried = gradient if fits else _zeros(leaf, gradient), [call.state[x] for x in leaf.own]
    read = None if fits else gradient, param if call.has_params else None
    return run(step, carried, read, leaf.cut)


def _over_param(call: Call, leaf: SlicedLeaf) -> tuple[Any, list[Any]]:
    """The new parameter, in the memory of the old one, and its own new state."""

    def step(carried: Any, gradient: Any, row: jax.Array) -> Any:
        param, own = carried
        update, own = of_slice(call, leaf, gradient, param, own, row)
        return optax.apply_updates(param, update), own

    carried = call.params[leaf.index], [call.state[path] for path in leaf.own]
    return run(step, carried, call.gradients[leaf.index], leaf.cut)


def of_slice(
    call: Call, leaf: SlicedLeaf, gradient: Any, param: Any, own: Any, row: jax.Array
) -> tuple[Any, list[Any]]:
    """The update of a slice, and its own new state."""
    cut, rows = leaf.cut, gradient.shape[0]
    arrays, numbers = (gradient, param, own), cut.rows_from(row, rows)
    update, state = call.slice_of(leaf.index, arrays, leaf.own, numbers, rows // cut.shards)
    return update, [state[path] for path in leaf.own]


def _zeros(leaf: SlicedLeaf, gradient: jax.Array) -> Any:
    """Memory for the update of a leaf."""
    partition = explicit_sharding.partition_of(gradient)

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        shape = (x.shape[0] * leaf.cut.size // leaf.cut.rows, *x.shape[1:])
        return explicit_sharding.zeros(
            shape, x.dtype, partition if x.ndim == gradient.ndim else None
        )

    return jax.tree.map(zeros, leaf.emitted)
