"""The projected optimizer: any optax transformation, run in a low-rank subspace of each gradient.

For a gradient matrix ``G [m, n]`` with ``m <= n`` and an orthonormal basis ``P [m, r]``, the inner
transformation sees ``R = Pᵀ G [r, n]`` instead of ``G``, keeps its state in that shape, and its
answer ``N`` is lifted back to ``P N``. The basis follows the gradients: every ``refresh_every``
steps it is found anew from the gradient of that step. Leaves that are not matrices go to the same
inner transformation as they are.
"""

from collections.abc import Iterable
import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import (
    DimensionNumbersRule,
    WeightDimensionNumbers,
    explicit_sharding,
    from_matrix,
    matrix_partition,
    matrix_shape,
    resolve_dimension_numbers,
    to_matrix,
)
from lowrank_optax.projection.subspaces import Subspace

Side: TypeAlias = Literal["shorter", "longer", "rows", "columns"]


class ScaleByProjectionState(NamedTuple):
    """State of `scale_by_projection`: parallel trees, one array for each matrix leaf.

    Attributes:
      count: Number of updates so far. shape=(), dtype=int32.
      basis: The subspace rule's basis, ``[*batch, d, r]`` in float32; ``MaskedNode`` where a leaf
        is not a matrix. Zero until the first gradient that is finite and not zero.
      next_refresh: The count at which the basis is due to be found anew, ``[*batch]`` int32;
        ``MaskedNode`` where a leaf is not a matrix.
      inner: State of the inner transformation, on the tree of projected gradients.
    """

    count: jax.typing.ArrayLike
    basis: Any
    next_refresh: Any
    inner: optax.OptState


class _View(NamedTuple):
    """How one leaf is projected: its dimension numbers, and the matrix axis that is compressed."""

    spec: WeightDimensionNumbers
    axis: int


def scale_by_projection(
    inner: optax.GradientTransformation,
    subspace: Subspace,
    *,
    refresh_every: int = 200,
    scale: float = 1.0,
    side: Side = "shorter",
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` in a low-rank subspace of each gradient matrix.

    One update, for a matrix leaf: the basis is refreshed if it is due; the gradient is projected;
    ``inner`` updates the projected tree; its answer is scaled and lifted back. The refresh is a
    ``lax.cond`` on a scalar outside all batch axes. A gradient that is zero or not finite never
    enters a basis: the last one stays, and the refresh is tried again at the next step. The
    gradient itself is passed on as it is, as everywhere in optax. When a refreshed basis replaces
    another, the sign of each vector is chosen to agree with its predecessor, and ``inner`` keeps
    its state (the rule of the paper).

    Arithmetic is float32 (float64 for float64 gradients) whatever the gradients' dtype; so is the
    inner state, of matrices and other leaves alike. Updates have the gradients' dtype.

    Args:
      inner: Any optax transformation. If it needs parameters, it is given the projected ones.
      subspace: How the basis is found: one of ``lowrank_optax.subspaces``.
      refresh_every: Steps from one refresh to the next; the first is at the first step.
      scale: Factor of the lifted updates (not of leaves that are not matrices).
      side: Which side of a matrix is compressed to the rank: the ``"shorter"`` (the paper's rule)
        or ``"longer"`` one (less state; optax's rule), or ``"rows"`` (inputs) or ``"columns"``
        always. Of a square matrix, the rows.
      seed: Seed of the random numbers that subspace rules use; the step count is folded in.
      weight_dimension_numbers: Which leaves are matrices, and how: see
        ``lowrank_optax.matrices.resolve_dimension_numbers``. By default leaves of two axes, but for
        embeddings, norms, biases and output heads, which are known by their names.

    Returns:
      A transformation with the state `ScaleByProjectionState`.

    Raises:
      ValueError: If ``side`` is unknown, ``refresh_every`` below 1, or a spec does not fit.
      TypeError: If ``subspace`` is not a subspace rule.

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
    _check_arguments(subspace, side, refresh_every)
    inner = optax.with_extra_args_support(inner)

    def views(tree: Any) -> list[_View | None]:
        specs = resolve_dimension_numbers(weight_dimension_numbers, tree)
        return [
            _view(leaf, spec, side) for leaf, spec in zip(jax.tree.leaves(tree), specs, strict=True)
        ]

    def init_fn(params: optax.Params) -> ScaleByProjectionState:
        leaves, treedef = jax.tree.flatten(params)
        bases, due, gradients = _columns(
            [
                _init_leaf(subspace, leaf, view)
                for leaf, view in zip(leaves, views(params), strict=True)
            ]
        )
        return ScaleByProjectionState(
            count=jnp.zeros([], jnp.int32),
            basis=treedef.unflatten(bases),
            next_refresh=treedef.unflatten(due),
            inner=inner.init(treedef.unflatten(gradients)),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, treedef = jax.tree.flatten(updates)
        leaf_views = views(updates)
        aligned = treedef.flatten_up_to  # trees with one array, or MaskedNode, for each leaf
        advance = functools.partial(
            _advance_leaf,
            subspace=subspace,
            key=jax.random.fold_in(jax.random.key(seed), state.count),
            count=state.count,
            refresh_every=refresh_every,
        )
        bases, due, gradients = _columns(
            map(advance, leaves, leaf_views, aligned(state.basis), aligned(state.next_refresh))
        )
        project = functools.partial(_projected, subspace)
        if params is not None:
            params = treedef.unflatten(map(project, aligned(params), bases, leaf_views))
        answers, inner_state = inner.update(
            treedef.unflatten(gradients), state.inner, params, **extra_args
        )
        lift = functools.partial(_lifted, subspace, scale)
        new_updates = treedef.unflatten(map(lift, leaves, aligned(answers), bases, leaf_views))
        new_state = ScaleByProjectionState(
            count=optax.safe_increment(state.count),
            basis=treedef.unflatten(bases),
            next_refresh=treedef.unflatten(due),
            inner=jax.tree.map(_cast_like, inner_state, state.inner),
        )
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_arguments(subspace: Any, side: Any, refresh_every: Any) -> None:
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"subspace={subspace!r} must be a subspace rule such as subspaces.randomized_svd(rank)."
        )
    if side not in ("shorter", "longer", "rows", "columns"):
        raise ValueError(f"side={side!r} must be 'shorter', 'longer', 'rows' or 'columns'.")
    if isinstance(refresh_every, int) and refresh_every < 1:
        raise ValueError(f"refresh_every={refresh_every} must be at least 1.")


def _columns(rows: Iterable[tuple[Any, Any, Any]]) -> tuple[list[Any], list[Any], list[Any]]:
    """Three lists from rows of three; empty ones from no rows."""
    table = list(rows)
    first, second, third = ([row[i] for row in table] for i in range(3))
    return first, second, third


def _init_leaf(subspace: Subspace, leaf: Any, view: _View | None) -> tuple[Any, Any, jax.Array]:
    """A leaf's basis, the count of its next refresh, and zeros like its projected gradient."""
    if view is None:
        zeros = jnp.zeros_like(leaf, dtype=_compute_dtype(leaf))
        return optax.MaskedNode(), optax.MaskedNode(), zeros
    matrix = to_matrix(leaf, view.spec)
    basis = subspace.init(matrix, view.axis)
    zeros = jnp.zeros_like(subspace.project(basis, matrix, view.axis))
    return basis, _one_per_matrix(matrix), zeros


def _advance_leaf(
    leaf: jax.Array,
    view: _View | None,
    basis: Any,
    next_refresh: Any,
    *,
    subspace: Subspace,
    **refresh: Any,
) -> tuple[Any, Any, jax.Array]:
    """A leaf's basis, the count of its next refresh, and its projected gradient at this step."""
    if view is not None:
        basis, next_refresh = _refresh_if_due(
            to_matrix(leaf, view.spec), basis, next_refresh, view.axis, subspace=subspace, **refresh
        )
    return basis, next_refresh, _projected(subspace, leaf, basis, view)


def _cast_like(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` in the dtype of ``old`` (a key array, which has no cast, is in it already)."""
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def _compute_dtype(leaf: Any) -> Any:
    """Float32 at least for floating leaves; other leaves stay as they are."""
    floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.promote_types(leaf.dtype, jnp.float32) if floating else leaf.dtype


def _one_per_matrix(matrix: jax.Array) -> jax.Array:
    """Zeros ``[*batch]`` int32, with the batch axes' own sharding."""
    partition = explicit_sharding.partition_of_batch(matrix)
    return explicit_sharding.zeros(matrix.shape[:-2], jnp.int32, partition)


def _view(leaf: Any, spec: WeightDimensionNumbers | None, side: Side) -> _View | None:
    """How the leaf is projected; None for leaves that are no real matrices, or empty."""
    if spec is None or leaf.size == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    rows, columns = matrix_shape(leaf.shape, spec)[-2:]
    compress_rows = {
        "shorter": rows <= columns,
        "longer": rows >= columns,
        "rows": True,
        "columns": False,
    }[side]
    return _View(spec, -2 if compress_rows else -1)


def _refresh_if_due(
    matrix: jax.Array,
    basis: jax.Array,
    next_refresh: jax.Array,
    axis: int,
    *,
    subspace: Subspace,
    key: jax.Array,
    count: jax.Array,
    refresh_every: int,
) -> tuple[jax.Array, jax.Array]:
    """The basis, found anew for those of the batch that are due, and when it is due again."""
    due = count >= next_refresh

    def refresh() -> tuple[jax.Array, jax.Array]:
        new = subspace.refresh(key, matrix, basis, axis)
        agreement = jnp.sum(new * basis, axis=-2, keepdims=True)
        new = jnp.where(agreement < 0, -new, new).astype(basis.dtype)
        every = lambda x: jnp.all(x, axis=(-2, -1))
        usable = every(jnp.isfinite(new)) & every(jnp.isfinite(matrix)) & ~every(matrix == 0)
        taken = due & usable
        following = (count // refresh_every + 1) * refresh_every
        return (
            jnp.where(taken[..., None, None], new, basis),
            jnp.where(taken, following, next_refresh).astype(next_refresh.dtype),
        )

    return jax.lax.cond(jnp.any(due), refresh, lambda: (basis, next_refresh))


def _projected(subspace: Subspace, leaf: jax.Array, basis: Any, view: _View | None) -> jax.Array:
    if view is None:
        return leaf.astype(_compute_dtype(leaf))
    return subspace.project(basis, to_matrix(leaf, view.spec), view.axis)


def _lifted(
    subspace: Subspace,
    scale: float,
    leaf: jax.Array,
    answer: jax.Array,
    basis: Any,
    view: _View | None,
) -> jax.Array:
    if view is None:
        return answer.astype(leaf.dtype)
    partition = matrix_partition(leaf, view.spec)
    matrix = subspace.lift(basis, scale * answer, view.axis, partition)
    return from_matrix(matrix.astype(leaf.dtype), view.spec, leaf)
