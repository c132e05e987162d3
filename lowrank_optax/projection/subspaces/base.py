"""What a subspace rule is, and the parts that rules share.

A gradient matrix is ``[*batch, m, n]``; its compressed axis has size ``d``, and the rank is ``r``.
A basis is ``[*batch, d, r]``, a projected gradient ``[*batch, r, n]`` or ``[*batch, m, r]``.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.arithmetic import product_with_bfloat16
from lowrank_optax.matrices.explicit_sharding import product
from lowrank_optax.projection.view import RankSpec, View, check_rank, resolve_rank


class Subspace(NamedTuple):
    """A rule for finding and using a subspace of gradient matrices: pure functions.

    The state of a rule for a leaf is called its basis, though it may be less than one: column
    indices, or a seed. It is an array, or a NamedTuple of arrays; each has the batch axes first, or
    is a scalar that belongs to the whole leaf. All functions take the leaf's `View` last. Make a
    rule with `from_basis`, which derives projection and lifting from the basis as a matrix.

    Attributes:
      rank: Rank, as `resolve_rank` reads it.
      init: ``init(view) -> basis``: the basis before the first refresh.
      refresh: ``refresh(key, matrix, basis, momentum, view) -> basis``: the basis for this
        gradient. ``basis`` is the last one, ``momentum`` the bias-corrected first moment in it for
        rules that ``follow_momentum``, otherwise None. The result for a zero or non-finite matrix
        is not used.
      project: ``project(basis, matrix, view) -> projected``.
      lift: ``lift(basis, projected, view) -> matrix``, the adjoint of project.
      rotate: ``rotate(old, new, projected, view, squared=False)``: an array of the projected shape,
        from one basis into another: ``C x`` with ``C = newᵀ old``, or ``(C∘C) x`` for a variance.
      track: ``track(basis, matrix, projected, view) -> basis``: moves the basis a little after
        every step; None for rules that only refresh.
      shared: Whether one basis serves all leaves and needs no gradient. Its refresh gets
        ``matrix=None`` and ``view=None``.
      orthonormal: Whether ``PᵀP = I``.
      refreshes: Whether a refresh ever changes the basis.
      follow_momentum: Whether ``refresh`` needs the first moment.
      example: Example of a leaf's basis, of which only the tree structure is used.
      size: ``size(basis)``: the rank of its arrays, where `lowrank_optax.compact` may have cut it;
        None where it is the view's.
      patterns: Patterns of paths by the argument that holds them; each must match a matrix.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule, gradient = lro.subspaces.svd(rank=1), jnp.outer(jnp.ones(4), jnp.arange(3.0))
      >>> view = lro.View.of(gradient, axis=-1, rank=rule.rank)
      >>> basis = rule.refresh(jax.random.key(0), gradient, rule.init(view), None, view)
      >>> lifted = rule.lift(basis, rule.project(basis, gradient, view), view)
      >>> bool(jnp.allclose(lifted, gradient, atol=1e-5))  # a matrix of rank one is unchanged
      True

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, section 4.
    """

    rank: RankSpec
    init: Callable[[View], Any]
    refresh: Callable[[jax.Array, Any, Any, jax.Array | None, Any], Any]
    project: Callable[[Any, jax.Array, View], jax.Array]
    lift: Callable[[Any, jax.Array, View], jax.Array]
    rotate: Callable[..., jax.Array]
    track: Callable[[Any, jax.Array, jax.Array, View], Any] | None = None
    shared: bool = False
    orthonormal: bool = True
    refreshes: bool = True
    follow_momentum: bool = False
    example: Any = 0
    size: Callable[[Any], int] | None = None
    patterns: Mapping[str, Collection[str]] = MappingProxyType({})

    @property
    def stores_one_array(self) -> bool:
        """Whether the state for each leaf is one array."""
        return not self.shared and jax.tree.structure(self.example) == jax.tree.structure(0)


def from_basis(
    rank: RankSpec,
    refresh: Callable[[jax.Array, Any, Any, jax.Array | None, Any], Any],
    *,
    init: Callable[[View], Any] | None = None,
    matrix_of: Callable[[Any, View], jax.Array] | None = None,
    rotate: Callable[..., jax.Array] | None = None,
    **attributes: Any,
) -> Subspace:
    """A rule from how its basis is found, and how the basis is read as a matrix ``[*batch, d, r]``.

    Args:
      rank: See `Subspace`.
      refresh: See `Subspace`.
      init: See `Subspace`; zeros ``[*batch, d, r]`` if None.
      matrix_of: ``matrix_of(basis, view)``; the basis itself if None.
      rotate: See `Subspace`; products with ``newᵀ old`` if None.
      **attributes: Other attributes of `Subspace`.
    """
    dense = (lambda basis, view: basis) if matrix_of is None else matrix_of

    def rotate_dense(
        old: Any, new: Any, projected: jax.Array, view: View, squared: bool = False
    ) -> jax.Array:
        return rotated(dense(old, view), dense(new, view), projected, view, squared)

    patterns = {"rank": tuple(rank)} if isinstance(rank, Mapping) else {}
    attributes["patterns"] = patterns | attributes.get("patterns", {})
    return Subspace(
        rank=check_rank(rank),
        init=zero_basis if init is None else init,
        refresh=refresh,
        project=lambda basis, matrix, view: project(dense(basis, view), matrix, view),
        lift=lambda basis, projected, view: lift(dense(basis, view), projected, view),
        rotate=rotate_dense if rotate is None else rotate,
        **attributes,
    )


def zero_basis(view: View) -> jax.Array:
    """Zeros ``[*batch, d, r]``: a basis that projects everything to nothing."""
    shape = (*view.batch, view.length, view.rank)
    return explicit_sharding.zeros(shape, view.dtype, view.small_partition)


def zero_basis_before(initial: Subspace) -> Callable[[View], jax.Array]:
    """`zero_basis` for a rule whose first basis another one finds, with `first_basis`."""
    if initial.track is not None or not initial.stores_one_array:
        raise ValueError(
            "initial must store its basis as one array, as randomized_svd and fixed do."
        )

    def init(view: View) -> jax.Array:
        rank = resolve_rank(initial.rank, view.path, view.shape)
        if rank != view.rank:
            raise ValueError(
                f"initial has the rank {rank} for {view.path!r}: it must be {view.rank}."
            )
        dtype = jax.eval_shape(lambda: initial.init(view)).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"initial must store its basis as floats; it stores {dtype}.")
        return zero_basis(view)

    return init


def first_basis(
    initial: Subspace, key: jax.Array, matrix: Any, basis: jax.Array, view: View
) -> jax.Array:
    """The basis ``[*batch, d, r]`` that a rule finds, or always has."""
    if not initial.refreshes:  # the basis may have been compacted since
        whole = view._replace(rank=resolve_rank(initial.rank, view.path, view.shape))
        return initial.init(whole)[..., : basis.shape[-1]]
    return initial.refresh(key, matrix, basis, None, view)


def project(basis: jax.Array, matrix: jax.Array, view: View) -> jax.Array:
    """``Pᵀ G`` or ``G P``, accumulated in the basis' dtype."""
    letters = "...mr,...mn->...rn" if view.axis == -2 else "...nr,...mn->...mr"
    thin = _cut_as(matrix, view.axis, basis)
    return product(letters, thin, matrix.astype(basis.dtype), view.projected_partition)


def lift(basis: jax.Array, projected: jax.Array, view: View) -> jax.Array:
    """``P R`` or ``R Pᵀ``, the adjoint of `project`."""
    letters = "...mr,...rn->...mn" if view.axis == -2 else "...nr,...mr->...mn"
    return product(letters, basis, projected.astype(basis.dtype), view.partition)


def rotated(
    old: jax.Array, new: jax.Array, projected: jax.Array, view: View, squared: bool
) -> jax.Array:
    """``C x`` (or ``x Cᵀ`` for columns) with ``C = newᵀ old``, or with its entries squared."""
    between = product("...ds,...dr->...sr", new, old, view.small_partition)
    between = between**2 if squared else between
    letters = "...sr,...rn->...sn" if view.axis == -2 else "...sr,...mr->...ms"
    return product(letters, between, projected, view.projected_partition)


def times(matrix: jax.Array, x: jax.Array, view: View, across: bool = False) -> jax.Array:
    """The matrix and a thin one: the result ``[*batch, d, k]`` lies on the compressed axis.

    ``G x`` if rows are compressed, ``Gᵀ x`` if columns are; with ``across`` the other way round, on
    the other axis. Pass a bfloat16 gradient as it is: see `product_with_bfloat16`.
    """
    lands_on_rows = (view.axis == -2) != across
    letters = "...mn,...nk->...mk" if lands_on_rows else "...mn,...mk->...nk"
    meets, lands = (-1, -2) if lands_on_rows else (-2, -1)
    thin = _cut_as(matrix, meets, jax.lax.optimization_barrier(x))
    multiply = product_with_bfloat16 if matrix.dtype == jnp.bfloat16 else product
    result = multiply(letters, matrix, thin, _cut_of(matrix, lands))
    return explicit_sharding.constrain(result, view.small_partition)


def _cut_as(matrix: jax.Array, axis: int, thin: jax.Array) -> jax.Array:
    """``thin [*batch, k, r]``, on explicit axes sharded as the axis of the matrix that it meets.

    For a product with a replicated factor or result, the partitioner gathers the whole matrix. On
    automatic axes it does so only with arguments of the program, and a barrier is enough.
    """
    return explicit_sharding.constrain(thin, _cut_of(matrix, axis))


def _cut_of(matrix: jax.Array, axis: int) -> PartitionSpec | None:
    """Partition of an array ``[*batch, k, r]`` whose ``k`` is this axis of the matrix."""
    partition = explicit_sharding.partition_of(matrix)
    return None if partition is None else PartitionSpec(*partition[:-2], partition[axis], None)


def agreeing(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` with the sign of each vector chosen to agree with its predecessor's.

    Signs of singular vectors are arbitrary; with these, moments that are not rotated stay valid.
    """
    agreement = jnp.sum(new * old, axis=-2, keepdims=True)
    return jnp.where(agreement < 0, -new, new).astype(old.dtype)


def scaled(x: jax.Array) -> jax.Array:
    """``x`` with largest entry one, so that no product of gradients over- or underflows."""
    return x / largest_entry(x)


def largest_entry(x: jax.Array) -> jax.Array:
    """The largest size of an entry of each matrix ``[*batch, 1, 1]``; one for a zero matrix."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0)
    return jnp.where(largest == 0, 1, largest)


def select(chosen: jax.Array, new: Any, old: Any) -> Any:
    """``new`` for those of the batch that are ``chosen [*batch]``, ``old`` for the others."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.ndim(y) == 0:
            return jnp.where(jnp.any(chosen), x, y).astype(y.dtype)
        flags = chosen.reshape(chosen.shape + (1,) * (y.ndim - chosen.ndim))
        return jnp.where(flags, x, y).astype(y.dtype)

    return jax.tree.map(one, new, old)


def all_finite(tree: Any, batch_ndim: int) -> jax.Array:
    """Whether all floats are finite, for each matrix of the batch (scalars count for all)."""
    finite: jax.Array = jnp.array(True)
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            axes = tuple(range(min(batch_ndim, x.ndim), x.ndim))
            finite = finite & jnp.all(jnp.isfinite(x), axis=axes)
    return finite
