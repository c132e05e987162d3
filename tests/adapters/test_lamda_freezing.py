"""LaMDA's freezing of rows: the worked steps, and rows that do not move."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.training.lamda_freezing import last_steps


def rows_frozen(tx: Any, shape: tuple[int, ...], steps: int) -> np.ndarray:
    """How many of the first rows did not move, by step and matrix."""
    params = {"B": jnp.ones(shape)}
    gradients = {"B": jnp.ones((steps, *shape))}

    def body(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return state, jnp.sum(jnp.all(updates["B"] == 0, axis=-1), axis=-1)

    return np.asarray(jax.jit(lambda s: jax.lax.scan(body, s, gradients)[1])(tx.init(params)))


def test_the_specifications_worked_steps() -> None:
    """r=4, T=100, eta=0.3: k = 0 below 7.5, 1 from 8, 2 from 15, 3 from 23, 4 from 30."""
    k = rows_frozen(lro.adapters.lamda_freezing(optax.sgd(1.0), 100, 0.3), (4, 2), 40)
    expected = np.digitize(np.arange(40), [8, 15, 23, 30])
    np.testing.assert_array_equal(k, expected)


@pytest.mark.parametrize(("rank", "total", "eta"), [(1, 10, 0.5), (3, 100, 0.1), (16, 97, 0.7)])
def test_counts_are_the_formulas(rank: int, total: int, eta: float) -> None:
    """In whole numbers, eta being so many tenths."""
    k = rows_frozen(lro.adapters.lamda_freezing(optax.sgd(1.0), total, eta), (rank, 2), total)
    tenths = round(10 * eta)
    expected = [min(rank, 10 * rank * t // (tenths * total)) for t in range(total)]
    np.testing.assert_array_equal(k, expected)
    assert k[0] == 0
    assert np.all(np.diff(k) >= 0)
    assert k[-1] == rank


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.7])
def test_traced_rates_give_the_same_steps(eta: float) -> None:
    for total in (100, 1000, 30_000):
        exact = last_steps(np.array(64), 64, eta * total)
        traced = jax.jit(lambda e: last_steps(np.array(64), 64, e * total))(eta)  # noqa: B023
        np.testing.assert_array_equal(exact, traced)


INNER = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", INNER)
def test_a_frozen_row_is_bit_identical_ever_after(name: str) -> None:
    tx = lro.adapters.lamda_freezing(INNER[name], 20, 0.5)  # rows at 5 and 10
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"S": draw(3, 2, 2), "B": draw(3, 2, 4)}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for _ in range(14):
        gradient = {"S": draw(3, 2, 2), "B": draw(3, 2, 4)}
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    for t in range(1, 14):
        now, before = seen[t], seen[t - 1]
        for row, first in enumerate((5, 10)):
            same = np.all(now["B"][:, row] == before["B"][:, row])
            assert same == (t >= first), (t, row)
        assert np.all(now["S"] != before["S"])


def test_layers_of_smaller_ranks_freeze_all_of_their_own_rows_by_the_same_step() -> None:
    """Paths are those of a model: the pattern is of the layer's, as for `attach`."""
    tx = lro.adapters.lamda_freezing(optax.sgd(1.0), 100, 0.4, rank_pattern={"^blocks/up$": (2, 4)})
    leaf = {"blocks": {"up": {"adapters": {"default": {"arrays": {"B": jnp.ones((2, 4, 1))}}}}}}
    update, state = jax.jit(tx.update), tx.init(leaf)
    for t in range(45):
        updates, state = update(leaf, state)
        moved = np.asarray(jax.tree.leaves(updates)[0])[..., 0] != 0
        for layer, rank in enumerate((2, 4)):
            k = min(rank, rank * t // 40)
            np.testing.assert_array_equal(moved[layer, :rank], np.arange(rank) >= k)
        assert not np.any(moved[0, 2:])


def test_its_limits_never_and_from_the_start() -> None:
    never = rows_frozen(lro.adapters.lamda_freezing(optax.sgd(1.0), 10, float("inf")), (3, 2), 12)
    assert not np.any(never)
    start = rows_frozen(lro.adapters.lamda_freezing(optax.sgd(1.0), 10, 0.0), (3, 2), 2)
    assert np.all(start == 3)


def test_nan_in_a_frozen_row_is_not_passed_on_and_elsewhere_is() -> None:
    tx = lro.adapters.lamda_freezing(optax.sgd(1.0), 4, 0.5)
    gradient = {"B": jnp.full((2, 2), jnp.nan)}
    state = tx.init(gradient)._replace(count=jnp.asarray(1, jnp.int32))
    updates, _ = tx.update(gradient, state)
    assert not np.any(updates["B"][0])
    assert np.all(np.isnan(updates["B"][1]))


def test_steps_are_optimizer_steps_under_multi_steps_and_masks_are_respected() -> None:
    tx = lro.adapters.lamda_freezing(optax.sgd(1.0), 4, 0.5)
    both = optax.MultiSteps(optax.masked(tx, {"x": {"B": True}, "y": {"B": False}}), 3)
    params = {"x": {"B": jnp.ones((2, 2))}, "y": {"B": jnp.ones((2, 2))}}
    update, state, seen = jax.jit(both.update), both.init(params), []
    for _ in range(9):
        updates, state = update(params, state, params)
        seen.append(np.asarray(updates["x"]["B"])[:, 0])
    np.testing.assert_array_equal(np.stack(seen)[[2, 5, 8]], [[-1, -1], [0, -1], [0, 0]])
    assert not np.any(np.stack(seen)[[0, 1, 3, 4, 6, 7]])
    np.testing.assert_array_equal(updates["y"]["B"], np.ones((2, 2)))


def test_unusable_options_are_refused() -> None:
    for options, message in (
        ({"eta": -0.1}, "eta=-0.1"),
        ({"names": "B"}, "names='B'"),
        ({"total_steps": 0}, "total_steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            lro.adapters.lamda_freezing(optax.sgd(1.0), **{"total_steps": 10, **options})
    tx = lro.adapters.lamda_freezing(optax.sgd(1.0), 10, rank_pattern={"up": (1, 2)})
    params = {"up": {"B": jnp.ones((3, 2, 2))}}
    with pytest.raises(ValueError, match="2 ranks for a stack"):
        tx.update(params, tx.init(params))
