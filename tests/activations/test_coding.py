"""Step functions and tables on arrays: as NumPy's searchsorted and indexing have them."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.activations.codebooks import (
    MOST_BINS,
    MOST_COMPARES,
    MOST_SELECTS,
    step_values,
    table_values,
)

SIZES = (1, 2, 7, MOST_COMPARES, MOST_COMPARES + 1, 100, 307)


def steps(size: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries, float32, and codes."""
    rng = np.random.default_rng(seed)
    boundaries = np.unique((rng.standard_normal(size) * 3**spread).astype(np.float32))
    return boundaries, rng.integers(0, 256, boundaries.size + 1)


def expected(boundaries: np.ndarray, codes: np.ndarray, x: np.ndarray) -> np.ndarray:
    place = np.searchsorted(boundaries, np.where(np.isnan(x), -np.inf, x), side="left")
    return codes[place].astype(np.uint8)


def encoded(boundaries: np.ndarray, codes: np.ndarray, x: jax.Array) -> jax.Array:
    return step_values(tuple(map(float, boundaries)), tuple(map(int, codes)), x)


def around(boundaries: np.ndarray) -> np.ndarray:
    """The boundaries, their neighbours in float32, and numbers all over."""
    neighbours = [np.nextafter(boundaries, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(1)
    far = np.array([-np.inf, -3e38, -1e9, 0.0, 1e9, 3e38, np.inf, np.nan], np.float32)
    return np.concatenate([boundaries, *neighbours, far, 5 * rng.standard_normal(999, np.float32)])


@pytest.mark.combinations(1)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_a_number_gets_the_code_of_its_interval_and_a_boundary_that_below(
    size: int, jit: bool
) -> None:
    boundaries, codes = steps(size)
    x = around(boundaries)
    encode = lambda x: encoded(boundaries, codes, x)
    found = (jax.jit(encode) if jit else encode)(jnp.asarray(x))
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, expected(boundaries, codes, x))


@settings(max_examples=6, deadline=None)
@given(st.integers(50, 150), st.integers(0, 100), st.floats(-8, 8))
def test_bins_agree_with_comparisons_however_the_boundaries_lie(
    size: int, seed: int, spread: float
) -> None:
    boundaries, codes = steps(size, seed, spread)
    # Some as close as float32 has them: more than one falls into a bin.
    close = itertools.accumulate(
        range(5), lambda x, _: np.nextafter(x, np.float32(np.inf)), initial=boundaries[3]
    )
    boundaries = np.unique(np.concatenate([boundaries, np.array(list(close), np.float32)]))
    codes = np.resize(codes, boundaries.size + 1)
    x = around(boundaries)
    found = jax.jit(lambda x: encoded(boundaries, codes, x))(x)
    np.testing.assert_array_equal(found, expected(boundaries, codes, x))


def test_16_bit_numbers_are_compared_in_float32() -> None:
    boundaries, codes = np.array([1.001], np.float32), np.array([0, 1])
    x = jnp.array([1.0, 1.0078125], jnp.bfloat16)
    np.testing.assert_array_equal(encoded(boundaries, codes, x), [0, 1])


def test_no_intervals_but_one_is_one_code() -> None:
    np.testing.assert_array_equal(step_values((), (3,), jnp.zeros((2, 0))), np.zeros((2, 0)))
    np.testing.assert_array_equal(step_values((), (3,), jnp.zeros(2)), [3, 3])


def test_codes_become_their_levels() -> None:
    sizes = [1, 2, 3, 5, 8, 16, 31, MOST_SELECTS, MOST_SELECTS + 1, 256]
    levels = [np.random.default_rng(0).standard_normal(size).astype(np.float32) for size in sizes]
    codes = [np.arange(size, dtype=np.uint8).reshape(1, -1) for size in sizes]
    decode = lambda codes: [
        table_values(tuple(map(float, of)), at) for of, at in zip(levels, codes, strict=True)
    ]
    for found, of, at in zip(jax.jit(decode)(codes), levels, codes, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, of[at])


def gathers(fn: object, x: jax.Array) -> bool:
    return "gather" in str(jax.make_jaxpr(fn)(x))


def test_nothing_is_gathered_up_to_some_dozens_of_intervals_and_levels() -> None:
    for size, gathered in ((MOST_COMPARES, False), (MOST_COMPARES + 1, True)):
        boundaries, codes = np.arange(size, dtype=np.float32), np.arange(size + 1)
        assert gathers(lambda x, b=boundaries, c=codes: encoded(b, c, x), jnp.ones(3)) is gathered
    for size, gathered in ((MOST_SELECTS, False), (MOST_SELECTS + 1, True)):
        levels = tuple(map(float, range(size)))
        decode = lambda codes, levels=levels: table_values(levels, codes)
        assert gathers(decode, jnp.ones(3, jnp.uint8)) is gathered


def test_bins_stay_few_where_boundaries_crowd() -> None:
    boundaries = np.concatenate([np.linspace(1, 1.001, 60), [1e3]]).astype(np.float32)
    codes = np.arange(boundaries.size + 1)
    x = around(boundaries)
    lowered = jax.jit(lambda x: encoded(boundaries, codes, x)).lower(x)
    assert f"tensor<{MOST_BINS}x" in lowered.as_text()
    np.testing.assert_array_equal(lowered.compile()(x), expected(boundaries, codes, x))
