"""Matrix products with codes of a few bits made or read inside them, and with random signs.

Each kernel stands beside what it was measured against; `activation_kernels.py` measures.
"""

from collections.abc import Callable
import itertools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro

SKETCH = 1024  # rows that remain
ROWS, COLS, WORD = 1024, 512, 32  # sides of tiles; bits of a random number
BOOK = lro.activations.codebook(jax.nn.gelu, 3)


def encode(x: jax.Array) -> jax.Array:
    """As `Codebook.encode`, from Python's numbers alone: a kernel holds no constant arrays."""
    code = jnp.full(x.shape, BOOK.codes[0], jnp.int32)
    for i, boundary in enumerate(BOOK.boundaries):
        code += jnp.where(x > boundary, BOOK.codes[i + 1] - BOOK.codes[i], 0)
    return code


def decode(codes: jax.Array) -> jax.Array:
    """As `Codebook.decode`."""
    value = jnp.full(codes.shape, BOOK.levels[0], jnp.float32)
    for code, level in enumerate(BOOK.levels[1:], 1):
        value = jnp.where(codes >= code, level, value)
    return value


def transfers(grid: tuple[int, ...], spec: pl.BlockSpec) -> int:
    """Tiles moved in the whole grid: one that the next step needs again stays."""
    assert spec.index_map is not None
    places = [spec.index_map(*step) for step in np.ndindex(*grid)]
    return 1 + sum(a != b for a, b in itertools.pairwise(places))


def matmul_kernel(
    name: str,
    grid: tuple[int, int, int],
    body: Callable[..., jax.Array],
    finish: Callable[[jax.Array], tuple[jax.Array, ...]],
    operands: list[tuple[jax.Array, pl.BlockSpec]],
    results: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    flops: int,
    interpret: bool,
) -> list[jax.Array]:
    """A product summed over the grid's last axis: ``finish(sum of body(*operand tiles))``."""
    inputs = len(operands)

    def kernel(*refs: Any) -> None:
        total, step = refs[-1], pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += body(*refs[:inputs])

        @pl.when(step == grid[2] - 1)
        def _() -> None:
            for ref, value in zip(refs[inputs:-1], finish(total[...]), strict=True):
                ref[...] = value.astype(ref.dtype)

    block: Any = results[0][1].block_shape
    bits = lambda dtype: 4 if dtype == jnp.uint4 else 8 * jnp.dtype(dtype).itemsize
    tile = lambda x, spec: int(np.prod(spec.block_shape)) * bits(x.dtype) // 8
    moved = sum(transfers(grid, spec) * tile(x, spec) for x, spec in [*operands, *results])
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in results],
        out_shape=[shape for shape, _ in results],
        scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
        cost_estimate=pl.CostEstimate(flops, 0, moved),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
        interpret=interpret,
    )(*(x for x, _ in operands))


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def forward_xla(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``gelu(x @ kernel)`` and its codes."""
    h = x @ kernel
    # Not from int32 to uint4 at once: in a scan libtpu 0.0.42 then fails with an internal error.
    codes = encode(h.astype(jnp.float32)).astype(jnp.uint8)
    return jax.nn.gelu(h), codes.astype(jnp.uint4)


def forward_kernel(x: jax.Array, kernel: jax.Array, interpret: bool = False) -> list[jax.Array]:
    """The same, encoded as the product ends."""
    (m, k), n = x.shape, kernel.shape[1]
    bm, bn = min(m, ROWS), min(n, COLS)
    out = pl.BlockSpec((bm, bn), lambda i, j, s: (i, j))

    def finish(h: jax.Array) -> tuple[jax.Array, ...]:
        h = h.astype(x.dtype).astype(jnp.float32)  # codes of what the reference rounds
        return jax.nn.gelu(h), encode(h)

    return matmul_kernel(
        "matmul_gelu_encode",
        (m // bm, n // bn, 1),  # all of k at once, so that x is read once for each j
        lambda a, b: dot(a[...], b[...], (1, 0)),
        finish,
        [
            (x, pl.BlockSpec((bm, k), lambda i, j, s: (i, 0))),
            (kernel, pl.BlockSpec((k, bn), lambda i, j, s: (0, j))),
        ],
        [(jax.ShapeDtypeStruct((m, n), t), out) for t in (x.dtype, jnp.uint4)],
        2 * m * n * k,
        interpret,
    )


def backward_xla(
    x: jax.Array, kernel: jax.Array, codes: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of input and kernel."""
    g = (g.astype(jnp.float32) * decode(codes.astype(jnp.int32))).astype(g.dtype)
    return g @ kernel.T, x.T @ g


def backward_kernel(
    x: jax.Array, kernel: jax.Array, codes: jax.Array, g: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The same, decoded as either product begins."""
    (m, k), n = x.shape, kernel.shape[1]
    bm, bn = min(m, ROWS), min(n, COLS)

    def scaled(g: Any, codes: Any) -> jax.Array:
        factor = decode(codes[...].astype(jnp.int32))
        return (g[...].astype(jnp.float32) * factor).astype(x.dtype)

    over_n = pl.BlockSpec((bm, bn), lambda i, j, s: (i, s))
    over_m = pl.BlockSpec((bm, bn), lambda i, j, s: (s, j))
    (dx,) = matmul_kernel(
        "decode_matmul_input",
        (m // bm, 1, n // bn),
        lambda g, c, b: dot(scaled(g, c), b[...], (1, 1)),
        lambda total: (total,),
        [
            (g, over_n),
            (codes, over_n),
            (kernel, pl.BlockSpec((k, bn), lambda i, j, s: (0, s))),
        ],
        [(jax.ShapeDtypeStruct((m, k), x.dtype), pl.BlockSpec((bm, k), lambda i, j, s: (i, 0)))],
        2 * m * n * k,
        interpret,
    )
    (dw,) = matmul_kernel(
        "decode_matmul_kernel",
        (1, n // bn, m // bm),
        lambda a, g, c: dot(a[...], scaled(g, c), (0, 0)),
        lambda total: (total,),
        [(x, pl.BlockSpec((bm, k), lambda i, j, s: (s, 0))), (g, over_m), (codes, over_m)],
        [(jax.ShapeDtypeStruct((k, n), x.dtype), pl.BlockSpec((k, bn), lambda i, j, s: (0, j)))],
        2 * m * n * k,
        interpret,
    )
    return dx, dw


def signs_of(words: jax.Array, dtype: Any) -> jax.Array:
    """``[m, p]`` signs from ``[m / 32, p]`` words: bit j is the sign in the j-th run of rows."""
    bits = [((words >> j) & 1).astype(jnp.float32) for j in range(WORD)]
    return (2 * jnp.concatenate(bits) - 1).astype(dtype)


def sketch_xla(x: jax.Array, seed: jax.Array) -> jax.Array:
    """``Sᵀ x``, with ``S`` of signs by threefry."""
    return jax.random.rademacher(jax.random.key(seed), (len(x), SKETCH), x.dtype).T @ x


def sketch_words(x: jax.Array, seed: jax.Array) -> jax.Array:
    """The same with all 32 bits of each random number used."""
    words = jax.random.bits(jax.random.key(seed), (len(x) // WORD, SKETCH), jnp.uint32)
    return signs_of(words, x.dtype).T @ x


def sketch_kernel(
    x: jax.Array, seed: jax.Array, words: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """The same with signs made in the product, by seed and tile; or from ``words``, for tests."""
    (m, n), bm = x.shape, min(len(x), ROWS)
    bn, p = min(n, 1024), SKETCH if words is None else words.shape[1]

    def body(first: Any, tile: Any) -> jax.Array:
        if words is None:
            pltpu.prng_seed(first[0], pl.program_id(2))
            drawn = pltpu.prng_random_bits((bm // WORD, p))
        else:
            drawn = first[...]
        return dot(signs_of(drawn, x.dtype), tile[...], (0, 0))

    seed_spec = pl.BlockSpec((1,), lambda i, j, s: (0,), memory_space=pltpu.SMEM)
    words_spec = pl.BlockSpec((bm // WORD, p), lambda i, j, s: (s, 0))
    source = (jnp.reshape(seed, (1,)), seed_spec) if words is None else (words, words_spec)
    (out,) = matmul_kernel(
        "random_signs_matmul",
        (1, n // bn, m // bm),
        body,
        lambda total: (total,),
        [source, (x, pl.BlockSpec((bm, bn), lambda i, j, s: (s, j)))],
        [(jax.ShapeDtypeStruct((p, n), x.dtype), pl.BlockSpec((p, bn), lambda i, j, s: (0, j)))],
        2 * m * n * p,
        interpret,
    )
    return out


def sketch_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows instead of signs: no product."""
    return jnp.take(x, rows, axis=0, indices_are_sorted=True, unique_indices=True)


def layer_of(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., jax.Array]:
    """``gelu(x @ kernel)`` that keeps ``x``, ``kernel`` and the codes."""

    @jax.custom_vjp
    def layer(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return forward(x, kernel)[0]

    def keep(x: jax.Array, kernel: jax.Array) -> Any:
        y, codes = forward(x, kernel)
        return y, (x, kernel, codes)

    layer.defvjp(keep, lambda kept, g: tuple(backward(*kept, g)))
    return layer
