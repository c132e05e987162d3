"""Sketched gradients are right on average, and as noisy as `sketch_variance` says."""

from collections.abc import Iterator
import functools
import itertools
from typing import Any, get_args

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import (
    Sketch,
    alignment,
    choose_sketch_size,
    minibatch_variance,
    randomized_linear,
)
from lowrank_optax.layers.randomized.sketch import (
    SketchKind,
    cosine_transform,
    hadamard_transform,
    row_chances,
)

KINDS = get_args(SketchKind)
WORKED_X = np.array([[1.0, 0], [0, 2], [1, 1], [2, -1]])
WORKED_Y = np.array([[1.0, 1], [0, 1], [2, 0], [1, -1]])


sketch_variance = functools.partial(jax.jit, static_argnums=(2, 3))(lro.layers.sketch_variance)


def data(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different sizes and a gradient that is not 0 on average."""
    rng = np.random.default_rng(count)
    normal = lambda size: rng.standard_normal((count, size), np.float32)
    return (normal(3) + np.float32(0.5)) * np.exp(np.float32(0.7) * normal(1)), normal(
        2
    ) + np.float32(0.5)


@functools.cache
def gradients(kind: SketchKind, count: int, size: int, number: int = 20_000) -> np.ndarray:
    x, y = data(count)

    def gradient(key: jax.Array) -> jax.Array:
        linear = lambda kernel: randomized_linear(
            x, kernel, key=key, sketch=Sketch(kind, size=size)
        )
        return jax.vjp(linear, np.zeros((3, 2), np.float32))[1](y)[0]

    keys = jax.random.split(jax.random.key(1), number)
    return np.asarray(jax.jit(jax.vmap(gradient))(keys), np.float64)


CASES = [(kind, 16, 4) for kind in KINDS] + [("stratified", 13, 4), ("srht", 13, 4)]


@pytest.mark.parametrize(("kind", "count", "size"), CASES)
def test_the_mean_over_keys_is_the_exact_gradient_within_four_standard_errors(
    kind: SketchKind, count: int, size: int
) -> None:
    x, y = (np.asarray(v, np.float64) for v in data(count))
    many = gradients(kind, count, size)
    standard_error = many.std(axis=0) / len(many) ** 0.5
    assert (abs(many.mean(axis=0) - x.T @ y) < 4 * standard_error).all()


@pytest.mark.parametrize(("kind", "count", "size"), CASES)
def test_the_simulated_variance_is_the_stated_one_within_three_percent(
    kind: SketchKind, count: int, size: int
) -> None:
    x, y = data(count)
    errors = gradients(kind, count, size) - np.asarray(x.T @ y, np.float64)
    simulated = (errors**2).sum(axis=(1, 2)).mean()
    assert float(sketch_variance(x, y, size, kind)) == pytest.approx(simulated, rel=0.03)


def draws(kind: str, size: int, chances: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """Every S of a kind for 4 rows, with its probability."""
    rows = range(4)
    if kind == "rademacher":
        for signs in itertools.product((-1, 1), repeat=4 * size):
            yield 0.5 ** (4 * size), np.reshape(signs, (4, size)) / size**0.5
        return
    if kind == "rows":
        weighted = [(1.0, c, np.full(4, size / 4)) for c in itertools.combinations(rows, size)]
    elif kind == "stratified":
        strata = np.array_split(np.arange(4), size)
        share = np.concatenate([np.full(len(s), 1 / len(s)) for s in strata])
        weighted = [(1.0, c, share) for c in itertools.product(*strata)]
    else:
        weighted = [
            (np.prod(chances[list(c)]), c, size * chances)
            for c in itertools.product(rows, repeat=size)
        ]
    total = sum(chance for chance, _, _ in weighted)
    for chance, chosen, share in weighted:
        s = np.zeros((4, size))
        s[list(chosen), range(size)] = share[list(chosen)] ** -0.5
        yield chance / total, s


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("rademacher", 1, 96),
        ("rademacher", 2, 48),
        ("rows", 1, 60),
        ("rows", 2, 20),
        ("stratified", 1, None),
        ("stratified", 2, None),
        ("stratified", 3, None),
        ("norm_weighted", 1, None),
        ("norm_weighted", 2, None),
    ],
)
def test_all_draws_have_the_exact_mean_and_the_stated_variance(
    kind: Any, size: int, expected: float | None
) -> None:
    x, y = WORKED_X, WORKED_Y
    chances = np.linalg.norm(x, axis=1) / np.linalg.norm(x, axis=1).sum()
    mean, square, variance = np.zeros((2, 2)), np.zeros((4, 4)), 0.0
    for chance, s in draws(kind, size, chances):
        gradient = (s.T @ x).T @ (s.T @ y)
        mean += chance * gradient
        square += chance * s @ s.T
        variance += chance * ((gradient - x.T @ y) ** 2).sum()
    np.testing.assert_allclose(mean, [[5, -1], [1, 3]], atol=1e-12)
    np.testing.assert_allclose(square, np.eye(4), atol=1e-12)
    stated = float(sketch_variance(np.float32(x), np.float32(y), size, kind))
    assert stated == pytest.approx(variance, rel=1e-5)
    assert expected is None or stated == pytest.approx(expected, rel=1e-6)


def test_the_worked_numbers_of_the_other_figures() -> None:
    x, y = np.float32(WORKED_X), np.float32(WORKED_Y)
    for size, expected in ((1, 144), (2, 72)):
        assert float(sketch_variance(x, y, size, "gaussian")) == pytest.approx(expected)
    assert float(minibatch_variance(x, y)) == pytest.approx(20)
    assert float(alignment(x, y)) == pytest.approx(1 / 3)
    assert float(sketch_variance(x, y, 4, "gaussian")) == 0  # the dense layer


@pytest.mark.parametrize("size", [1, 3, 8, 15])
def test_rows_add_what_a_smaller_batch_would(size: int) -> None:
    x, y = data(16)
    stated = float(sketch_variance(x, y, size, "rows"))
    assert stated == pytest.approx((16 / size - 1) * float(minibatch_variance(x, y)), rel=1e-5)


def test_the_variance_of_a_mini_batch_is_that_of_its_rows_gradients() -> None:
    x, y = (np.asarray(v, np.float64) for v in data(16))
    each = np.einsum("bi,bj->bij", x, y)
    expected = 16 * each.var(axis=0, ddof=1).sum()
    assert float(minibatch_variance(*data(16))) == pytest.approx(expected, rel=1e-5)
    assert 0 <= float(alignment(*data(16))) <= 1
    shaped = [jnp.asarray(v.reshape(4, 4, -1).astype(jnp.bfloat16)) for v in data(16)]
    assert minibatch_variance(*shaped).dtype == jnp.float32
    assert float(minibatch_variance(*shaped)) == pytest.approx(expected, rel=0.05)


def test_equal_gradients_have_no_mini_batch_noise_but_sketches_of_sums_have() -> None:
    c = np.array([1.0, 2.0, 4.0, 0.5])[:, None]
    x, y = np.float32(c * [1.0, 2.0]), np.float32([1.0, -1.0, 3.0] / c)
    assert float(minibatch_variance(x, y)) == pytest.approx(0, abs=1e-3)
    assert float(alignment(x, y)) > 0.1
    assert float(sketch_variance(x, y, 2, "gaussian")) > 1000


@pytest.mark.parametrize("size", [3, 4, 12])
def test_rows_of_equal_norm_are_best_sampled_then_signed_then_normal(size: int) -> None:
    x, y = data(16)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    opposed = y - x @ np.linalg.lstsq(x, y)[0]  # XᵀY = 0: the least that rows can win
    for of in (y, opposed):
        noise = [float(sketch_variance(x, of, size, k)) for k in ("rows", "rademacher", "gaussian")]
        assert noise[0] < noise[1] < noise[2]


def test_rows_of_equal_norm_are_better_sampled_than_mixed_if_their_gradients_agree() -> None:
    x, y = data(16)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    noise = lambda kind, y: float(sketch_variance(x, y, 4, kind))
    agreeing = x[:, :2]
    assert noise("rows", agreeing) < noise("srht", agreeing)
    opposed = y - x @ np.linalg.lstsq(x, y)[0]
    assert noise("rows", opposed) > noise("srht", opposed)


def test_winners_take_all_where_few_rows_are_large() -> None:
    x, y = data(16)
    x *= np.where(np.arange(16) < 3, np.float32(30), np.float32(1))[:, None]
    noise = {kind: float(sketch_variance(x, y, 6, kind)) for kind in KINDS}
    assert noise["winner_take_all"] < 0.2 * noise["norm_weighted"] < 0.2 * noise["rows"]
    # No row is large: nothing is kept for sure.
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    taken, drawn = (sketch_variance(x, y, 6, k) for k in ("winner_take_all", "norm_weighted"))
    assert float(taken) == pytest.approx(float(drawn), rel=1e-4)


def test_winner_take_all_is_exact_if_no_more_rows_than_places_are_not_zero() -> None:
    x, y = data(16)
    x[np.arange(16) % 4 != 0] = 0
    assert float(sketch_variance(x, y, 5, "winner_take_all")) == pytest.approx(0, abs=1e-4)
    linear = lambda kernel: randomized_linear(
        x, kernel, key=jax.random.key(0), sketch=Sketch("winner_take_all", size=5)
    )
    got = jax.jit(lambda kernel: jax.vjp(linear, kernel)[1](y)[0])(np.zeros((3, 2), np.float32))
    assert_close(got, x.T @ y, 100)


@pytest.mark.parametrize("shape", [(64, 40, 30), (64, 2, 2)])
def test_the_variance_of_strata_by_either_product(shape: tuple[int, int, int]) -> None:
    count, features, outputs = shape
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((count, size), np.float32) for size in (features, outputs))
    each = np.einsum("bi,bj->bij", np.asarray(x, np.float64), np.asarray(y, np.float64))
    strata = np.array_split(each, 7)
    expected = sum(len(s) ** 2 * s.var(axis=0).sum() for s in strata)
    assert float(sketch_variance(x, y, 7, "stratified")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_size_is_the_least_within_the_bound(kind: SketchKind) -> None:
    x, y = data(16)
    size = choose_sketch_size(x, y, noise_ratio=2.5, kind=kind)
    allowed = 2.5 * float(minibatch_variance(x, y)) * (1 + 1e-6)
    assert float(sketch_variance(x, y, size, kind)) <= allowed
    assert size == 1 or float(sketch_variance(x, y, size - 1, kind)) > allowed
    assert choose_sketch_size(x, y, noise_ratio=1.0, kind="rows") == 8
    assert choose_sketch_size(x, y, noise_ratio=3.0, kind="rows") == 4


def test_bad_arguments_are_refused() -> None:
    x, y = data(16)
    with pytest.raises(ValueError, match=r"x \(16, 3\) and y \(2, 2\)"):
        sketch_variance(x, y[:2], 3, "rows")
    with pytest.raises(ValueError, match="kind='row'"):
        sketch_variance(x, y, 3, "row")  # ty: ignore
    with pytest.raises(ValueError, match="size=0"):
        sketch_variance(x, y, 0, "rows")
    with pytest.raises(ValueError, match="1 rows"):
        minibatch_variance(x[:1], y[:1])
    with pytest.raises(ValueError, match=r"noise_ratio=0\.0"):
        choose_sketch_size(x, y, noise_ratio=0.0)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 200])
def test_transforms_are_the_orthonormal_ones(count: int) -> None:
    scipy = pytest.importorskip("scipy")
    x = np.random.default_rng(0).standard_normal((count, 3), np.float32)
    got, cosines = jax.jit(lambda x: (hadamard_transform(x), cosine_transform(x)))(x)
    padded = np.pad(x, ((0, 2 ** (count - 1).bit_length() - count), (0, 0)))
    expected = scipy.linalg.hadamard(len(padded)) @ padded / len(padded) ** 0.5
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(cosines, scipy.fft.dct(x, axis=0, norm="ortho"), atol=1e-5)


def test_chances_are_the_norms_shares() -> None:
    chances = jax.jit(row_chances)(np.float32([[3, 4], [0, 0], [5, 0]]))
    np.testing.assert_allclose(chances, [0.5, 0, 0.5])
    valid = np.array([True, True, False])
    np.testing.assert_allclose(jax.jit(row_chances)(np.eye(3), valid), [0.5, 0.5, 0])
