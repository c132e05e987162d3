"""Fira against the worked example and an independent float64 reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.projection.runs import Adam, first, float64, moved, normal_gradients, run

CODE = [[-0.009593, -0.008944, 0], [-0.003198, -0.004472, -0.022036]]
PAPER = [[-0.002398, -0.002236, 0], [-0.000799, -0.001118, -0.005509]]


@pytest.mark.parametrize(("form", "expected"), [("code", CODE), ("paper", PAPER)])
def test_worked_example_of_the_specification(form: Any, expected: Any) -> None:
    gradient = {"kernel": np.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]], np.float32)}
    tx = lro.fira(0.01, 1, scale=0.25, subspace=lro.subspaces.svd(1), residual_form=form)
    updates, _ = first(tx, gradient)
    # The code adds eps before the bias correction: 1e-6 on the largest entry.
    np.testing.assert_allclose(updates["kernel"], expected, atol=1.5e-6)


def _reference(gradients: list[np.ndarray], form: str, rank: int, every: int) -> np.ndarray:
    """The weight after all gradients, from zeros, in the order of the official code or paper."""
    adam, weight, last = Adam(eps=1e-6), np.zeros_like(gradients[0]), 0.0
    basis, scale = np.zeros((weight.shape[0], rank)), 0.25
    for t, g in enumerate(gradients):
        if t % every == 0:
            new = np.linalg.svd(g)[0][:, :rank]
            basis = new * np.where((new * basis).sum(0) < 0, -1, 1)
        r = basis.T @ g
        n = adam.update(r)
        one, two = adam.corrections
        if form == "code":  # without bias correction, until the end
            n = adam.first / (np.sqrt(adam.second) + adam.eps * np.sqrt(two))
        inside = scale if form == "code" else 1.0
        factors = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        s = (g - inside * basis @ r) * factors
        if last > 0:
            s = s / (max(np.linalg.norm(s) / (last + 1e-8), 1.01) / 1.01)
        last = np.linalg.norm(s)
        if form == "code":
            weight = weight - 0.1 * np.sqrt(two) / one * (scale * basis @ n + s)
        else:
            weight = weight - 0.1 * scale * (basis @ n + s)
    return weight


@pytest.mark.parametrize("form", ["code", "paper"])
def test_agrees_with_a_float64_reference(form: Any) -> None:
    gradients = normal_gradients((6, 9), 8)
    tx = lro.fira(0.1, 2, 4, subspace=lro.subspaces.svd(2), residual_form=form)
    expected = _reference(float64(gradients), form, 2, 4)
    np.testing.assert_allclose(moved(tx, (6, 9), gradients), expected, atol=2e-3)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_gradients_of_float64_are_updated_in_float64(form: Any) -> None:
    gradients = [np.float64(g["kernel"]) for g in normal_gradients((6, 9), 8)]
    tx = lro.fira(0.1, 2, 4, subspace=lro.subspaces.svd(2), residual_form=form)
    with jax.enable_x64(True):
        start, trees = (
            {"kernel": jnp.zeros((6, 9))},
            [{"kernel": jnp.asarray(g)} for g in gradients],
        )
        weight = np.asarray(run(tx, start, trees)[-1][0]["kernel"])
    np.testing.assert_allclose(weight, _reference(gradients, form, 2, 4), atol=1e-12)


def test_the_part_outside_the_subspace_is_stronger_by_one_over_scale_in_the_code() -> None:
    gradient = normal_gradients((6, 9), 1)
    one, other = (
        moved(
            lro.fira(0.1, 2, scale=0.5, subspace=lro.subspaces.svd(2), residual_form=form),
            (6, 9),
            gradient,
        )
        for form in ("code", "paper")
    )
    leading = np.linalg.svd(gradient[0]["kernel"])[0][:, :2]
    outside = np.eye(6) - leading @ leading.T
    np.testing.assert_allclose(outside @ one, 2 * outside @ other, atol=1e-4)
