"""Optimizer state in 8 or 4 bits, around any optax transformation.

Between steps moments are codes, with a scale for each block. Within a step one leaf after the other
is decoded, updated by the transformation, and encoded again. The update comes from the moments
before they are rounded.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.matrices.paths import (
    is_whole,
    leaves_by_path,
    normalised_path,
    owner_of,
    path_string,
)
from lowrank_optax.quantization import Bits, BlockFormat, Quantized, code_map, dequantize, quantize
from lowrank_optax.quantization.blocks import same_layout
from lowrank_optax.slices.call import (
    Call,
    CannotCutError,
    Whole,
    keys_of_rows,
    shapes_of_state,
    whole_of,
)
from lowrank_optax.slices.update import update_in_slices
from lowrank_optax.states.moment_names import (
    FIRST_MOMENTS,
    SECOND_MOMENTS,
    SQUARES,
    Kind,
    moment_kinds,
)
from lowrank_optax.states.precision import in_float32

BLOCK_SIZES: dict[int, int] = {8: 256, 4: 128}

Which = Callable[[str, jax.ShapeDtypeStruct], bool | Kind | None]


class LowBitState(NamedTuple):
    """State of `low_bit`: three trees of the inner state's structure.

    Attributes:
      inner: The inner state, with None for each quantized array.
      codes: uint8 codes of the quantized arrays, with None for each other one; 4-bit codes two to a
        byte, ``[*, rows / 2, n]``.
      scales: float32 scales of their blocks, ``[*leading, blocks]``.
      count: Number of updates so far, int32, if codes are rounded at random; otherwise ``()``.
    """

    inner: optax.OptState
    codes: Any
    scales: Any
    count: Any


@explains_names
def low_bit(
    inner: optax.GradientTransformation,
    bits: Bits = 8,
    block_size: int | None = None,
    min_size: int = 4096,
    which: Which | None = None,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""``inner`` with its moments in 8 or 4 bits between steps.

    A moment is cut into blocks along its last axis, and each element stored as the code of the
    nearest number of a fixed map (see ``quantization.code_map``) times the largest element of its
    block. First moments (signed) and second ones (unsigned) have maps of their own. A second moment
    is never rounded to zero while its block has anything else, since
    :math:`m / (\sqrt v + \epsilon)` would explode.

    Arithmetic and the unquantized part of the state are float32 (float64 for float64 parameters).
    Updates have the gradients' dtype. Elements that are not finite are stored as zero. ``init``
    makes the float32 state first: under ``jax.jit`` it takes no more memory than the result.

    For parameters of n elements Adam's state takes 8·n bytes, in 8 bits 2.03·n, in 4 bits 1.06·n.

    Args:
      inner: Any optax transformation, also `scale_by_projection` (its moments are quantized, its
        basis is not), ``optax.chain``, ``optax.masked`` or ``optax.partition``.
      bits: 8 or 4.
      block_size: Elements to a scale; None for 256 in 8 bits and 128 in 4.
      min_size: Arrays with fewer elements, counted on all devices, stay as they are.
      which: ``which(path, array)``, of the path in the inner state, as ``0/mu/layers/kernel``, and
        of shape and dtype: ``"signed"`` or ``"unsigned"`` quantizes, False does not, None leaves it
        to the rule (the names of the moments in optax's states). For embeddings in float32:
        ``lambda path, _: False if "embed" in path else None``.
      stochastic_rounding: Round codes up or down at random, with the value as expectation.
      seed: Seed of the random numbers, combined with the step.

    Returns:
      A transformation with the state `LowBitState`.

    Raises:
      ValueError: If an argument is out of range; in ``init``, if no array that is large enough is
        known as a moment, or all moments are smaller than ``min_size``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.low_bit(optax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))
      >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}
      >>> state = tx.init(params)[0]
      >>> print(state.codes.mu["kernel"].dtype, state.scales.mu["kernel"].shape)
      uint8 (64, 1)
      >>> print(state.inner.mu["kernel"], state.inner.mu["bias"].dtype)  # small: as it was
      None float32

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
      https://arxiv.org/abs/2110.02861. Li et al., Memory Efficient Optimizers with 4-bit States,
      2023, https://arxiv.org/abs/2309.01507: the second moment without zero, section 4.1.
    """
    formats = moment_formats(bits, block_size)
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
        raise ValueError(f"min_size={min_size!r} must be an int of at least 0.")
    in_32_bits = in_float32(inner)

    def formats_in(state: Any) -> dict[Any, BlockFormat | None]:
        """How each array of the inner state is stored, by its path."""
        chosen = map(formats.get, _kinds(state, min_size, which))
        return dict(zip(leaves_by_path(state), chosen, strict=True))

    def init_fn(params: optax.Params, checked: bool = True) -> LowBitState:
        # Behind a barrier: for minutes the compiler would encode constants, one by one.
        state = jax.lax.optimization_barrier(in_32_bits.init(params))
        plan = list(formats_in(state).values())
        is_array = jax.tree_util.treedef_is_leaf(jax.tree.structure(params))
        if checked and not any(plan):
            _check_no_moments(state, min_size, is_whole(params) and not is_array)
        count = jnp.zeros([], jnp.int32) if stochastic_rounding else ()
        return _encoded(state, plan, count)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LowBitState]:
        given = updates if params is None else params
        shapes = shapes_of_state(in_32_bits, given)
        whole_shapes = shapes_of_state(in_32_bits, whole_of(whole, given))
        by_path = formats_in(whole_shapes)
        if whole is not None and whole.rows is not None:
            _check_cut(whole_shapes, shapes, by_path, whole)
        plan = [by_path[path] for path in leaves_by_path(shapes)]
        new, inner_state = in_32_bits.update(
            updates, _decoded(state, shapes, plan), params, whole=whole, **extra_args
        )
        count, keys = (), None
        if stochastic_rounding:
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            keys = [keys_of_rows(key, path, x, whole) for path, x in leaves_by_path(shapes).items()]
            count = optax.safe_increment(state.count)
        state = _encoded(inner_state, plan, count, keys, state.scales)
        return optax.tree.cast_like(new, updates), state

    def in_codes(call: Call) -> list[bool]:
        """Which leaves have moments in codes."""
        names = [normalised_path(path) for path in call.paths]
        by_path = formats_in(shapes_of_state(in_32_bits, call.whole.tree))
        coded = {owner_of(path, names) for path, fmt in by_path.items() if fmt is not None}
        return [name in coded for name in names]

    # Among some leaves alone there may be none that has a moment.
    unchecked = functools.partial(init_fn, checked=False)
    core = optax.GradientTransformationExtraArgs(unchecked, update_fn)
    return optax.GradientTransformationExtraArgs(init_fn, update_in_slices(core, in_codes, [inner]))


def moment_formats(bits: Bits, block_size: int | None = None) -> dict[Kind | None, BlockFormat]:
    """How first moments are stored, ``"signed"``, and second ones, ``"unsigned"``.

    Raises:
      ValueError: If an argument is out of range.
    """
    if bits not in get_args(Bits):
        raise ValueError(f"bits={bits!r} must be 8 or 4.")
    signed = code_map("dynamic", bits)
    size = BLOCK_SIZES[bits] if block_size is None else block_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"block_size={block_size!r} must be an int of at least 1, or None.")
    unsigned = code_map("dynamic", bits, signed=False)
    return {
        "signed": BlockFormat(signed, size),
        "unsigned": BlockFormat(unsigned, size, positive=True),
    }


def _kinds(state: Any, min_size: int, which: Which | None) -> list[Kind | None]:
    """What each leaf of the state is quantized as."""
    kinds = moment_kinds(state)
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        if not _is_large(leaf, min_size):
            kinds[i] = None
            continue
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        answer = None if which is None else which(path_string(path), shape)
        if answer is not None and answer is not False and answer not in ("signed", "unsigned"):
            raise ValueError(
                f"which returned {answer!r} for {path_string(path)!r}: it must return 'signed', "
                "'unsigned', False, or None for the default."
            )
        kinds[i] = kinds[i] if answer is None else answer or None
    return kinds


def _is_large(leaf: Any, min_size: int) -> bool:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and leaf.ndim > 0 and leaf.size > 0 and leaf.size >= min_size


def _check_cut(
    whole_shapes: Any, shapes: Any, by_path: dict[Any, BlockFormat | None], whole: Whole
) -> None:
    """Raise CannotCutError where blocks, or pairs of 4-bit codes, lie across runs of rows."""
    leaves = leaves_by_path(whole_shapes)
    for path, part in leaves_by_path(shapes).items():
        fmt = by_path[path]
        run = part.shape[0] * whole.run // whole.rows.shape[0] if part.ndim else 0
        if fmt is not None and not same_layout(leaves[path].shape, (run, *part.shape[1:]), fmt):
            raise CannotCutError(f"{path_string(path)} has blocks across slices.")


def _check_no_moments(state: Any, min_size: int, must_find: bool) -> None:
    """Raise ValueError if arrays of the state are large but unknown, or moments too small."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    large = [path_string(path) for path, leaf in leaves if _is_large(leaf, min_size)]
    if large:
        names = ", ".join(FIRST_MOMENTS + SECOND_MOMENTS + SQUARES)
        raise ValueError(
            f"low_bit knows none of the arrays of inner's state as a moment: {', '.join(large)}. "
            f"It goes by the names {names}; for others give which=."
        )
    sizes = [
        (leaf.size, path_string(path))
        for (path, leaf), kind in zip(leaves, moment_kinds(state), strict=True)
        if kind is not None and _is_large(leaf, 1)
    ]
    if must_find and sizes:
        size, name = max(sizes)
        raise ValueError(
            f"low_bit would store nothing in codes: the largest moment, {name!r}, has {size} "
            f"elements, fewer than min_size={min_size}. Give a smaller min_size, or leave low_bit "
            "(state_bits) out."
        )


def _decoded(state: LowBitState, shapes: Any, plan: list[BlockFormat | None]) -> Any:
    """The inner state, with the quantized arrays in float32."""

    def one(shape: Any, fmt: BlockFormat | None, plain: Any, codes: Any, scales: Any) -> Any:
        if fmt is None:
            return plain
        x = dequantize(Quantized(codes, scales), fmt, shape.shape)
        if explicit_sharding.partition_of(x) is None or shape.sharding is None:
            return x
        # Sharded as it was, also where its shards are no whole blocks.
        spec = shape.sharding.spec
        return explicit_sharding.constrain(x, PartitionSpec(*spec, *[None] * (x.ndim - len(spec))))

    leaves, treedef = jax.tree.flatten(shapes)
    parts = (treedef.flatten_up_to(tree) for tree in (state.inner, state.codes, state.scales))
    return treedef.unflatten(map(one, leaves, plan, *parts))


def _encoded(
    state: Any,
    plan: list[BlockFormat | None],
    count: Any,
    keys: list[jax.Array] | None = None,
    last_scales: Any = None,
) -> LowBitState:
    leaves, treedef = jax.tree.flatten(state)
    none = [None] * len(leaves)
    last = none if last_scales is None else treedef.flatten_up_to(last_scales)
    rows = [
        (leaf, None, None) if fmt is None else (None, *quantize(leaf, fmt, key, old))
        for leaf, fmt, key, old in zip(leaves, plan, keys or none, last, strict=True)
    ]
    plain, codes, scales = (treedef.unflatten([row[i] for row in rows]) for i in range(3))
    return LowBitState(plain, codes, scales, count)
