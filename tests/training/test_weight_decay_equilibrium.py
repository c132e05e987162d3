"""The predicted norms and rotations are those of simulated random walks."""

from typing import Any

from close import assert_close
import jax
import numpy as np
import optax
import pytest

from lowrank_optax.training import (
    add_weight_decay,
    equilibrium,
    monitor_weight_decay,
)
from lowrank_optax.training.weight_decay_equilibrium import Optimizer
from tests.training.random_walks import SIZE, late, random_walk


def sgd(rate: float, decay: float, momentum: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(decay),
        optax.sgd(rate, momentum or None),
        monitor_weight_decay(
            learning_rate=rate, weight_decay=decay, optimizer="sgd", momentum=momentum
        ),
    )


def sgdw(rate: float, decay: float, momentum: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.sgd(rate, momentum),
        add_weight_decay(decay, learning_rate=rate),
        monitor_weight_decay(
            learning_rate=rate, weight_decay=decay, optimizer="sgdw", momentum=momentum
        ),
    )


def adamw(rate: float, decay: float, momentum: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.adamw(rate, momentum, weight_decay=decay),
        monitor_weight_decay(learning_rate=rate, weight_decay=decay, momentum=momentum),
    )


MAKE = {"sgd": sgd, "sgdw": sgdw, "adamw": adamw}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "rate", "decay", "momentum", "rotation", "norm"),
    [
        ("sgd", 0.1, 0.05, 0.0, 0.1000, 6.69),
        ("sgd", 0.1, 0.05, 0.9, 0.07255, 11.89),
        ("adamw", 0.01, 0.1, 0.9, 0.01026, 10.0),
    ],
)
def test_the_specified_values_and_a_simulation_agree_with_the_prediction(
    optimizer: Optimizer, rate: float, decay: float, momentum: float, rotation: float, norm: float
) -> None:
    predict = lambda size: equilibrium(
        optimizer, rate, decay, momentum=momentum, size=size, unit_gradient_norm=size**0.5
    )
    np.testing.assert_allclose(predict(2000).rotation, rotation, rtol=1e-3)
    np.testing.assert_allclose(predict(2000).norm, norm, rtol=1e-3)
    # From above, for six times the relaxation and more. Adam's second moment lags behind.
    norm = float(predict(SIZE).norm)
    above, steps = (1.02, 3000) if optimizer == "adamw" else (1.1, 400)
    history, _ = random_walk(MAKE[optimizer](rate, decay, momentum), above * norm, steps)
    assert late(history, "rotation") == pytest.approx(rotation, rel=0.01)
    assert late(history, "weight_norm") == pytest.approx(norm, rel=0.01)
    # The monitor's own prediction is of the same numbers, here from the updates alone.
    assert late(history, "equilibrium_norm") == pytest.approx(norm, rel=0.01)
    assert late(history, "norm_ratio") == pytest.approx(1.0, rel=0.01)
    assert late(history, "rotation_ratio") == pytest.approx(1.0, rel=0.01)


@pytest.mark.slow
def test_decay_after_the_momentum_has_its_own_equilibrium() -> None:
    rate, decay, momentum = 0.02, 0.05, 0.9
    predicted = equilibrium("sgdw", rate, decay, momentum=momentum, unit_gradient_norm=SIZE**0.5)
    history, _ = random_walk(sgdw(rate, decay, momentum), float(predicted.norm), 2000)
    assert late(history, "norm_ratio") == pytest.approx(1.0, rel=0.02)
    assert late(history, "rotation_ratio") == pytest.approx(1.0, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decay", "low"), [pytest.param(0.5, 0.026, marks=pytest.mark.full), (1.0, 0.046)]
)
def test_adamw_comes_out_below_the_limit_of_small_decay(decay: float, low: float) -> None:
    limit = (0.01 * SIZE / 2 / decay) ** 0.5
    # It stays there for thirty times the relaxation; the second moment has forgotten the start.
    history, _ = random_walk(adamw(0.01, decay, 0.9), (1 - low) * limit, 3000)
    assert late(history, "norm_ratio") == pytest.approx(1 - low, abs=0.006)


def test_the_norm_approaches_equilibrium_at_the_predicted_pace() -> None:
    rate, decay = 0.1, 0.05
    at = equilibrium("sgd", rate, decay, unit_gradient_norm=SIZE**0.5)
    history, _ = random_walk(sgd(rate, decay, 0.0), 1.5 * float(at.norm), 200)
    fourth = (np.asarray(history["all"]["weight_norm"]) / float(at.norm)) ** 4 - 1
    np.testing.assert_allclose(at.relaxation_steps, 50)
    # The state is that before an update: the norm at a step has seen as many updates.
    np.testing.assert_allclose(fourth[50] / fourth[0], np.exp(-1), rtol=0.05)
    assert equilibrium("sgd", rate, decay, momentum=0.9).relaxation_steps == pytest.approx(5)
    assert equilibrium("adamw", 0.01, 0.1).relaxation_steps == pytest.approx(500)


def test_weights_of_adamw_are_an_average_of_its_updates() -> None:
    rate, decay, steps = 0.01, 2.0, 60
    gradients = np.random.default_rng(1).normal(size=(steps, 7)).astype(np.float32)
    tx, scaled = optax.adamw(rate, weight_decay=decay), optax.scale_by_adam()
    first = np.linspace(-1, 1, 7, dtype=np.float32)

    def step(carry: Any, g: jax.Array) -> tuple[Any, jax.Array]:
        w, state, inner = carry
        direction, inner = scaled.update(g, inner)
        updates, state = tx.update(g, state, w)
        return (optax.apply_updates(w, updates), state, inner), direction

    run = jax.jit(lambda w, gs: jax.lax.scan(step, (w, tx.init(w), scaled.init(w)), gs))
    (w, *_), directions = run(first, gradients)
    keep = 1 - rate * decay
    weights = keep ** np.arange(steps)[::-1]
    total = weights @ np.asarray(directions, np.float64)
    expected = keep**steps * first.astype(np.float64) - rate * total
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)


def test_without_decay_there_is_no_equilibrium() -> None:
    for optimizer in ("sgd", "sgdw", "adamw"):
        norm, rotation, steps = equilibrium(optimizer, 0.1, 0.0)
        assert np.isinf([norm, steps]).all()
        assert rotation == 0


def test_a_learning_rate_of_zero_gives_no_nan() -> None:
    rates = np.float32([0.0, 0.1])
    for optimizer in ("sgd", "sgdw", "adamw"):
        assert not any(np.isnan(x).any() for x in equilibrium(optimizer, rates, 0.1))
        jitted = jax.jit(equilibrium, static_argnums=0)(optimizer, 0.1, 0.1)
        assert_close(equilibrium(optimizer, 0.1, 0.1), jitted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0.$"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    given = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.1} | arguments
    with pytest.raises(ValueError, match=words):
        equilibrium(**given)
