"""ComRoPE: exponentials, the relative-position property, RoPE as a special case, and folding."""

from typing import Any

from close import EPS32, assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.layers.comrope import (
    block_exponentials,
    fold,
    grid_positions,
    position_rotations,
    rope_angles,
    rotate_heads,
    to_rope,
)
from lowrank_optax.models.rotary import inverse_frequencies, rotary_angles, rotate

# The specification's worked example.
K4 = np.array([[0, 0.3, -0.2, 0.5], [0, 0, 0.7, -0.1], [0, 0, 0, 0.4], [0, 0, 0, 0]])
EXP_K4 = [
    [0.817860, 0.365623, -0.155074, 0.416386],
    [-0.191632, 0.721707, 0.665074, -0.009627],
    [0.164232, -0.573500, 0.675920, 0.432733],
    [-0.517117, 0.128673, -0.277057, 0.799545],
]
CASES = [(2, False), (2, True), (4, True), (8, False)]
by_size = pytest.mark.parametrize("size", [2, 3, 4, pytest.param(5, marks=pytest.mark.full), 8])
few_sizes = pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.full), 4, 8])
size_and_axial = pytest.mark.parametrize(
    ("size", "axial"),
    [(4, False), (8, True), *(pytest.param(*x, marks=pytest.mark.full) for x in CASES)],
)
exponentials, rotate_jit = jax.jit(block_exponentials), jax.jit(rotate_heads)
rotations_jit = jax.jit(position_rotations)


def expm(x: np.ndarray) -> np.ndarray:
    """Taylor's series of float64 after halving, and squaring."""
    halvings = max(0, int(np.ceil(np.log2(max(np.abs(x).sum(-1).max(), 1e-9)))) + 3)
    term = total = np.broadcast_to(np.eye(x.shape[-1]), x.shape)
    for i in range(1, 20):
        term = term @ (x / 2.0**halvings) / i
        total = total + term
    for _ in range(halvings):
        total = total @ total
    return total


def draw(size: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, size, size))


def skew(p: np.ndarray) -> np.ndarray:
    return p - np.swapaxes(p, -1, -2)


def of_norm(k: np.ndarray, norm: float) -> np.ndarray:
    return k * norm / np.linalg.norm(k, 2, axis=(-2, -1))[..., None, None]


@by_size
def test_exponentials_are_those_of_the_series_and_rotations(size: int) -> None:
    k = of_norm(skew(draw(size, 2, 3)), 1.0)
    times = np.array([0, 1e-3, 1, 10, -20])[:, None, None] * np.ones((5, 2, 3))
    found = np.asarray(exponentials(jnp.float32(times), jnp.float32(k)), np.float64)
    exact = expm(times[..., None, None] * np.float32(k))
    units = 4 + 2 * np.abs(times)  # the angles are rounded
    assert (np.abs(found - exact).max((-2, -1)) <= units * EPS32).all()
    gram = np.swapaxes(found, -1, -2) @ found
    assert np.abs(gram[:4] - np.eye(size)).max() <= 4e-6
    assert np.abs(gram[4] - np.eye(size)).max() <= 7e-6
    assert_close(np.linalg.det(found), np.ones((5, 2, 3)), units=64, dtype=np.float32)


def test_worked_numbers_of_a_block_of_4() -> None:
    k = jnp.asarray(K4 - K4.T, jnp.float32)[None, None]
    found = exponentials(jnp.ones((1, 1)), k)[0, 0]
    np.testing.assert_allclose(found, EXP_K4, atol=1e-6)
    frequencies = to_rope(jnp.asarray(K4, jnp.float32)[None, None]).frequencies
    np.testing.assert_allclose(frequencies[0, 0], [0.883502, 0.509337], atol=1e-6)


def test_worked_scores_of_two_axes_and_after_a_shift() -> None:
    p, scale = jnp.asarray(K4, jnp.float32)[None, None], jnp.asarray([[1.5], [-0.8]])
    x = jnp.asarray([[0.25, 0.5], [0.75, 0.125]])
    q, k = jnp.asarray([1.0, 2, 3, 4]), jnp.asarray([0.5, -1, 0.25, 2])
    for shift in (0.0, 3.7):
        rotations = rotations_jit(x + shift, p, scale)
        rotated = rotate_jit(jnp.stack([q, k])[:, None], rotations)[:, 0]
        np.testing.assert_allclose(rotated[0] @ rotated[1], 9.147713, rtol=2e-6)


@size_and_axial
def test_rotations_depend_on_relative_positions_exactly(size: int, axial: bool) -> None:
    rng = np.random.default_rng(size)
    with jax.enable_x64(True):
        p, scale = jnp.asarray(draw(size, 2, 6)), jnp.asarray(rng.standard_normal((3, 6)))
        x, y = jnp.asarray(rng.uniform(-1, 1, (2, 4, 3)))
        rotations = lambda x: rotations_jit(x, p, None if axial else scale)
        relative = jnp.einsum("...ji,...jk->...ik", rotations(x), rotations(y))
        assert relative.dtype == jnp.float64
        assert np.abs(relative - rotations(y - x)).max() < 1e-13
        # Skew matrices of two axes that do not commute have no such property (LieRE).
        free = skew(draw(8, 2, seed=1))
        free_rotation = lambda x: expm(np.einsum("ni,iab->nab", x[:, :2], free))
        error = np.swapaxes(free_rotation(x), -1, -2) @ free_rotation(y) - free_rotation(y - x)
        assert np.linalg.norm(error, axis=(-2, -1)).max() > 1


@by_size
def test_gradients_are_finite_differences_of_the_series(size: int) -> None:
    p, times = draw(size, 1, 2), np.random.default_rng(1).standard_normal((3, 1, 2))
    weight = draw(size, 3, 1, 2, seed=2)

    def loss(times: np.ndarray, p: np.ndarray) -> float:
        return float(np.sum(weight * expm(times[..., None, None] * skew(p))))

    def ours(times: jax.Array, p: jax.Array) -> jax.Array:
        return jnp.sum(weight * block_exponentials(times, p - p.mT))

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(ours, argnums=(0, 1)))
        even = size // 2 * 2
        equal = np.zeros_like(p)  # all frequencies are 1
        equal[..., :even, :even] = np.kron(np.eye(size // 2), [[0, -1], [0, 0]])
        for at in (p, np.zeros_like(p), equal):
            of_times, of_p = gradient(times, at)
            np.testing.assert_allclose(of_p, -np.swapaxes(of_p, -1, -2), atol=1e-12)
            for i, direction in enumerate((draw(size, 1, 2, seed=3), np.eye(size) + 0 * p)):
                step = 1e-5 * direction
                expected = (loss(times, at + step) - loss(times, at - step)) / 2e-5
                np.testing.assert_allclose(np.sum(of_p * direction), expected, atol=2e-7, err_msg=i)
            step = 1e-5 * np.ones_like(times)
            expected = (loss(times + step, at) - loss(times - step, at)) / 2e-5
            np.testing.assert_allclose(np.sum(of_times), expected, atol=2e-7)


def test_second_derivatives_of_blocks_of_4_also_where_frequencies_meet() -> None:
    times, weight = np.random.default_rng(1).standard_normal((3, 1, 1)), draw(4, 3, 1, 1, seed=2)
    p, direction = draw(4, 1, 1), draw(4, 1, 1, seed=3)
    equal = np.kron(np.eye(2), [[0, -1.0], [0, 0]])[None, None]  # one of two parts is zero
    loss = lambda p: jnp.sum(weight * block_exponentials(times, p - p.mT))
    with jax.enable_x64(True):
        both = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (jnp.asarray(direction),)))
        for at in (p, np.zeros_like(p), equal):
            after, before = (both(at + step * direction)[0] for step in (1e-5, -1e-5))
            np.testing.assert_allclose(both(at)[1], (after - before) / 2e-5, atol=1e-8)


@few_sizes
def test_symmetric_angle_matrices_rotate_nothing_bit_for_bit(size: int) -> None:
    p = draw(size, 1, 2).astype(np.float32)
    positions = jnp.linspace(-3, 1e4, 5)[:, None]
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(jax.random.key(0), (5, 1, 2 * size), dtype)
        rotated = rotate_jit(x, rotations_jit(positions, jnp.asarray(p + p.swapaxes(-1, -2))))
        assert rotated.dtype == dtype
        np.testing.assert_array_equal(rotated, x)


@few_sizes
def test_rope_is_the_special_case_and_folds_back(size: int) -> None:
    angles = rope_angles(16, size, num_heads=2)
    positions = jnp.arange(6.0)
    rotary = rotary_angles(positions, inverse_frequencies(16, 10_000.0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 16))
    neighbours = rotate_jit(x, rotations_jit(positions[:, None], angles))
    halves = np.r_[0:16:2, 1:16:2]  # neighbours to Hugging Face's halves
    assert_close(neighbours[..., halves], rotate(x[..., halves], rotary))
    assert_close(to_rope(angles).frequencies[:, 0], np.stack([inverse_frequencies(16, 1e4)] * 2))


@size_and_axial
def test_folded_weights_have_the_same_scores_as_plain_rope(size: int, axial: bool) -> None:
    rng, width = np.random.default_rng(size), 4 * size
    p = draw(size, 2, 4).astype(np.float32)
    p[0, 1] = 0  # nothing turns
    p[1, 2] = np.kron(np.eye(size // 2), [[0, -1], [0, 0]])  # equal frequencies
    scale = None if axial else jnp.asarray(rng.standard_normal((2, 4)), jnp.float32)
    x, kernels = rng.standard_normal((5, 7)), rng.standard_normal((2, 7, 4, width))
    kernels = [kernels[0].reshape(7, -1), kernels[1][:, :2].reshape(7, -1)]  # 4 and 2 heads
    positions = jnp.asarray(rng.uniform(-1, 1, (5, 2)), jnp.float32)

    def scores(kernels: Any, turn: Any) -> np.ndarray:
        q, k = (
            turn(jnp.asarray(x @ kernel, jnp.float32).reshape(5, -1, width)) for kernel in kernels
        )
        return jnp.einsum("qhgd,khd->hgqk", q.reshape(5, 2, 2, width), k)

    rotations = rotations_jit(positions, jnp.asarray(p), scale)
    form = to_rope(jnp.asarray(p), scale, num_axes=2)
    assert_close(form.basis @ form.basis.mT, np.stack([np.eye(width)] * 2))
    angles = jnp.einsum("na,had->nhd", positions, form.frequencies, precision="highest")

    def plain(x: jax.Array) -> jax.Array:
        each = jnp.repeat(angles, x.shape[1] // 2, axis=1)
        return rotate(x[None], (jnp.cos(each), jnp.sin(each)))[0]

    folded = [fold(jnp.asarray(kernel, jnp.float32), form.basis) for kernel in kernels]
    expected = scores(kernels, lambda x: rotate_jit(x, rotations))
    assert_close(scores(folded, plain), expected, units=100)


def test_an_axis_turns_its_own_blocks_alone() -> None:
    p = jnp.asarray(draw(4, 1, 6), jnp.float32)
    x = jnp.asarray([[0.1, 0.2, 0.3], [0.1, 0.9, 0.3]])
    first, second = rotations_jit(x, p)
    moved = np.any(np.asarray(first != second), axis=(0, 2, 3))
    np.testing.assert_array_equal(moved, [False, True, False] * 2)


def test_vmap_scan_and_batches_of_positions_are_calls_one_by_one() -> None:
    p, scale = jnp.asarray(draw(8, 2, 2), jnp.float32), jnp.ones((2, 2))
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    one_by_one = jnp.stack([rotations_jit(each, p, scale) for each in x])
    call = lambda x: rotations_jit(x, p, scale)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda _, x: (None, call(x)), None, x)[1])
    for found in (call(x), jax.vmap(call)(x), scanned(x)):
        assert_close(found, one_by_one)
    stacked = jax.vmap(lambda p: rotations_jit(x[0], p, scale))(jnp.stack([p, 2 * p]))
    assert_close(stacked[1], rotations_jit(x[0], 2 * p, scale), units=64)


def test_angles_of_late_positions_are_float32() -> None:
    p = rope_angles(8, 8).astype(jnp.bfloat16)
    frequencies = to_rope(p).frequencies[0, 0]
    x = jnp.asarray([[9999.0]])
    found = rotations_jit(x, p)[0, 0, 0]
    exact = expm(9999 * skew(np.asarray(p[0, 0], np.float64)))
    assert found.dtype == jnp.float32
    assert float(frequencies[0]) == 1
    assert np.abs(found - exact).max() < 9999 * 8 * EPS32


def test_grids_are_scaled_to_one_and_moved_within_their_cells() -> None:
    grid = grid_positions((2, 4), class_token=True)
    np.testing.assert_array_equal(grid[:3], [[0.5, 0.5], [0.25, 0.125], [0.25, 0.375]])
    make = lambda key: grid_positions(
        (2, 4, 8), class_token=True, key=key, perturbation=(0, 1.0, 4.0)
    )
    moved = jax.vmap(make)(jax.random.split(jax.random.key(0), 200))
    moves = (moved - grid_positions((2, 4, 8), class_token=True)) * np.array([2, 4, 8])
    assert_close(moves[:, 0], np.zeros((200, 3)))
    moves = np.asarray(moves[:, 1:]).reshape(-1, 3)
    assert not moves[:, 0].any()
    assert np.abs(moves).max() <= 0.5 + 8 * EPS32
    np.testing.assert_allclose(np.mean(np.abs(moves[:, 1]) > 0.4999), 0.3173, atol=0.02)
    np.testing.assert_allclose(np.mean(np.abs(moves[:, 2]) > 0.4999), 0.8026, atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: position_rotations(jnp.zeros((3, 1), int), rope_angles(8)), "positions are int32"),
        (
            lambda: position_rotations(jnp.zeros((3, 1), jnp.bfloat16), rope_angles(8)),
            "positions are bfloat16",
        ),
        (lambda: position_rotations(jnp.full((3, 1), jnp.nan), rope_angles(8)), "not finite"),
        (lambda: position_rotations(jnp.zeros(3), rope_angles(8)), r"shape \(3,\)"),
        (lambda: position_rotations(jnp.zeros((3, 0)), rope_angles(8)), "at least one axis"),
        (lambda: position_rotations(jnp.zeros((3, 3)), rope_angles(8)), "4 blocks.*3 axes"),
        (
            lambda: position_rotations(jnp.zeros((3, 2)), rope_angles(8), jnp.ones((1, 4))),
            r"axis_scale has shape \(1, 4\).*\(2, 4\)",
        ),
        (lambda: position_rotations(jnp.zeros((3, 1)), jnp.ones((1, 2, 1, 1))), "b of at least 2"),
        (lambda: rope_angles(10, 4), r"block_size=4 does not divide head_dim=10.*\[2, 5, 10\]"),
        (lambda: rope_angles(9, 3), "must be even"),
        (lambda: to_rope(jnp.zeros((1, 2, 3, 3))), "even blocks"),
        (lambda: to_rope(jnp.zeros((1, 2, 4, 4)), jnp.ones((1, 3))), "does not fit"),
        (lambda: to_rope(jnp.zeros((1, 2, 4, 4)), num_axes=3), "2 blocks.*3 axes"),
        (lambda: fold(jnp.zeros((4, 9)), jnp.zeros((2, 4, 4))), r"kernel has shape \(4, 9\)"),
        (
            lambda: rotate_heads(
                jnp.zeros((3, 3, 8)),
                position_rotations(jnp.zeros((3, 1)), rope_angles(8, num_heads=2)),
            ),
            "a multiple of 2 heads, 8",
        ),
        (
            lambda: rotate_heads(
                jnp.zeros((4, 2, 8)), position_rotations(jnp.zeros((3, 1)), rope_angles(8))
            ),
            r"x has shape \(4, 2, 8\)",
        ),
        (lambda: grid_positions(()), "positive number of cells"),
        (lambda: grid_positions((2, 0)), "positive number of cells"),
        (lambda: grid_positions((2,), perturbation=-1.0), "perturbation=-1.0"),
    ],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
