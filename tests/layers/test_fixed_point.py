"""Quantization to fixed point: against fractions, and the gradients of the specification."""

from fractions import Fraction
import math
import re
from typing import Any, get_args

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import FixedPointFormat, Overflow, Rounding, quantize_fixed_point
from lowrank_optax.layers.fixed_point import quantizer

LOG_2 = math.log(2)
ROUNDINGS, OVERFLOWS = get_args(Rounding), get_args(Overflow)
# Ties, ends of the range, far outside, and the numbers next to a tie on both sides.
NUMBERS = np.unique(
    np.concatenate(
        [
            np.arange(-80, 81) / 16,
            np.array([0.49999997, 0.50000006, 8388609, 8388611, 1e-20, 12345.678]) / 4,
            np.array([-0.49999997, -0.50000006, -8388609, -8388611, -1e-20, -12345.678]) / 4,
        ]
    ).astype(np.float32)
)


def by_fractions(x: float, integer_bits: int, format: FixedPointFormat) -> Fraction:
    """One number, by exact rational arithmetic and the definitions in words."""
    step = Fraction(2) ** (integer_bits - format.bits)
    t = Fraction(float(x)) / step
    down, up = math.floor(t), math.ceil(t)
    toward_zero, away = (down, up) if t > 0 else (up, down)
    if format.rounding in ("TRN", "TRN_ZERO"):
        n = down if format.rounding == "TRN" else toward_zero
    elif t - down != up - t:
        n = down if t - down < up - t else up
    else:
        even = down if down % 2 == 0 else up
        ties = {"RND": up, "RND_CONV": even, "RND_ZERO": toward_zero, "RND_INF": away}
        n = ties.get(format.rounding, down)
    return step * overflow(n, format)


def overflow(n: int, format: FixedPointFormat) -> int:
    low = -(2 ** (format.bits - 1)) if format.signed else 0
    high = low + 2**format.bits - 1
    low = -high if format.overflow == "SAT_SYM" and format.signed else low
    if format.overflow.startswith("SAT"):
        inside = low <= n <= high
        return n if inside else 0 if format.overflow == "SAT_ZERO" else min(max(n, low), high)
    bits = [n >> i & 1 for i in range(format.bits + 1)]  # two's complement, lowest first
    kept = bits[:-1]
    if format.overflow == "WRAP_SM" and bits[-1] != kept[-1]:
        kept = [1 - bit for bit in kept]
    value = sum(bit << i for i, bit in enumerate(kept))
    return value - 2**format.bits if format.signed and kept[-1] else value


def formats() -> list[FixedPointFormat]:
    pairs = [(r, o, s) for r in ROUNDINGS for o in OVERFLOWS for s in (True, False)]
    options = [{"rounding": r, "overflow": o, "signed": s} for r, o, s in pairs]
    return [FixedPointFormat(4, **o) for o in options if o["signed"] or o["overflow"] != "WRAP_SM"]


@pytest.fixture(scope="module")
def quantized() -> dict[FixedPointFormat, Any]:
    """All numbers in every format: one compiled program."""
    run = jax.jit(lambda x: [quantize_fixed_point(x, 2.0, f) for f in formats()])
    return dict(zip(formats(), map(np.asarray, run(NUMBERS)), strict=True))


def test_every_rounding_and_overflow_is_that_of_exact_fractions(quantized: Any) -> None:
    for format, y in quantized.items():
        expected = [by_fractions(x, 2, format) for x in NUMBERS]
        wrong = [
            (float(x), float(a), float(e))
            for x, a, e in zip(NUMBERS, y, expected, strict=True)
            if Fraction(float(a)) != e
        ]
        assert not wrong, (format, wrong)


def test_worked_values_of_the_specification() -> None:
    x = jnp.array([-3, -2.3, -0.125, 0.125, 0.375, 1.9, 2.3])
    for rounding, mode, expected in (
        ("TRN", "WRAP", [1.0, 1.5, -0.25, 0, 0.25, 1.75, -1.75]),
        ("RND", "SAT", [-2, -2, 0, 0.25, 0.5, 1.75, 1.75]),
        ("RND_CONV", "SAT", [-2, -2, 0, 0, 0.5, 1.75, 1.75]),
        ("RND", "WRAP", [1.0, 1.75, 0, 0.25, 0.5, -2.0, -1.75]),
    ):
        y = quantize_fixed_point(x, 2, FixedPointFormat(4, rounding=rounding, overflow=mode))
        assert y.tolist() == expected, (rounding, mode)
    # The examples of Vivado HLS (UG902) for AP_WRAP_SM.
    signs = FixedPointFormat(4, overflow="WRAP_SM")
    assert quantize_fixed_point(jnp.array([19.0, -19.0]), 4, signs).tolist() == [-4, 2]


def test_steps_are_exact_powers_of_two_on_every_backend() -> None:
    """Of these, accelerators round a power, an exponential and a quotient."""
    exponents = np.arange(-126, 127)
    steps = quantizer.step_size(jnp.asarray(exponents + 8, jnp.float32), FixedPointFormat(8))
    np.testing.assert_array_equal(np.asarray(steps, np.float64), np.ldexp(1.0, exponents))
    x = jnp.asarray(np.ldexp(5.0, exponents - 1), jnp.float32)  # 2.5 steps
    y = quantize_fixed_point(x, exponents + 8.0, FixedPointFormat(8))
    np.testing.assert_array_equal(np.asarray(y, np.float64), np.ldexp(3.0, exponents))
    loss = lambda x, i: quantize_fixed_point(x, i, FixedPointFormat(8)).sum()
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, 2.0).as_text()
    operations = set(re.findall(r"stablehlo\.(\w+)", program))
    assert "multiply" in operations
    assert not operations & {"power", "exponential", "exponential_minus_one", "log", "divide"}


def test_a_quantized_number_stays_and_its_integer_and_error_are_bounded(quantized: Any) -> None:
    step = 0.25
    again = jax.jit(
        lambda each: [quantize_fixed_point(y, 2.0, f) for f, y in zip(formats(), each, strict=True)]
    )
    repeated = again(list(quantized.values()))
    for (format, y), same in zip(quantized.items(), repeated, strict=True):
        np.testing.assert_array_equal(same, y)
        n = y / step
        assert (n == np.rint(n)).all()
        assert n.min() >= format.smallest
        assert n.max() <= format.largest
        assert not np.signbit(y[y == 0]).any()
        x = NUMBERS.astype(np.float64)
        low, high = format.smallest * step, format.largest * step
        if format.rounding == "TRN":
            error = (x - y)[(x >= low) & (x < high + step)]
            assert error.min() >= 0
            assert error.max() <= step  # rounded itself: one number is just below zero
        elif format.rounding != "TRN_ZERO":
            error = np.abs(x - y)[(x >= low - step / 2) & (x < high + step / 2)]
            if format.overflow == "SAT" or format.rounding == "RND":
                assert error.max() <= step / 2


@pytest.mark.parametrize("position", [-5.0, 0.0, 9.0])
def test_numbers_times_two_with_one_more_integer_bit_are_times_two(position: float) -> None:
    format = FixedPointFormat(6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=500) * 2.0**position, jnp.float32)
    twice = quantize_fixed_point(2 * x, position + 1, format)
    np.testing.assert_array_equal(twice, 2 * quantize_fixed_point(x, position, format))


def gradients(x: Any, format: FixedPointFormat, position: float = 2.0) -> tuple[Any, Any, Any]:
    """Numbers, and both derivatives of each."""
    points = jnp.full(np.shape(x), position)
    y, vjp = jax.vjp(lambda x, i: quantize_fixed_point(x, i, format), jnp.asarray(x), points)
    return y, *vjp(jnp.ones_like(y))


def test_gradients_are_those_that_the_specification_works_out() -> None:
    x = np.array([0.3, -0.7, 1.1, 1.9, 3, -5], np.float32)
    y, by_x, by_point = gradients(x, FixedPointFormat(4))
    assert y.tolist() == [0.25, -0.75, 1, 1.75, 1.75, -2]
    # 1.9 is more than half a step above 1.75, the largest number.
    assert by_x.tolist() == [1, 1, 1, 0, 0, 0]
    expected = [-0.0346574, -0.0346574, -0.0693147, 1.2130076, 1.2130076, -1.3862944]
    np.testing.assert_allclose(by_point, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("rounding", "passing"),
    [
        ("RND", [False, True, True, True, True, False]),
        ("TRN", [False, False, True, True, True, True]),
        ("TRN_ZERO", [True, True, True, True, True, True]),
    ],
)
def test_the_range_ends_where_rounding_leaves_it(rounding: Any, passing: list[bool]) -> None:
    x = np.array([-2.1875, -2.125, -2.0, 1.75, 1.875, 1.9375], np.float32)  # steps of 1/4
    y, by_x, by_point = gradients(x, FixedPointFormat(4, rounding=rounding))
    assert by_x.tolist() == passing
    assert_close(by_point, LOG_2 * np.where(passing, y - x, y), dtype=np.float32)
    y, by_x, by_point = gradients(x, FixedPointFormat(4, rounding=rounding, overflow="SAT_ZERO"))
    assert by_x.tolist() == (y != 0).tolist()
    assert_close(by_point, LOG_2 * np.where(y != 0, y - x, 0), dtype=np.float32)
    y, by_x, by_point = gradients(4 * x, FixedPointFormat(4, rounding=rounding, overflow="WRAP"))
    assert (by_x == 1).all()
    assert np.abs(by_point).max() < LOG_2 * 0.25  # of the rounding alone, not of the wrapping


def test_gradients_of_saturation_and_of_scale_are_finite_differences() -> None:
    """In float64: an end of the range is ``n * 2**(I - W)``, and y(2**h x; I + h) = 2**h y."""
    h = 1e-6
    for format in (FixedPointFormat(4), FixedPointFormat(5, overflow="SAT_SYM")):
        x = np.array([-7.0, 9.0], np.float32)
        _, _, by_point = gradients(x, format)
        n = np.array([format.smallest, format.largest], np.float64)
        end = lambda point, n=n, w=format.bits: n * 2.0 ** (point - w)
        assert_close(by_point, (end(2 + h) - end(2 - h)) / (2 * h), 64, dtype=np.float32)
        x = np.linspace(-4, 4, 101, dtype=np.float32)
        y, by_x, by_point = gradients(x, format)
        y64 = np.asarray(y, np.float64)
        along = (2.0**h * y64 - 2.0**-h * y64) / (2 * h)
        assert_close(LOG_2 * x * by_x + by_point, along, 64, size=4.0, dtype=np.float32)


def test_a_position_per_channel_gets_the_sum_over_all_other_axes() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 3)), jnp.float32)
    points, format = jnp.array([0.0, 1.0, 2.0]), FixedPointFormat(3)
    g = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    loss = lambda x, i: jnp.vdot(g, quantize_fixed_point(x, i, format))
    by_x, by_points = jax.jit(jax.grad(loss, (0, 1)))(x, points)
    for channel, point in enumerate(points):
        _, each_x, each_point = gradients(x[..., channel], format, point)
        assert_close(by_x[..., channel], g[..., channel] * each_x)
        assert_close(by_points[channel], (g[..., channel] * each_point).sum(), 100)
    stacked = jax.vmap(lambda x, i: quantize_fixed_point(x, i, format))(x[:3, 0], points)
    rows = [quantize_fixed_point(x[i, 0], points[i], format) for i in range(3)]
    np.testing.assert_array_equal(stacked, rows)


def test_numbers_that_are_not_finite() -> None:
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    for mode, expected in (("SAT", [0, 1.75, -2]), ("WRAP", [0, 1.75, -2]), ("SAT_ZERO", [0] * 3)):
        y, by_x, by_point = gradients(x, FixedPointFormat(4, overflow=mode))
        assert y.tolist() == expected
        assert by_x.tolist() == [0, 0, 0]
        assert_close(by_point, LOG_2 * y)
    traced = jax.jit(lambda i: quantize_fixed_point(jnp.ones(2), i, FixedPointFormat(4)))
    assert np.isnan(traced(jnp.nan)).all()
    assert np.isnan(traced(jnp.inf)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_in_float32(dtype: Any) -> None:
    x = jnp.asarray(np.random.default_rng(3).normal(size=1000), dtype)
    format = FixedPointFormat(9)
    y = quantize_fixed_point(x, 2.0, format)
    assert y.dtype == dtype
    expected = quantize_fixed_point(x.astype(jnp.float32), 2.0, format)
    np.testing.assert_array_equal(y.astype(jnp.float32), expected)
    gradient = jax.grad(lambda x, i: quantize_fixed_point(x, i, format).sum(), (0, 1))(x, 2.0)
    assert gradient[0].dtype == dtype
    assert gradient[1].dtype == jnp.float32


def test_24_bits_are_within_half_a_step() -> None:
    x = np.random.default_rng(4).uniform(-2, 2, 1000).astype(np.float32)
    y = np.asarray(quantize_fixed_point(x, 2.0, FixedPointFormat(24)))
    assert np.abs(y.astype(np.float64) - x).max() <= 2.0**-23
    assert (y * 2**22 == np.rint(y * 2**22)).all()


@pytest.mark.parametrize(
    ("bits", "ones", "binary", "signed_digits"),
    [
        (8, 1, 16, 16),
        (8, 2, 58, 88),
        (8, 3, 128, 208),
        (6, 1, 12, 12),
        (6, 2, 32, 44),
        (6, 3, 52, 64),
    ],
)
def test_few_ones_have_the_levels_of_the_table(
    bits: int, ones: int, binary: int, signed_digits: int
) -> None:
    for digits, count in ((False, binary), (True, signed_digits)):
        levels = FixedPointFormat(bits, ones=ones, signed_digits=digits).integers()
        assert len(levels) == count
        by_text = [
            n for n in range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if bin(n).count("1") <= ones
        ]
        if not digits:
            assert levels.tolist() == by_text


@pytest.mark.parametrize("digits", [False, True])
def test_few_ones_take_the_nearest_level_and_ties_go_up(digits: bool) -> None:
    format = FixedPointFormat(6, ones=2, signed_digits=digits)
    x = np.arange(-80, 81, dtype=np.float32) / 2
    levels = format.integers().astype(np.float32)
    # From the largest level down, so that the first of two equally near ones is the upper one.
    nearest = [levels[::-1][np.argmin(np.abs(levels[::-1] - each))] for each in x]
    np.testing.assert_array_equal(quantize_fixed_point(x, 6.0, format), nearest)
    _, by_x, by_point = gradients(x, format, 6.0)
    inside = (x >= levels[0] - 0.5) & (x <= levels[-1] + 0.5)
    assert by_x.tolist() == inside.tolist()
    expected = LOG_2 * np.where(inside, nearest - x, nearest)
    assert_close(by_point, expected, size=64, dtype=np.float32)


def test_many_ones_are_no_restriction_and_one_is_a_power_of_two() -> None:
    x = jnp.asarray(np.random.default_rng(5).normal(size=500), jnp.float32)
    plain = quantize_fixed_point(x, 2.0, FixedPointFormat(6))
    for options in ({"ones": 5}, {"ones": 3, "signed_digits": True}):
        y = quantize_fixed_point(x, 2.0, FixedPointFormat(6, **options))
        np.testing.assert_array_equal(y, plain)
    y = np.abs(np.asarray(quantize_fixed_point(x, 2.0, FixedPointFormat(6, ones=1))))
    np.testing.assert_array_equal(np.frexp(y)[0], np.where(y == 0, 0, 0.5))


@pytest.mark.parametrize(
    ("bits", "options", "decibels"),
    [
        (8, {}, 40.55),
        (8, {"ones": 1}, 14.06),
        (8, {"ones": 2}, 24.16),
        (8, {"ones": 2, "signed_digits": True}, 28.58),
        (6, {"ones": 3}, 28.28),
    ],
)
def test_noise_of_a_normal_distribution(bits: int, options: Any, decibels: float) -> None:
    x = np.linspace(-2, 2, 400_001, dtype=np.float32)
    weight = np.exp(-8 * x.astype(np.float64) ** 2)
    y = np.asarray(quantize_fixed_point(x, 1.0, FixedPointFormat(bits, **options)), np.float64)
    noise = (weight * (y - x) ** 2).sum() / (weight * x.astype(np.float64) ** 2).sum()
    assert abs(-10 * math.log10(noise) - decibels) < 0.02


@pytest.mark.parametrize("bits", [4, 8])
def test_the_start_by_range_and_by_error(bits: int) -> None:
    format = FixedPointFormat(bits)
    draws = np.random.default_rng(6).normal(size=20_000).astype(np.float32)
    best = {4: (1, 3, 4), 8: (1, 3, 5)}[bits]
    for sigma, position in zip((0.25, 1.0, 3.0), best, strict=True):
        assert lro.layers.choose_integer_bits(sigma * draws, format) == position
    for largest in (0.3, 1.0, 1.75, 1.9375, 100.0):
        x = jnp.array([0.0, -largest, largest / 2])
        expected = 1 + math.ceil(math.log2(largest / (1 - 2.0 ** (1 - bits))))
        assert lro.layers.choose_integer_bits(x, format, "max") == expected
    for rule in ("mse", "max"):
        assert lro.layers.choose_integer_bits(jnp.zeros(3), format, rule) == 1
    # Of a ReLU that nothing passes, as of zeros.
    relu = FixedPointFormat(bits, signed=False)
    assert lro.layers.choose_integer_bits(-jnp.ones(3), relu) == 1
    columns = jnp.asarray(np.array([0.25, 3.0]) * draws[:, None], jnp.float32)
    found = lro.layers.choose_integer_bits(columns, format, per_channel=True)
    assert found.tolist() == [best[0], best[2]]


@pytest.mark.full  # 600 steps
def test_a_learned_position_ends_within_one_of_the_best() -> None:
    draws = jax.random.normal(jax.random.key(0), (4096,))
    sigmas, best = jnp.array([0.25, 1.0, 3.0]), jnp.array([1.0, 3.0, 4.0])
    x, format = sigmas[:, None] * draws, FixedPointFormat(4)
    start = 1 + jnp.ceil(jnp.log2(jnp.abs(x).max(1)))
    tx = optax.adam(1e-2)

    def loss(point: jax.Array) -> jax.Array:
        return ((quantize_fixed_point(x, point[:, None], format) - x) ** 2).mean(1).sum()

    def step(carry: Any, _: None) -> Any:
        point, state = carry
        updates, state = tx.update(jax.grad(loss)(point), state)
        return (optax.apply_updates(point, updates), state), None

    (point, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=600))((start, tx.init(start)))
    assert (jnp.abs(jnp.round(point) - best) <= 1).all()
    assert (jnp.abs(point - start) > 0.3).any()  # it moved


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 0}, ValueError, "bits=0 must be 1 to 53"),
        ({"bits": 54}, ValueError, "bits=54 must be 1 to 53"),
        ({"bits": 8.0}, TypeError, "bits=8.0 must be an int"),
        ({"bits": True}, TypeError, "bits=True must be an int"),
        ({"bits": 8, "signed": 1}, TypeError, "signed=1"),
        ({"bits": 8, "rounding": "nearest"}, ValueError, "rounding='nearest' must be one of"),
        ({"bits": 8, "overflow": "CLIP"}, ValueError, "overflow='CLIP' must be one of"),
        ({"bits": 8, "overflow": "WRAP_SM", "signed": False}, ValueError, "needs a sign bit"),
        ({"bits": 8, "ones": 0}, ValueError, "ones=0 must be"),
        ({"bits": 17, "ones": 2}, ValueError, "bits=17 must be 1 to 16 if ones"),
        ({"bits": 8, "ones": 2, "overflow": "WRAP"}, ValueError, "ones=2 takes the nearest"),
        ({"bits": 8, "signed_digits": True}, ValueError, "needs ones"),
    ],
)
def test_formats_that_are_refused(options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FixedPointFormat(**options)


def test_numbers_and_positions_that_are_refused() -> None:
    x, format = jnp.ones((2, 3)), FixedPointFormat(8)
    refused = [
        (x, jnp.nan, format, ValueError, "integer_bits must be finite, not nan"),
        (x, jnp.inf, format, ValueError, "integer_bits must be finite, not inf"),
        (x, 135.0, format, ValueError, r"normal numbers of float32, 2\*\*-126 to 2\*\*126"),
        (x, -119.0, format, ValueError, "normal numbers of float32"),
        (x, jnp.zeros(2), format, ValueError, "does not broadcast"),
        (x, jnp.zeros((4, 2, 3)), format, ValueError, "does not broadcast"),
        (jnp.ones(2, jnp.int32), 1.0, format, TypeError, "x must be floating-point, not int32"),
        (x, 1.0, FixedPointFormat(25), ValueError, "24 bits at most, not of 25"),
        (x.astype(jnp.bfloat16), 1.0, FixedPointFormat(10), ValueError, "9 bits at most"),
        (x, 1.0, 8, TypeError, "format=8 must be a FixedPointFormat"),
    ]
    for numbers, position, kind, error, message in refused:
        with pytest.raises(error, match=message):
            quantize_fixed_point(numbers, position, kind)
    choose = lro.layers.choose_integer_bits
    for numbers, rule, message in (
        (jnp.array([1.0, jnp.inf]), "mse", "x has numbers that are not finite"),
        (jnp.array([1.0, jnp.nan]), "max", "x has numbers that are not finite"),
        (jnp.array([1.0, 1e12]), "max", "x has numbers that 32 integer bits do not hold"),
        (jnp.zeros(0), "mse", "no numbers to choose by"),
        (x, "percentile", "rule='percentile'"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(numbers, format, rule)
    with pytest.raises(TypeError, match="x must be floating-point, not int32"):
        choose(jnp.arange(3), format)
    with pytest.raises(ValueError, match="rule='max' needs a largest number above zero"):
        choose(x, FixedPointFormat(1), "max")
