"""NAG-GS: its numbers, the heavy ball it is, and what it composes with."""

from typing import Any

from close import assert_close
from harness.trees import assert_same_types
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.optimizers.nag_gs_runs import final, normal, updates_of


class PointForm:
    """The paper's x and v in float64, line by line in the trainer's order."""

    def __init__(self, x: Any, mu: float, gamma: float, constant_gamma: bool = False) -> None:
        self.x = np.array(x, np.float64)
        self.v, self.mu, self.gamma, self.constant = self.x.copy(), mu, gamma, constant_gamma

    def update(
        self, gradient: Any, alpha: float, skip: bool = False, stored: Any = np.float64
    ) -> None:
        g = np.asarray(gradient, np.float64)
        if not skip:
            b = alpha * self.mu / (alpha * self.mu + self.gamma)
            self.v = (1 - b) * self.v + b * self.x - alpha / (alpha * self.mu + self.gamma) * g
            self.v = self.v.astype(stored).astype(np.float64)
        a = alpha / (1 + alpha)
        if not self.constant:
            self.gamma = (1 - a) * self.gamma + a * self.mu
        self.x = (1 - a) * self.x + a * self.v


# What must hold: the specification's numbers


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    alpha=st.floats(1e-3, 3.0),
    mu=st.sampled_from([0.0, 1e-4, 0.3, 1.0, 10.0]),
    gamma=st.floats(0.05, 10.0),
    seed=st.integers(0, 1000),
)
def test_constant_gamma_is_gradient_descent_with_momentum(
    alpha: float, mu: float, gamma: float, seed: int
) -> None:
    gradients = {"kernel": normal((12, 3, 2), seed)}
    found = updates_of(lro.nag_gs(alpha, mu, gamma, constant_gamma=True), gradients)
    expected = updates_of(optax.sgd(*lro.to_heavy_ball(alpha, mu, gamma)), gradients)
    assert_close(found, expected, 100)


def test_moving_gamma_is_a_heavy_ball_whose_rate_and_momentum_follow_it() -> None:
    alpha, mu, gamma, gradients = 0.3, 0.5, 2.0, normal((20, 4))
    found, buffer, last = updates_of(lro.nag_gs(alpha, mu, gamma), gradients), 0.0, 0.0
    for k, gradient in enumerate(np.asarray(gradients, np.float64)):
        gamma_k = mu + (gamma - mu) / (1 + alpha) ** k
        rate, beta = lro.to_heavy_ball(alpha, mu, gamma_k)
        buffer = beta * last - rate * gradient
        np.testing.assert_allclose(found[k], buffer, rtol=1e-4, atol=1e-6)
        last = buffer
    limit = lro.to_heavy_ball(alpha, mu, mu)
    assert limit.momentum == pytest.approx(1 / (1 + alpha) ** 2)
    assert limit.learning_rate == pytest.approx(alpha**2 / (mu * (1 + alpha) ** 2))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"constant_gamma": True}, 2.9082e-4),
        ({"paper_start": True}, -6.88893e-5),
        ({}, -6.84423e-5),
    ],
)
def test_two_hundred_steps_on_a_square_end_where_the_references_do(
    options: Any, expected: float
) -> None:
    tx = lro.nag_gs(0.05, 1.0, 1.5, **options)
    with jax.enable_x64(True):
        x, state = final(tx, lambda x: 2 * x, jnp.ones(3, jnp.float64), 200)
        assert x.dtype == state.momentum.dtype == jnp.float64
    assert_close(x, expected, 200, dtype=np.float32)  # the printed digits
    if "constant_gamma" not in options:
        assert abs(float(state.gamma) - 1.0000289) < 2e-7


def test_numbers_of_float64_are_updated_in_float64() -> None:
    """Its scalars too, with a schedule and with weight decay."""
    rate = lambda count: 0.3 * 0.9**count  # many of optax are float32
    point = PointForm(np.ones(4), 0.7, 1.3)
    gradients = np.random.default_rng(0).normal(size=(20, 4))
    for step, gradient in enumerate(gradients):
        shrink = lro.to_heavy_ball(0.3 * 0.9**step, 0.7, point.gamma).learning_rate * 0.1
        decay = shrink * point.x
        point.update(gradient, 0.3 * 0.9**step)
        point.x, point.v = point.x - decay, point.v - decay
    tx = lro.nag_gs(rate, 0.7, 1.3, weight_decay=0.1)
    with jax.enable_x64(True):

        def body(carry: Any, gradient: jax.Array) -> Any:
            updates, state = tx.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        start = jnp.ones(4)
        x, state = jax.lax.scan(body, (start, tx.init(start)), jnp.asarray(gradients))[0]
        assert x.dtype == state.gamma.dtype == jnp.float64
    np.testing.assert_allclose(x, point.x, atol=1e-13)
    np.testing.assert_allclose(state.gamma, point.gamma, rtol=1e-14)


def test_gamma_falls_to_mu_geometrically() -> None:
    alpha, mu, gamma = 0.07, 0.4, 3.0
    tx = lro.nag_gs(alpha, mu, gamma)
    body = lambda state, _: (tx.update(jnp.zeros(1), state)[1], state.gamma)
    _, gammas = jax.jit(lambda: jax.lax.scan(body, tx.init(jnp.zeros(1)), length=80))()
    expected = mu + (gamma - mu) / (1 + alpha) ** np.arange(80)
    assert_close(gammas, expected)


def test_gamma_that_starts_at_mu_is_constant() -> None:
    gradients = normal((10, 3))
    moving = updates_of(lro.nag_gs(0.4, 0.7, 0.7), gradients)
    assert_close(moving, updates_of(lro.nag_gs(0.4, 0.7, 0.7, constant_gamma=True), gradients))


def test_a_shifted_problem_has_shifted_iterates() -> None:
    """So that no weight decay hides in mu."""
    curvature, shift = jnp.array([0.5, 1.0, 4.0]), jnp.array([8.0, -4.0, 2.0])
    tx, start = lro.nag_gs(0.2, 2.0, 1.0), jnp.array([1.0, -2.0, 0.5])
    x, _ = final(tx, lambda x: curvature * x, start, 40)
    shifted, _ = final(tx, lambda x: curvature * (x - shift), start + shift, 40)
    np.testing.assert_allclose(shifted - shift, x, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"constant_gamma": True}, {"paper_start": True}])
def test_the_form_with_two_points_gives_the_same_iterates_with_a_schedule(options: Any) -> None:
    schedule = optax.linear_schedule(0.6, 0.05, 25)
    constant, skip = (name in options for name in ("constant_gamma", "paper_start"))
    tx, start = lro.nag_gs(schedule, 0.8, 2.0, **options), jnp.array([1.0, -2.0])
    two = PointForm(start, 0.8, 2.0, constant)
    curvature = np.array([0.3, 5.0])
    for k in range(30):
        two.update(curvature * two.x, float(schedule(k)), skip=skip and k == 0)
    x, _ = final(tx, lambda x: jnp.asarray(curvature, jnp.float32) * x, start, 30)
    np.testing.assert_allclose(x, two.x, rtol=1e-5, atol=1e-6)


def test_jit_scan_and_a_loop_agree_and_the_state_keeps_its_types() -> None:
    tx, gradients = lro.nag_gs(optax.linear_schedule(0.5, 0.0, 5), 0.5, 2.0), normal((5, 2, 3))
    scanned = updates_of(tx, {"kernel": gradients})["kernel"]
    state = initial = tx.init({"kernel": gradients[0]})
    for gradient, expected in zip(gradients, scanned, strict=True):
        updates, state = tx.update({"kernel": gradient}, state)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5, atol=1e-7)
        assert_same_types(state, initial)


# Edges


def test_the_first_update_of_the_papers_start_moves_gamma_alone() -> None:
    tx, gradient = lro.nag_gs(0.5, 1.0, 2.0, paper_start=True), jnp.array([1.0, jnp.nan])
    updates, state = tx.update(gradient, tx.init(gradient))
    np.testing.assert_array_equal(updates, 0)
    assert_close(state.gamma, (2.0 + 0.5) / 1.5)
    assert_close(tx.update(jnp.ones(2), state)[0], -0.25 / (1.5 * (5 / 3 + 0.5)))


def test_without_gradients_the_momentum_fades_and_without_a_rate_nothing_moves() -> None:
    tx = lro.nag_gs(0.3, 0.5, 2.0, constant_gamma=True)
    beta = lro.to_heavy_ball(0.3, 0.5, 2.0).momentum
    updates = updates_of(tx, jnp.array([1.0, 0.0, 0.0]))
    assert_close(updates[1:] / updates[:-1], beta)
    np.testing.assert_array_equal(updates_of(lro.nag_gs(0.0), normal((3, 2))), 0)


def test_no_convexity_with_a_constant_gamma_is_a_momentum_of_one_over_one_plus_alpha() -> None:
    updates = updates_of(lro.nag_gs(0.25, 0.0, 2.0, constant_gamma=True), jnp.array([1.0, 0, 0]))
    assert_close(updates[1:] / updates[:-1], 0.8)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mu": 0.0}, "mu=0.0 must be a number above 0"),
        ({"mu": -1.0}, "mu=-1.0"),
        ({"mu": -1.0, "constant_gamma": True}, "at least 0"),
        ({"mu": float("nan")}, "mu=nan"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"gamma": -2, "constant_gamma": True}, "gamma=-2"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1"),
        ({"state_bits": 5}, "bits"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        lro.nag_gs(**{"learning_rate": 0.1, **options})


# Dtypes


def test_momentum_is_float32_for_narrow_parameters_or_as_asked() -> None:
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float16)}
    for asked, expected in ((None, jnp.float32), ("bfloat16", jnp.bfloat16)):
        tx = lro.nag_gs(0.1, state_dtype=asked)
        state = tx.init(params)
        updates, after = tx.update(params, state)
        assert {x.dtype for x in jax.tree.leaves(state.momentum)} == {jnp.dtype(expected)}
        assert_same_types(updates, params)
        assert_same_types(after, state)
        assert state.gamma.dtype == jnp.float32


def test_bfloat16_holds_the_momentum_where_it_loses_the_point_it_stands_for() -> None:
    """A slow quadratic: v in bfloat16 rounds back to where it was at every step."""
    curvature, alpha, steps = 0.01, 0.05, 2000
    quadratic, start = lambda x: curvature * x, jnp.array([3.0])
    reference, _ = final(lro.nag_gs(alpha), quadratic, start, steps)
    found, state = final(lro.nag_gs(alpha, state_dtype="bfloat16"), quadratic, start, steps)
    assert state.momentum.dtype == jnp.bfloat16
    assert abs(reference[0] - 1.844) < 1e-3
    assert abs(found[0] - 1.826) < 0.01

    two = PointForm(start, 1.0, 1.0)
    for _ in range(steps):
        two.update(curvature * two.x, alpha, stored=ml_dtypes.bfloat16)
    assert abs(two.x[0] - 3.0) < 1e-9


# Weight decay


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"paper_start": True}, {"constant_gamma": True}])
def test_weight_decay_takes_off_a_share_by_the_heavy_balls_rate(options: Any, dtype: Any) -> None:
    rate, decay = optax.linear_schedule(0.8, 0.2, 4), 0.3
    params = {"kernel": normal((2, 3)).astype(dtype), "bias": jnp.ones(3, dtype)}
    gradients = {"kernel": normal((2, 3), 1).astype(dtype), "bias": jnp.ones(3, dtype)}
    mask = {"kernel": True, "bias": False}
    tx = lro.nag_gs(rate, 0.5, 2.0, weight_decay=decay, weight_decay_mask=mask, **options)
    plain, gamma = lro.nag_gs(rate, 0.5, 2.0, **options), 2.0
    state, bare = tx.init(params), plain.init(params)
    for k in range(3):
        updates, state = tx.update(gradients, state, params)
        without, bare = plain.update(gradients, bare, params)
        share = decay * lro.to_heavy_ball(float(rate(k)), 0.5, gamma).learning_rate
        share = 0.0 if k == 0 and "paper_start" in options else share
        expected = np.asarray(without["kernel"], np.float64) - share * np.float64(params["kernel"])
        tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(np.float64(updates["kernel"]), expected, tolerance, tolerance)
        np.testing.assert_array_equal(updates["bias"], without["bias"])
        assert_same_types(updates, gradients)
        if "constant_gamma" not in options:
            gamma = (gamma + float(rate(k)) * 0.5) / (1 + float(rate(k)))


def test_weight_decay_is_that_of_gradient_descent_at_the_same_rate() -> None:
    ball = lro.to_heavy_ball(0.5, 0.2, 1.0)
    sgd = optax.chain(
        optax.trace(ball.momentum),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(ball.learning_rate),
    )
    start, quadratic = normal((4,)), lambda x: jnp.arange(1.0, 5.0) * x
    tx = lro.nag_gs(0.5, 0.2, 1.0, constant_gamma=True, weight_decay=0.1)
    expected, _ = final(sgd, quadratic, start, 10)
    np.testing.assert_allclose(final(tx, quadratic, start, 10)[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(start, tx.init(start))
