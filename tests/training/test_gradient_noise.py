"""The noise of a gradient: what the tests are defined by, and unbiased estimates of it."""

import functools
from typing import Any

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from lowrank_optax.training import (
    GradientNoise,
    accumulate_with_noise,
    coordinate_wise_batch_size,
    per_example_gradients,
    per_example_noise,
)

WORKED = np.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 2.0]], np.float32)


NOISE = jax.jit(per_example_noise)


def linear_loss(params: Any, group: jax.Array) -> jax.Array:
    """A loss whose gradients are the rows of the batch."""
    return jnp.mean(group @ params)


def squared_loss(params: Any, group: Any) -> jax.Array:
    hidden = jnp.tanh(group["x"] @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - group["y"]) ** 2)


@pytest.fixture(scope="module")
def regression() -> tuple[Any, Any]:
    """Parameters, and a batch of 16 examples."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"in": normal(3, 5), "bias": np.zeros(5, np.float32), "out": normal(5)}
    return params, {"x": normal(16, 3), "y": normal(16)}


def measure(params: Any, batch: Any, loss: Any = squared_loss, **options: Any) -> Any:
    """Loss, gradient and noise over the groups of a batch."""
    inner = options.pop("inner_product", False)

    def run(params: Any, batch: Any, options: dict[str, Any]) -> Any:
        return accumulate_with_noise(loss, params, batch, inner_product=inner, **options)

    return jax.jit(run)(params, batch, options)


def in_groups(batch: Any, groups: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), batch)


def reference(gradients: np.ndarray) -> dict[str, float]:
    """By sample covariances in float64: tr S, gᵀSg and the trace beside g, of rows."""
    g = gradients.astype(np.float64)
    mean, covariance = g.mean(0), np.cov(g.T, ddof=1)
    away = np.eye(len(mean)) - np.outer(mean, mean) / (mean @ mean)
    return {
        "norm": mean @ mean,
        "V": np.trace(covariance),
        "Vip": mean @ covariance @ mean,
        "Vor": np.trace(away @ covariance @ away),
    }


def assert_same(a: Any, b: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_worked_example_has_the_numbers_of_the_paper_s_definition() -> None:
    noise = NOISE(WORKED)
    _, gradient, grouped = measure(
        np.zeros(2, np.float32), WORKED[:, None], linear_loss, inner_product=True
    )
    assert_close(gradient, np.float32([2.0, 0.5]))
    for found in (noise, grouped):
        assert found.squared_norm == pytest.approx(4.25)
        assert found.variance == pytest.approx(2.333333, rel=1e-5)
        assert found.inner_product_variance == pytest.approx(3.75)
        across = found.variance - found.inner_product_variance / found.squared_norm
        assert across == pytest.approx(1.450980, rel=1e-5)
        assert found.signal == pytest.approx(4.25 - 2.333333 / 4)
        assert found.noise_scale == pytest.approx(2.333333 / (4.25 - 2.333333 / 4), rel=1e-5)
    assert coordinate_wise_batch_size(WORKED, 0.5, 1.0) == pytest.approx(26.667, abs=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([2, 3, 8]), st.sampled_from([2, 5]), st.integers(0, 2**31))
def test_variance_is_that_along_the_gradient_and_that_across(b: int, n: int, seed: int) -> None:
    gradients = np.random.default_rng(seed).normal(1.0, 1.0, (b, n)).astype(np.float32)
    expected = reference(gradients)
    noise = NOISE({"a": gradients[:, :1], "b": gradients[:, 1:].reshape(b, 1, -1)})
    assert noise.variance == pytest.approx(expected["V"], rel=1e-4)
    assert noise.inner_product_variance == pytest.approx(expected["Vip"], rel=1e-3, abs=1e-6)
    along = noise.inner_product_variance / noise.squared_norm
    assert noise.variance - along == pytest.approx(expected["Vor"], rel=1e-3, abs=1e-4)


def test_groups_of_one_example_measure_what_single_gradients_do(regression: Any) -> None:
    params, batch = regression
    gradients = functools.partial(per_example_gradients, squared_loss)
    exact = jax.jit(lambda *args: per_example_noise(gradients(*args)))(params, batch)
    loss, gradient, noise = measure(params, in_groups(batch, 16), inner_product=True)
    assert_same(noise, exact)
    whole, slope = jax.jit(jax.value_and_grad(squared_loss))(params, batch)
    assert loss == pytest.approx(float(whole), rel=1e-5)
    assert_same(gradient, slope)


DRAWS, SIZE, NUMBERS = 4000, 24, 5


@pytest.fixture(scope="module")
def drawn() -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Gradients [draws, b, n] of skewed, correlated noise; their mean and covariance."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(NUMBERS, NUMBERS)).astype(np.float32)
    mean = rng.normal(size=NUMBERS).astype(np.float32)
    noise = rng.exponential(size=(DRAWS, SIZE, NUMBERS)).astype(np.float32) - 1
    return jnp.asarray(noise @ mixing.T + mean), mean, mixing @ mixing.T


@pytest.mark.parametrize("groups", [2, 3, 6, 24])
def test_estimates_are_right_on_average_however_the_batch_is_divided(
    groups: int, drawn: tuple[jax.Array, np.ndarray, np.ndarray]
) -> None:
    samples, mean, covariance = drawn
    direction = jnp.ones(NUMBERS)

    def estimate(batch: jax.Array) -> tuple[GradientNoise, jax.Array]:
        divided = batch.reshape(groups, -1, NUMBERS)
        run = lambda **kw: accumulate_with_noise(linear_loss, jnp.zeros(NUMBERS), divided, **kw)[2]
        fixed = run(direction=direction)
        # Given as a variance along the gradient: undo the scaling.
        return run(), fixed.inner_product_variance * NUMBERS / fixed.squared_norm

    noise, along = jax.jit(jax.vmap(estimate))(samples)

    def assert_mean(values: np.ndarray, expected: float) -> None:
        values = np.asarray(values, np.float64)
        error = values.std() / np.sqrt(DRAWS)
        assert abs(values.mean() - expected) < 4 * error
        assert error < 0.05 * abs(expected)  # else the line above would say little

    assert_mean(noise.variance, np.trace(covariance))
    assert_mean(noise.signal, mean @ mean)
    assert_mean(along, np.ones(NUMBERS) @ covariance @ np.ones(NUMBERS))


def test_variance_along_the_gradient_is_the_same_on_average_however_the_batch_is_divided() -> None:
    """For normal noise, of what the definition measures: Gᵀ Σ G + tr Σ² / b."""
    rng = np.random.default_rng(1)
    scales, mean = np.array([2.0, 1.0, 0.5]), np.array([1.0, -1.0, 2.0])
    samples = jnp.asarray(rng.normal(size=(4000, 12, 3)) * scales + mean, jnp.float32)
    expected = np.sum(mean**2 * scales**2) + np.sum(scales**4) / 12
    for groups in (2, 4, 12):

        def estimate(batch: jax.Array, groups: int = groups) -> jax.Array:
            divided = batch.reshape(groups, -1, 3)
            noise = accumulate_with_noise(linear_loss, jnp.zeros(3), divided, inner_product=True)[2]
            return noise.inner_product_variance

        values = np.asarray(jax.jit(jax.vmap(estimate))(samples), np.float64)
        assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(4000)


def test_direction_of_the_gradient_itself_needs_no_second_pass(regression: Any) -> None:
    params, batch = regression
    divided = in_groups(batch, 4)
    _, gradient, twice = measure(params, divided, inner_product=True)
    doubled = jax.tree.map(lambda g: 2 * np.asarray(g), gradient)
    _, _, once = measure(params, divided, direction=doubled)
    assert_same(once, twice)


def test_groups_of_different_sizes_are_weighted(drawn: tuple[jax.Array, Any, Any]) -> None:
    """Sums of padding count for nothing, and the variance stays right on average."""
    samples, _, covariance = drawn
    sizes = np.array([1, 2, 5])

    def masked_loss(params: jax.Array, group: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, there = group
        return jnp.sum((rows @ params) * there) / jnp.sum(there)

    there = jnp.asarray(np.arange(8) < sizes[:, None], jnp.float32)

    def estimate(batch: jax.Array) -> tuple[jax.Array, GradientNoise]:
        divided = batch.reshape(3, 8, NUMBERS), there
        _, gradient, noise = accumulate_with_noise(
            masked_loss, jnp.zeros(NUMBERS), divided, sizes=jnp.asarray(sizes)
        )
        return gradient, noise

    gradients, noise = jax.jit(jax.vmap(estimate))(samples)
    first = np.asarray(samples[0]).reshape(3, 8, NUMBERS)[np.asarray(there, bool)]
    assert_close(gradients[0], first.mean(0), 800)
    assert noise.batch_size[0] == sizes.sum()
    values = np.asarray(noise.variance, np.float64)
    assert abs(values.mean() - np.trace(covariance)) < 4 * values.std() / np.sqrt(DRAWS)


def test_equal_sizes_change_only_the_unit(regression: Any) -> None:
    params, batch = regression
    divided = in_groups(batch, 4)
    plain = measure(params, divided, inner_product=True)
    sized = measure(params, divided, sizes=np.full(4, 4), inner_product=True)
    assert_same(plain, sized)


@pytest.mark.slow
def test_one_program_serves_any_number_of_groups(regression: Any) -> None:
    params, batch = regression
    divided = in_groups(batch, 8)
    traces = []

    @jax.jit
    def step(groups: jax.Array) -> Any:
        traces.append(groups)
        return accumulate_with_noise(
            squared_loss, params, divided, groups=groups, inner_product=True
        )

    for count in (2, 5, 8):
        part = jax.tree.map(lambda x, count=count: x[:count], divided)
        expected = measure(params, part, inner_product=True)
        found = step(np.int32(count))
        assert_same(found, expected)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("local", [1, 2])
def test_split_over_eight_devices_it_measures_what_one_device_does(
    local: int, check: bool, regression: Any
) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices, which tests/conftest.py asks for")
    params, batch = regression
    divided = in_groups(batch, 8 * local)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, same = PartitionSpec("data"), PartitionSpec()

    for options in ({"inner_product": True}, {"direction": params}):
        expected = measure(params, divided, **options)
        on_one = lambda p, b, options=options: accumulate_with_noise(
            squared_loss,
            p,
            b,
            axis_name="data",
            **(options if "inner_product" in options else {"direction": p}),
        )
        mapped = jax.shard_map(
            on_one, mesh=mesh, in_specs=(same, split), out_specs=same, check_vma=check
        )
        found = jax.jit(mapped)(params, divided)
        assert_same(found, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_micro_batches_split_over_devices_measure_the_same(
    axis_type: AxisType, regression: Any
) -> None:
    if jax.device_count() < 4:
        pytest.skip("needs four devices, which tests/conftest.py asks for")
    params, batch = regression
    divided = in_groups(batch, 4)
    run = lambda p, b: accumulate_with_noise(squared_loss, p, b, inner_product=True)
    expected = measure(params, divided, inner_product=True)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        shared = jax.device_put(divided, NamedSharding(mesh, PartitionSpec(None, "data")))
        on_all = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        found = jax.jit(run)(on_all, shared)
    assert_same(found, expected)


def test_identical_examples_have_no_noise() -> None:
    batch, params = np.ones((4, 2, 3), np.float32), np.ones(3, np.float32)
    noise = measure(params, batch, linear_loss, inner_product=True)[2]
    assert noise.squared_norm == pytest.approx(3, rel=1e-5)
    for number in noise.variance, noise.inner_product_variance, noise.noise_scale:
        assert 0 <= number < 1e-10  # the square of what rounding does


def test_without_a_signal_the_noise_scale_is_infinite() -> None:
    noise = NOISE(np.float32([[1.0], [-1.0]]))
    assert noise.squared_norm == 0
    assert noise.inner_product_variance == 0
    assert noise.signal < 0
    assert noise.noise_scale == np.inf


def test_gradients_of_bfloat16_are_summed_in_float32() -> None:
    batch, params = WORKED[:, None].astype(jnp.bfloat16), np.zeros(2, jnp.bfloat16)
    loss, gradient, noise = measure(params, batch, linear_loss, inner_product=True)
    assert gradient.dtype == jnp.bfloat16
    assert {x.dtype for x in (loss, *noise)} == {jnp.dtype(jnp.float32)}
    assert noise.variance == pytest.approx(2.333333, rel=1e-6)


@pytest.mark.slow
def test_coordinates_of_noise_alone_ask_for_any_batch_and_constant_ones_for_none() -> None:
    gradients = jnp.array([[1.0, 1.0, 3.0], [-1.0, 1.0, 1.0]])
    assert coordinate_wise_batch_size(gradients, 1.0, 1.0) == np.inf
    assert coordinate_wise_batch_size(gradients, 1.0, 0.5) == pytest.approx(0.5)
    assert coordinate_wise_batch_size(gradients[:, 1:2], 1.0, 1.0) == 0


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="J >= 2, not J = 1"):
        accumulate_with_noise(linear_loss, jnp.ones(2), jnp.ones((1, 4, 2)))
    for wrong in (jnp.ones(4), {"x": jnp.ones((4, 2)), "y": jnp.ones((2, 4))}, {}):
        with pytest.raises(ValueError, match=r"every leaf of batch must be \[J, m, ...\]"):
            accumulate_with_noise(linear_loss, jnp.ones(2), wrong)
    for wrong in (jnp.ones((1, 2)), {"x": jnp.ones((4, 2)), "y": jnp.ones((2, 4))}):
        with pytest.raises(ValueError, match="b >= 2 examples"):
            per_example_noise(wrong)
    with pytest.raises(ValueError, match="eta=0"):
        coordinate_wise_batch_size(WORKED, 0)
    with pytest.raises(ValueError, match="quantile=0"):
        coordinate_wise_batch_size(WORKED, quantile=0)


def test_it_trains_as_the_whole_batch_does(regression: Any) -> None:
    """With micro-batches of four, Adam goes where it goes on sixteen at once."""
    params, batch = regression
    tx = optax.adam(1e-2)

    def train(gradient_of: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(gradient_of(params), state)
            return (optax.apply_updates(params, updates), state), None

        scan = lambda params: jax.lax.scan(step, (params, tx.init(params)), length=20)
        return jax.jit(scan)(params)[0][0]

    whole = train(lambda p: jax.grad(squared_loss)(p, batch))
    parts = train(lambda p: accumulate_with_noise(squared_loss, p, in_groups(batch, 4))[1])
    assert_same(whole, parts, rtol=1e-3, atol=1e-5)
