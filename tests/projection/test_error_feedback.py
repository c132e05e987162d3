"""Error feedback: nothing is lost, only late."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import normal_gradients, run, state_bytes

SHAPE, STEPS = (6, 9), 7


def _sent_and_error(tx: Any, gradients: list[Any]) -> tuple[np.ndarray, list[Any]]:
    """The sum of what was applied, and the states."""
    trajectory = run(tx, {"kernel": jnp.zeros(SHAPE)}, gradients)
    return np.asarray(trajectory[-1][0]["kernel"], np.float64), [state for _, state in trajectory]


def _feeding(bits: Any, subspace: Any, **options: Any) -> Any:
    residual = lro.residuals.error_feedback(bits)
    options = {"refresh_every": 2, **options}
    return lro.scale_by_projection(optax.identity(), subspace, residual=residual, **options)


@pytest.mark.parametrize(
    "subspace", [lro.subspaces.svd(2), lro.subspaces.dct(2)], ids=["svd", "dct"]
)
def test_all_that_was_sent_and_the_error_are_the_sum_of_all_gradients(subspace: Any) -> None:
    gradients = normal_gradients(SHAPE, STEPS)
    sent, states = _sent_and_error(_feeding(32, subspace), gradients)
    total = sum(np.asarray(g["kernel"], np.float64) for g in gradients)
    np.testing.assert_allclose(sent + states[-1].residual["kernel"], total, atol=1e-5)
    assert np.linalg.matrix_rank(states[-1].residual["kernel"], tol=1e-4) >= 4


@pytest.mark.slow
def test_in_8_bits_what_is_lost_are_half_steps_of_rounding() -> None:
    gradients = normal_gradients(SHAPE, STEPS)
    sent, states = _sent_and_error(_feeding(8, lro.subspaces.svd(2)), gradients)
    kept = [s.residual for s in states]
    error = kept[-1].low["kernel"] + kept[-1].step["kernel"] * kept[-1].codes["kernel"]
    total = sum(np.asarray(g["kernel"], np.float64) for g in gradients)
    lost = np.abs(sent + np.asarray(error, np.float64) - total)
    bound = sum(np.asarray(k.step["kernel"], np.float64) / 2 for k in kept)
    assert (lost <= bound + 1e-5).all()
    assert lost.max() > 1e-4  # there was something to round
    assert 0 < float(kept[-1].step["kernel"].max()) < 0.1


def test_the_error_in_8_bits_takes_a_byte_an_entry() -> None:
    params = {"kernel": jnp.zeros((64, 128))}
    state = jax.eval_shape(_feeding(8, lro.subspaces.dct(4)).init, params)
    assert state_bytes(state.residual) == 64 * 128 + 2 * 64 * 4


@pytest.mark.parametrize("bits", [32, 8])
def test_a_gradient_inside_the_subspace_leaves_no_error(bits: Any) -> None:
    gradient = {"kernel": np.where(np.arange(6)[:, None] < 2, np.full(SHAPE, 1.5, np.float32), 0)}
    tx = _feeding(bits, lro.subspaces.fixed(jnp.eye(6, 2)), side="rows")
    _, states = _sent_and_error(tx, [gradient] * 2)
    kept = jax.tree.map(np.asarray, states[-1].residual)
    error = (
        kept["kernel"]
        if bits == 32
        else kept.low["kernel"] + kept.step["kernel"] * kept.codes["kernel"]
    )
    np.testing.assert_allclose(error, 0, atol=1e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_gradient_that_is_not_finite_does_not_enter_the_error(bits: Any) -> None:
    good = normal_gradients(SHAPE, 1)[0]
    broken = {"kernel": good["kernel"].at[2, 3].set(jnp.inf)}
    tx = _feeding(bits, lro.subspaces.svd(2))
    _, (before, after) = _sent_and_error(tx, [good, broken])
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert jnp.isfinite(new).all()
        assert old.dtype == new.dtype
    for old, new in zip(*(jax.tree.leaves(s.residual) for s in (before, after)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_momentum_that_a_refresh_projects_away_is_fed_back() -> None:
    b1, basis = 0.8, [np.eye(6)[:, :2], np.eye(6)[:, 1:3]]

    def refresh(key: Any, matrix: Any, last: jax.Array, momentum: Any, view: Any) -> jax.Array:
        return jnp.where(jnp.any(last != 0), *map(jnp.float32, basis[::-1]))

    tx = lro.scale_by_projection(
        optax.scale_by_adam(b1),
        lro.subspaces.from_basis(2, refresh),
        residual=lro.residuals.error_feedback(32, momentum=True),
        on_refresh="rotate",
        refresh_every=1,
        side="rows",
    )
    gradients = normal_gradients(SHAPE, 2)
    _, states = _sent_and_error(tx, gradients)
    first, second = (np.asarray(g["kernel"], np.float64) for g in gradients)
    outside = [np.eye(6) - p @ p.T for p in basis]
    momentum = (1 - b1) * basis[0] @ basis[0].T @ first  # after one step, in the full space
    fed = outside[0] @ first + second
    expected = outside[1] @ fed + b1 / (1 - b1) * outside[1] @ momentum
    np.testing.assert_allclose(states[-1].residual["kernel"], expected, atol=1e-5)
