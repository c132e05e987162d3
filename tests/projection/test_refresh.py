"""When bases are due: every so many steps, staggered, lazily, upon convergence, or never."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.rules import gram_error, normal

VIEW = lro.View((4, 8), -2, 2)
STACKED = lro.View((2, 4, 8), -2, 2)


def _due(rule: lro.refresh.RefreshRule, phase: float, steps: int) -> list[int]:
    """The counts at which a leaf of this phase is refreshed."""
    found, due, statistics = [], rule.first_refresh(phase), rule.init(VIEW)
    for count in range(steps):
        if count >= int(due):
            found.append(count)
            due, statistics = rule.schedule(statistics, count, due, jnp.array(0.0))
    return found


def test_every_is_every_so_many_steps_from_the_first() -> None:
    assert _due(lro.refresh.every(3), 0.5, 10) == [0, 3, 6, 9]
    assert _due(lro.refresh.every(1), 0.0, 3) == [0, 1, 2]


@pytest.mark.parametrize(("steps", "leaves"), [(10, 4), (4, 4), (3, 7), (100, 100)])
def test_staggered_leaves_have_phases_of_their_own(steps: int, leaves: int) -> None:
    rule = lro.refresh.every(steps, stagger=True)
    for i in range(leaves):
        counts = _due(rule, i / leaves, 3 * steps + 1)
        assert counts[0] == 0
        assert all(count % steps == i * steps // leaves for count in counts[1:])
        assert np.diff(counts[1:]).tolist() == [steps] * (len(counts) - 2)


@pytest.mark.slow
def test_no_step_but_the_first_refreshes_all_leaves_of_an_optimizer() -> None:
    gradients = {name: normal(2, 3, seed=i) for i, name in enumerate("abc")}
    rule = lro.refresh.every(3, stagger=True)
    tx = lro.scale_by_projection(optax.identity(), lro.subspaces.dct(1), refresh_every=rule)
    state, step, refreshed = tx.init(gradients), jax.jit(tx.update), []
    for _ in range(7):
        last = state.next_refresh
        _, state = step(gradients, state)
        refreshed.append([int(state.next_refresh[name]) != int(last[name]) for name in "abc"])
    assert refreshed[0] == [True] * 3
    assert [sum(step) for step in refreshed[1:]] == [1] * 6
    np.testing.assert_array_equal(np.sum(refreshed[1:], axis=0), [2, 2, 2])


def test_never_is_once() -> None:
    assert _due(lro.refresh.never(), 0.0, 1000) == [0]


@pytest.mark.parametrize(
    ("rule", "options", "match"),
    [
        ("every", {"steps": 0}, "refresh_every=0"),
        ("lazily", {"patience": 0}, "patience=0"),
        ("lazily", {"steps": 0}, "=0"),
        ("when_converged", {"shortest": 0}, "shortest=0"),
        ("when_converged", {"shortest": 9, "longest": 8}, "shortest=9 .*longest=8"),
    ],
)
def test_bad_arguments_are_refused_by_name(rule: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(lro.refresh, rule)(**options)


def test_the_lazy_interval_doubles_for_each_matrix_that_stands_still() -> None:
    rule = lro.refresh.lazily(10, threshold=0.4, patience=2)
    statistics, count, intervals = rule.init(STACKED), 0, []
    for overlap in ([0.0, 0.0], [0.9, 0.1], [0.9, 0.3], [0.9, 0.6], [0.0, 0.1]):
        due, statistics = rule.schedule(statistics, count, count, jnp.array(overlap))
        intervals.append(statistics.interval.tolist())
        np.testing.assert_array_equal(due - count, statistics.interval)
        count += 10
    # The mean of the last two: (0, 0), (.45, .05), (.9, .2), (.9, .45), (.45, .35).
    assert intervals == [[10, 10], [20, 10], [40, 10], [80, 20], [160, 20]]


def test_a_lazy_rule_waits_for_as_many_overlaps_as_its_patience() -> None:
    rule = lro.refresh.lazily(10, patience=3)
    statistics, dues = rule.init(VIEW), []
    for count in (0, 10, 20):
        due, statistics = rule.schedule(statistics, count, count, jnp.array(1.0))
        dues.append(int(due))
    assert dues == [10, 20, 40]


@pytest.mark.slow
def test_a_lazy_rule_sees_through_signs_and_rotations_of_the_basis() -> None:
    """A fixed subspace, whose vectors change: its interval doubles all the same."""
    rule = lro.refresh.lazily(1, patience=1)
    tx = lro.scale_by_projection(optax.identity(), lro.subspaces.svd(2), refresh_every=rule)
    column = jnp.linalg.qr(normal(4, 2))[0]
    turns = [jnp.eye(2), jnp.array([[0.0, 1.0], [-1.0, 0.0]])]
    gradients = [
        {"kernel": column @ turn @ jnp.eye(2, 6) * jnp.r_[2.0, 1, 0, 0, 0, 0]} for turn in turns
    ]
    state = tx.init(gradients[0])
    for gradient in gradients:
        _, state = tx.update(gradient, state)
    assert int(state.statistics.interval["kernel"]) == 2
    np.testing.assert_allclose(state.statistics.overlaps["kernel"], [1.0], atol=1e-5)


def _observed(
    rule: lro.refresh.RefreshRule, captured: list[Any], total: list[Any] | None = None
) -> list[list[int]]:
    """When a stack of two is due, after each step, for these norms."""
    due, statistics = rule.schedule(rule.init(STACKED), 0, 0, None)
    dues = []
    for count, norms in enumerate(zip(captured, captured if total is None else total, strict=True)):
        energies = lro.refresh.Energies(*(jnp.square(jnp.asarray(x, jnp.float32)) for x in norms))
        due, statistics = rule.observe(statistics, count, due, energies)
        dues.append(due.tolist())
    return dues


def test_a_subspace_whose_gradient_fell_is_left() -> None:
    rule = lro.refresh.when_converged(fall=0.5, energy=0.0, shortest=1, longest=99, decay=0.0)
    norms = [[2.0, 2.0], [1.1, 2.0], [0.9, 2.0], [0.9, 0.1]]
    assert _observed(rule, norms) == [[99, 99], [99, 99], [3, 99], [3, 4]]


def test_a_subspace_that_lost_the_gradient_s_energy_is_left() -> None:
    rule = lro.refresh.when_converged(fall=0.0, energy=0.5, shortest=1, longest=99, decay=0.0)
    captured = [[0.9, 0.9], [0.72, 0.72], [0.7, 0.8]]
    assert _observed(rule, captured, [[1.0, 1.0]] * 3) == [[99, 99], [99, 99], [3, 99]]


def test_a_subspace_is_left_after_the_longest_and_not_before_the_shortest() -> None:
    rule = lro.refresh.when_converged(shortest=3, longest=7, decay=0.0)
    assert _observed(rule, [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]) == [[7, 7], [7, 7], [3, 7]]


def test_norms_are_moving_averages() -> None:
    rule = lro.refresh.when_converged(fall=0.5, energy=0.0, shortest=1, longest=99, decay=0.5)
    # Of (1, 0, 0): 1, 1/2, 1/4.
    assert _observed(rule, [[1.0, 1.0], [0.0, 0.1], [0.0, 0.1]]) == [[99, 99], [2, 99], [2, 3]]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_norms_that_are_not_finite_are_not_heeded(bad: float) -> None:
    rule = lro.refresh.when_converged(fall=0.5, energy=0.5, shortest=1, longest=99, decay=0.5)
    clean = _observed(rule, [[1.0, 1.0], [0.6, 0.1]])
    broken = _observed(rule, [[1.0, 1.0], [bad, bad], [0.6, 0.1]])
    assert broken[1] == [99, 99]
    assert [[d if d == 99 else d - 1 for d in due] for due in broken[2:]] == clean[1:]


@pytest.mark.slow
@pytest.mark.parametrize("subspace", [None, lro.subspaces.power_iteration(4)])
def test_bases_stay_orthonormal_in_bfloat16_training(subspace: Any) -> None:
    params = {"kernel": normal(16, 24).astype(jnp.bfloat16)}
    tx = lro.galore(0.1, 4, refresh_every=2, subspace=subspace)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        loss = lambda p: jnp.sum(jnp.tanh(p["kernel"] @ normal(24, 4).astype(jnp.bfloat16)) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    bases = []
    for _ in range(7):
        params, state = step(params, state)
        bases.append(state[0].basis["kernel"])
        assert params["kernel"].dtype == jnp.bfloat16
        assert bases[-1].dtype == jnp.float32
        assert gram_error(bases[-1]) < 1e-5
    assert (bases[0] != bases[-1]).any()


def test_the_statistics_of_convergence_are_arrays_of_their_own_and_can_be_donated() -> None:
    params = {"kernel": np.ones((6, 4), np.float32)}
    tx = lro.scale_by_projection(
        optax.identity(), lro.subspaces.svd(2), refresh_every=lro.refresh.when_converged()
    )
    state = tx.init(params)
    _, after = jax.jit(tx.update, donate_argnums=1)(params, state)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.statistics))
    assert jax.tree.structure(after) == jax.tree.structure(state)
