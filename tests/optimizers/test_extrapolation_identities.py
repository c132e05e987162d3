"""What extrapolation does on problems that have an answer on paper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

SAME = {0.13: 7.69, 0.2: 5.0, 0.5: 2.0, 1.0: 1.0}
PAST = {0.1: 1.667, 0.2: 1.4286, 0.5: 1.0, 1.0: 0.6667}


def quadratic(w: jax.Array, curvature: Any) -> jax.Array:
    return 0.5 * jnp.sum(curvature * w**2)


def step_of(variant: str, rate: Any, inner: Any, loss: Any = quadratic) -> Any:
    """Gradient descent: ``step((w, state), batch) -> ((w, state), w)``."""
    f = lro.extrapolated_value_and_grad(loss, variant, inner)

    def step(carry: Any, batch: Any) -> Any:
        w, state = carry
        more = {"independent": (batch,)} if variant == "fresh" else {}
        _, gradient, state = f(w, state, batch, **more)
        w = w - rate * gradient
        return (w, state), w

    return step, f.init


@pytest.mark.parametrize("variant", ["same", "fresh"])
@pytest.mark.parametrize(
    ("rate", "inner", "curvature"), [(0.5, 0.2, 1.0), (0.3, 0.3, 2.0), (1.0, 0.13, 5.0)]
)
def test_two_passes_contract_by_1_minus_x_plus_r_x_squared(
    variant: str, rate: float, inner: float, curvature: float
) -> None:
    step, init = step_of(variant, rate, inner)
    w = jnp.array([1.0])
    found = float(step((w, init(w)), curvature)[1][0])
    x, r = rate * curvature, inner / rate
    assert found == pytest.approx(1 - x + r * x**2, rel=1e-5)
    if (rate, inner, curvature) == (0.5, 0.2, 1.0):
        assert found == pytest.approx(0.6)
        assert step_of("none", rate, 0.0)[0]((w, init(w)), curvature)[1][0] == pytest.approx(0.5)


@jax.jit
def grows(steps: jax.Array, x: jax.Array, ratio: jax.Array) -> dict[str, jax.Array]:
    """Whether descent at a step of x / curvature and a ratio of the rates runs away."""

    def runs_away(variant: str) -> jax.Array:
        step, init = step_of(variant, x, ratio * x)
        start = jnp.ones(()), init(jnp.ones(()))
        w, _ = jax.lax.fori_loop(0, steps, lambda _, carry: step(carry, 1.0)[0], start)
        return ~(jnp.abs(w) < 1)

    return {variant: runs_away(variant) for variant in ("same", "past_local")}


@pytest.mark.parametrize(("variant", "limits"), [("same", SAME), ("past_local", PAST)])
def test_stability_limits_on_the_step_size(variant: str, limits: dict[float, float]) -> None:
    """By bisection on runs of 4000 steps, whose growth per step is seen from 0.1% on."""
    for ratio, limit in limits.items():
        low, high = 0.5 * limit, 1.5 * limit
        for _ in range(12):
            middle = (low + high) / 2
            away = bool(grows(4000, middle, ratio)[variant])
            low, high = (low, middle) if away else (middle, high)
        formula = 1 / ratio if variant == "same" else 2 / (1 + 2 * ratio)
        assert low == pytest.approx(formula, rel=2e-3), ratio
        assert formula == pytest.approx(limit, rel=1e-3)


def test_two_passes_more_than_triple_the_limit_just_above_an_eighth() -> None:
    """Below an eighth it is (1 - sqrt(1 - 8r)) / 2r."""
    r = 0.12
    limit = (1 - np.sqrt(1 - 8 * r)) / (2 * r)
    assert not grows(4000, 0.995 * limit, r)["same"]
    assert grows(4000, 1.005 * limit, r)["same"]
    assert not grows(4000, 7.9, 0.126)["same"]
    assert grows(4000, 8.0, 0.126)["same"]


@pytest.mark.parametrize("variant", ["past_local", "past_global"])
def test_the_points_ahead_are_optimistic_gradient_descent(variant: str) -> None:
    """h follows optax's, and w = h + inner_learning_rate * (last gradient)."""
    rate, inner = 0.3, 0.2
    loss = lambda w, _: (jnp.sum(jnp.cos(w) + 0.1 * w**4), w)
    f = lro.extrapolated_value_and_grad(loss, variant, inner, has_aux=True)
    w = h = jnp.array([0.5, -1.0, 2.0])
    state = f.init(w)
    tx = optax.optimistic_gradient_descent(1.0, alpha=rate, beta=inner)
    first, *rest = tx.init(h)
    opt_state = (first._replace(is_initial_step=jnp.array(False)), *rest)
    last = jnp.zeros(3)
    for _ in range(8):
        np.testing.assert_allclose(w, h + inner * last, atol=1e-6)
        (_, ahead), gradient, state = f(w, state, 0)
        np.testing.assert_allclose(ahead, h, atol=1e-6)
        w, last = w - rate * gradient, gradient
        updates, opt_state = tx.update(jax.grad(loss, has_aux=True)(h, 0)[0], opt_state, h)
        h = optax.apply_updates(h, updates)


def game(players: Any, _: Any) -> jax.Array:
    """A loss whose gradient is that of min over x, max over y, of x·y."""
    x, y = players["x"], players["y"]
    hold = jax.lax.stop_gradient
    return x * hold(y) - hold(x) * y


@pytest.mark.parametrize("rate", [0.3, 0.7, 0.95])
def test_a_bilinear_game_converges_with_a_look_ahead(rate: float) -> None:
    """Of squared radius 1 + rate² a step without, and 1 - rate² + rate⁴ with two passes."""
    players = {"x": jnp.float32(1.0), "y": jnp.float32(0.5)}
    size = lambda p: float(p["x"] ** 2 + p["y"] ** 2)
    factors = {"none": 1 + rate**2, "same": 1 - rate**2 + rate**4}
    for variant, factor in factors.items():
        f = lro.extrapolated_value_and_grad(game, variant, rate)
        p, state = players, f.init(players)
        for _ in range(3):
            before = size(p)
            _, gradient, state = f(p, state, 0)
            p = jax.tree.map(lambda w, g: w - rate * g, p, gradient)
            assert size(p) == pytest.approx(before * factor, rel=1e-4)
    assert factors["same"] < 1 < factors["none"]


def test_gradients_under_noise_are_those_of_the_smoothed_loss() -> None:
    """Of cos, smoothed by a normal distribution of deviation s: exp(-s²/2) cos; by a uniform one
    of half-width a: sin(a)/a cos."""
    w, inner = jnp.full(20_000, 0.7), 0.8
    a = inner * np.sqrt(3)
    for noise, damping in (("normal", np.exp(-(inner**2) / 2)), ("uniform", np.sin(a) / a)):
        f = lro.extrapolated_value_and_grad(
            lambda w, _: jnp.sum(jnp.cos(w)), "noise", inner, noise=noise
        )
        gradient = f(w, f.init(w), 0)[1]
        expected = -damping * np.sin(0.7)
        assert float(gradient.mean()) == pytest.approx(expected, abs=4 * 0.6 / np.sqrt(w.size))
        assert abs(expected + np.sin(0.7)) > 0.1  # and is not the plain gradient


def test_under_noise_the_gradient_of_a_quadratic_is_the_plain_one_on_average() -> None:
    matrix = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    w = jnp.array([1.0, -1.0])
    f = lro.extrapolated_value_and_grad(lambda w, _: 0.5 * w @ matrix @ w, "noise", 0.5)

    def step(state: Any, _: None) -> Any:
        _, gradient, state = f(w, state, 0)
        return state, gradient

    gradients = jax.lax.scan(step, f.init(w), length=4000)[1]
    spread = 0.5 * np.sqrt(np.diag(np.asarray(matrix @ matrix)))
    np.testing.assert_allclose(gradients.std(0), spread, rtol=0.05)
    error = np.abs(gradients.mean(0) - matrix @ w)
    assert (error < 4 * spread / np.sqrt(4000)).all()


@pytest.mark.slow
def test_filter_normalized_noise_has_the_norm_of_its_column() -> None:
    """Of a matrix, of one turned around by dimension numbers, of a convolution and of a vector."""
    columns = jnp.array([0.1, 1.0, 10.0])
    params = {"dense": jnp.ones((400, 3)) * columns, "turned": (jnp.ones((400, 3)) * columns).T}
    params |= {"conv": jnp.ones((5, 5, 16, 3)) * columns, "bias": columns}
    numbers = {"dense": (0, 1), "turned": (1, 0)}
    rule = {n: lro.WeightDimensionNumbers(*axes) for n, axes in numbers.items()}
    loss = lambda p, _: (0.0 * p["bias"].sum(), p)
    f = lro.extrapolated_value_and_grad(
        loss,
        "noise",
        0.1,
        has_aux=True,
        filter_normalized=True,
        weight_dimension_numbers={**rule, "conv": None, "bias": None},
    )
    call = jax.jit(lambda state: f(params, state, 0))
    (_, points), _, state = call(f.init(params))
    moved = {name: np.asarray(points[name] - params[name]) for name in params}
    for name, noise in {**moved, "turned": moved["turned"].T}.items():
        if name != "bias":
            flat = noise.reshape(-1, 3)
            expected = 0.1 * np.sqrt(len(flat)) * columns
            np.testing.assert_allclose(flat.std(0), expected, rtol=0.2)
    assert (np.abs(moved["bias"]) < 0.5 * columns).all()
    (_, after), _, _ = call(state)
    assert not np.allclose(after["dense"], points["dense"])  # new noise at every step


def test_extrapolation_damps_sharp_directions() -> None:
    """For a small inner rate, the gradient is g - rate * H g."""
    loss = lambda w, _: jnp.sum(w**4)
    w = np.array([1.0, 0.5], np.float32)
    f = lro.extrapolated_value_and_grad(loss, "same", 1e-3)
    g, hessian = 4 * w**3, np.diag(12 * w**2)
    found = jax.jit(f)(w, f.init(w), 0)[1]
    # What is left out is the square of the rate times half of the third derivative, 24 w.
    error = 1e-6 * 12 * w * g**2
    np.testing.assert_allclose(found, g - 1e-3 * hessian @ g, rtol=0, atol=1.1 * error.max())
