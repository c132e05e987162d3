"""The controller: sizes that pass the tests, never shrink, and are few."""

from typing import Any

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lowrank_optax.training import (
    AdaptiveBatchSize,
    BatchSizeState,
    GradientNoise,
    accumulate_with_noise,
    per_example_noise,
)

WORKED = np.float32([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 2.0]])
NOISE = jax.jit(per_example_noise)
HALF: dict[str, Any] = {"eta": 0.5, "theta": 0.5, "nu": 0.5}


def noise_of(
    variance: float, squared_norm: float, batch_size: float = 8, inner: float | None = None
) -> GradientNoise:
    numbers = [np.float32(x) for x in (squared_norm, variance, batch_size)]
    return GradientNoise(*numbers, None if inner is None else np.float32(inner))


@pytest.mark.parametrize(
    ("test", "nu", "expected"),
    [
        ("norm", 0.5, 2.1961),
        ("inner_product", 0.5, 0.8305),
        ("augmented", 0.5, 1.3656),  # orthogonality asks for more
        ("augmented", 5.0, 0.8305),  # the inner product does
    ],
)
def test_worked_example_asks_for_these_sizes(test: Any, nu: float, expected: float) -> None:
    used = {"norm": ["eta"], "inner_product": ["theta"], "augmented": ["theta", "nu"]}[test]
    options = {name: x for name, x in (HALF | {"nu": nu}).items() if name in used}
    control = AdaptiveBatchSize(initial=1, maximum=64, test=test, bucket="multiple", **options)
    noise = NOISE(WORKED)
    assert control.required(noise) == pytest.approx(expected, abs=1e-4)
    state = control.init()._replace(batch_size=jnp.int32(4))
    assert control.observe(state, noise).batch_size == 4  # never smaller
    of_one = noise._replace(batch_size=jnp.float32(1))  # the same numbers of a batch of one
    assert control.observe(control.init(), of_one).batch_size == int(np.ceil(expected))


def test_identical_examples_never_grow_the_batch() -> None:
    control = AdaptiveBatchSize(initial=4, maximum=1024, eta=0.1)
    batch = jnp.broadcast_to(jnp.array([0.1, 1 / 3, 7.7]), (4, 8, 3))
    loss = lambda params, group: jnp.mean(group @ params)
    noise = accumulate_with_noise(loss, jnp.ones(3), batch)[2]
    state = control.init()
    for _ in range(5):
        state = control.observe(state, noise)
    assert state.batch_size == 4
    assert state.samples == 20


@pytest.mark.parametrize("test", ["norm", "inner_product", "augmented"])
def test_sizes_ignore_the_scale_of_gradients_and_copies_of_parameters(test: Any) -> None:
    control = AdaptiveBatchSize(initial=1, maximum=64, test=test)
    gradients = np.random.default_rng(0).normal(1, 1, (8, 5)).astype(np.float32)
    expected = float(control.required(NOISE({"a": gradients})))
    scaled = control.required(NOISE({"a": np.float32(1e-3) * gradients}))
    assert scaled == pytest.approx(expected, rel=1e-4)
    copied = {"a": gradients, "b": gradients, "c": gradients[:, None, :]}
    assert control.required(NOISE(copied)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 900),
    st.sampled_from(["power_of_two", "multiple"]),
    st.lists(st.tuples(st.floats(0, 1e4), st.floats(1e-3, 10)), min_size=1, max_size=6),
)
def test_batch_never_shrinks_is_bounded_and_divides_among_devices(
    micro: int, devices: int, groups: int, more: int, bucket: Any, noises: list
) -> None:
    initial = micro * devices * groups
    control = AdaptiveBatchSize(
        initial=initial,
        maximum=initial + more,
        dataset_size=700,
        micro_batch_size=micro,
        devices=devices,
        bucket=bucket,
        eta=0.5,
    )
    state, before = control.init(), 0
    for variance, norm in noises:
        assert before <= int(state.batch_size) <= min(initial + more, 700)
        assert int(state.batch_size) in control.sizes
        assert int(state.batch_size) % (micro * devices) == 0
        before = int(state.batch_size)
        noise = noise_of(variance, norm, before)
        state = control.observe(state, noise)
        if control.required(noise) <= control.largest:
            assert float(control.required(noise)) <= int(state.batch_size) + 1e-3
    assert int(state.batch_size) in control.sizes


def test_sizes_are_powers_of_two_times_the_first_and_the_largest() -> None:
    options = {"micro_batch_size": 2, "devices": 3}
    control = AdaptiveBatchSize(initial=12, maximum=101, **options)
    assert control.sizes == (12, 24, 48, 96)
    assert AdaptiveBatchSize(initial=12, maximum=80, **options).sizes == (12, 24, 48, 78)
    assert AdaptiveBatchSize(initial=12, maximum=12, **options).sizes == (12,)
    assert AdaptiveBatchSize(initial=12, maximum=10**9, dataset_size=31, **options).sizes == (
        (12, 24, 30)
    )
    many = AdaptiveBatchSize(initial=12, maximum=31, bucket="multiple", **options)
    assert many.sizes == (12, 18, 24, 30)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_gradients_of_noise_alone_ask_for_the_batch_over_eta_squared(eta: float) -> None:
    """What grows a batch is bounded, for the squared norm of a noisy gradient is noise too."""
    size, numbers = 16, 400
    control = AdaptiveBatchSize(initial=size, maximum=4096, eta=eta)
    ratios = []
    for seed in range(20):
        gradients = np.random.default_rng(seed).normal(size=(size, numbers)).astype(np.float32)
        ratios.append(float(control.required(NOISE(gradients))) / size)
    assert np.mean(ratios) == pytest.approx(1 / eta**2, rel=0.05)


def test_norm_test_comes_to_rest_at_a_multiple_of_the_noise_scale() -> None:
    variance, signal, eta = 30.0, 1.0, 0.5
    control = AdaptiveBatchSize(initial=1, maximum=10**6, eta=eta, bucket="multiple")
    state = control.init()
    for _ in range(40):
        size = int(state.batch_size)
        state = control.observe(state, noise_of(variance, signal + variance / size, size))
    assert state.noise_scale == pytest.approx(30.0, rel=1e-4)
    assert int(state.batch_size) == pytest.approx(30 * (1 / eta**2 - 1), abs=1)


def test_averages_start_as_means_and_the_test_goes_by_them() -> None:
    control = AdaptiveBatchSize(initial=8, maximum=1024, eta=0.5, decay=0.5, bucket="multiple")
    state = control.init()
    variances, norms = [8.0, 24.0, 0.0], [3.0, 5.0, 2.0]
    for variance, norm in zip(variances, norms, strict=True):
        before = state.batch_size
        state = control.observe(state, noise_of(variance, norm, 8))
    mean = 0.5 * (0.5 * 8 + 0.5 * 24) + 0.5 * 0
    signal = 0.5 * (0.5 * (3 - 1) + 0.5 * (5 - 3)) + 0.5 * 2
    assert state.variance == pytest.approx(mean)
    assert state.signal == pytest.approx(signal)
    asked = mean / (0.25 * (signal + mean / float(before)))
    assert int(state.batch_size) == max(int(before), int(np.ceil(asked)))


def test_tests_are_made_at_their_interval() -> None:
    control = AdaptiveBatchSize(initial=2, maximum=64, test_interval=3)
    state, sizes = control.init(), []
    for _ in range(4):
        state = control.observe(state, noise_of(100.0, 1.0, 2))
        sizes.append(int(state.batch_size))
    assert sizes == [2, 2, 64, 64]


def test_zero_gradient_grows_the_batch_only_if_noise_stays_around_it() -> None:
    control = AdaptiveBatchSize(initial=2, maximum=64)
    silent, noisy = noise_of(0.0, 0.0, 2), noise_of(1.0, 0.0, 2)
    state = control.init()
    for _ in range(5):
        state = control.observe(state, silent)
    assert state.batch_size == 2
    for _ in range(2):
        state = control.observe(state, noisy)
        assert state.batch_size == 2
    state = control.observe(state, noise_of(0.0, 1.0, 2))  # a gradient between: counted anew
    for _ in range(2):
        state = control.observe(state, noisy)
        assert state.batch_size == 2
    assert control.observe(state, noisy).batch_size == 64
    with_inner = AdaptiveBatchSize(initial=2, maximum=64, test="augmented")
    zero = noise_of(1.0, 0.0, 2, inner=0.0)
    assert with_inner.observe(with_inner.init(), zero).batch_size == 2
    assert with_inner.required(zero) == np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_measurements_that_are_not_finite_only_count_their_examples(bad: float) -> None:
    control = AdaptiveBatchSize(initial=2, maximum=64, decay=0.9, test="inner_product")
    before = control.observe(control.init(), noise_of(0.1, 1.0, 2, 0.1))
    for noise in (noise_of(bad, 1.0, 2, 1.0), noise_of(1.0, bad, 2, 1.0), None):
        after = control.observe(before, noise)
        assert after.samples == before.samples + before.batch_size
        assert after._replace(samples=before.samples) == before


def test_samples_stop_counting_before_they_overflow() -> None:
    control = AdaptiveBatchSize(initial=2**20, maximum=2**20)
    state = control.init()._replace(samples=jnp.int32(2**31 - 2))
    assert control.observe(state, None).samples == 2**31 - 1


def test_controller_works_inside_jit_and_scan() -> None:
    control = AdaptiveBatchSize(initial=2, maximum=64, eta=0.5, decay=0.5)
    variances = jnp.array([0.1, 1.0, 5.0, 2.0])
    noises = GradientNoise(jnp.ones(4), variances, jnp.full(4, 2.0))

    @jax.jit
    def run(state: BatchSizeState) -> BatchSizeState:
        return jax.lax.scan(lambda s, n: (control.observe(s, n), None), state, noises)[0]

    state = control.init()
    for i in range(4):
        one = jax.tree.map(lambda x, i=i: x[i], noises)
        state = control.observe(state, one)
    scanned = run(control.init())
    assert [x.dtype for x in scanned] == [x.dtype for x in control.init()]
    jax.tree.map(lambda a, b: assert_close(a, b), scanned, state)


def test_state_survives_a_checkpoint_to_the_last_bit(tmp_path: Any) -> None:
    control = AdaptiveBatchSize(initial=2, maximum=64, decay=0.9)
    state = control.observe(control.init(), noise_of(1 / 3, 0.7, 2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", control.init())
    assert restored == state
    assert isinstance(restored, BatchSizeState)


def test_batch_grows_as_training_nears_the_minimum_of_a_noisy_quadratic() -> None:
    """With one program for all sizes: the signal falls, the noise stays."""
    control = AdaptiveBatchSize(
        initial=8, maximum=512, eta=0.5, micro_batch_size=4, decay=0.8, test_interval=2
    )
    loss = lambda params, group: jnp.mean(jnp.sum((params - group) ** 2, -1)) / 2

    @jax.jit
    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        data = jax.random.normal(key, (control.largest // 4, 4, 3))
        _, gradient, noise = accumulate_with_noise(loss, params, data, groups=state.batch_size // 4)
        return (params - 0.1 * gradient, control.observe(state, noise)), state.batch_size

    start = jnp.full(3, 30.0), control.init()
    keys = jax.random.split(jax.random.key(0), 120)
    (params, state), sizes = jax.jit(lambda *args: jax.lax.scan(step, *args))(start, keys)
    assert sizes[20] == 8
    assert sizes[-1] > 100
    assert np.all(np.diff(sizes) >= 0)
    assert state.samples == np.sum(sizes)
    assert np.abs(params).max() < 0.3


def test_wrong_arguments_are_refused_by_name() -> None:
    for options, message in (
        ({"initial": 0}, "initial=0 must be at least 1"),
        ({"test_interval": 0}, "test_interval=0"),
        ({"eta": 0.0}, "eta=0.0 must be positive"),
        ({"theta": float("nan")}, "theta=nan must be positive"),
        ({"test": "sharpe"}, "test='sharpe' must be one of"),
        ({"bucket": "three"}, "bucket='three' must be one of"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"micro_batch_size": 3}, "initial=8 must be a multiple of micro_batch_size"),
        ({"maximum": 7}, "maximum=7 must be at least initial=8"),
        ({"dataset_size": 7}, "dataset_size=7 must be at least initial=8"),
        ({"maximum": 2**40}, "must be below"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveBatchSize(**({"initial": 8, "maximum": 64} | options))


def test_inner_products_that_were_not_measured_are_asked_for() -> None:
    control = AdaptiveBatchSize(initial=8, maximum=64, test="augmented")
    for call in (lambda n: control.required(n), lambda n: control.observe(control.init(), n)):
        with pytest.raises(ValueError, match="inner_product=True"):
            call(noise_of(1.0, 1.0))
