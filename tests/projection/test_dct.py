"""Cosine columns: the worked numbers, the two transforms, the choice of columns, their turning."""

import functools
import itertools

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

import lowrank_optax as lro
from lowrank_optax.projection.subspaces.dct import cosines, scores_by_fft, scores_by_products
from tests.projection.rules import AXES, Case, normal

WORKED = np.array(
    [[1, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1, 1], [0, 1, 0, 1], [2, 2, 0, 0]], np.float32
)
# Even, odd, a power of two, odd halves, and those that are split more than once.
LENGTHS = (1, 2, 7, 12, 33, 64, 258, 600, 1024)
SIZES = {1: jnp.abs, 2: jnp.square}


def _all_cosines(length: int) -> np.ndarray:
    """The cosine matrix in float64; columns are basis vectors."""
    j, k = np.arange(length)[:, None], np.arange(length)[None]
    b = np.sqrt(2 / length) * np.cos(np.pi * k * (2 * j + 1) / (2 * length))
    b[:, 0] = np.sqrt(1 / length)
    return b


_cosines = functools.partial(jax.jit, static_argnums=1)(
    lambda frequencies, length: cosines(frequencies, length, jnp.float32)
)


@jax.jit
def _scores(matrix: jax.Array) -> list[dict[int, jax.Array]]:
    """Of both transforms and both orders, in one program."""
    transforms = scores_by_products, scores_by_fft
    return [{order: scores(matrix, size) for order, size in SIZES.items()} for scores in transforms]


def _case(matrix: jax.Array, axis: int, rank: int, **options: object) -> Case:
    rule = lro.subspaces.dct(rank, **options)
    return Case(rule, lro.View.of(matrix, axis, rank))


def test_the_cosines_of_length_four_are_the_specification_s() -> None:
    expected = [
        [0.5, 0.5, 0.5, 0.5],
        [0.653281, 0.270598, -0.270598, -0.653281],
        [0.5, -0.5, -0.5, 0.5],
        [0.270598, -0.653281, 0.653281, -0.270598],
    ]
    columns = np.asarray(_cosines(np.arange(4), 4))
    np.testing.assert_allclose(columns.T, expected, atol=1e-6)
    np.testing.assert_allclose(
        columns.T @ np.arange(1.0, 5.0), [5, -2.230442, 0, -0.158513], atol=5e-6
    )


@pytest.mark.parametrize("length", [1, 2, 5, 100, 1000])
def test_cosines_are_an_orthogonal_matrix(length: int) -> None:
    columns = np.asarray(_cosines(np.arange(length), length), np.float64)
    np.testing.assert_allclose(columns.T @ columns, np.eye(length), atol=1e-6)


@pytest.mark.parametrize("length", [32_768, 50_000, 152_064])
def test_cosines_of_long_axes_are_exact(length: int) -> None:
    """A phase ``π k (2j + 1) / 2d`` formed in float32 would be off by whole turns."""
    frequencies = np.array([0, 1, length // 3, length - 1])
    j = np.arange(length, dtype=np.int64)[:, None]
    phase = frequencies * (2 * j + 1) % (4 * length)
    expected = np.sqrt(2 / length) * np.cos(np.pi * phase / (2 * length))
    expected[:, 0] = np.sqrt(1 / length)
    got = np.asarray(_cosines(frequencies, length), np.float64)
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.sqrt(2 / length))


def test_scores_of_the_worked_example() -> None:
    for scores in _scores(WORKED.T):
        scale = np.sqrt(2 / 4)
        sums, squares = np.asarray(scores[1]) * scale, np.asarray(scores[2]) * scale**2
        assert_close(sums, [15, 6.691327, 0, 2.006272], dtype=np.float32)
        assert_close(squares, [59, 13.510408, 0, 1.489592], dtype=np.float32)


@pytest.mark.combinations(1)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("transform", ["products", "fft"])
def test_columns_and_error_of_the_worked_example(order: int, transform: str) -> None:
    one = _case(WORKED, -1, 2, order=order, transform=transform)
    chosen = one.found(WORKED)
    assert chosen.tolist() == [0, 1]
    lost = WORKED - one.lift(chosen, one.project(chosen, WORKED))
    assert_close(np.sum(np.asarray(lost) ** 2), 1.489592, 100)


@pytest.mark.parametrize("length", LENGTHS)
def test_both_transforms_give_the_scores_of_scipy(length: int) -> None:
    matrix = normal(2, length, 3, seed=length)
    coefficients = scipy.fft.dct(np.asarray(matrix, np.float64), norm="ortho", axis=-2)
    for scores in _scores(matrix):
        for order, found in scores.items():
            expected = (np.abs(coefficients) ** order).sum(-1)
            found = np.asarray(found) * np.sqrt(2 / length) ** order
            np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


@AXES
@pytest.mark.parametrize("order", [1, 2])
def test_projecting_gives_the_coefficients_of_scipy(axis: int, order: int) -> None:
    gradient = normal(5, 9, 12)
    one = _case(gradient, axis, 4, order=order)
    chosen = one.found(gradient)
    coefficients = scipy.fft.dct(np.asarray(gradient, np.float64), norm="ortho", axis=axis)
    scores = (np.abs(coefficients) ** order).sum(one.view.across)
    expected = np.sort(np.argsort(-scores, axis=-1)[..., :4], axis=-1)
    np.testing.assert_array_equal(chosen, expected)
    taken = np.expand_dims(expected, one.view.across)
    np.testing.assert_allclose(
        one.project(chosen, gradient), np.take_along_axis(coefficients, taken, axis), atol=1e-5
    )


def test_the_second_order_makes_the_best_choice_of_all_subsets() -> None:
    """By brute force over the columns of six; and keeps at least their share of the energy."""
    gradient = normal(6, 4, seed=3)
    one = _case(gradient, -2, 3, order=2)
    chosen, columns = one.found(gradient), _all_cosines(6)
    energy = lambda subset: (columns[:, list(subset)].T @ np.asarray(gradient)) ** 2
    best = max(itertools.combinations(range(6), 3), key=lambda subset: energy(subset).sum())
    assert tuple(chosen.tolist()) == best
    projected = one.project(chosen, gradient)
    kept = np.sum(np.asarray(projected) ** 2)
    lost = np.asarray(gradient) - np.asarray(one.lift(chosen, projected))
    total = np.sum(np.asarray(gradient) ** 2)
    assert_close(kept + np.sum(lost**2), total)
    assert kept >= 3 / 6 * total


@pytest.mark.combinations(1)
@AXES
@pytest.mark.parametrize("transform", ["products", "fft"])
def test_all_columns_are_the_identity(axis: int, transform: str) -> None:
    gradient = normal(2, 6, 6)
    one = _case(gradient, axis, 6, transform=transform)
    chosen = one.found(gradient)
    assert chosen.tolist() == [list(range(6))] * 2
    np.testing.assert_allclose(one.lift(chosen, one.project(chosen, gradient)), gradient, atol=1e-5)


@AXES
def test_turning_moves_the_rows_that_stay_and_zeroes_the_others(axis: int) -> None:
    one = _case(normal(8, 8), axis, 3)
    old, new = np.array([1, 4, 6]), np.array([0, 1, 6])
    x = np.asarray(normal(*one.view.projected_shape))
    rows = x if axis == -2 else x.T
    expected = np.stack([np.zeros(8), rows[0], rows[2]])
    for squared in (False, True):
        turned = one.turn(old, new, x, squared)
        np.testing.assert_array_equal(turned if axis == -2 else turned.T, expected)


def test_only_indices_are_kept_and_before_the_first_they_project_to_nothing() -> None:
    gradient = normal(2, 6, 8)
    one = _case(gradient, -2, 3)
    basis = one.rule.init(one.view)
    assert basis.shape == (2, 3)
    assert jnp.issubdtype(basis.dtype, jnp.integer)
    assert not np.any(one.project(basis, gradient))
    chosen = one.found(gradient)
    assert chosen.dtype == basis.dtype
    assert (np.diff(chosen) > 0).all()
