"""LDAdam against an independent float64 reference."""

from typing import Any

import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import Adam, float64, moved, normal_gradients

RHO, B1, B2, EPS = 0.908, 0.908, 0.99, 1e-8
SHAPE, RANK, STEPS = (6, 9), 2, 8


def _reference(
    gradients: list[np.ndarray], learning_rate: float, decay: float, feedback: bool
) -> np.ndarray:
    """The weight after all gradients, from zeros."""
    adam, weight = Adam(B1, B2, EPS), np.zeros(SHAPE)
    error, basis = np.zeros(SHAPE), np.zeros((SHAPE[0], RANK))
    for t, g in enumerate(gradients):
        a = g + error
        if t == 0:
            new = np.linalg.svd(a)[0][:, :RANK]
            before = after = np.zeros(SHAPE)
        else:
            blend = RHO * basis @ (adam.first / adam.corrections[0]) + (1 - RHO) * a
            new = np.linalg.qr(blend @ (blend.T @ basis))[0]
            new = new * np.where((new * basis).sum(0) < 0, -1, 1)
            before = basis @ adam.first
            adam.turn(new.T @ basis)
            after = new @ adam.first
        if feedback:
            error = a - new @ (new.T @ a) + B1 / (1 - B1) * (before - after)
        basis = new
        direction = adam.update(basis.T @ a)
        weight = weight - learning_rate * (basis @ direction + decay * weight)
    return weight


@pytest.mark.combinations(1)
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_agrees_with_a_float64_reference(decay: float, feedback: bool) -> None:
    gradients = normal_gradients(SHAPE, STEPS)
    first = lro.subspaces.svd(RANK)
    tx = lro.ldadam(
        0.1,
        RANK,
        weight_decay=decay,
        error_feedback=32 if feedback else None,
        subspace=lro.subspaces.power_iteration(RANK, RHO, initial=first),
    )
    expected = _reference(float64(gradients), 0.1, decay, feedback)
    np.testing.assert_allclose(moved(tx, SHAPE, gradients), expected, atol=2e-4)


def _moved(inner: Any, **options: Any) -> np.ndarray:
    rule = lro.subspaces.power_iteration(RANK, RHO, initial=lro.subspaces.svd(RANK))
    tx = lro.ldadam(1.0, subspace=rule, inner=inner, **options)
    return moved(tx, SHAPE, normal_gradients(SHAPE, 4))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            optax.scale_by_adam(0.9, 0.99, 0.0),
            optax.chain(optax.scale(128.0), optax.scale_by_adam(0.9, 0.99, 0.0)),
        ),
        (optax.trace(0.9), optax.chain(optax.ema(0.9, debias=False), optax.scale(10.0))),
        (optax.ema(0.9), optax.chain(optax.scale(7.0), optax.ema(0.9), optax.scale(1 / 7))),
    ],
    ids=["scaled", "trace", "ema"],
)
def test_a_momentum_in_any_units_is_followed_and_fed_back_alike(one: Any, other: Any) -> None:
    np.testing.assert_allclose(_moved(one), _moved(other), atol=1e-4)


def test_the_decay_of_what_is_fed_back_is_that_of_the_inner_optimizer() -> None:
    rule = lro.subspaces.power_iteration(RANK, RHO, initial=lro.subspaces.svd(RANK))
    own = lro.ldadam(1.0, b1=0.5, subspace=rule)
    expected = moved(own, SHAPE, normal_gradients(SHAPE, 4))
    inner = optax.scale_by_adam(0.5, B2, EPS)
    np.testing.assert_allclose(_moved(inner), expected, atol=1e-5)
    wrong = moved(lro.ldadam(1.0, subspace=rule), SHAPE, normal_gradients(SHAPE, 4))
    assert np.abs(wrong - expected).max() > 0.1


def test_clipping_before_the_momentum_is_refused_with_its_place() -> None:
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    with pytest.raises(ValueError, match=r"clipped gradients\. Chain clipping before"):
        lro.ldadam(1.0, RANK, inner=inner).init({"kernel": np.ones(SHAPE, np.float32)})
    tx = optax.chain(optax.clip_by_global_norm(1.0), lro.ldadam(1.0, RANK))
    tx.init({"kernel": np.ones(SHAPE, np.float32)})


def test_a_momentum_that_is_no_average_is_not_fed_back() -> None:
    inner = optax.chain(optax.scale_by_sign(), optax.scale_by_adam())
    tx = lro.scale_by_projection(
        inner, lro.subspaces.svd(RANK), residual=lro.residuals.error_feedback(momentum=True)
    )
    with pytest.raises(ValueError, match=r"residual rule feeds back the momentum, but .*mu"):
        tx.init({"kernel": np.ones(SHAPE, np.float32)})


@pytest.mark.slow
def test_8_bits_of_feedback_stay_close_to_32() -> None:
    gradients = normal_gradients(SHAPE, 4)
    rule = lro.subspaces.power_iteration(RANK, RHO, initial=lro.subspaces.svd(RANK))
    exact, rounded, none = (
        moved(lro.ldadam(0.1, RANK, error_feedback=bits, subspace=rule), SHAPE, gradients)
        for bits in (32, 8, None)
    )
    assert np.abs(rounded - exact).max() < 0.01
    assert np.abs(none - exact).max() > 0.04


def test_with_one_basis_and_no_momentum_weight_it_is_adam_in_the_subspace() -> None:
    gradients, basis = normal_gradients(SHAPE, 4), lro.subspaces.svd(RANK)
    options: dict[str, Any] = {"subspace": basis, "refresh_every": None}
    ldadam = lro.ldadam(0.1, RANK, error_feedback=None, **options)
    galore = lro.galore(0.1, RANK, None, 1.0, B1, B2, EPS, subspace=basis)
    np.testing.assert_allclose(
        moved(ldadam, SHAPE, gradients), moved(galore, SHAPE, gradients), atol=1e-5
    )
