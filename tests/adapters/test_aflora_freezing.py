"""AFLoRA's freezing against the rules written in NumPy, and what a frozen matrix does not do."""

from collections.abc import Callable
import functools
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.training.aflora_scores import kth_smallest, matrix_scores

# The specification's run: 20 epochs of 50 steps, one of warm-up, seven tenths frozen.
RUN = {"total_steps": 1000, "warmup_steps": 50, "final_steps": 700}
SHAPES = [(3, 2), (2, 4), (5, 2), (2, 4), (3, 2), (2, 6)]
Draw = Callable[[int], list[np.ndarray]]


class Controller:
    """The official code's rules in float64, one matrix after the other."""

    def __init__(self, shapes: list[tuple[int, ...]], total: int, warmup: int, final: int) -> None:
        zeros = lambda: [np.zeros(shape) for shape in shapes]
        self.total, self.warmup, self.final = total, warmup, final
        self.w, self.i, self.u = zeros(), zeros(), zeros()
        self.frozen_at: dict[int, int] = {}

    def rho(self, t: int) -> float:
        if t <= self.warmup:
            return 1.0
        if t > self.total - self.final:
            return 0.0
        return (1 - (t - self.warmup) / (self.total - self.warmup - self.final)) ** 3

    def step(self, t: int, gradients: list[np.ndarray]) -> None:
        place = t % 10
        left = [j for j in range(len(gradients)) if j not in self.frozen_at]
        for j in left:
            size = np.abs(gradients[j])
            if place == 0:
                self.i[j] = 0.85 * self.i[j] + 0.15 * self.w[j]
                self.u[j] = 0.95 * self.u[j] + 0.05 * np.abs(self.w[j] - self.i[j])
                self.w[j] = size
            else:
                self.w[j] = (place * self.w[j] + size) / (place + 1)
        if left and t > self.warmup and (place == 0 or t > self.total - self.final):
            scores = {j: self.i[j] * self.u[j] for j in left}
            pool = np.sort(np.concatenate([s.ravel() for s in scores.values()]))
            k = int(np.floor(len(pool) * (1 - self.rho(t))))
            for j in left:
                if k and scores[j].mean() < pool[k - 1]:
                    self.frozen_at[j] = t


def halving(seed: int) -> Draw:
    """Gradients whose scale halves from one matrix to the next."""
    rng = np.random.default_rng(seed)
    return lambda t: [rng.uniform(size=s) * 2.0**-j for j, s in enumerate(SHAPES)]


def tree_of(arrays: list[np.ndarray]) -> dict[str, Any]:
    return {
        f"layer{j}": {"A" if j % 2 else "B": np.asarray(x, np.float32)}
        for j, x in enumerate(arrays)
    }


def trace(tx: optax.GradientTransformation, state: Any, gradients: Any) -> Any:
    """The flags after each step."""

    def body(state: Any, gradient: Any) -> Any:
        state = tx.update(gradient, state)[1]
        return state, state.frozen

    return jax.lax.scan(body, state, gradients)[1]


compiled = jax.jit(trace, static_argnums=0)


def frozen_steps(tx: optax.GradientTransformation, draw: Draw, steps: int) -> dict[int, int]:
    """Each matrix and the step at which it was frozen."""
    drawn = [tree_of(draw(t)) for t in range(steps)]
    gradients = jax.tree.map(lambda *x: np.stack(x), *drawn)
    flags = [np.asarray(x) for x in jax.tree.leaves(compiled(tx, tx.init(drawn[0]), gradients))]
    return {j: int(f.argmax()) for j, f in enumerate(flags) if f.any()}


@functools.cache  # equal ones are one program
def freezing(**options: Any) -> optax.GradientTransformationExtraArgs:
    return lro.adapters.aflora_freezing(optax.sgd(0.1), **{**RUN, **options})


def test_the_schedule_has_the_specifications_values() -> None:
    rho = jax.jit(lro.adapters.aflora_schedule(**RUN))
    for t, value in {60: 0.884736, 100: 0.512, 150: 0.216, 200: 0.064, 290: 6.4e-5}.items():
        assert np.isclose(rho(t), value, rtol=1e-4), t
    assert rho(50) == 1
    assert rho(301) == 0
    values = np.array([rho(t) for t in range(0, 400, 7)])
    assert np.all(np.diff(values) <= 0)
    squared = lro.adapters.aflora_schedule(100, 30, 30, exponent=2)
    assert np.isclose(squared(50), 0.25)


def test_constant_gradients_give_the_specifications_scores() -> None:
    c = 3.0
    tx = freezing()
    gradient = {"A": np.full((2, 3), -c, np.float32)}
    update, state = jax.jit(tx.update), tx.init(gradient)
    seen = {}
    for t in range(21):
        _, state = update(gradient, state)
        seen[t] = (state.sensitivity["A"], state.uncertainty["A"])
    assert not np.any(seen[9])
    for t, i, u, s in ((10, 0.15, 0.0425, 0.006375), (20, 0.2775, 0.0765, 0.02122875)):
        assert_close(seen[t][0], i * c, 100)
        assert_close(seen[t][1], u * c, 100)
        assert_close(seen[t][0] * seen[t][1], s * c**2, 100)


def test_six_matrices_are_frozen_in_the_specifications_order() -> None:
    """Faster than rho falls, since the quantile is of those that are left."""
    found = frozen_steps(freezing(), halving(0), 150)
    assert list(found.values()) == [140, 100, 90, 80, 80, 70]
    controller, draw = (
        Controller(SHAPES, *RUN.values()),
        halving(0),
    )
    for t in range(150):
        controller.step(t, draw(t))
    assert found == controller.frozen_at


@pytest.mark.parametrize("seed", range(3))
def test_freezing_steps_are_those_of_the_reference(seed: int) -> None:
    options = {"total_steps": 120, "warmup_steps": 10, "final_steps": 30}
    draw = lambda rng: lambda t: [rng.normal(size=s) * (1 + j % 3) for j, s in enumerate(SHAPES)]
    found = frozen_steps(freezing(**options), draw(np.random.default_rng(seed)), 100)
    controller, again = Controller(SHAPES, 120, 10, 30), draw(np.random.default_rng(seed))
    for t in range(100):
        controller.step(t, again(t))
    assert found == controller.frozen_at
    assert len(found) == 6


def test_the_order_does_not_depend_on_the_scale_of_the_loss() -> None:
    scaled = lambda factor: (lambda draw: lambda t: [factor * x for x in draw(t)])(halving(1))
    tx = freezing()
    expected = frozen_steps(tx, scaled(1.0), 150)
    assert len(expected) == 6
    for factor in (2.0**-20, 2.0**12):
        assert frozen_steps(tx, scaled(factor), 150) == expected


def test_the_fraction_mode_follows_the_schedule_and_does_not_compound() -> None:
    found = frozen_steps(freezing(mode="fraction"), halving(0), 320)
    assert sorted(found, key=found.__getitem__) == [5, 4, 3, 2, 1, 0]
    sizes = np.array([np.prod(s) for s in SHAPES])
    rho = jax.jit(lro.adapters.aflora_schedule(**RUN))
    for t in range(60, 301, 10):
        gone = sum(sizes[j] for j, at in found.items() if at <= t)
        following = next((sizes[j] for j in (5, 4, 3, 2, 1, 0) if found[j] > t), np.inf)
        allowed = sizes.sum() * (1 - float(rho(t))) + 1e-3
        assert gone <= allowed < gone + following + 1e-2


@pytest.mark.slow
def test_the_fraction_counts_what_a_later_phase_has_no_more() -> None:
    """The same steps with the frozen leaves taken out of the tree on the way."""
    tx, draw = freezing(mode="fraction"), halving(0)
    gradients = [tree_of(draw(t)) for t in range(320)]
    state, update, at = tx.init(gradients[0]), jax.jit(tx.update), {}
    for t, gradient in enumerate(gradients):
        left = {layer: x for layer, x in gradient.items() if layer not in at}
        if not left:
            break
        _, state = update(left, state)
        gone = lro.adapters.frozen_leaves(state)
        if gone:
            at |= {name.split("/")[0]: t for name in gone}
            fewer = {layer: x for layer, x in left.items() if layer not in at}
            state = lro.adapters.carry_state(tx.init(fewer), state)
    expected = frozen_steps(freezing(mode="fraction"), halving(0), 320)
    assert {int(name[-1]): t for name, t in at.items()} == expected


def test_all_are_frozen_at_the_end_also_when_all_scores_tie() -> None:
    constant = lambda t: [np.ones(s) for s in SHAPES]
    found = frozen_steps(freezing(total_steps=100, warmup_steps=0, final_steps=50), constant, 60)
    assert set(found.values()) == {50}


def test_no_warm_up_end_never_freezes() -> None:
    options = {"total_steps": 60, "warmup_steps": 60, "final_steps": 0}
    assert not frozen_steps(freezing(**options), halving(0), 60)


def test_layers_of_a_stack_are_frozen_as_separate_leaves_are() -> None:
    rng = np.random.default_rng(5)
    drawn = [rng.uniform(size=(4, 3, 2)) * 2.0 ** -np.arange(4)[:, None, None] for _ in range(150)]
    separate = frozen_steps(freezing(), lambda t: [*drawn[t]], 150)
    tx = freezing()
    update, state = jax.jit(tx.update), tx.init({"A": np.zeros((4, 3, 2), np.float32)})
    at = {}
    for t in range(150):
        _, state = update({"A": np.asarray(drawn[t], np.float32)}, state)
        at |= {j: t for j in np.flatnonzero(state.frozen["A"]) if j not in at}
    assert at == separate
    assert len(set(at.values())) > 1


def test_the_kth_smallest_is_exact() -> None:
    found_by = jax.jit(kth_smallest)
    for k in (0, 1, 7, 12, 18):
        arrays, excluded, expected = kth_case(k)
        assert found_by(arrays, excluded, k) == expected


def kth_case(k: int) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Arrays, which of their matrices do not count, and the k-th smallest number of the rest."""
    rng = np.random.default_rng(k)
    arrays = [
        np.exp(rng.normal(size=(3, 2, 2)) * 20),
        np.zeros((1, 2, 1)),
        rng.uniform(size=(2, 4)),
    ]
    arrays = [x.astype(np.float32) for x in arrays]
    excluded = [np.array([False, True, False]), np.array([False]), np.array(False)]
    pool = np.sort(
        np.concatenate([x[~out].ravel() for x, out in zip(arrays, excluded, strict=True)])
    )
    return arrays, excluded, pool[k - 1] if k else 0


def test_the_mean_of_equal_scores_is_exactly_theirs() -> None:
    for value in (0.1, 1e-12, 0.7):
        x = jnp.full((3, 5, 7), value, jnp.float32)
        np.testing.assert_array_equal(matrix_scores(x), x[:, 0, 0])


def test_unusable_options_are_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        freezing(warmup_steps=400)
    with pytest.raises(ValueError, match="mode='median'"):
        freezing(mode="median")
    with pytest.raises(ValueError, match="window=0"):
        freezing(window=0)
    with pytest.raises(ValueError, match="names='A'"):
        freezing(names="A")
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        lro.adapters.aflora_schedule(10, -1, 0)
