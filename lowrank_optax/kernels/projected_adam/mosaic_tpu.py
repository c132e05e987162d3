"""Adam in a fixed subspace as one TPU kernel: gradient and parameter cross memory once.

grid     (batch, tiles of the kept axis)
tile     the whole compressed axis by some of the kept one, of gradient and parameter; the basis
         stays in VMEM while the tiles of its matrix pass
step     project, Adam on a tile of the moments, lift, apply; nothing between goes to memory
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from lowrank_optax.kernels.adam import (
    AdamScalars,
    adam_direction,
    adam_moments,
    applied,
    as_vector,
    from_vector,
    in_place,
    result_like,
)
from lowrank_optax.kernels.projected_adam.tiles import (
    VMEM_LIMIT,
    Formats,
    Shape,
    accepts,
    piece_of,
    reason_against_codes,
    shape_of,
    stored_by_columns,
    tile_for,
)
from lowrank_optax.kernels.tpu_tiles import CodedTile, step_in_tile
from lowrank_optax.quantization import Quantized


def supports(
    gradient: Any,
    basis: Any,
    first: Any,
    second: Any,
    param: Any,
    scalars: Any,
    *,
    axis: int,
    formats: Formats,
) -> str | None:
    """Why the kernel cannot take these, or None."""
    del first, second, scalars
    for x in (gradient, basis) if param is None else (gradient, basis, param):
        if not accepts(x.dtype):
            return f"{x.dtype} is neither float32 nor bfloat16"
    if not gradient.size or not basis.size:
        return f"a gradient {gradient.shape} in a basis {basis.shape} is empty"
    shape = shape_of(gradient, basis, axis)
    reason = None if formats is None else reason_against_codes(shape, formats)
    if reason is not None:
        return reason
    try:
        tile_for(shape, gradient, param, formats)
    except NotImplementedError as error:
        return str(error)
    return None


def run(
    gradient: jax.Array,
    basis: jax.Array,
    first: Any,
    second: Any,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    axis: int,
    formats: Formats,
    interpret: Any = False,
) -> tuple[jax.Array, Any, Any]:
    """See `lowrank_optax.kernels.projected_adam`; for what `supports` has nothing against."""
    options = {"formats": formats, "interpret": interpret}
    if formats is not None or not stored_by_columns(gradient.shape):
        return _run(gradient, basis, first, second, param, scalars, axis=axis, **options)
    # Its transpose is what lies in memory: that way no copies are made.
    param = None if param is None else param.mT
    moments = (first.mT, second.mT)
    out = _run(gradient.mT, basis, *moments, param, scalars, axis=-3 - axis, **options)
    return out[0].mT, out[1].mT, out[2].mT


def _run(
    gradient: jax.Array,
    basis: jax.Array,
    first: Any,
    second: Any,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    axis: int,
    formats: Formats,
    interpret: Any,
) -> tuple[jax.Array, Any, Any]:
    shape = shape_of(gradient, basis, axis)
    tile = tile_for(shape, gradient, param, formats)
    matrices = lambda x: x.reshape(shape.batch, *x.shape[-2:])
    values = [matrices(x) for x in (gradient, param) if x is not None]
    given = jax.tree.leaves((first, second))
    moments = [matrices(x) for x in given]
    if formats is not None:  # `step_in_tile` looks for the scales of one half
        moments[1::2] = [x[:, None] for x in moments[1::2]]
    value_spec, basis_spec, moment_specs = _specs(shape, tile, formats)
    dtype = jnp.float32 if param is None else param.dtype
    result = result_like(values[0], dtype)
    coded = None if formats is None else shape.coded_tile(tile, formats)
    small = pltpu.VMEM((1, *shape.along(tile, shape.rank)), jnp.float32)
    new, *moments = pl.pallas_call(
        functools.partial(
            _kernel, axis=axis, piece=piece_of(shape), coded=coded, has_param=param is not None
        ),
        grid=(shape.batch, pl.cdiv(shape.kept, tile)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[value_spec] * len(values),
            basis_spec,
            *moment_specs,
        ],
        out_specs=[value_spec, *moment_specs],
        out_shape=[result, *(result_like(x) for x in moments)],
        scratch_shapes=[small, small],
        input_output_aliases=in_place(values, result, moments, between=1),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(shape, [*values, result, basis, *moments, *moments]),
        interpret=interpret,
        name="projected_adam",
    )(as_vector(scalars), *values, matrices(basis), *moments)
    moments = [x.reshape(old.shape) for x, old in zip(moments, given, strict=True)]
    m, v = moments if formats is None else (Quantized(*moments[:2]), Quantized(*moments[2:]))
    return new.reshape(gradient.shape), m, v


def _specs(
    shape: Shape, tile: int, formats: Formats
) -> tuple[pl.BlockSpec, pl.BlockSpec, list[pl.BlockSpec]]:
    """Of gradients and parameters, of the basis, and of the moments."""
    place = (lambda b, j: (b, 0, j)) if shape.axis == -2 else (lambda b, j: (b, j, 0))
    along = lambda compressed: pl.BlockSpec((None, *shape.along(tile, compressed)), place)
    whole = lambda b, j: (b, 0, 0)
    # Once in VMEM, not twice: it changes with the matrix only.
    basis = pl.BlockSpec((None, shape.compressed, shape.rank), whole, pipeline_mode=pl.Buffered(1))
    if formats is None:
        return along(shape.compressed), basis, [along(shape.rank)] * 2
    coded = shape.coded_tile(tile, formats)
    codes = pl.BlockSpec((None, coded.rows // coded.row_halves, coded.columns), place)
    # All blocks of a row in one: where tiles are columns, their scales stay while these pass.
    row = (lambda b, j: (b, 0, 0, 0)) if shape.axis == -2 else (lambda b, j: (b, 0, j, 0))
    scales = pl.BlockSpec((None, 1, coded.rows, coded.blocks), row)
    return along(shape.compressed), basis, [codes, scales] * 2


def _cost(shape: Shape, moved: list[Any]) -> pl.CostEstimate:
    small = shape.batch * shape.kept * shape.rank
    return pl.CostEstimate(
        flops=4 * small * shape.compressed,
        transcendentals=small,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
    )


def _kernel(
    scalars_ref: Any,
    *refs: Any,
    axis: int,
    piece: int,
    coded: CodedTile | None,
    has_param: bool,
) -> None:
    s = from_vector(scalars_ref)
    count = 2 if coded is None else 4
    *values, basis_ref = refs[: 2 + has_param]
    old, (new, *moments) = refs[2 + has_param :][:count], refs[2 + has_param + count : -2]
    projected, direction = refs[-2:]
    pieces = basis_ref.shape[0] // piece

    def project(index: jax.Array, carry: None) -> None:
        at = pl.ds(pl.multiple_of(index * piece, piece), piece)
        gradient = values[0][at, :] if axis == -2 else values[0][:, at]
        projected[0] += _project(gradient, basis_ref[at, :].astype(jnp.float32), axis)

    def lift(index: jax.Array, carry: None) -> None:
        at = pl.ds(pl.multiple_of(index * piece, piece), piece)
        place = (at, slice(None)) if axis == -2 else (slice(None), at)
        lifted = _lift(direction[0], basis_ref[at, :].astype(jnp.float32), axis)
        new[place] = applied(lifted, values[1][place], s) if has_param else lifted

    projected[...] = jnp.zeros_like(projected)
    jax.lax.fori_loop(0, pieces, project, None)
    if coded is None:
        stepped = adam_moments(projected[0], old[0][...], old[1][...], s)
        moments[0][...], moments[1][...] = stepped
        direction[0] = adam_direction(*stepped, s)
    else:
        first_block = pl.program_id(1) * (coded.columns // coded.block) if axis == -2 else 0

        def move(place: Any, u: jax.Array) -> None:
            direction[place] = u

        step_in_tile(coded, first_block, s, old, moments, lambda at: projected[at], move)
    jax.lax.fori_loop(0, pieces, lift, None)


def _project(gradient: jax.Array, basis: jax.Array, axis: int) -> jax.Array:
    """``Pᵀ G [r, tile]`` for rows, ``G P [tile, r]`` for columns."""
    if gradient.dtype == jnp.float32:
        return _product(gradient, basis, axis, jax.lax.Precision.HIGHEST)
    result: Any = 0
    for _ in range(3):  # bfloat16 parts of the basis: half the passes of two float32 factors
        part = basis.astype(jnp.bfloat16)
        basis = basis - part.astype(jnp.float32)
        result += _product(gradient, part, axis, jax.lax.Precision.DEFAULT)
    return result


def _product(gradient: jax.Array, basis: jax.Array, axis: int, precision: Any) -> jax.Array:
    pair, meets = ((basis, gradient), 0) if axis == -2 else ((gradient, basis), 1)
    dimensions = (((meets,), (0,)), ((), ()))
    return jax.lax.dot_general(
        *pair, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _lift(direction: jax.Array, basis: jax.Array, axis: int) -> jax.Array:
    """``P U`` for rows, ``U Pᵀ`` for columns."""
    pair, meets = ((basis, direction), 0) if axis == -2 else ((direction, basis), 1)
    return jax.lax.dot_general(
        *pair,
        (((1,), (meets,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
