"""1cycle: the spec's reference values, torch's and optax's curves, and momentum that cycles."""

import functools
from typing import Any

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.training import one_cycle, one_cycle_schedules

# torch.optim.lr_scheduler.OneCycleLR(SGD, max_lr=1, total_steps=101), 2.13: step, rate, momentum.
TORCH = {
    "linear": [
        (0, 0.04, 0.95),
        (15, 0.531468, 0.89881),
        (29, 0.990171, 0.85102),
        (30, 0.990099, 0.85099),
        (60, 0.565773, 0.89342),
        (100, 4e-6, 0.95),
    ],
    "cosine": [(15, 0.538009, 0.89812), (30, 0.999758, 0.85002), (60, 0.602581, 0.88974)],
    "three phases": [(45, 0.485597, 0.90358), (59, 0.039614, 0.95), (80, 0.019326, 0.95)],
}
# Its phases end at pct_start * total_steps - 1, and 2 * pct_start * total_steps - 2.
TORCH_UP = (0.3 * 101 - 1) / 100
DIVS = {"div_factor": 25.0, "final_div_factor": 1e4}
OPTAX = {
    "cosine": [(0, 0.04), (15, 0.52), (30, 1), (65, 0.500002), (99, 0.000507), (100, 4e-6)],
    "linear": [(0, 0.04), (15, 0.52), (30, 1), (57, 0.528727), (85, 0.04), (99, 0.00267)]
    + [(100, 4e-6)],
}


def curves(cycle: Any, steps: int) -> tuple[np.ndarray, ...]:
    """The rates and momenta of steps 0 to `steps - 1`."""
    both = jax.jit(lambda steps: tuple(jax.vmap(schedule)(steps) for schedule in cycle))
    return tuple(np.asarray(x) for x in both(np.arange(steps)))


@pytest.mark.parametrize("kind", TORCH)
def test_the_values_of_torch(kind: str) -> None:
    shape = "cosine" if kind == "cosine" else "linear"
    final = 2 * TORCH_UP if kind == "three phases" else None
    cycle = one_cycle_schedules(101, 1.0, pct_start=TORCH_UP, pct_final=final, shape=shape, **DIVS)
    rates, momenta = curves(cycle, 101)
    for step, rate, momentum in TORCH[kind]:
        np.testing.assert_allclose(rates[step], rate, rtol=1e-5, atol=6e-7)
        np.testing.assert_allclose(momenta[step], momentum, atol=6e-6)


@pytest.mark.parametrize("shape", OPTAX)
def test_the_values_of_optax_where_its_boundaries_are_whole(shape: Any) -> None:
    theirs = (
        optax.cosine_onecycle_schedule(100, 1.0)
        if shape == "cosine"
        else optax.linear_onecycle_schedule(100, 1.0)
    )
    final = None if shape == "cosine" else 0.85
    cycle = one_cycle_schedules(101, 1.0, pct_start=0.3, pct_final=final, shape=shape, **DIVS)
    expected, rates = curves((theirs, cycle.learning_rate), 130)  # also past the end
    for step, rate in OPTAX[shape]:
        np.testing.assert_allclose(expected[step], rate, rtol=1e-2)  # the constants are optax's
        np.testing.assert_allclose(rates[step], rate, atol=6e-7)
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_values_at_the_ends_of_phases(shape: Any) -> None:
    cycle = one_cycle_schedules(101, 2.0, shape=shape)  # phases end at 45, 90 and 100
    rates, momenta = curves(cycle, 101)
    assert_close(rates[[0, 45, 90, 100]], np.float32([0.2, 2.0, 0.2, 0.002]))
    assert_close(momenta[[0, 45, 90, 100]], np.float32([0.95, 0.85, 0.95, 0.95]))
    assert rates.argmax() == momenta.argmin() == 45
    np.testing.assert_array_equal(rates[46:] < rates[45:-1], True)


def test_slopes_are_constant_equal_and_opposite() -> None:
    rates, _ = curves(one_cycle_schedules(101, 1.0), 101)
    slopes = np.diff(rates)
    np.testing.assert_allclose(slopes[:45], 0.9 / 45, atol=1e-6)
    np.testing.assert_allclose(slopes[45:90], -0.9 / 45, atol=1e-6)
    np.testing.assert_allclose(slopes[90:], -(0.1 - 0.001) / 10, atol=1e-6)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_both_are_continuous_between_steps(shape: Any) -> None:
    for schedule in one_cycle_schedules(50, 1.0, shape=shape):
        steps = np.linspace(-1, 51, 20_001).astype(np.float32)
        assert np.abs(np.diff(jax.jit(schedule)(steps))).max() < 1e-3


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(3, 500),
    up=st.floats(0.05, 0.6),
    down=st.none() | st.floats(0.05, 0.35),
    shape=st.sampled_from(["linear", "cosine"]),
)
def test_momentum_mirrors_the_learning_rate(
    steps: int, up: float, down: float | None, shape: Any
) -> None:
    end = up if down is None else up + down
    final = None if down is None else end
    cycle = one_cycle_schedules(steps, 1.0, pct_start=up, pct_final=final, shape=shape)
    rates, momenta = (np.asarray(x(np.arange(500)))[:steps] for x in cycle)  # of one shape
    position = np.arange(steps) / (steps - 1)
    low = np.where(position <= up, 0.1, 0.1 if down is not None else 1e-3)
    heights = (rates - low) / (1 - low) + (momenta - 0.85) / 0.1
    within = position <= (1 if down is None else end)
    np.testing.assert_allclose(heights[within], 1, atol=2e-5)
    assert_close(momenta[~within], np.float32(0.95))
    assert 1e-3 * 0.999 <= rates.min() <= rates.max() <= 1


@pytest.mark.parametrize("steps", [3, 4, 5, 7])
def test_few_steps_still_warm_up_and_end_low(steps: int) -> None:
    rates, momenta = curves(one_cycle_schedules(steps, 1.0), steps)
    assert_close(rates[[0, -1]], np.float32([0.1, 0.001]))
    assert rates.max() > 0.5
    assert momenta.min() < 0.92


@pytest.mark.slow
def test_traced_steps_of_any_type_and_steps_past_the_end() -> None:
    cycle = one_cycle_schedules(101, 1.0)
    for schedule in cycle:
        expected = schedule(30)
        assert expected.dtype == jnp.float32
        assert expected.shape == ()
        jitted = jax.jit(schedule)
        for step in (np.int32(30), np.float32(30), np.int64(30), 30.0):
            assert_close(jitted(step), expected)
        curve = jax.jit(jax.vmap(schedule))(np.arange(101))
        assert_close(jitted(np.arange(101)), curve)
        assert_close(jitted(np.array([100, 101, 10**9])), np.broadcast_to(curve[-1], 3))


def test_peaks_and_lengths_may_be_traced() -> None:
    at = lambda peak, steps: one_cycle_schedules(steps, peak).learning_rate(30)
    rates = jax.jit(jax.vmap(at))(np.float32([1.0, 2.0]), np.array([101, 101]))
    assert_close(rates, at(1.0, 101) * np.float32([1, 2]))


def quadratic(params: Any) -> jax.Array:
    return 0.5 * jnp.sum(np.float32([1.0, 3.0, 10.0]) * (params["x"] - 1.0) ** 2)


def train(tx: optax.GradientTransformation, steps: int) -> tuple[Any, Any, Any]:
    """Positions ``[steps, 3]``, the last state, and the states' hyper-parameters of each step."""

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(jax.grad(quadratic)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["x"], getattr(state, "hyperparams", None))

    params = {"x": np.zeros(3, np.float32)}
    run = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=steps))
    (_, state), (xs, log) = run()
    return np.asarray(xs), state, log


@pytest.mark.parametrize(
    ("factory", "plain", "momentum"),
    [
        (optax.sgd, optax.sgd(0.01, momentum=0.9), 0.9),
        (optax.adamw, optax.adamw(0.01, b1=0.9), 0.9),
        (functools.partial(lro.galore, rank=2), lro.galore(0.01, rank=2, b1=0.9), 0.9),
        (optax.adagrad, optax.adagrad(0.01), None),
    ],
)
def test_a_flat_cycle_is_the_plain_optimizer(factory: Any, plain: Any, momentum: Any) -> None:
    flat = {"div_factor": 1.0, "final_div_factor": 1.0}
    if momentum is not None:
        flat |= {"max_momentum": momentum, "min_momentum": momentum}
    tx = one_cycle(factory, 20, 0.01, **flat)
    np.testing.assert_allclose(train(tx, 20)[0], train(plain, 20)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("factory", "momentum"), [(optax.sgd, "momentum"), (optax.lion, "b1"), (optax.nadamw, "b1")]
)
def test_hyper_parameters_are_read_from_the_state(factory: Any, momentum: str) -> None:
    cycle = one_cycle_schedules(21, 0.01)
    _, state, log = train(one_cycle(factory, 21, 0.01), 21)
    assert set(log) == {"learning_rate", momentum}
    expected = dict(zip(("learning_rate", momentum), curves(cycle, 21), strict=True))
    for name, values in log.items():
        assert_close(values, expected[name])
    assert optax.tree.get(state, "hyperparams")[momentum] == log[momentum][-1]


def test_sgd_with_cycled_momentum_step_by_step() -> None:
    rates, momenta = (x.astype(np.float64) for x in curves(one_cycle_schedules(21, 0.02), 21))
    curvature = np.array([1.0, 3.0, 10.0])
    for damped in (False, True):
        x, velocity = np.zeros(3), np.zeros(3)
        expected = []
        for rate, momentum in zip(rates, momenta, strict=True):
            weight = 1 - momentum if damped else 1.0
            velocity = momentum * velocity + weight * curvature * (x - 1)
            x = x - rate * velocity
            expected.append(x)
        tx = one_cycle(optax.sgd, 21, 0.02, dampen=damped)
        np.testing.assert_allclose(train(tx, 21)[0], expected, rtol=1e-4, atol=1e-6)


def constant_gradient(tx: optax.GradientTransformation, steps: int) -> np.ndarray:
    """The updates where every gradient is one."""
    one = np.float32(1)
    step = lambda state, _: tx.update(one, state)[::-1]
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, tx.init(one), length=steps)[1])())


def test_damping_makes_steps_as_long_as_the_learning_rate() -> None:
    """A constant gradient: in the long run steps are lr, or lr / (1 - m) without damping."""
    flat = {"div_factor": 1.0, "final_div_factor": 1.0, "max_momentum": 0.85}
    for dampen, expected in ((True, 0.1), (False, 0.1 / 0.15)):
        tx = one_cycle(optax.sgd, 200, 0.1, dampen=dampen, **flat)
        assert_close(constant_gradient(tx, 200)[-1], -expected, 800)


def test_momentum_cycles_only_where_asked_and_possible() -> None:
    held = one_cycle(optax.sgd, 10, 0.01, momentum_name=None, momentum=0.7)
    _, state, log = train(held, 10)
    assert set(log) == {"learning_rate"}
    assert jax.tree.leaves(optax.tree.get(state, "trace"))  # the momentum that was given
    assert set(train(one_cycle(optax.adagrad, 10, 0.01), 10)[2]) == {"learning_rate"}
    log = train(one_cycle(optax.adam, 10, 0.01, momentum_name="b2"), 10)[2]
    assert set(log) == {"learning_rate", "b2"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hyper_parameters_and_moments_are_float32_for_parameters_in_half_precision(
    dtype: Any,
) -> None:
    """In bfloat16, b2 = 0.999 would be 1, and Adam's updates NaN."""
    params = {"x": np.ones(4, dtype)}
    tx = one_cycle(optax.adamw, 10, 1e-3)
    state = jax.jit(tx.init)(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    types = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert types(after) == types(state)
    assert {x.dtype for x in jax.tree.leaves(after.hyperparams)} == {jnp.dtype("float32")}
    assert updates["x"].dtype == dtype
    expected = -1e-4 * (1 + 1e-4)  # a tenth of the peak, Adam's first step, and weight decay
    np.testing.assert_allclose(updates["x"].astype(jnp.float32), expected, rtol=5e-3)


def adam_with(b1_products: bool, momenta: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The first moments of Adam without bias, by the product of all b1, or by b1 to the t."""
    mu, product, corrected = 0.0, 1.0, []
    for step, (b1, gradient) in enumerate(zip(momenta, gradients, strict=True), 1):
        mu = b1 * mu + (1 - b1) * gradient
        product *= b1
        corrected.append(mu / (1 - (product if b1_products else b1**step)))
    return np.array(corrected)


def test_the_bias_correction_of_adam_under_a_cycled_b1() -> None:
    """optax corrects by b1 to the count: at first too much, and not at all in the long run."""
    steps = 400
    momenta = curves(one_cycle_schedules(steps, 1.0), steps)[1].astype(np.float64)
    ones = np.ones(steps)
    exact = adam_with(True, momenta, ones)
    np.testing.assert_allclose(exact, 1, rtol=1e-10)  # the product is what is right
    approximate = adam_with(False, momenta, ones)

    tx = one_cycle(optax.adam, steps, 1.0, div_factor=1.0, final_div_factor=1.0, b2=0.5, eps=0.0)
    updates = -constant_gradient(tx, steps)
    assert_close(updates, approximate, 800)  # what optax does

    error = approximate - exact
    assert -0.05 < error.min() < -0.01  # a few per cent too short
    assert 5 < error.argmin() < 60  # early
    np.testing.assert_allclose(error[200:], 0, atol=1e-4)  # negligible later


def test_other_arguments_of_the_factory_are_constants() -> None:
    """So integers and functions need no static_args."""
    tx = one_cycle(lro.galore, 10, 0.01, rank=2, refresh_every=3, weight_decay=0.1)
    params = {"kernel": jnp.ones((4, 6))}
    updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    assert optax.tree.get(state, "basis")["kernel"].shape == (4, 2)
    assert bool(jnp.isfinite(updates["kernel"]).all())


def test_bad_arguments_of_the_schedules_are_refused() -> None:
    good = {"total_steps": 10, "peak_value": 1.0}
    for arguments, message in (
        ({"total_steps": 2}, "total_steps=2 must be at least 3"),
        ({"peak_value": 0.0}, "peak_value=0.0 must be above 0"),
        ({"peak_value": lambda count: 1.0}, "must be a number, not a schedule"),
        ({"div_factor": -1.0}, "div_factor=-1.0 must be above 0"),
        ({"final_div_factor": 0}, "final_div_factor=0 must be above 0"),
        ({"pct_start": 1.5}, "pct_start=1.5 must be between 0 and 1"),
        ({"pct_final": 0.45}, "pct_final=0.45 must be between pct_start=0.45 and 1"),
        ({"pct_final": 1.0}, "pct_final=1.0 must be between"),
        ({"shape": "square"}, "shape='square' must be 'linear' or 'cosine'"),
        ({"max_momentum": 1.0}, "max_momentum=1.0 must be"),
        ({"max_momentum": 0.5}, "min_momentum=0.85 and max_momentum=0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            one_cycle_schedules(**good | arguments)
    traced = jax.jit(
        lambda start: one_cycle_schedules(10, 1.0, pct_start=start, pct_final=1.5)[0](0)
    )
    with pytest.raises(ValueError, match=r"pct_final=1\.5 must be between 0 and 1"):
        traced(0.4)


def test_bad_arguments_of_the_optimizer_are_refused() -> None:
    for factory, arguments, message in (
        (optax.sgd, {"learning_rate": 1.0}, "learning_rate=1.0 was given, but"),
        (optax.sgd, {"momentum": 0.9}, "momentum=0.9 was given, but .* momentum_name=None"),
        (optax.adam, {"momentum_name": "momentum"}, "adam has no argument 'momentum'"),
        (optax.scale_by_adam, {}, "scale_by_adam has no argument 'learning_rate'"),
        (optax.adam, {"dampen": True}, "weighs gradients by 1 - b1 itself"),
        (optax.adagrad, {"dampen": True}, "adagrad has no momentum that cycles"),
    ):
        with pytest.raises(ValueError, match=message):
            one_cycle(factory, 10, 1.0, **arguments)
