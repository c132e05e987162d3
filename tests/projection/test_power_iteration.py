"""One warm power iteration a refresh: LDAdam's formula, and where it leads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.rules import AXES, Case, decaying, gram_error, normal
from tests.projection.runs import run

WEIGHT = 0.908


def _case(shape: tuple[int, ...], axis: int = -2, rank: int = 3) -> Case:
    rule = lro.subspaces.power_iteration(rank, WEIGHT)
    return Case(rule, lro.View.of(jnp.zeros(shape), axis, rank))


def _expected(gradient: np.ndarray, basis: np.ndarray, moment: np.ndarray | None) -> np.ndarray:
    """``qr(b (bᵀ P))`` of rows in float64, with ``b = ρ P M + (1 - ρ) G`` formed in full."""
    g, p = np.asarray(gradient, np.float64), np.asarray(basis, np.float64)
    b = g if moment is None else WEIGHT * p @ np.asarray(moment, np.float64) + (1 - WEIGHT) * g
    q = np.linalg.qr(b @ (b.T @ p))[0]
    return q * np.where((q * p).sum(0) < 0, -1, 1)


@functools.cache
def _refresh(axis: int) -> Any:
    one = _case((7, 9) if axis == -2 else (9, 7), axis)
    return jax.jit(lambda *args: one.rule.refresh(*args, one.view))


@AXES
@pytest.mark.parametrize("with_momentum", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_a_refresh_is_the_formula_of_the_paper(axis: int, with_momentum: bool, size: float) -> None:
    gradient, basis = np.asarray(normal(7, 9)), np.linalg.qr(np.asarray(normal(7, 3, seed=1)))[0]
    moment = np.asarray(normal(3, 9, seed=2)) if with_momentum else None
    expected = _expected(gradient, basis, moment)
    gradient, moment = (x if x is None else np.float32(x * size) for x in (gradient, moment))
    if axis == -1:
        gradient, moment = gradient.T, None if moment is None else moment.T
    new = _refresh(axis)(jax.random.key(0), gradient, basis, moment)
    np.testing.assert_allclose(new, expected, atol=1e-5)


def test_it_converges_to_the_leading_subspace_of_a_constant_gradient() -> None:
    gradient = decaying(8, 12, 1.5)
    one = _case((8, 12))
    basis = jnp.asarray(np.linalg.qr(np.asarray(normal(8, 3)))[0])
    top = np.linalg.svd(np.asarray(gradient))[0][:, :3]
    for step in range(30):
        basis = one.refresh(jax.random.key(step), gradient, basis)
        assert gram_error(basis) < 1e-5
    np.testing.assert_allclose(basis @ basis.T, top @ top.T, atol=1e-4)


def test_the_layers_of_a_stack_begin_one_by_one() -> None:
    stack = jnp.stack([decaying(6, 8, 2.0), decaying(6, 8, 2.0, seed=1)])
    many, one = _case((2, 6, 8)), _case((6, 8))
    old = jnp.asarray(np.linalg.qr(np.asarray(normal(6, 3)))[0])
    new = many.refresh(jax.random.key(0), stack, jnp.stack([jnp.zeros((6, 3)), old]))
    np.testing.assert_allclose(new[0], one.found(stack[0]), atol=1e-4)
    np.testing.assert_allclose(new[1], _expected(stack[1], old, None), atol=1e-4)


def test_a_momentum_in_other_units_than_the_gradient_is_brought_to_them() -> None:
    gradients = [{"kernel": normal(6, 9, seed=i)} for i in range(3)]
    rule = lro.subspaces.power_iteration(2)
    bases = []
    for inner in (optax.scale_by_adam(), optax.chain(optax.scale(128.0), optax.scale_by_adam())):
        tx = lro.scale_by_projection(inner, rule, refresh_every=1)
        bases.append(run(tx, gradients[0], gradients)[-1][1].basis["kernel"])
    np.testing.assert_allclose(*bases, atol=1e-4)


def test_a_momentum_that_is_no_average_of_gradients_is_not_followed() -> None:
    inner = optax.chain(optax.scale_by_sign(), optax.scale_by_adam())
    tx = lro.scale_by_projection(inner, lro.subspaces.power_iteration(2))
    with pytest.raises(ValueError, match=r"follows the momentum, but .*mu.* in their own units"):
        tx.init({"kernel": jnp.ones((6, 9))})
