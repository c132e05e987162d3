"""The range test: its curve, what it suggests, and that it leaves no trace."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.training import lr_range_test, refine_weight_decay
from lowrank_optax.training.range_test import centred_mean, read_curve

DOCS = Path(__file__).parents[2] / "docs"
CURVATURE = 8.0  # gradient descent diverges above a learning rate of 2 / 8


def descend(x: Any, batch: Any, learning_rate: Any) -> tuple[Any, Any]:
    """Gradient descent on a quadratic."""
    return x - learning_rate * CURVATURE * x, 0.5 * CURVATURE * jnp.sum(x**2)


def decayed(x: Any, batch: Any, learning_rate: Any, weight_decay: Any) -> tuple[Any, Any]:
    """The same on one with its minimum at 1, and weight decay."""
    gradient = CURVATURE * (x - 1) + weight_decay * x
    return x - learning_rate * gradient, 0.5 * CURVATURE * jnp.sum((x - 1) ** 2)


def regression(seed: int = 0) -> tuple[Any, Any, Any]:
    """A step of SGD with momentum on noisy data, its state, and stacked batches."""
    tx = optax.trace(0.9)
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x = normal(60, 8, 5)
    y = x @ np.arange(5, dtype=np.float32) + np.float32(0.1) * normal(60, 8)
    params = {"kernel": normal(5), "bias": np.float32(0)}
    state = {"params": params, "moments": tx.init(params), "mean": np.float32(0), "seen": 0}

    def step(state: Any, batch: Any, learning_rate: Any) -> tuple[Any, Any]:
        inputs, targets = batch
        loss = lambda p: jnp.mean((inputs @ p["kernel"] + p["bias"] - targets) ** 2)
        value, gradient = jax.value_and_grad(loss)(state["params"])
        updates, moments = tx.update(gradient, state["moments"])
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], updates)
        mean = 0.9 * state["mean"] + 0.1 * inputs.mean()  # as a batch norm's
        return {
            "params": params,
            "moments": moments,
            "mean": mean,
            "seen": state["seen"] + 1,
        }, value

    return step, state, (x, y)


def as_numpy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def assert_equal(result: Any, expected: Any, **tolerance: float) -> None:
    assert result.stopped_at == expected.stopped_at
    for one, other in zip(result[:3], expected[:3], strict=True):
        np.testing.assert_allclose(one, other, **{"rtol": 1e-4, **tolerance})


@pytest.mark.parametrize("scan", ["auto", False])
def test_gradient_descent_on_a_quadratic_diverges_from_two_over_the_curvature_on(
    scan: Any,
) -> None:
    result = lr_range_test(descend, jnp.ones(3), None, steps=200, scan=scan)
    rates, losses = result.learning_rates, result.losses
    limit = 2 / CURVATURE
    # A loss is measured before its step acts: it rises first after a rate above the limit.
    ratio = losses[1 : result.stopped_at] / losses[: result.stopped_at - 1]
    acted = rates[: result.stopped_at - 1]
    assert (ratio[acted < 0.999 * limit] <= 1).all()
    assert (ratio[acted > 1.001 * limit] > 1).all()
    np.testing.assert_allclose(ratio, (1 - acted * CURVATURE) ** 2, rtol=1e-3, atol=1e-5)
    for suggestion in result.suggestions:
        assert 0.01 * limit < suggestion.learning_rate < limit
    assert rates[result.stopped_at] > limit


def test_learning_rates_rise_by_a_constant_ratio_or_difference() -> None:
    rates = lr_range_test(descend, jnp.ones(1), None).learning_rates
    assert rates.shape == (100,)
    assert_close(rates[[0, -1]], [1e-7, 10.0])
    assert_close(rates[1:] / rates[:-1], 1e8 ** (1 / 99))
    options = {"mode": "linear", "min_learning_rate": 0.0, "max_learning_rate": 0.2, "steps": 21}
    result = lr_range_test(descend, jnp.ones(1), None, **options)
    assert_close(np.diff(result.learning_rates), 0.01, 800)
    assert np.isfinite(result.suggestions.steepest.learning_rate)


def test_losses_are_those_of_the_step_and_their_average_is_without_bias() -> None:
    step, state, batches = regression()
    result = lr_range_test(step, state, batches, max_learning_rate=1e-2, smoothing=0.9)
    average, carry, step = 0.0, state, jax.jit(step)
    for i, rate in enumerate(result.learning_rates):
        carry, loss = step(carry, jax.tree.map(lambda x, i=i: x[i], batches), rate)
        average = 0.9 * average + 0.1 * float(loss)
        assert_close(result.losses[i], loss, 800)
        expected = average / (1 - 0.9 ** (i + 1))
        assert_close(result.smoothed[i], expected, 800, dtype=np.float32)
    assert result.stopped_at is None
    assert len(result.losses) == 60


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("donate", [True, False])
def test_the_state_it_was_given_is_untouched(scan: bool, donate: bool) -> None:
    step, state, batches = regression()
    state = jax.tree.map(jnp.asarray, state)
    before = as_numpy(state)
    jitted = jax.jit(step, donate_argnums=0) if donate else jax.jit(step)
    result = lr_range_test(jitted, state, batches, scan=scan)
    assert result.stopped_at is not None  # it diverged, and yet:
    jax.tree.map(np.testing.assert_array_equal, as_numpy(state), before)
    if donate:  # the step does donate, when it is called
        jitted(state, jax.tree.map(lambda x: x[0], batches), 0.1)
        assert state["mean"].is_deleted()


def test_arrays_of_numpy_keys_and_python_numbers_in_the_state() -> None:
    array = np.ones(2)
    state = {"key": jax.random.key(0), "float": 1.0, "int": 3, "array": array}

    def step(state: Any, batch: Any, learning_rate: Any) -> tuple[Any, Any]:
        key, _ = jax.random.split(state["key"])
        x = state["array"] * (1 - learning_rate)
        return {"key": key, "float": 0.5, "int": state["int"] + 1, "array": x}, jnp.sum(x**2)

    one, other = (lr_range_test(step, state, None, steps=30, scan=x) for x in (True, False))
    assert_equal(one, other)
    assert (array == 1).all()


@pytest.mark.slow
def test_all_ways_to_give_batches_agree() -> None:
    step, state, (x, y) = regression()
    expected = lr_range_test(step, state, (x, y), steps=50)
    pairs = list(zip(np.asarray(x), np.asarray(y), strict=True))

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return iter(pairs)

    for batches in (pairs, iter(pairs), Loader()):
        assert_equal(lr_range_test(step, state, batches, steps=50), expected)
    for batches in ((x, y), pairs):
        for scan in (True, False):
            assert_equal(lr_range_test(step, state, batches, steps=50, scan=scan), expected)
    assert len(lr_range_test(step, state, pairs).losses) == 60  # all of a list


@pytest.mark.parametrize("scan", [True, False])
def test_warm_up_steps_act_and_leave_no_record(scan: bool) -> None:
    step, state, batches = regression()
    step = jax.jit(step)
    options = {"min_learning_rate": 1e-3, "max_learning_rate": 1e-2, "scan": scan}
    result = lr_range_test(step, state, batches, warmup_steps=10, **options)
    assert len(result.losses) == 50
    assert_close(result.learning_rates[[0, -1]], [1e-3, 1e-2])
    for i in range(10):
        state, _ = step(state, jax.tree.map(lambda x, i=i: x[i], batches), 1e-3)
    rest = jax.tree.map(lambda x: x[10:], batches)
    assert_equal(result, lr_range_test(step, state, rest, **options))


@pytest.mark.parametrize("scan", [True, False])
def test_it_stops_where_the_smoothed_loss_is_four_times_its_lowest(scan: bool) -> None:
    losses = np.array([4.0, 3.0, 2.0, 1.0, 3.9, 4.1, 0.1] + [0.1] * 20, np.float32)
    calls = []

    def step(state: Any, batch: Any, learning_rate: Any) -> tuple[Any, Any]:
        jax.debug.callback(lambda: calls.append(1))
        return state, batch

    result = lr_range_test(step, (), losses, smoothing=0.0, scan=scan)
    jax.effects_barrier()
    assert result.stopped_at == 5
    assert len(calls) == 6  # later steps are not computed
    np.testing.assert_allclose(result.losses[:6], losses[:6])
    assert_close(result.smoothed[:6], losses[:6])
    assert np.isnan(result.losses[6:]).all()
    assert np.isnan(result.smoothed[6:]).all()
    never = lr_range_test(step, (), losses, smoothing=0.0, scan=scan, stop_factor=np.inf)
    assert never.stopped_at is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scan", [True, False])
def test_it_stops_at_a_loss_that_is_not_finite(bad: float, scan: bool) -> None:
    losses = np.array([3.0, 2.0, 1.0, bad, 0.5, 0.5], np.float32)
    step = lambda state, batch, learning_rate: (state, batch)
    result = lr_range_test(step, (), losses, scan=scan)
    assert result.stopped_at == 3
    assert np.isfinite(result.losses[:3]).all()
    assert not np.isfinite(result.losses[3:]).any()
    rate = result.learning_rates[2]
    assert_close(result.suggestions.minimum.learning_rate, rate / 10)
    from_the_start = np.full(5, bad, np.float32)
    with pytest.raises(ValueError, match=rf"the loss {bad} in the first step, so there is nothing"):
        lr_range_test(step, (), from_the_start, scan=scan)
    with pytest.raises(ValueError, match=rf"the loss {bad} in step 1 of the warm-up"):
        lr_range_test(step, (), np.append(1, from_the_start), scan=scan, warmup_steps=2)
    rises = lr_range_test(step, (), np.arange(5, dtype=np.float32), scan=scan)
    for suggestion in rises.suggestions:
        assert np.isnan(suggestion.learning_rate)
        assert "never fell" in suggestion.reason


def test_losses_below_zero_stop_it_only_when_they_rise() -> None:
    losses = np.concatenate([np.linspace(1, -5, 30), [-4.0, 9.0, 11.0, 0.0]])
    step = lambda state, batch, learning_rate: (state, batch)
    result = lr_range_test(step, (), losses.astype(np.float32), smoothing=0.0)
    assert result.stopped_at == 32  # above -5 + 3 * 5


def test_losses_in_half_precision() -> None:
    step = lambda state, batch, learning_rate: (state, batch.astype(jnp.bfloat16))
    result = lr_range_test(step, (), np.linspace(2, 1, 20, dtype=np.float32))
    assert result.losses.dtype == result.smoothed.dtype == np.float32
    np.testing.assert_allclose(result.losses, np.linspace(2, 1, 20), rtol=1e-2)


def test_suggestions_of_a_curve_with_known_turns() -> None:
    """Flat, a straight fall from 1e-3 to 1e-1, and up again."""
    rates = np.geomspace(1e-6, 10, 701)
    exponent = np.log10(rates)
    losses = np.interp(exponent, [-3, -1, 0], [2.0, 1.0, 5.0])
    noisy = losses + 0.01 * np.random.default_rng(0).normal(size=losses.shape)
    for curve in (losses, noisy):
        minimum, steepest, valley = read_curve(rates, curve, "exponential")
        np.testing.assert_allclose(np.log10(minimum.learning_rate), -2, atol=0.3)
        np.testing.assert_allclose(np.log10(valley.learning_rate), -2, atol=0.3)
        assert -3 < np.log10(steepest.learning_rate) < -1.2
        assert "tenth of" in minimum.reason
        assert "fastest" in steepest.reason
        assert "middle of the fall" in valley.reason
    only_down = read_curve(rates[:450], losses[:450], "exponential")
    assert all("raise max_learning_rate" in x.reason for x in only_down)
    assert np.isnan(read_curve(rates, exponent, "exponential").minimum.learning_rate)


def test_the_mean_does_not_lag_and_a_blow_up_does_not_reach_back() -> None:
    losses = np.concatenate([np.linspace(2, 1, 60), np.geomspace(1, 1e8, 20), [np.nan, 0.0]])
    mean = centred_mean(losses)
    assert len(mean) == 80
    np.testing.assert_allclose(mean[20:50], losses[20:50], rtol=1e-3)
    assert 55 <= mean.argmin() <= 62


@pytest.mark.parametrize("scan", [True, False])
def test_a_grid_of_weight_decays_is_as_one_after_another(scan: bool) -> None:
    decays = [0.0, 1e-3, 1.0, 300.0]
    start = jnp.zeros(2)
    grid = lr_range_test(decayed, start, None, weight_decay=decays, scan=scan)
    for decay, result in zip(decays, grid.results, strict=True):
        alone = lr_range_test(decayed, start, None, weight_decay=decay, scan=scan)
        assert result.weight_decay == alone.weight_decay == decay
        assert_equal(result, alone, rtol=2e-2)
    # A larger decay diverges at a smaller rate.
    assert grid.results[3].stopped_at < grid.results[0].stopped_at
    np.testing.assert_array_equal(start, 0)
    lowest = list(grid.lowest_losses.values())
    assert lowest[0] < lowest[2] < lowest[3]
    assert grid.weight_decay == 1e-3  # of those that are equal, the largest
    assert "largest of the weight decays" in grid.reason
    assert grid.best is not None
    assert grid.best.weight_decay == 1e-3
    assert refine_weight_decay(grid.lowest_losses)


def test_a_grid_chooses_the_lowest_loss_and_never_one_that_is_not_finite() -> None:
    step = lambda x, batch, rate, decay: (x, batch * jnp.where(decay > 0.5, jnp.nan, 1 + decay))
    losses = np.linspace(2, 1, 20, dtype=np.float32)
    grid = lr_range_test(step, (), losses, weight_decay=np.array([0.3, 0.1, 1.0]))
    assert grid.weight_decay == pytest.approx(0.1)
    assert "lowest of all" in grid.reason
    assert grid.results[2].stopped_at == 0
    assert {x.reason for x in grid.results[2].suggestions} == {"no loss was finite"}
    with pytest.raises(ValueError, match="the loss nan in the first step"):
        lr_range_test(step, (), losses, weight_decay=[1.0, 2.0])


def test_exponents_are_bisected_around_the_best_weight_decay() -> None:
    tried = {1e-3: 3.0, 1e-4: 1.0, 1e-5: 2.0, 0.0: 4.0}
    np.testing.assert_allclose(refine_weight_decay(tried), [10**-4.5, 10**-3.5])
    np.testing.assert_allclose(refine_weight_decay({1e-3: 1.0, 1e-4: 2.0}), [10**-3.5, 1e-2])
    np.testing.assert_allclose(refine_weight_decay({1e-3: 2.0, 1e-4: 1.0}), [1e-5, 10**-3.5])
    np.testing.assert_allclose(refine_weight_decay({1e-3: 2.0, 0.0: 1.0}), [1e-4])
    np.testing.assert_allclose(refine_weight_decay({1e-3: np.nan, 1e-4: 1.0})[1], 10**-3.5)
    for bad in ({}, {0.0: 1.0}, {-1.0: 1.0, 1.0: 2.0}, {1e-3: np.nan}):
        with pytest.raises(ValueError, match="weight decay"):
            refine_weight_decay(bad)


@pytest.mark.slow
def test_the_plot_of_a_curve_and_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    from plots import plot_lr_range_test

    result = lr_range_test(descend, jnp.ones(1), None)
    axes = plot_lr_range_test(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    labels = [line.get_label() for line in axes.lines]
    assert labels[:2] == ["loss", "smoothed"]
    for name, suggestion in result.suggestions._asdict().items():
        assert f"{name}: {suggestion.learning_rate:.2g}" in labels
    grid = lr_range_test(decayed, jnp.zeros(1), None, weight_decay=[0.0, 1.0])
    given = plot_lr_range_test(grid, axes=axes.figure.subplots())
    assert sum("weight decay" in line.get_label() for line in given.lines) == 2
    linear = lr_range_test(descend, jnp.ones(1), None, mode="linear", min_learning_rate=0)
    assert plot_lr_range_test(linear).get_xscale() == "linear"
    steps = np.array([1, np.nan, np.nan], np.float32)
    broken = lr_range_test(lambda x, b, r: (x, b), (), steps)
    assert plot_lr_range_test(broken).lines


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"min_learning_rate": 0.0}, "min_learning_rate=0.0 and .* 0 <"),
        ({"min_learning_rate": -1.0, "mode": "linear"}, "0 <= min_learning_rate"),
        ({"max_learning_rate": 1e-9}, "min_learning_rate < max_learning_rate"),
        ({"mode": "cubic"}, "mode='cubic' must be"),
        ({"smoothing": 1.0}, "smoothing=1.0 must be"),
        ({"stop_factor": 1.0}, "stop_factor=1.0 must be above 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        ({"scan": "yes"}, "scan='yes' must be"),
        ({"steps": 2}, "steps=2 must be at least 3"),
        ({"steps": 30}, "need 30 batches; there are 20"),
        ({"steps": 15, "warmup_steps": 6}, "need 21 batches; there are 20"),
        ({"weight_decay": []}, "must be None, a number, or a sequence"),
        ({"weight_decay": [[1.0]]}, "must be None, a number, or a sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            lr_range_test(descend, jnp.ones(1), np.zeros((20, 2), np.float32), **options)


def test_batches_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="ended after 4"):
        lr_range_test(descend, jnp.ones(1), iter(range(4)), steps=5)
    with pytest.raises(ValueError, match="one leading axis of steps"):
        lr_range_test(descend, jnp.ones(1), (jnp.zeros((9, 2)), jnp.zeros(8)))
    with pytest.raises(TypeError, match="must be arrays, or give one after another, not 5"):
        lr_range_test(descend, jnp.ones(1), 5)


SHAPE = r"ShapeDtypeStruct\(shape=\(2,\), dtype=float32\)"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x, batch, rate: x, f"must return \\(state, loss\\), not {SHAPE}"),
        (lambda x, batch, rate: (x, x), f"scalar loss, not {SHAPE}"),
        (lambda x, batch, rate: (x, 1), "scalar loss"),
        (lambda x, batch, rate: ((x, x), jnp.sum(x)), "a state like the one it takes"),
        (lambda x, batch, rate: (x[:1], jnp.sum(x)), "is float32\\[2\\] before .* float32\\[1\\]"),
    ],
)
@pytest.mark.parametrize("scan", [True, False])
def test_steps_that_return_something_else_are_refused(step: Any, message: str, scan: bool) -> None:
    with pytest.raises(TypeError, match=message):
        lr_range_test(step, jnp.ones(2), None, scan=scan)


def test_the_python_loop_looks_at_every_tenth_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    array = type(jnp.ones([]))
    look = array.__bool__
    monkeypatch.setattr(array, "__bool__", lambda x: looks.append(1) or look(x))
    lr_range_test(descend, jnp.ones(1), None, steps=50, scan=False, max_learning_rate=1e-3)
    assert len(looks) == 5
