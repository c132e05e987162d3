"""EfficientPackNet: tasks in a row share weights, and none changes what an earlier one computes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

pytestmark = pytest.mark.slow

packnet = lro.layers.packnet
ALPHA = 1.5
UNITS, INPUTS, OUTPUTS = 32, 6, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(64, INPUTS)), jnp.float32)
HEADS = {task: jax.random.normal(jax.random.key(task), (UNITS, OUTPUTS)) / 6 for task in (1, 2)}
TARGETS = {1: X[:, :OUTPUTS], 2: jnp.tanh(X[:, OUTPUTS:] - X[:, :OUTPUTS])}


def draw(seed: int) -> Any:
    """What is trained of the two layers that tasks share; their heads are fixed here."""
    up, mid = jax.random.split(jax.random.key(seed))
    weights = {
        "up": {
            "kernel": jax.random.normal(up, (INPUTS, UNITS)) / INPUTS**0.5,
            "bias": jnp.zeros(UNITS),
        },
        "mid": {"kernel": jax.random.normal(mid, (UNITS, UNITS)) / UNITS**0.5},
    }
    return lro.layers.powerprop_inverse(weights, ALPHA)


def outputs(theta: Any, task: int) -> jax.Array:
    w = lro.layers.powerprop(theta, ALPHA)
    hidden = jnp.tanh(X @ w["up"]["kernel"] + w["up"]["bias"])
    return jnp.tanh(hidden @ w["mid"]["kernel"]) @ HEADS[task]


def score(task: int) -> Any:
    """The share of the targets' squares that is explained."""
    y = TARGETS[task]
    return jax.jit(lambda theta: 1 - jnp.sum((outputs(theta, task) - y) ** 2) / jnp.sum(y**2))


def train(state: Any, theta: Any, task: int, steps: int = 300) -> Any:
    inner = optax.adamw(0.02, weight_decay=0.01)
    tx = lro.layers.mask_updates(inner, packnet.free_masks(state))
    loss = lambda theta: jnp.mean((outputs(theta, task) - TARGETS[task]) ** 2)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        theta, state = carry
        updates, state = tx.update(jax.grad(loss)(theta), state, theta)
        return (optax.apply_updates(theta, updates), state), None

    carry = theta, tx.init(theta)
    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0][0])(carry)


@pytest.fixture(scope="module")
def tasks() -> list[tuple[Any, Any]]:
    """What is trained, and what `prune` found, after each of two tasks."""
    theta, found = draw(0), []
    state = packnet.init(theta)
    for task in (1, 2):
        theta = train(state, packnet.redraw(state, theta, draw(task)), task)
        pruned = packnet.prune(state, theta, score(task), tolerance=0.95)
        state = pruned.state
        found.append((theta, pruned))
    return found


def test_outputs_of_a_task_are_the_same_to_the_last_bit_after_the_next(tasks: Any) -> None:
    (theta_1, pruned_1), (theta_2, pruned_2) = tasks
    run = jax.jit(outputs, static_argnums=1)
    before = run(packnet.of_task(pruned_1.state, theta_1, 1), 1)
    after = run(packnet.of_task(pruned_2.state, theta_2, 1), 1)
    np.testing.assert_array_equal(before, after)
    changed = jnp.mean(theta_1["up"]["kernel"] != theta_2["up"]["kernel"])
    assert 0.1 < changed < 1


def test_each_task_keeps_its_score_with_a_part_of_the_weights(tasks: Any) -> None:
    for task, (theta, pruned) in enumerate(tasks, 1):
        assert pruned.dense_score > 0.8
        assert pruned.score >= 0.95 * pruned.dense_score
        assert 0 < pruned.keep < 1
        assert abs(score(task)(packnet.of_task(pruned.state, theta, task)) - pruned.score) < 1e-6


def test_the_bisection_finds_the_smallest_share_of_the_grid(tasks: Any) -> None:
    theta, pruned = tasks[0]
    start = packnet.init(theta)
    levels = packnet.LEVELS

    def score_at(level: float) -> float:
        exactly = packnet.prune(start, theta, score(1), tolerance=1e-6, levels=(level,))
        return exactly.score

    assert score_at(levels[levels.index(pruned.keep) - 1]) < 0.95 * pruned.dense_score
    assert abs(score_at(pruned.keep) - pruned.score) < 1e-6


def test_owners_are_never_overwritten_and_the_rest_stays_free(tasks: Any) -> None:
    (_, pruned_1), (_, pruned_2) = tasks
    assert (int(pruned_1.state.task), int(pruned_2.state.task)) == (1, 2)
    for name in ("up", "mid"):
        first, second = (np.asarray(p.state.owner[name]["kernel"]) for p in (pruned_1, pruned_2))
        assert set(np.unique(first)) == {0, 1}
        assert set(np.unique(second)) == {0, 1, 2}
        np.testing.assert_array_equal(first == 1, second == 1)
        free = packnet.free_masks(pruned_2.state)[name]["kernel"]
        np.testing.assert_array_equal(free, second == 0)
        expected = max(1, int(pruned_2.keep * (first == 0).sum()))
        assert abs((second == 2).sum() - expected) <= 1
    # Biases are the first task's, or its outputs would change.
    assert (pruned_1.state.owner["up"]["bias"] == 1).all()


def test_a_new_task_starts_from_new_weights_where_they_are_free(tasks: Any) -> None:
    theta, pruned = tasks[0]
    fresh = draw(9)
    redrawn = packnet.redraw(pruned.state, theta, fresh)
    owner = np.asarray(pruned.state.owner["up"]["kernel"])
    expected = np.where(owner == 0, fresh["up"]["kernel"], theta["up"]["kernel"])
    np.testing.assert_array_equal(redrawn["up"]["kernel"], expected)
    assert (redrawn["up"]["kernel"] != 0).all()


def test_everything_is_kept_if_nothing_less_is_enough() -> None:
    theta = draw(0)
    dense = lambda t: 1.0 if all(bool((x != 0).all()) for x in jax.tree.leaves(t["mid"])) else 0.1
    pruned = packnet.prune(packnet.init(theta), theta, dense, levels=(0.1, 0.5))
    assert pruned.keep == 1.0
    assert pruned.score == pruned.dense_score == 1.0
    assert (pruned.state.owner["mid"]["kernel"] == 1).all()


def test_stacked_layers_give_up_the_same_share_each() -> None:
    kernel = (
        jax.random.normal(jax.random.key(0), (3, 6, 6)) * jnp.array([1.0, 9.0, 81.0])[:, None, None]
    )
    params = {"norm": {"scale": jnp.ones((3, 6))}, "up": {"kernel": kernel}}
    done = packnet.prune(packnet.init(params), params, lambda _: 1.0, levels=(0.25, 1.0))
    owned = np.asarray(done.state.owner["up"]["kernel"] == 1)
    assert owned.sum(axis=(1, 2)).tolist() == [9, 9, 9]


def test_bad_arguments_are_refused() -> None:
    theta = draw(0)
    state = packnet.init(theta)
    for tolerance in (0.0, 1.1):
        with pytest.raises(ValueError, match="tolerance="):
            packnet.prune(state, theta, score(1), tolerance)
    for levels in ((), (0.5, 0.1), (0.0, 1.0), (0.5, 2.0)):
        with pytest.raises(ValueError, match="levels="):
            packnet.prune(state, theta, score(1), levels=levels)
    with pytest.raises(ValueError, match="score with all weights is -1"):
        packnet.prune(state, theta, lambda _: -1.0)
    full = packnet.PackNetState(jnp.array(255), state.owner)
    with pytest.raises(ValueError, match="255 tasks"):
        packnet.prune(full, theta, lambda _: 1.0)


def test_pruning_holds_the_owners_of_one_share_at_a_time() -> None:
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(17, 23)))}
    state = packnet.init(params)
    held: list[int] = []

    def explained(params: Any) -> jax.Array:
        arrays = jax.live_arrays()
        held.append(sum(a.dtype == jnp.uint8 and a.shape == (17, 23) for a in arrays))
        return jnp.sum(params["kernel"] ** 2)

    packnet.prune(state, params, explained, 0.9)
    assert max(held) == 1  # those of the state
