"""DCT-AdamW against an independent float64 reference."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import Adam, float64, moved, normal_gradients, run

SHAPE, RANK, STEPS = (6, 9), 3, 8


def _cosines(length: int) -> np.ndarray:
    """The cosine basis, one vector a column."""
    j, k = np.arange(length)[:, None], np.arange(length)[None]
    basis = np.sqrt(2 / length) * np.cos(np.pi * k * (2 * j + 1) / (2 * length))
    basis[:, 0] = np.sqrt(1 / length)
    return basis


def _reference(gradients: list[np.ndarray], feedback: bool, decay: float) -> np.ndarray:
    """The weight after all gradients, from ones; moments are moved to their indices' new places."""
    basis, chosen, adam = _cosines(SHAPE[0]), None, Adam(eps=1e-8)
    weight, error = np.ones(SHAPE), np.zeros(SHAPE)
    for g in gradients:
        weight = weight * (1 - 0.1 * decay)
        a = g + error if feedback else g
        coefficients = basis.T @ a
        last, chosen = chosen, np.sort(np.argsort(-np.abs(coefficients).sum(1))[:RANK])
        if last is not None:
            place = (chosen[:, None] == last[None]).astype(float)
            adam.first, adam.second = place @ adam.first, place @ adam.second
        sent = coefficients[chosen]
        error = a - basis[:, chosen] @ sent
        weight = weight - 0.1 * basis[:, chosen] @ adam.update(sent)
    return weight


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize(("feedback", "decay"), [(32, 0.2), (None, 0.0)])
@pytest.mark.parametrize("transform", ["products", "fft"])
def test_agrees_with_a_float64_reference(feedback: Any, decay: float, transform: Any) -> None:
    gradients = normal_gradients(SHAPE, STEPS)
    tx = lro.dct_adamw(0.1, RANK, error_feedback=feedback, weight_decay=decay, transform=transform)
    trajectory = run(tx, {"kernel": jnp.ones(SHAPE)}, gradients)
    bases = {tuple(state[0].basis["kernel"].tolist()) for _, state in trajectory}
    assert len(bases) > 2  # the choice did change
    expected = _reference(float64(gradients), feedback is not None, decay)
    np.testing.assert_allclose(trajectory[-1][0]["kernel"], expected, atol=2e-4)


@pytest.mark.slow
def test_with_all_columns_it_is_adamw_in_cosine_coordinates() -> None:
    gradients, basis = normal_gradients(SHAPE, 4), _cosines(6).astype(np.float32)
    rotated = [{"kernel": basis.T @ g["kernel"]} for g in gradients]
    expected = basis @ moved(optax.adam(0.1), SHAPE, rotated)
    seen = moved(lro.dct_adamw(0.1, 6), SHAPE, gradients)
    np.testing.assert_allclose(seen, expected, atol=1e-4)


@pytest.mark.slow
def test_8_bits_of_feedback_stay_close_to_32() -> None:
    gradients = normal_gradients(SHAPE, 4)
    exact, rounded, none = (
        moved(lro.dct_adamw(0.1, RANK, error_feedback=bits), SHAPE, gradients)
        for bits in (32, 8, None)
    )
    assert np.abs(rounded - exact).max() < 0.02
    assert np.abs(none - exact).max() > 0.1


def test_has_no_seed_as_nothing_is_drawn() -> None:
    with pytest.raises(TypeError, match="seed"):
        lro.dct_adamw(0.1, RANK, seed=1)  # pyrefly: ignore
