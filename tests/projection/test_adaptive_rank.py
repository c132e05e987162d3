"""A rank that is data: the information threshold, its grid, and what lies beyond the rank."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.projection.rules import Case, decaying, gram_error, normal


def _case(shape: tuple[int, ...], rank: int, **options: Any) -> Case:
    rule = lro.subspaces.adaptive_rank(lro.subspaces.svd(rank), **options)
    return Case(rule, lro.View.of(jnp.zeros(shape), -2, rank))


def _ranks(gradient: jax.Array, rank: int, thresholds: Any, **options: Any) -> list[int]:
    rules = (_case(gradient.shape, rank, threshold=x, **options) for x in thresholds)
    return [int(one.found(gradient).rank) for one in rules]


@pytest.mark.slow
def test_ranks_of_the_worked_spectrum() -> None:
    """What is lost of (4, 2, 1, 1/2), as a share of the norm: .4970, .2425, .1085, 0."""
    gradient = jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5]))
    assert _ranks(gradient, 4, (0.2, 0.25, 0.24, 0.5, 0.1)) == [3, 2, 3, 1, 4]


def test_what_is_lost_is_what_is_not_captured() -> None:
    gradient = decaying(8, 12)
    one = _case((8, 12), 6, threshold=0.3)
    basis = one.found(gradient)
    projected = one.project(basis, gradient)
    lost = jnp.sum((gradient - one.lift(basis, projected)) ** 2)
    total = jnp.sum(gradient**2)
    assert_close(total - jnp.sum(projected**2), lost, 800)
    assert lost <= 0.3**2 * total
    fewer = np.asarray(projected)[: int(basis.rank) - 1]
    assert total - np.sum(fewer**2) > 0.3**2 * total  # no smaller rank would do


def test_the_rank_falls_as_more_may_be_lost() -> None:
    ranks = _ranks(decaying(8, 12), 8, (0.0, 0.1, 0.3, 0.6, 1.0))
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 8
    assert ranks[-1] == 1


def test_a_gradient_of_low_rank_needs_no_more_and_the_grid_rounds_up() -> None:
    gradient = normal(8, 3) @ normal(3, 12, seed=1)
    for options, largest in (
        ({}, 3),
        ({"min_rank": 4}, 4),
        ({"min_rank": 2, "rank_step": 3}, 5),
        ({"min_rank": 6}, 6),
    ):
        assert _ranks(gradient, 6, (0.01,), **options) == [largest]


def test_columns_beyond_the_rank_are_zero_and_the_others_orthonormal_and_in_order() -> None:
    gradient = jnp.stack([decaying(8, 12, 3.0), decaying(8, 12, 0.2, seed=1)])
    one = _case(gradient.shape, 6, threshold=0.4)
    basis = one.found(gradient)
    assert basis.rank.shape == (2,)  # a rank for each layer
    assert 1 <= int(basis.rank[0]) < int(basis.rank[1]) <= 6
    assert gram_error(one.dense(basis), basis.rank) < 1e-5
    beyond = jnp.arange(6) >= basis.rank[:, None]
    assert not jnp.any(jnp.where(beyond[:, None], basis.basis, 0))
    energy = jnp.sum(one.project(basis, gradient) ** 2, axis=-1)
    assert (jnp.diff(energy, axis=-1) <= 1e-6).all()


@pytest.mark.parametrize("monotone", [False, True])
def test_the_rank_only_falls_if_told(monotone: bool) -> None:
    one = _case((6, 8), 6, threshold=0.2, monotone=monotone)
    steep, flat = decaying(6, 8, 3.0), decaying(6, 8, 0.1)
    first = one.found(steep)
    again = one.refresh(jax.random.key(1), flat, first)
    back = one.refresh(jax.random.key(2), steep, one.found(flat))
    assert int(again.rank) == int(first.rank) if monotone else int(again.rank) > int(first.rank)
    assert int(back.rank) == int(first.rank)


def test_the_rank_falls_to_the_least_while_a_gradient_collapses_to_rank_one() -> None:
    """Gradient descent on a quadratic whose directions die out at different rates."""
    one = _case((4, 4), 4, threshold=0.2, min_rank=1)
    rates = jnp.array([0.0, 0.3, 0.6, 0.9])
    ranks = [int(one.found(jnp.diag((1 - rates) ** t)).rank) for t in (0, 1, 3, 9)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 4
    assert ranks[-1] == 1
