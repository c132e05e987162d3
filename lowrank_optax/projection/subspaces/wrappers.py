"""Rules made from another rule: on both sides, with an adaptive rank, or with low-bit bases."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View, over_batch
from lowrank_optax.quantization import Affine, BlockFormat, code_map, dequantize, quantize

BasisBits = Literal[16, 8, 4]


class TwoBases(NamedTuple):
    """The basis of `both_sides`: the rule's bases for the rows and for the columns."""

    rows: Any
    columns: Any


def both_sides(rule: base.Subspace) -> base.Subspace:
    """``rule`` on the rows and on the columns: ``R = Pᵀ G Q``, ``[*batch, r, r]``.

    `scale_by_projection` applies it for ``side="both"``.

    Args:
      rule: Subspace rule that does not follow the momentum.

    Raises:
      ValueError: If the rule follows the momentum.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np, optax
      >>> tx = lro.scale_by_projection(optax.identity(), lro.subspaces.svd(2), side="both")
      >>> gradient = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> print(np.diag(updates["kernel"]).round(3) + 0)
      [3. 2. 0.]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, equation 2; ``full`` in the
      official code.
    """
    if rule.follow_momentum:
        raise ValueError("side='both' cannot be combined with a rule that follows the momentum.")

    def refresh(key: jax.Array, matrix: Any, last: Any, momentum: Any, view: Any) -> TwoBases:
        keys = jax.random.split(key)
        last = TwoBases(None, None) if last is None else last
        views = (None, None) if view is None else (_rows(view), _columns(view))
        rows = rule.refresh(keys[0], matrix, last.rows, momentum, views[0])
        columns = rule.refresh(keys[1], matrix, last.columns, momentum, views[1])
        return TwoBases(rows, columns)

    def project(bases: TwoBases, matrix: jax.Array, view: View) -> jax.Array:
        half = rule.project(bases.rows, matrix, _rows(view))
        return rule.project(bases.columns, half, _columns_of_half(view))

    def lift(bases: TwoBases, projected: jax.Array, view: View) -> jax.Array:
        half = rule.lift(bases.columns, projected, _columns_of_half(view))
        return rule.lift(bases.rows, half, _rows(view))

    def rotate(
        old: TwoBases, new: TwoBases, projected: jax.Array, view: View, squared: bool = False
    ) -> jax.Array:
        partition = view.small_partition
        for side, at in ((0, _rows(view)), (1, _columns(view))):
            inner = at._replace(partition=partition)
            projected = rule.rotate(old[side], new[side], projected, inner, squared)
        return projected

    def track(bases: TwoBases, matrix: jax.Array, projected: jax.Array, view: View) -> TwoBases:
        del projected
        move = rule.track
        assert move is not None
        parts = ((bases.rows, _rows(view)), (bases.columns, _columns(view)))
        return TwoBases(*(move(b, matrix, rule.project(b, matrix, v), v) for b, v in parts))

    return rule._replace(
        init=lambda view: TwoBases(rule.init(_rows(view)), rule.init(_columns(view))),
        refresh=refresh,
        project=project,
        lift=lift,
        rotate=rotate,
        track=None if rule.track is None else track,
        example=TwoBases(rule.example, rule.example),
        size=None,
    )


def _rows(view: View) -> View:
    return view._replace(axis=-2, both=False)


def _columns(view: View) -> View:
    return view._replace(axis=-1, both=False)


def _columns_of_half(view: View) -> View:
    """The columns of a matrix whose rows are compressed already."""
    rows = _rows(view)
    return rows._replace(axis=-1, shape=rows.projected_shape, partition=rows.projected_partition)


class AdaptiveBasis(NamedTuple):
    """The basis of `adaptive_rank`.

    Attributes:
      basis: Basis ``[*batch, d, r]``, float32; columns from the active rank on are zero.
      rank: Active rank ``[*batch]``, int32; zero before the first refresh.
    """

    basis: Any
    rank: Any


def adaptive_rank(
    rule: base.Subspace,
    min_rank: int = 1,
    rank_step: int = 1,
    threshold: float = 0.2,
    monotone: bool = False,
) -> base.Subspace:
    r"""``rule`` with the least rank that loses at most a share ``threshold`` of the gradient.

    A refresh orders the directions by energy, and takes the least rank, in steps of ``rank_step``
    from ``min_rank``, for which

    .. math::
      \lVert G - P_r P_r^\top G \rVert_F \le \xi \, \lVert G \rVert_F .

    The rank is data: shapes stay, and the columns beyond it and their state are zero.
    ``lowrank_optax.compact`` frees that memory, between steps.

    Args:
      rule: Rule whose basis is an orthonormal array, as `randomized_svd`; its rank is the largest.
      min_rank: Least rank.
      rank_step: Distance from one rank considered to the next.
      threshold: Share :math:`\xi` of the gradient's norm that may be lost.
      monotone: Whether the rank may only fall.

    Raises:
      ValueError: If a number is out of range, or the rule's basis is not such an array.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.subspaces.adaptive_rank(lro.subspaces.svd(4), threshold=0.2)
      >>> gradient = jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5]))
      >>> view = lro.View.of(gradient, axis=-2, rank=rule.rank)
      >>> rule.refresh(jax.random.key(0), gradient, rule.init(view), None, view).rank.item()
      3

    Reference:
      Refael et al., AdaRankGrad: Adaptive Gradient-Rank and Moments for Memory-Efficient LLMs
      Training and Fine-Tuning, 2024, https://arxiv.org/abs/2410.17881, section 3.
    """
    for name, value in (("min_rank", min_rank), ("rank_step", rank_step)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name}={value!r} must be an int of at least 1; under optax.inject_hyperparams, "
                "list it in static_args."
            )
    if isinstance(rule.rank, int) and min_rank > rule.rank:
        raise ValueError(f"min_rank={min_rank!r} must be at most the rule's rank, {rule.rank!r}.")
    if isinstance(threshold, int | float) and not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r} must be between 0 and 1.")
    if rule.shared or rule.track is not None or not rule.orthonormal:
        raise ValueError("rule must store an orthonormal array, as randomized_svd does.")

    def init(view: View) -> AdaptiveBasis:
        basis = rule.init(view)
        if not isinstance(basis, jax.Array) or not jnp.issubdtype(basis.dtype, jnp.floating):
            raise ValueError("rule must store an orthonormal array, as randomized_svd does.")
        rank = explicit_sharding.zeros(view.batch, jnp.int32, view.partitioned())
        return AdaptiveBasis(basis, rank)

    def refresh(
        key: jax.Array,
        matrix: jax.Array,
        last: AdaptiveBasis,
        momentum: jax.Array | None,
        view: View,
    ) -> AdaptiveBasis:
        basis = rule.refresh(key, matrix, last.basis, momentum, view)
        energy, total = _energies(basis, matrix, view)
        order = jnp.argsort(-energy, axis=-1)
        basis = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
        lost = total[..., None] - jnp.cumsum(jnp.take_along_axis(energy, order, axis=-1), axis=-1)
        rank = _least_rank(lost <= threshold**2 * total[..., None], min_rank, rank_step)
        if monotone:
            rank = jnp.where(last.rank > 0, jnp.minimum(rank, last.rank), rank)
        active = jnp.arange(basis.shape[-1]) < rank[..., None]
        return AdaptiveBasis(jnp.where(active[..., None, :], basis, 0), rank)

    return base.from_basis(
        rule.rank,
        refresh,
        init=init,
        matrix_of=lambda adaptive, view: adaptive.basis,
        follow_momentum=rule.follow_momentum,
        example=AdaptiveBasis(0, 0),
        size=lambda adaptive: adaptive.basis.shape[-1],
    )


def _energies(basis: jax.Array, matrix: jax.Array, view: View) -> tuple[jax.Array, jax.Array]:
    """Energy on each direction ``[*batch, r]``, and of the whole, in units of the largest entry."""
    unit = base.largest_entry(matrix).astype(basis.dtype)
    projected = base.project(basis, matrix, view) / unit
    energy = jnp.sum(jnp.square(projected), axis=view.across)
    total = jnp.sum(jnp.square(matrix / unit), axis=(-2, -1))
    return energy, total


def _least_rank(enough: jax.Array, min_rank: int, rank_step: int) -> jax.Array:
    """The least rank of the grid with ``enough [*batch, r]``; the largest if there is none."""
    largest = enough.shape[-1]
    grid = range(min(min_rank, largest), largest, rank_step)
    considered = [enough[..., rank - 1] for rank in grid] + [jnp.ones_like(enough[..., 0])]
    first = jnp.argmax(jnp.stack(considered, axis=-1), axis=-1)
    return jnp.minimum(min(min_rank, largest) + rank_step * first, largest).astype(jnp.int32)


def quantized(rule: base.Subspace, bits: BasisBits = 16) -> base.Subspace:
    """``rule`` with its basis stored in 16, 8 or 4 bits.

    16 bits are bfloat16; 8 and 4 are codes evenly spaced between the extremes of groups of 256
    elements along the rows of the basis. Products are in float32 with the basis as it is stored,
    which is orthonormal to about 0.4%, 1% and 10%; projecting and lifting remain adjoint.

    Args:
      rule: One of ``lowrank_optax.subspaces``: for 16 bits any that stores arrays of floats, for 8
        and 4 one that stores only its basis.
      bits: 16, 8 or 4.

    Raises:
      TypeError: If `rule` is no subspace rule.
      ValueError: If `bits` is another number, or the rule stores no such basis.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> rule = lro.subspaces.quantized(lro.subspaces.randomized_svd(rank=8), bits=4)
      >>> tx = lro.scale_by_projection(optax.scale_by_adam(), rule)
      >>> state = tx.init({"kernel": jnp.ones((64, 128))})
      >>> print(state.basis.codes["kernel"].shape, state.basis.scales["kernel"].shape)
      (32, 8) (2,)

    Reference:
      Zhang et al., Q-GaLore, 2024, https://arxiv.org/abs/2407.08296, section 3.2: four bits.
    """
    if not isinstance(rule, base.Subspace):
        raise TypeError(f"rule={rule!r} must be a subspace rule.")
    if bits not in get_args(BasisBits):
        raise ValueError(f"bits={bits!r} must be 16, 8 or 4.")
    if rule.shared or (bits < 16 and (not rule.stores_one_array or rule.track is not None)):
        needs = "arrays of floats" if bits == 16 else "only its basis, and changes it at refreshes"
        raise ValueError(f"bits={bits} needs a rule that stores {needs}.")
    encode, decode = (_to_bfloat16, _from_bfloat16) if bits == 16 else _affine_coder(bits)

    def refresh(key: jax.Array, matrix: Any, basis: Any, momentum: Any, view: View) -> Any:
        return encode(rule.refresh(key, matrix, decode(basis, view), momentum, view), view)

    def track(basis: Any, matrix: jax.Array, projected: jax.Array, view: View) -> Any:
        assert rule.track is not None
        return encode(rule.track(decode(basis, view), matrix, projected, view), view)

    def rotate(
        old: Any, new: Any, projected: jax.Array, view: View, squared: bool = False
    ) -> jax.Array:
        return rule.rotate(decode(old, view), decode(new, view), projected, view, squared)

    return rule._replace(
        init=lambda view: encode(rule.init(view), view),
        refresh=refresh,
        project=lambda basis, matrix, view: rule.project(decode(basis, view), matrix, view),
        lift=lambda basis, projected, view: rule.lift(decode(basis, view), projected, view),
        rotate=rotate,
        track=None if rule.track is None else track,
        orthonormal=False,
        example=rule.example if bits == 16 else Affine(0, 0, 0),
    )


def _to_bfloat16(basis: Any, view: View) -> Any:
    del view
    _check_floats(basis)
    narrow = lambda x: x.astype(jnp.bfloat16) if _is_float(x) and jnp.ndim(x) > 1 else x
    return jax.tree.map(narrow, basis)


def _from_bfloat16(basis: Any, view: View) -> Any:
    return jax.tree.map(lambda x: x.astype(view.dtype) if x.dtype == jnp.bfloat16 else x, basis)


def _affine_coder(bits: Any) -> tuple[Any, Any]:
    """How a basis is encoded and decoded, each matrix of the batch by itself."""
    fmt = BlockFormat(code_map("affine", bits), 256)

    def encode_one(matrix: jax.Array) -> Affine:
        codes = quantize(matrix, fmt)
        # Codes can not tell that a basis is not finite; scales can.
        bad = jnp.where(jnp.all(jnp.isfinite(matrix)), 0.0, jnp.nan)
        return codes._replace(scales=codes.scales + bad)

    def encode(basis: jax.Array, view: View) -> Affine:
        _check_floats(basis)
        return over_batch(encode_one, len(view.batch))(basis)

    def decode(basis: Affine, view: View) -> jax.Array:
        one = lambda codes: dequantize(codes, fmt, (view.length, view.rank))
        return over_batch(one, len(view.batch))(basis).astype(view.dtype)

    return encode, decode


def _check_floats(basis: Any) -> None:
    if not any(_is_float(x) for x in jax.tree.leaves(basis)):
        raise ValueError("the rule stores no basis of floats that could be stored in fewer bits.")


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
