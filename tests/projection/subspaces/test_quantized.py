"""Bases in 16, 8 and 4 bits: narrow between steps, and a basis all the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.quantization import Affine, BlockFormat, code_map, dequantize
from tests.projection.runs import normal_gradients, run

ALL_BITS = pytest.mark.parametrize("bits", [16, 8, 4])
EIGHT_FULL = pytest.mark.parametrize("bits", [16, pytest.param(8, marks=pytest.mark.full), 4])
BEYOND_FOUR_FULL = pytest.mark.parametrize(
    "bits", [*(pytest.param(x, marks=pytest.mark.full) for x in (16, 8)), 4]
)
LAST_TWO = lro.WeightDimensionNumbers(-2, -1)
SHAPE, RANK = (32, 48), 8


def rule(bits: Any, rank: int = RANK) -> Any:
    return lro.subspaces.quantized(lro.subspaces.svd(rank), bits)


def scaled(subspace: Any, inner: Any = None, **options: Any) -> Any:
    return lro.scale_by_projection(inner or optax.scale_by_adam(), subspace, **options)


def one(x: jax.Array) -> dict[str, jax.Array]:
    return {"kernel": x}


def first_basis(bits: Any, gradient: Any) -> tuple[np.ndarray, Any]:
    """The basis ``[32, 8]`` found of a gradient, decoded, and as it is stored."""
    tx = scaled(rule(bits))
    state = jax.jit(lambda g: tx.update(g, tx.init(g), g)[1])(gradient)
    stored = jax.tree.map(lambda x: x["kernel"], state.basis, is_leaf=lambda x: isinstance(x, dict))
    if bits == 16:
        return np.asarray(stored, np.float64), stored
    fmt = BlockFormat(code_map("affine", bits), 256)
    found = dequantize(Affine(*stored), fmt, (SHAPE[0], RANK))
    return np.asarray(found, np.float64), stored


@ALL_BITS
def test_bases_are_nearly_orthonormal_and_of_few_bytes(bits: Any) -> None:
    gradient = normal_gradients(SHAPE, 1)[0]
    basis, stored = first_basis(bits, gradient)
    bound = {16: 0.005, 8: 0.02, 4: 0.15}[bits]
    error = np.abs(basis.T @ basis - np.eye(RANK)).max()
    assert 1e-6 < error < bound
    leaves = jax.tree.leaves(stored)
    assert leaves[0].dtype == (jnp.bfloat16 if bits == 16 else jnp.uint8)
    assert leaves[0].nbytes == SHAPE[0] * RANK * bits // 8
    exact, _ = first_basis_float32(gradient)
    np.testing.assert_allclose(np.abs(np.sum(basis * exact, 0)), 1, atol=bound)


def first_basis_float32(gradient: Any) -> tuple[np.ndarray, Any]:
    tx = scaled(lro.subspaces.svd(RANK))
    state = jax.jit(lambda g: tx.update(g, tx.init(g), g)[1])(gradient)
    return np.asarray(state.basis["kernel"], np.float64), state


SHAPES = {"wide": SHAPE, "tall": SHAPE[::-1], "stack": (3, *SHAPE)}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("wide", 16),
        ("wide", 8),
        ("tall", 4),
        pytest.param("stack", 4, marks=pytest.mark.slow),
        pytest.param("stack", 16, marks=pytest.mark.full),
    ],
)
def test_project_and_lift_are_adjoint(name: str, bits: Any) -> None:
    """Without moments the update is P Pᵀ G: symmetric, and of the rank of the basis."""
    tx = scaled(rule(bits), optax.identity(), weight_dimension_numbers=LAST_TWO)
    first, second, third = normal_gradients(SHAPES[name], 3)

    def products(a: Any, b: Any, c: Any) -> tuple[jax.Array, ...]:
        state = tx.update(a, tx.init(a), a)[1]
        lifted = lambda g: tx.update(g, state, g)[0]["kernel"]
        return lifted(b), jnp.sum(lifted(b) * c["kernel"]), jnp.sum(lifted(c) * b["kernel"])

    lifted, one, other = jax.jit(products)(first, second, third)
    assert float(one) == pytest.approx(float(other), rel=1e-4)
    singular = np.linalg.svd(np.asarray(lifted, np.float64), compute_uv=False)
    assert (singular[..., RANK:] < 1e-4 * singular[..., :1]).all()


@pytest.mark.slow
@BEYOND_FOUR_FULL
def test_stacked_weights_are_separate_ones(bits: Any) -> None:
    """Of fewer elements than a group: it is not filled with the next weight."""
    subspace = rule(bits, rank=2)
    tx = scaled(subspace, weight_dimension_numbers=LAST_TWO, refresh_every=2)
    init, step = jax.jit(tx.init), jax.jit(tx.update)
    stack = [g["kernel"] for g in normal_gradients((3, 6, 8), 3)]

    def updates(gradients: list[jax.Array]) -> list[np.ndarray]:
        state, found = init(one(gradients[0])), []
        for gradient in gradients:
            update, state = step(one(gradient), state, one(gradient))
            found.append(np.asarray(update["kernel"]))
        return found

    together = updates(stack)
    for i in range(3):
        for whole, part in zip(together, updates([x[i] for x in stack]), strict=True):
            np.testing.assert_allclose(whole[i], part, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "bad"),
    [(8, np.inf), (4, np.nan), pytest.param(16, np.nan, marks=pytest.mark.slow)],
)
def test_a_bad_gradient_never_enters_the_basis(bits: Any, bad: float) -> None:
    tx = scaled(rule(bits), optax.identity(), refresh_every=1)
    good, other = normal_gradients(SHAPE, 2)
    poisoned = one(good["kernel"].at[3, 4].set(bad))
    step = jax.jit(tx.update)
    _, state = step(good, jax.jit(tx.init)(good), good)
    _, after = step(poisoned, state, good)
    for x, y in zip(jax.tree.leaves(after.basis), jax.tree.leaves(state.basis), strict=True):
        np.testing.assert_array_equal(x, y)
    updates, last = step(other, after, good)
    assert np.isfinite(updates["kernel"]).all()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(last.basis))


@EIGHT_FULL
def test_moments_are_turned_into_the_next_basis(bits: Any) -> None:
    gradients = normal_gradients(SHAPE, 6)
    options = {"on_refresh": "rotate", "refresh_every": 2}
    wide = scaled(lro.subspaces.svd(RANK), **options)
    narrow = scaled(rule(bits), **options)
    start = one(jnp.zeros(SHAPE))
    wanted, found = (
        np.asarray(run(tx, start, gradients)[-1][0]["kernel"]) for tx in (wide, narrow)
    )
    share = {16: 0.05, 8: 0.2, 4: 0.5}[bits]
    assert np.linalg.norm(found - wanted) < share * np.linalg.norm(wanted)


def test_ranks_shrink_and_states_are_compacted_with_a_basis_of_16_bits() -> None:
    adaptive = lro.subspaces.adaptive_rank(lro.subspaces.svd(RANK))
    tx = scaled(lro.subspaces.quantized(adaptive, 16), refresh_every=2)
    rng = np.random.default_rng(0)
    low = rng.normal(size=(32, 2)) @ rng.normal(size=(2, 48))
    gradients = [one(jnp.asarray((i + 1) * low, jnp.float32)) for i in range(3)]
    whole = run(tx, one(jnp.zeros(SHAPE)), gradients)
    params, state = whole[1]
    assert state.basis.basis["kernel"].dtype == jnp.bfloat16
    assert int(state.basis.rank["kernel"]) == 2
    smaller = lro.compact(state)
    assert smaller.basis.basis["kernel"].shape == (32, 2)
    assert smaller.basis.basis["kernel"].dtype == jnp.bfloat16
    updates, _ = jax.jit(tx.update)(gradients[2], smaller, params)
    found = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_allclose(found, whole[2][0]["kernel"], atol=1e-3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lro.subspaces.quantized("svd"), TypeError, "rule='svd' must be a subspace"),
        (lambda: rule(2), ValueError, "bits=2 must be 16, 8 or 4"),
        (
            lambda: lro.subspaces.quantized(
                lro.subspaces.adaptive_rank(lro.subspaces.randomized_svd(8), 2), 4
            ),
            ValueError,
            "bits=4 needs a rule that stores only its basis",
        ),
        (
            lambda: lro.subspaces.quantized(lro.subspaces.online_pca(8), 8),
            ValueError,
            "bits=8 needs a rule",
        ),
    ],
    ids=["no rule", "bits", "adaptive rank", "a tracked basis"],
)
def test_what_can_not_be_stored_so_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
