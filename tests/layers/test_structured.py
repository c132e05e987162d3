"""Structured weights: products, factors and initial values, by the numbers of the paper's code."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.layers import (
    BlockDense,
    BlockShuffle,
    Factors,
    LowRank,
    Structure,
    structured_linear,
)

X = np.arange(1.0, 5)
CASES = [
    pytest.param(LowRank(3), 8, 12, marks=pytest.mark.full),
    (BlockDense(4, 2), 8, 12),
    pytest.param(BlockShuffle(2), 12, 8, marks=pytest.mark.full),
    (BlockShuffle(3), 12, 15),  # blocks that do not divide the hidden width
]
by_case = pytest.mark.parametrize(("structure", "inputs", "outputs"), CASES, ids=str)


def random_factors(structure: Structure, inputs: int, outputs: int, *stack: int) -> Factors:
    rng = np.random.default_rng(inputs)
    shapes = structure.shapes(inputs, outputs)
    return Factors(*(rng.standard_normal((*stack, *shape), np.float32) for shape in shapes))


def weight_of(structure: Structure, factors: Factors) -> np.ndarray:
    """The weight, entry by entry as in the specification, in float64."""
    v, u = (np.asarray(x, np.float64) for x in factors)
    if isinstance(structure, LowRank):
        return v @ u
    blocks, inputs, width = v.shape
    if isinstance(structure, BlockDense):
        rows = [v[k] @ u[k * width : (k + 1) * width] for k in range(blocks)]
        return np.concatenate(rows)
    weight = np.zeros((blocks * inputs, blocks * u.shape[2]))
    for hidden in range(blocks * width):
        k, j, part, row = hidden // width, hidden % width, hidden % blocks, hidden // blocks
        weight[k * inputs : (k + 1) * inputs, part::blocks] += np.outer(v[k, :, j], u[part, row])
    return weight


def test_worked_numbers_of_block_shuffle() -> None:
    v, u = np.arange(1.0, 9).reshape(2, 2, 2), np.arange(1.0, 13).reshape(2, 2, 3) / 10
    expected = [17.9, 57, 22.9, 63, 27.9, 69]
    assert_close(structured_linear(jnp.asarray(X), Factors(v, u), BlockShuffle(2)), expected)


def test_worked_numbers_of_block_dense() -> None:
    v = np.array([[[1.0], [2]], [[3], [-1]]])
    u = np.array([[1.0, 0, 2], [0.5, -1, 1]])
    factors = Factors(v, u)
    assert_close(structured_linear(jnp.asarray(X), factors, BlockDense(2, 2)), [7.5, -5, 15])


@by_case
def test_product_and_composed_weight_are_the_definition(
    structure: Structure, inputs: int, outputs: int
) -> None:
    stacked = random_factors(structure, inputs, outputs, 2)
    weights = structure.compose(stacked)
    for layer in range(2):
        factors = Factors(*(x[layer] for x in stacked))
        expected = weight_of(structure, factors)
        assert_close(weights[layer], expected.astype(np.float32))
        x = np.random.default_rng(1).standard_normal((2, 3, inputs), np.float32)
        y = structured_linear(x, factors, structure)
        assert_close(y, (x @ expected).astype(np.float32), size=np.abs(x) @ np.abs(expected))


@by_case
def test_no_rows_give_no_rows_and_nan_stays_in_its_row(
    structure: Structure, inputs: int, outputs: int
) -> None:
    factors = random_factors(structure, inputs, outputs)
    assert structured_linear(jnp.ones((2, 0, inputs)), factors, structure).shape == (2, 0, outputs)
    x = jnp.ones((2, inputs)).at[0].set(jnp.nan)
    y = structured_linear(x, factors, structure)
    assert jnp.isnan(y[0]).all()
    assert jnp.isfinite(y[1]).all()


def test_one_block_is_low_rank() -> None:
    v, u = random_factors(LowRank(3), 8, 12)
    assert_close(BlockDense(3, 1).compose(Factors(v[None], u)), v @ u)
    v, u = np.ones((1, 2, 2), np.float32), np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert_close(BlockShuffle(1).compose(Factors(v, u)), v[0] @ u[0])


@by_case
def test_projection_gives_a_structured_weight_back_and_is_the_nearest(
    structure: Structure, inputs: int, outputs: int
) -> None:
    """Nearest: the error has no slope along the factors, and other factors are further away."""
    weights = structure.compose(random_factors(structure, inputs, outputs, 2))
    assert_close(structure.compose(structure.project(weights)), weights, 100)
    dense = np.random.default_rng(2).standard_normal((inputs, outputs), np.float32)
    factors = structure.project(dense)
    error = lambda factors: jnp.sum((structure.compose(factors) - dense) ** 2)
    slopes = jax.jit(jax.grad(error))(factors)
    assert_close(slopes, jax.tree.map(np.zeros_like, slopes), 100, size=np.sum(dense**2))
    for seed in range(3):
        start = random_factors(structure, inputs, outputs)
        other = jax.tree.map(lambda x, s=seed: x * (s + 1) / 4, start)
        assert np.sum((weight_of(structure, other) - dense) ** 2) > error(factors)


def test_projection_of_block_shuffle_keeps_the_leading_singular_values_of_each_part() -> None:
    dense = np.random.default_rng(3).standard_normal((12, 15))
    structure, lost = BlockShuffle(3), 0.0
    for k in range(3):
        for part in range(3):
            # Hidden units 4 k to 4 k + 3, of which those congruent to `part` are in this part.
            rank = sum(hidden % 3 == part for hidden in range(4 * k, 4 * k + 4))
            values = np.linalg.svd(dense[4 * k : 4 * k + 4, part::3], compute_uv=False)
            lost += np.sum(values[rank:] ** 2)
    weight = structure.compose(structure.project(dense.astype(np.float32)))
    found = np.sum((np.asarray(weight, np.float64) - dense) ** 2)
    assert_close(np.float32(found), np.float32(lost), 200)


@by_case
def test_gradients_are_those_of_the_composed_weight_in_float64(
    structure: Structure, inputs: int, outputs: int
) -> None:
    """And of finite differences along a random direction."""
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        factors = Factors(*(x.astype(float) for x in random_factors(structure, inputs, outputs)))
        x, y = rng.standard_normal((3, inputs)), rng.standard_normal((3, outputs))
        direction = jax.tree.map(lambda f: rng.standard_normal(f.shape), (x, factors))

        def loss(x: Any, factors: Any) -> jax.Array:
            return jnp.sum(jnp.sin(structured_linear(x, factors, structure)) * y)

        slopes = jax.jit(jax.grad(loss, (0, 1)))(x, factors)
        assert all(s.dtype == jnp.float64 for s in jax.tree.leaves(slopes))
        value = jax.jit(loss)
        at = lambda t: float(value(*jax.tree.map(lambda a, d: a + t * d, (x, factors), direction)))
        step = 1e-3  # of five points, whose error is of the fourth order
        found = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
        pairs = zip(jax.tree.leaves(slopes), jax.tree.leaves(direction), strict=True)
        products = [np.sum(np.asarray(s) * d) for s, d in pairs]
        np.testing.assert_allclose(found, sum(products), atol=1e-7 * sum(map(abs, products)))
        # The chain rule through the composed weight: dV = dW Uᵀ and dU = Vᵀ dW for LowRank.
        through = lambda f: jnp.sum(jnp.sin(x @ structure.compose(f)) * y)
        for a, b in zip(slopes[1], jax.jit(jax.grad(through))(factors), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())


@pytest.mark.parametrize(
    ("structure", "inputs", "outputs"),
    [(LowRank(3), 8, 12), (BlockDense(4, 2), 8, 12), (BlockShuffle(3), 12, 15)],
    ids=str,
)
def test_initial_singular_values(structure: Structure, inputs: int, outputs: int) -> None:
    factors = structure.init(jax.random.key(0), inputs, outputs, initializer_range=0.5)
    values = np.linalg.svd(structure.compose(factors), compute_uv=False)
    if isinstance(structure, LowRank):
        dense = 0.5 * jax.random.normal(jax.random.key(0), (inputs, outputs))
        kept = np.linalg.svd(dense, compute_uv=False)[: structure.rank]
        assert_close(values[: structure.rank], kept)
        for gram in (factors.first.T @ factors.first, factors.second @ factors.second.T):
            assert_close(gram, np.diag(kept))
        return
    rank = structure.rank if isinstance(structure, BlockDense) else min(inputs, outputs)
    assert_close(values, np.where(np.arange(len(values)) < rank, 1, 0).astype(np.float32), 100)


@pytest.mark.full
def test_output_variances_of_the_paper_sizes() -> None:
    """Mean squared output for normal inputs, the squared norm over the outputs."""
    key = jax.random.key(1)
    variance = lambda structure: float(
        sum_of_squares(structure, structure.init(key, 768, 3072)) / 3072
    )
    np.testing.assert_allclose(variance(BlockShuffle(4)), 0.25, rtol=1e-4)
    np.testing.assert_allclose(variance(BlockDense(256, 2)), 0.0833, rtol=1e-3)


def sum_of_squares(structure: Structure, factors: Factors) -> jax.Array:
    return jnp.sum(jnp.square(structure.compose(factors)))


@pytest.mark.parametrize(
    ("structures", "millions"),
    [
        ((LowRank(384), LowRank(192)), (90.0, 73.8)),
        ((BlockDense(512, 2), BlockDense(256, 2)), (90.0, 73.8)),
        ((BlockShuffle(2), BlockShuffle(4)), (90.0, 73.8)),
    ],
    ids=["LowRank", "BlockDense", "BlockShuffle"],
)
def test_parameters_of_the_small_model_of_the_paper(structures: Any, millions: Any) -> None:
    """Width 768, 12 blocks of which the first is dense, a tied embedding of 32,000 words."""
    for structure, expected in zip(structures, millions, strict=True):
        shapes = [*structure.shapes(768, 3072), *structure.shapes(3072, 768)]
        structured = sum(int(np.prod(shape)) for shape in shapes)
        total = 11 * structured + 2 * 768 * 3072 + 4 * 768**2 * 12 + 32000 * 768
        assert round(total / 1e6, 1) == expected


def test_parts_of_block_shuffle_have_the_rank_of_their_hidden_units() -> None:
    weight = weight_of(BlockShuffle(2), random_factors(BlockShuffle(2), 12, 16))
    for rows in (weight[:6], weight[6:]):
        for part in (rows[:, ::2], rows[:, 1::2]):
            assert np.linalg.matrix_rank(part) == 3  # of ceil(6 / 2)
    assert np.linalg.matrix_rank(weight) == 12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)])
def test_half_precision_is_accumulated_in_float32(dtype: Any) -> None:
    structure = BlockShuffle(2)
    factors = structure.init(jax.random.key(0), 512, 512, dtype=dtype)
    x = jnp.ones((2, 512), dtype)
    y = structured_linear(x, factors, structure)
    assert y.dtype == dtype
    exact = x.astype(np.float32) @ structure.compose(factors)
    size = np.abs(x.astype(np.float32)) @ np.abs(structure.compose(factors)) / 16
    assert_close(y, exact, 4, size=size, dtype=dtype)
    assert structured_linear(x.astype(jnp.float32), factors, structure).dtype == jnp.float32


REFUSALS = [
    (lambda: LowRank(0), "rank must be a positive integer, got 0"),
    (lambda: LowRank(2.0), "rank must be a positive integer, got 2.0"),
    (lambda: BlockShuffle(True), "blocks must be a positive integer, got True"),
    (lambda: BlockDense(5, 2), "blocks=2 does not divide rank=5; blocks=1 does"),
    (lambda: BlockDense(4, 2).shapes(9, 16), "blocks=2 does not divide in_features=9"),
    (lambda: BlockShuffle(3).shapes(9, 16), "blocks=3 does not divide out_features=16; blocks=2"),
    (lambda: LowRank(9).shapes(8, 16), "rank=9 is above a side of a weight 8 × 16"),
    (lambda: BlockDense(10, 2).shapes(16, 8), "rank=10 is above a side"),
    (lambda: LowRank(6).shapes(8, 16), "rank=6 saves no parameter .* below 5.33333"),
    (lambda: BlockShuffle(4).shapes(8, 32), "blocks=4 leaves zeros .* at most 8"),
    (lambda: BlockShuffle(4).project(jnp.ones((8, 32))), "blocks=4 leaves zeros"),
    (
        lambda: structured_linear(
            jnp.ones(8), Factors(jnp.ones((8, 2)), jnp.ones((3, 9))), LowRank(2)
        ),
        "do not fit LowRank",
    ),
    (
        lambda: structured_linear(
            jnp.ones(7), Factors(jnp.ones((8, 2)), jnp.ones((2, 9))), LowRank(2)
        ),
        r"x \(7,\)",
    ),
    (
        lambda: structured_linear(
            jnp.ones(()), Factors(jnp.ones((8, 2)), jnp.ones((2, 9))), LowRank(2)
        ),
        r"x \(\)",
    ),
    (
        lambda: structured_linear(
            jnp.ones(8), Factors(jnp.ones((3, 8, 2)), jnp.ones((3, 2, 9))), LowRank(2)
        ),
        "have 2 and 2 axes: call it for stacked factors",
    ),
    (
        lambda: structured_linear(
            jnp.ones(8), Factors(jnp.ones(8), jnp.ones((4, 9))), BlockDense(4, 2)
        ),
        "have 3 and 2 axes",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
