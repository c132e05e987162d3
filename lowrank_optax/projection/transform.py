"""The projected optimizer: any optax transformation in a low-rank subspace of each gradient.

For a gradient matrix ``G [m, n]`` with ``m <= n`` and an orthonormal basis ``P [m, r]``, the inner
transformation sees ``R = Pᵀ G [r, n]`` instead of ``G``, has its state in that shape, and its
answer ``N`` is lifted back to ``P N``. How and when the basis is found, what becomes of the inner
state when it changes, and what of the part of the gradient outside it, are independent choices.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import Any, get_args
import warnings

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import DimensionNumbersRule, resolve_dimension_numbers, to_matrix
from lowrank_optax.matrices.paths import is_whole, leaves_by_path, path_string
from lowrank_optax.matrices.selection import check_patterns
from lowrank_optax.projection.inner_moments import OnRefresh, first_moment_path, is_traced
from lowrank_optax.projection.leaf import (
    Leaf,
    Parts,
    When,
    finish,
    init_leaf,
    prepare,
    project_all,
    projected_param,
    refresh_without_leaves,
)
from lowrank_optax.projection.refresh import RefreshRule, refresh_rule
from lowrank_optax.projection.residuals import ResidualSpec, residual_rule
from lowrank_optax.projection.state import InnerRunner, ScaleByProjectionState, pack, unpack
from lowrank_optax.projection.subspaces import Subspace, both_sides
from lowrank_optax.projection.view import Side, View, compute_dtype, view_of_leaf
from lowrank_optax.slices.call import Call, Whole, whole_of
from lowrank_optax.slices.update import update_in_slices
from lowrank_optax.states.arguments import transformation


def scale_by_projection(
    inner: optax.GradientTransformation,
    subspace: Subspace,
    *,
    residual: ResidualSpec = "drop",
    on_refresh: OnRefresh = "keep",
    refresh_every: int | RefreshRule | None = 200,
    scale: float = 1.0,
    side: Side = "shorter",
    accumulate_steps: int | None = None,
    non_matrix_transform: optax.GradientTransformation | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` in a low-rank subspace of each gradient matrix.

    For each matrix leaf, one update (1) adds what the residual rule saved to the gradient, (2)
    refreshes the basis if needed, and moves the inner state along, (3) projects the gradient, (4)
    updates the projected tree by ``inner``, and (5) makes the update of the lifted and scaled
    answer and of the residual. The refresh is a ``lax.cond`` on a scalar outside all batch axes. A
    gradient that is zero or not finite never enters a basis: the last one stays, and the next step
    tries again.

    Arithmetic is float32 (float64 for float64 gradients) whatever the gradients' dtype; so is the
    inner state of all leaves. Updates have the gradients' dtype.

    A gradient may arrive projected already, as ``[*batch, r, n]`` or ``[*batch, m, r]``, if
    ``params`` are given, which tell the shape of the update: a layer that projects in its backward
    pass reads the basis from ``state.basis``, through ``subspace.project`` and ``lift``.

    Args:
      inner: Any optax transformation. If it needs parameters, it gets the projected ones.
      subspace: Rule that finds the basis, one of ``lowrank_optax.subspaces``.
      residual: Rule for the part of a gradient outside the subspace: ``"drop"``, ``"raw"``,
        ``"sign"``, ``"fira"``, ``"gradient_scaling"`` or ``"error_feedback"``, or one of
        ``lowrank_optax.residuals`` with its options.
      on_refresh: What becomes of ``inner``'s state when the basis changes: ``"keep"`` (the paper;
        signs of singular vectors are chosen to agree), ``"reset"``, ``"rotate"`` for first moments,
        or ``"rotate_moments"`` for second ones too, by LDAdam's rule. Unless it is ``"keep"``,
        ``inner`` runs on each matrix separately, with its own count.
      refresh_every: Steps from one refresh to the next, with the first at the first step; one of
        ``lowrank_optax.refresh``; or None for no further refresh.
      scale: Factor of the lifted updates (not of leaves that are not matrices).
      side: Side of a matrix that is compressed to the rank: the ``"shorter"`` (the paper's rule)
        or ``"longer"`` one (less state; optax's rule; of a square matrix the rows), always
        ``"rows"`` (inputs) or ``"columns"``, or ``"both"``.
      accumulate_steps: Micro-batches per optimizer step (None for one): projected gradients are
        averaged over this number of calls, and updates are zero in between. ``refresh_every`` then
        counts optimizer steps, and a basis is found from the first micro-batch of a step.
      non_matrix_transform: Transformation of leaves that are not matrices; ``inner`` if None.
      seed: Seed of the random numbers that subspace rules use; the step count is folded in.
      weight_dimension_numbers: Which leaves are matrices, and how: see
        ``lowrank_optax.matrices.resolve_dimension_numbers``. By default leaves of two axes except
        embeddings, norms, biases and output heads, which are recognized by their names.

    Returns:
      A transformation with the state `ScaleByProjectionState`.

    Raises:
      ValueError: If an argument is out of range, a spec does not fit, or two choices exclude each
        other. In ``init``: if no leaf is a matrix though some have two axes or more, if a pattern
        of ``subspace`` matches no matrix, or if moments to be rotated, followed or fed back are no
        moving averages of gradients and their squares. ``init`` warns if most elements of leaves
        of two axes or more are left out, or if ``params`` are one vector, as in ``optax.flatten``.
      TypeError: If ``inner`` or ``non_matrix_transform`` is no optax transformation, or
        ``subspace`` no subspace rule.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.chain(
      ...     lro.scale_by_projection(optax.scale_by_adam(), lro.subspaces.randomized_svd(rank=4)),
      ...     optax.scale_by_learning_rate(1e-2),
      ... )
      >>> params = {"kernel": jnp.ones((16, 64))}
      >>> state = tx.init(params)
      >>> [leaf.shape for leaf in jax.tree.leaves(state[0].inner)]
      [(), (4, 64), (4, 64)]
      >>> updates, state = jax.jit(tx.update)(params, state)
      >>> updates["kernel"].shape
      (16, 64)

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithms 1 and 2.
    """
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"subspace={subspace!r} must be a subspace rule such as subspaces.randomized_svd(rank)."
        )
    parts = Parts(
        inner=transformation("inner", inner),
        subspace=both_sides(subspace) if side == "both" else subspace,
        residual=residual_rule(residual),
        refresh=refresh_rule(refresh_every),
        on_refresh=on_refresh,
        scale=scale,
    )
    micro_steps = 1 if accumulate_steps is None else accumulate_steps
    _check(parts, side, micro_steps)
    non_matrix = None
    if non_matrix_transform is not None:
        non_matrix = transformation("non_matrix_transform", non_matrix_transform)
    known: list[Parts] = []

    def with_averages() -> Parts:
        if known:
            return known[0]
        found = parts.with_averages()
        if not is_traced(found.averages):
            known.append(found)
        return found

    def views_of(tree: Any, whole: Whole | None = None) -> list[View | None]:
        around = whole_of(whole, tree)
        specs = resolve_dimension_numbers(weight_dimension_numbers, around)
        views = {
            path: view_of_leaf(
                leaf, spec, side=side, rank=parts.subspace.rank, path=path_string(path)
            )
            for (path, leaf), spec in zip(leaves_by_path(around).items(), specs, strict=True)
        }
        if whole is None:
            return list(views.values())
        # A part of the tree, or slices of its leaves.
        part = [(views[path], leaf) for path, leaf in leaves_by_path(tree).items()]
        cut = whole.rows is not None
        return [view.of_slice(leaf) if cut and view is not None else view for view, leaf in part]

    def init_fn(params: optax.Params) -> ScaleByProjectionState:
        leaves, treedef = jax.tree.flatten(params)
        views = views_of(params)
        _check_found(params, views, parts.subspace)
        with_averages()  # for its errors
        index, matrices = itertools.count(), sum(v is not None for v in views)
        states: list[Any] = [
            None if v is None else init_leaf(parts, v, next(index) / matrices) for v in views
        ]
        zeros = [
            jnp.zeros_like(leaf, dtype=compute_dtype(leaf.dtype))
            if view is None
            else jnp.zeros_like(parts.subspace.project(own.basis, to_matrix(leaf, view.spec), view))
            for leaf, view, own in zip(leaves, views, states, strict=True)
        ]
        runner = InnerRunner(parts, non_matrix, treedef, views, zeros)
        inner_state, non_matrix_state = runner.init(zeros)
        if parts.residual.needs_moments:
            _check_moments(views, runner.split(inner_state))
        return ScaleByProjectionState(
            jnp.zeros([], jnp.int32),
            *pack(parts, treedef, states),
            treedef.unflatten(map(jnp.zeros_like, zeros)) if micro_steps > 1 else (),
            inner_state,
            non_matrix_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        parts = with_averages()
        leaves, treedef = jax.tree.flatten(updates)
        shaped = leaves if params is None else treedef.flatten_up_to(params)
        views = views_of(treedef.unflatten(shaped), whole)
        states = unpack(parts, treedef, state)
        views = list(map(functools.partial(_as_stored, parts), views, leaves, states))
        runner = InnerRunner(parts, non_matrix, treedef, views, leaves)
        micro_step = state.count % micro_steps
        when = When(
            count=state.count // micro_steps,
            may_refresh=True if micro_steps == 1 else micro_step == 0,
            key=jax.random.fold_in(jax.random.key(seed), state.count),
        )
        given = map(Leaf, views, leaves, shaped, states, runner.split(state.inner))
        ready = project_all(parts, [prepare(parts, leaf) for leaf in given], when)
        inners = [leaf.inner for leaf in ready]
        gradients = [leaf.projected for leaf in ready]
        saved = (
            [leaf.state for leaf in ready],
            runner.join(inners, state.inner),
            state.non_matrix_transform,
        )

        def step(gradients: list[jax.Array]) -> tuple[Any, ...]:
            given = None if params is None else [projected_param(parts, leaf) for leaf in ready]
            answers, *inner_states = runner.update(
                gradients, inners, state.inner, state.non_matrix_transform, given, extra_args
            )
            finished = [
                finish(parts, *pair, when.count) for pair in zip(ready, answers, strict=True)
            ]
            new, own = ([pair[i] for pair in finished] for i in (0, 1))
            return new, *jax.tree.map(_cast_as, (own, *inner_states), saved)

        def wait(gradients: list[jax.Array]) -> tuple[Any, ...]:
            zeros = [jnp.zeros_like(x, leaf.dtype) for x, leaf in zip(shaped, leaves, strict=True)]
            return zeros, *saved

        accumulated = ()
        if micro_steps == 1:
            new, states, *inner_states = step(gradients)
        else:
            sums = jax.tree.map(jnp.add, treedef.flatten_up_to(state.accumulated), gradients)
            last = micro_step == micro_steps - 1
            mean = [x / micro_steps for x in sums]
            new, states, *inner_states = jax.lax.cond(last, step, wait, mean)
            accumulated = treedef.unflatten([jnp.where(last, jnp.zeros_like(x), x) for x in sums])
        shared = lambda: refresh_without_leaves(parts, state.basis, state.next_refresh, when)
        new_state = ScaleByProjectionState(
            optax.safe_increment(state.count),
            *pack(parts, treedef, states, shared),
            accumulated,
            *inner_states,
        )
        return treedef.unflatten(new), jax.tree.map(_cast_as, new_state, state)

    core = optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def are_stacks(call: Call) -> list[bool]:
        views = views_of(call.whole.tree, call.whole)
        return [view is not None and len(view.batch) > 0 for view in views]

    given = [parts.inner] if non_matrix is None else [parts.inner, non_matrix]
    return core._replace(update=update_in_slices(core, are_stacks, given))


def _check(parts: Parts, side: Any, accumulate_steps: Any) -> None:
    for name, value, kind in (("side", side, Side), ("on_refresh", parts.on_refresh, OnRefresh)):
        if value not in get_args(kind):
            allowed = ", ".join(map(repr, get_args(kind)))
            raise ValueError(f"{name}={value!r} must be one of {allowed}.")
    if parts.residual.needs_one_side and side == "both":
        raise ValueError(
            "side='both' has no columns for the residual rule to scale; take one side."
        )
    if not isinstance(accumulate_steps, int) or accumulate_steps < 1:
        raise ValueError(
            f"accumulate_steps={accumulate_steps!r} must be an int of at least 1, or None; under "
            "optax.inject_hyperparams, list it in static_args."
        )
    if accumulate_steps > 1 and parts.residual.needs_gradient:
        raise ValueError(
            f"accumulate_steps={accumulate_steps} adds up projected gradients, but the residual "
            "rule needs whole ones; take residual='drop', or optax.MultiSteps around everything."
        )
    if parts.subspace.shared and (parts.refresh.compares or parts.refresh.observe is not None):
        raise ValueError(
            "refresh_every looks at gradients, but a random subspace has one basis for all leaves; "
            "give a number of steps."
        )


def _check_found(params: Any, views: Sequence[View | None], subspace: Subspace) -> None:
    """Raises if a whole tree has no matrix, or none for a pattern; warns if most is left out."""
    whole = is_whole(params)
    leaves = list(zip(jax.tree_util.tree_leaves_with_path(params), views, strict=True))
    known = [tuple(view.path.split("/")) for view in views if view is not None]
    left_out = [
        (x.size, path, x.shape) for (path, x), view in leaves if not view and x.ndim > 1 and x.size
    ]
    if not known and [(path, x.ndim) for (path, x), _ in leaves] == [((), 1)]:
        warnings.warn(
            "params are one vector, of which nothing is projected. optax.flatten makes one of a "
            "tree: put it inside, as inner=optax.flatten(optax.adam(1e-3)), not around.",
            stacklevel=4,
        )
    total = sum(size for size, *_ in left_out)
    largest = ""
    if total:
        _, path, shape = max(left_out, key=lambda entry: entry[0])
        largest = f"the largest is {path_string(path)!r} {shape}"
    if total and not known:
        nothing = (
            f"no leaf is a matrix to project: {len(left_out)} leaves of two axes or more are left "
            f"out, {largest}. Say which are matrices by weight_dimension_numbers, as "
            "lro.weight_dimension_numbers(params, include=...)."
        )
        if whole:
            raise ValueError(nothing)
        warnings.warn(nothing, stacklevel=4)  # all of a group of parameters may be embeddings, say
    if not whole:
        return
    for argument, patterns in subspace.patterns.items() if known else ():
        check_patterns(argument, patterns, known, "matrix")
    projected = sum(x.size for (_, x), view in leaves if view)
    if total > projected:
        warnings.warn(
            f"{total / (total + projected):.0%} of the elements in leaves of two axes or more are "
            f"not projected and have full-size state; {largest}. lro.selection_table(params) shows "
            "which are.",
            stacklevel=4,
        )


def _check_moments(views: Sequence[View | None], inners: Sequence[Any]) -> None:
    for view, inner in zip(views, inners, strict=True):
        if view is not None and first_moment_path(inner, view) is None:
            raise ValueError(
                "residual has momentum=True, but inner has no first moment that a refresh "
                "could lose a part of: leave it out, as residuals.error_feedback()."
            )


def _as_stored(parts: Parts, view: View | None, gradient: jax.Array, own: Any) -> View | None:
    """The view in the dtype of the gradient's arithmetic, and of the rank that the state has."""
    if view is None:  # parameters may have another dtype, and ranks may be cut between steps
        return None
    rank = view.rank if parts.subspace.size is None else parts.subspace.size(own.basis)
    return view._replace(dtype=compute_dtype(gradient.dtype), rank=rank)


def _cast_as(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` in the dtype of ``old`` (a key array, which has no cast, is in it already)."""
    return new if new.dtype == old.dtype else new.astype(old.dtype)
