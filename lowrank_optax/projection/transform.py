"""The projected optimizer: any optax transformation, run in a low-rank subspace of each gradient.

For a gradient matrix ``G [m, n]`` with ``m <= n`` and an orthonormal basis ``P [m, r]``, the inner
transformation sees ``R = Pᵀ G [r, n]`` instead of ``G``, keeps its state in that shape, and its
answer ``N`` is lifted back to ``P N``. How the basis is found, when, what becomes of the inner
state when it turns, and what of the part of the gradient outside it, are independent choices.
"""

from collections.abc import Sequence
import itertools
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import (
    DimensionNumbersRule,
    matrix_partition,
    resolve_dimension_numbers,
    to_matrix,
)
from lowrank_optax.matrices.paths import is_whole, leaves_by_path, path_string
from lowrank_optax.matrices.selection import check_patterns
from lowrank_optax.projection.inner import InnerRunner
from lowrank_optax.projection.leaf import (
    Advanced,
    LeafState,
    Parts,
    finish_leaf,
    init_leaf,
    prepare_leaf,
    project_leaf,
)
from lowrank_optax.projection.rank import RankSpec
from lowrank_optax.projection.refresh import RefreshRule, refresh_rule
from lowrank_optax.projection.refreshing import When, refreshed, refreshed_without_leaves
from lowrank_optax.projection.residuals import ResidualSpec, residual_rule
from lowrank_optax.projection.state import ScaleByProjectionState, pack, unpack
from lowrank_optax.projection.subspaces import Subspace, both_sides
from lowrank_optax.projection.transfer import (
    OnRefresh,
    check_on_refresh,
    first_moment,
    is_traced,
)
from lowrank_optax.projection.view import LeafView, Side, compute_dtype, leaf_view
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
    others: optax.GradientTransformation | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` in a low-rank subspace of each gradient matrix.

    One update, for a matrix leaf: the residual rule adds what it kept; the basis is refreshed if it
    is due, and the inner state moved along; the gradient is projected; ``inner`` updates the
    projected tree; the residual rule makes the update of the lifted, scaled answer and the rest.
    The refresh is a ``lax.cond`` on a scalar outside all batch axes. A gradient that is zero or not
    finite never enters a basis: the last one stays, and the refresh is tried again at the next
    step. The gradient itself is passed on as it is, as everywhere in optax.

    Arithmetic is float32 (float64 for float64 gradients) whatever the gradients' dtype; so is the
    inner state, of matrices and other leaves alike. Updates have the gradients' dtype.

    A gradient may arrive projected already, in the shape ``[*batch, r, n]`` or ``[*batch, m, r]``,
    if ``params`` are given, which tell the shape of the update: a layer that projects in its
    backward pass reads the basis in ``state.basis``, through ``subspace.project`` and ``lift``.

    Args:
      inner: Any optax transformation. If it needs parameters, it is given the projected ones.
      subspace: How the basis is found: one of ``lowrank_optax.subspaces``.
      residual: What becomes of the part outside the subspace: ``"drop"``, ``"raw"``, ``"sign"``,
        ``"fira"``, ``"gradient_scaling"`` or ``"error_feedback"``, or one of
        ``lowrank_optax.residuals`` with its options.
      on_refresh: What becomes of ``inner``'s state when the basis turns: ``"keep"`` (the paper;
        signs of singular vectors are chosen to agree), ``"reset"``, ``"rotate"`` for first moments,
        or ``"rotate_moments"`` for second ones too, by LDAdam's rule. Unless kept, ``inner`` is run
        on each matrix alone, with a count of its own.
      refresh_every: Steps from one refresh to the next, the first being at the first step; one of
        ``lowrank_optax.refresh``; or None for never again.
      scale: Factor of the lifted updates (not of leaves that are not matrices).
      side: Which side of a matrix is compressed to the rank: the ``"shorter"`` (the paper's rule)
        or ``"longer"`` one (less state; optax's rule), or ``"rows"`` (inputs) or ``"columns"``
        always, of a square matrix the rows; or ``"both"``.
      accumulate_steps: Micro-batches to an optimizer step (None for one): projected gradients are
        averaged over so many calls, between which updates are zero. ``refresh_every`` then counts
        optimizer steps, and a basis is found from the first micro-batch of one.
      others: The transformation of leaves that are not matrices; ``inner`` itself if None.
      seed: Seed of the random numbers that subspace rules use; the step count is folded in.
      weight_dimension_numbers: Which leaves are matrices, and how: see
        ``lowrank_optax.matrices.resolve_dimension_numbers``. By default leaves of two axes, but for
        embeddings, norms, biases and output heads, which are known by their names.

    Returns:
      A transformation with the state `ScaleByProjectionState`.

    Raises:
      ValueError: If an argument is out of range, a spec does not fit, or two choices exclude each
        other; in ``init``, if no leaf is a matrix though some have two axes or more, if a pattern
        of ``subspace`` matches no matrix, or if moments are to be rotated, followed or fed back
        that are no moving averages of gradients and their squares. If most elements of leaves of
        two axes or more are left out, ``init`` warns.
      TypeError: If ``inner`` or ``others`` is not an optax transformation, or ``subspace`` not a
        subspace rule.

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
    _check(parts, side, accumulate_steps)
    micro_steps = accumulate_steps or 1
    other = None if others is None else transformation("others", others)
    known: list[Parts] = []

    def with_averages() -> Parts:
        if known:
            return known[0]
        found = parts.with_averages()
        if not is_traced(found.averages):
            known.append(found)
        return found

    def views_of(tree: Any, whole: Whole | None = None) -> list[LeafView | None]:
        around = whole_of(whole, tree)
        views = _views(around, weight_dimension_numbers, side, parts.subspace.rank)
        return views if whole is None else _of_part(views, tree, whole)

    def init_fn(params: optax.Params) -> ScaleByProjectionState:
        leaves, treedef = jax.tree.flatten(params)
        views = views_of(params)
        _check_found(params, views, parts.subspace)
        with_averages()  # for its errors
        places, matrices = itertools.count(), sum(v is not None for v in views)
        states = [
            None if v is None else init_leaf(parts, v.view, next(places) / matrices) for v in views
        ]
        zeros = [_projected_zeros(parts, *pair) for pair in zip(leaves, views, states, strict=True)]
        runner = InnerRunner(parts, other, treedef, views, zeros)
        inner_state, others_state = runner.init(zeros)
        if parts.residual.needs_moments:
            _check_moments(views, runner.split(inner_state))
        return ScaleByProjectionState(
            jnp.zeros([], jnp.int32),
            *pack(parts, treedef, states),
            treedef.unflatten(map(jnp.zeros_like, zeros)) if micro_steps > 1 else (),
            inner_state,
            others_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, treedef = jax.tree.flatten(updates)
        likes = leaves if params is None else treedef.flatten_up_to(params)
        views = _in_dtype_of(leaves, views_of(treedef.unflatten(likes), whole))
        states = unpack(parts, treedef, state)
        views = _in_size_of(parts, states, views)
        runner = InnerRunner(with_averages(), other, treedef, views, leaves)
        micro_step = state.count % micro_steps
        when = When(
            count=state.count // micro_steps,
            may_refresh=True if micro_steps == 1 else micro_step == 0,
            key=jax.random.fold_in(jax.random.key(seed), state.count),
        )
        shared = state.basis, state.next_refresh
        ready, inners = _advance(runner, likes, states, state.inner, when)
        gradients = [
            x.astype(compute_dtype(x.dtype)) if one is None else one.projected
            for x, one in zip(leaves, ready, strict=True)
        ]
        kept = [one and one.state for one in ready], runner.join(inners, state.inner), state.others

        def step(gradients: list[jax.Array]) -> tuple[Any, ...]:
            given = None if params is None else _project_params(parts, likes, ready)
            answers, *inner_states = runner.update(
                gradients, inners, state.inner, state.others, given, extra_args
            )
            new, states = _finish(parts, leaves, likes, answers, ready, when.count)
            return new, *jax.tree.map(_cast_like, (states, *inner_states), kept)

        def wait(gradients: list[jax.Array]) -> tuple[Any, ...]:
            zeros = [jnp.zeros_like(x, leaf.dtype) for x, leaf in zip(likes, leaves, strict=True)]
            return zeros, *kept

        accumulated = ()
        if micro_steps == 1:
            new, states, *inner_states = step(gradients)
        else:
            sums = jax.tree.map(jnp.add, treedef.flatten_up_to(state.accumulated), gradients)
            last = micro_step == micro_steps - 1
            mean = [x / micro_steps for x in sums]
            new, states, *inner_states = jax.lax.cond(last, step, wait, mean)
            accumulated = treedef.unflatten([jnp.where(last, jnp.zeros_like(x), x) for x in sums])
        new_state = ScaleByProjectionState(
            optax.safe_increment(state.count),
            *pack(parts, treedef, states, lambda: refreshed_without_leaves(parts, *shared, when)),
            accumulated,
            *inner_states,
        )
        return treedef.unflatten(new), jax.tree.map(_cast_like, new_state, state)

    core = optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def are_stacks(call: Call) -> list[bool]:
        views = views_of(call.whole.tree, call.whole)
        return [view is not None and len(view.view.batch) > 0 for view in views]

    given = [parts.inner] if other is None else [parts.inner, other]
    return core._replace(update=update_in_slices(core, are_stacks, given))


def _check(parts: Parts, side: Any, accumulate_steps: Any) -> None:
    if side not in ("shorter", "longer", "rows", "columns", "both"):
        raise ValueError(f"side={side!r} must be 'shorter', 'longer', 'rows', 'columns' or 'both'.")
    check_on_refresh(parts.on_refresh)
    if parts.residual.needs_one_side and side == "both":
        raise ValueError(
            "side='both' has no columns for the residual rule to scale; take one side."
        )
    if accumulate_steps is None:
        accumulate_steps = 1
    if not isinstance(accumulate_steps, int) or accumulate_steps < 1:
        raise ValueError(
            f"accumulate_steps={accumulate_steps!r} must be an int of at least 1, or None; under "
            "optax.inject_hyperparams, list it in static_args."
        )
    if accumulate_steps > 1 and parts.residual.needs_gradient:
        raise ValueError(
            f"accumulate_steps={accumulate_steps} keeps projected gradients only, but the residual "
            "rule needs whole ones; take residual='drop', or optax.MultiSteps around everything."
        )
    if parts.subspace.shared and (parts.refresh.compares or parts.refresh.observe is not None):
        raise ValueError(
            "refresh_every looks at gradients, but a random subspace has one basis for all leaves; "
            "give a number of steps."
        )


def _check_found(params: Any, views: Sequence[LeafView | None], subspace: Subspace) -> None:
    """Checks that a tree has matrices, most of its elements, and one for each pattern.

    Raises:
      ValueError: If no leaf of a whole tree is a matrix though some have two axes or more, or if a
        pattern of the subspace matches no matrix.
    """
    must_find = is_whole(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    large = [
        (x.size, path_string(path), x.shape)
        for (path, x), view in zip(leaves, views, strict=True)
        if view is None and x.ndim > 1 and x.size
    ]
    known = [tuple(view.view.path.split("/")) for view in views if view is not None]
    if large and not known:
        _, name, shape = max(large)
        nothing = (
            f"no leaf is a matrix to project: {len(large)} leaves of two axes or more are left "
            f"out, the largest is {name!r} {shape}. Say which are matrices by "
            "weight_dimension_numbers, as lro.weight_dimension_numbers(params, include=...)."
        )
        if must_find:
            raise ValueError(nothing)
        warnings.warn(nothing, stacklevel=4)  # of a group of parameters all may be embeddings, say
    if not must_find:
        return
    if known:
        for argument, patterns in subspace.patterns.items():
            check_patterns(argument, patterns, known, "matrix")
    left_out = sum(size for size, *_ in large)
    projected = sum(x.size for (_, x), v in zip(leaves, views, strict=True) if v is not None)
    if left_out > projected:
        _, name, shape = max(large)
        warnings.warn(
            f"{left_out / (left_out + projected):.0%} of the elements in leaves of two axes or "
            f"more are not projected and keep full-size state; the largest is {name!r} {shape}. "
            "lro.selection_table(params) shows which are.",
            stacklevel=4,
        )


def _check_moments(views: Sequence[LeafView | None], inners: Sequence[Any]) -> None:
    for view, inner in zip(views, inners, strict=True):
        if view is not None and first_moment(inner, view.view) is None:
            raise ValueError(
                "residual has momentum=True, but inner keeps no first moment that a refresh "
                "could lose a part of: leave it out, as residuals.error_feedback()."
            )


def _views(
    tree: Any, rule: DimensionNumbersRule, side: Side, rank: RankSpec
) -> list[LeafView | None]:
    """How each leaf is projected, in the order of the tree's leaves."""
    specs = resolve_dimension_numbers(rule, tree)
    views = []
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(tree), specs, strict=True):
        partition = None if spec is None else matrix_partition(leaf, spec)
        name = path_string(path)
        views.append(leaf_view(leaf, spec, partition, side=side, rank=rank, path=name))
    return views


def _of_part(views: Sequence[LeafView | None], tree: Any, whole: Whole) -> list[LeafView | None]:
    """The views of leaves of a tree of which this is a part, or of slices of them."""
    paths = leaves_by_path(whole_of(whole, tree))
    known = dict(zip(paths, views, strict=True))
    part = [(known[path], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    if whole.rows is None:
        return [view for view, _ in part]
    return [None if view is None else view.of_slice(leaf) for view, leaf in part]


def _in_dtype_of(
    leaves: Sequence[jax.Array], views: Sequence[LeafView | None]
) -> list[LeafView | None]:
    """The views with the arithmetic of the gradients' dtypes: parameters may have others."""
    return [
        v if v is None else v._replace(view=v.view._replace(dtype=compute_dtype(x.dtype)))
        for x, v in zip(leaves, views, strict=True)
    ]


def _in_size_of(
    parts: Parts, states: Sequence[LeafState], views: Sequence[LeafView | None]
) -> list[LeafView | None]:
    """The views with the ranks the state has, which may have been made smaller between steps."""
    size = parts.subspace.size
    if size is None:
        return list(views)
    return [
        v if v is None else v._replace(view=v.view._replace(rank=size(own.basis)))
        for own, v in zip(states, views, strict=True)
    ]


def _advance(
    runner: InnerRunner,
    likes: Sequence[Any],
    states: Sequence[LeafState],
    inner_state: Any,
    when: When,
) -> tuple[list[Advanced | None], list[Any]]:
    """Every matrix leaf with its basis as it is to be used; and all leaves' inner states."""
    parts, inners = runner.parts, runner.split(inner_state)
    matrices = {i: view for i, view in enumerate(runner.views) if view is not None}
    prepared = [
        prepare_leaf(parts, runner.leaves[i], likes[i], view, states[i], inners[i])
        for i, view in matrices.items()
    ]
    ready: list[Advanced | None] = [None] * len(likes)
    turned = refreshed(parts, prepared, when)
    for i, leaf, (own, inners[i]) in zip(matrices, prepared, turned, strict=True):
        ready[i] = project_leaf(parts, leaf, own, inners[i])
    return ready, inners


def _finish(
    parts: Parts,
    leaves: Sequence[jax.Array],
    likes: Sequence[Any],
    answers: Sequence[jax.Array],
    ready: Sequence[Advanced | None],
    count: jax.Array,
) -> tuple[list[jax.Array], list[LeafState | None]]:
    """The updates of all leaves, and what is kept for the matrices."""
    results = [
        (answer.astype(leaf.dtype), None)
        if one is None
        else finish_leaf(parts, one, answer, like, leaf.dtype, count)
        for answer, leaf, like, one in zip(answers, leaves, likes, ready, strict=True)
    ]
    return [update for update, _ in results], [own for _, own in results]


def _project_params(
    parts: Parts, params: Sequence[jax.Array], ready: Sequence[Advanced | None]
) -> list[jax.Array]:
    """The parameters as the inner optimizer is given them."""
    project = lambda x, one: parts.subspace.project(
        one.state.basis, to_matrix(x, one.leaf_view.spec), one.leaf_view.view
    )
    return [x if one is None else project(x, one) for x, one in zip(params, ready, strict=True)]


def _projected_zeros(
    parts: Parts, leaf: jax.Array, leaf_view: LeafView | None, own: LeafState | None
) -> jax.Array:
    """Zeros like the leaf's projected gradient, sharded like it."""
    if leaf_view is None or own is None:
        return jnp.zeros_like(leaf, dtype=compute_dtype(leaf.dtype))
    matrix = to_matrix(leaf, leaf_view.spec)
    return jnp.zeros_like(parts.subspace.project(own.basis, matrix, leaf_view.view))


def _cast_like(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` in the dtype of ``old`` (a key array, which has no cast, is in it already)."""
    return new if new.dtype == old.dtype else new.astype(old.dtype)
