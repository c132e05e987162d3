"""The predicted norms and rotations are those of simulated random walks."""

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.schedules.weight_decay import (
    add_weight_decay,
    equilibrium,
    monitor_weight_decay,
)
from lowrank_optax.schedules.weight_decay.equilibrium import Optimizer
from tests.schedules.random_walks import SIZE, late, random_walk


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
    predicted = equilibrium(
        optimizer, rate, decay, momentum=momentum, size=SIZE, unit_gradient_norm=SIZE**0.5
    )
    np.testing.assert_allclose(predicted.rotation, rotation, rtol=1e-3)
    np.testing.assert_allclose(predicted.norm, norm, rtol=1e-3)
    # From a tenth above; ten times the relaxation and more.
    steps = 6000 if optimizer == "adamw" else 1000
    history, _ = random_walk(MAKE[optimizer](rate, decay, momentum), 1.1 * norm, steps)
    assert late(history, "rotation") == pytest.approx(rotation, rel=0.01)
    assert late(history, "weight_norm") == pytest.approx(norm, rel=0.01)
    # The monitor's own prediction is of the same numbers, here from the updates alone.
    assert late(history, "equilibrium_norm") == pytest.approx(norm, rel=0.01)
    assert late(history, "norm_ratio") == pytest.approx(1.0, rel=0.01)
    assert late(history, "rotation_ratio") == pytest.approx(1.0, rel=0.01)


def test_decay_after_the_momentum_has_its_own_equilibrium() -> None:
    rate, decay, momentum = 0.02, 0.05, 0.9
    predicted = equilibrium("sgdw", rate, decay, momentum=momentum, unit_gradient_norm=SIZE**0.5)
    history, _ = random_walk(sgdw(rate, decay, momentum), float(predicted.norm), 4000)
    assert late(history, "norm_ratio") == pytest.approx(1.0, rel=0.02)
    assert late(history, "rotation_ratio") == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(("decay", "low"), [(0.5, 0.026), (1.0, 0.046)])
def test_adamw_comes_out_below_the_limit_of_small_decay(decay: float, low: float) -> None:
    history, _ = random_walk(adamw(0.01, decay, 0.9), float((0.01 * SIZE / 2 / decay) ** 0.5), 4000)
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
    first = w = jnp.linspace(-1, 1, 7)
    state, inner = tx.init(w), scaled.init(w)
    directions = []
    for g in gradients:
        direction, inner = scaled.update(g, inner)
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        directions.append(np.asarray(direction, np.float64))
    keep = 1 - rate * decay
    weights = keep ** np.arange(steps)[::-1]
    expected = keep**steps * np.asarray(first, np.float64) - rate * weights @ np.array(directions)
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)


def test_without_decay_there_is_no_equilibrium() -> None:
    for optimizer in ("sgd", "sgdw", "adamw"):
        norm, rotation, steps = equilibrium(optimizer, 0.1, 0.0)
        assert np.isinf([norm, steps]).all()
        assert rotation == 0


def test_a_learning_rate_of_zero_gives_no_nan() -> None:
    rates = jnp.array([0.0, 0.1])
    for optimizer in ("sgd", "sgdw", "adamw"):
        assert not any(jnp.isnan(x).any() for x in equilibrium(optimizer, rates, 0.1))
        jitted = jax.jit(equilibrium, static_argnums=0)(optimizer, 0.1, 0.1)
        assert_close(equilibrium(optimizer, 0.1, 0.1), jitted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    given = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.1} | arguments
    with pytest.raises(ValueError, match=words):
        equilibrium(**given)
