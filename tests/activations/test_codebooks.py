"""Codebooks: the best step functions for a derivative, against the specification and by force."""

import functools
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from lowrank_optax.activations import Codebook, codebook
from lowrank_optax.activations.fitting import best_path, fit, fit_steps, squared_error
from lowrank_optax.activations.sampling import Samples, gradient, sample

pytestmark = pytest.mark.usefixtures("coarse_grid")
CODINGS = ("value", "interval")
GELU = functools.partial(jax.nn.gelu, approximate=False)
FUNCTIONS = {
    "gelu_erf": GELU,
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "selu": jax.nn.selu,
    "elu": jax.nn.elu,
    "mish": jax.nn.mish,
    "hard_silu": jax.nn.hard_silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "tanhshrink": lambda x: x - jnp.tanh(x),
    "soft_sign": jax.nn.soft_sign,
}


# A derivative with f'(x) + f'(-x) = 1, an even one, one with jumps, and one of neither parity.
PARITIES = ("gelu_erf", "tanh", "hard_silu", "selu")


@functools.cache
def slopes_at(name: str) -> Any:
    return gradient(FUNCTIONS[name])


@functools.cache
def slopes(name: str, density: str = "uniform") -> Samples:
    return sample(slopes_at(name), 10.0, density)


@functools.cache
def fitted(name: str, bits: int, density: str = "uniform", coding: str = "interval") -> Codebook:
    """Not what is shipped: `test_tables.py` compares that with what is fitted."""
    return fit_steps(slopes(name, density), bits, coding)


def recoded(book: Codebook, x: np.ndarray) -> np.ndarray:
    """The level at each x."""
    return np.asarray(jax.jit(lambda x: book.decode(book.encode(x)))(x))


# The specification's tables: of the derivative f' with f'(x) + f'(-x) = 1, the half x > 0.
HALVES = {
    ("gelu_erf", "uniform", 1): (0.141047396, [], [1.0]),
    ("gelu_erf", "uniform", 2): (0.040562510, [0.4690264], [0.6804746, 1.0157241]),
    ("gelu_erf", "uniform", 3): (
        0.011898275,
        [0.3263160, 0.7110919, 2.3980782],
        [0.6279073, 0.8747704, 1.0888231, 1.0025996],
    ),
    ("gelu_erf", "uniform", 4): (
        0.003139633,
        [0.1550305, 0.3152635, 0.4875042, 0.6834634, 0.9318839, 2.0530780, 2.6850975],
        [0.5616013, 0.6838202, 0.8029670, 0.9165230, 1.0209017, 1.1093496, 1.0496720, 1.0013308],
    ),
    ("gelu_tanh", "uniform", 2): (0.040742696, [0.4692343], [0.6805198, 1.0157292]),
    ("gelu_tanh", "uniform", 3): (
        0.011906019,
        [0.3266204, 0.7121518, 2.4033728],
        [0.6280118, 0.8750200, 1.0890248, 1.0025172],
    ),
    ("gelu_tanh", "uniform", 4): (
        0.003135647,
        [0.1551661, 0.3155743, 0.4880832, 0.6844997, 0.9338077, 2.0588825, 2.6832809],
        [0.5616536, 0.6839696, 0.8031916, 0.9167851, 1.0211485, 1.1095165, 1.0499866, 1.0012722],
    ),
    ("silu", "uniform", 1): (0.214977795, [], [0.9999546]),
    ("silu", "uniform", 2): (0.047849498, [0.7892767], [0.6876760, 1.0267141]),
    ("silu", "uniform", 3): (
        0.017018165,
        [0.5121875, 1.1379074, 4.4863482],
        [0.6253191, 0.8653252, 1.0675581, 1.0089790],
    ),
    ("silu", "uniform", 4): (
        0.004464047,
        [0.2416939, 0.4932459, 0.7676962, 1.0879085, 1.5113958, 3.7296215, 5.1932727],
        [0.5601310, 0.6792302, 0.7947219, 0.9037395, 1.0023820, 1.0837326, 1.0401303, 1.0058728],
    ),
    ("gelu_erf", "normal", 1): (0.0384431, [], [0.909155]),
    ("gelu_erf", "normal", 2): (0.0080011, [0.498962], [0.687325, 1.046386]),
    ("gelu_erf", "normal", 3): (
        0.0019075,
        [0.224020, 0.469245, 0.779345],
        [1 - 0.411738, 1 - 0.236691, 1 - 0.066832, 1.090020],
    ),
    ("silu", "normal", 1): (0.0320636, [], [0.812120]),
    ("silu", "normal", 2): (0.0078953, [0.668529], [0.655474, 0.966405]),
    ("silu", "normal", 3): (
        0.0019366,
        [0.314220, 0.663982, 1.126811],
        [1 - 0.422719, 1 - 0.268157, 1 - 0.113605, 1.040681],
    ),
    ("silu", "normal", 4): (
        0.0004752,
        [0.154089, 0.311950, 0.478046, 0.658606, 0.863900, 1.114742, 1.470708],
        [
            1 - level
            for level in [0.461630, 0.384889, 0.308148, 0.231408, 0.154673, 0.077962, 0.001364]
        ]
        + [1.074576],
    ),
}


@pytest.mark.parametrize(("name", "density", "bits"), HALVES)
def test_interval_codebooks_are_those_of_the_specification(name, density, bits):
    error, boundaries, levels = HALVES[name, density, bits]
    book = fitted(name, bits, density)
    half = len(levels)
    np.testing.assert_allclose(book.error, error, atol=1e-6)
    np.testing.assert_allclose(book.boundaries[half:], boundaries, atol=1e-6)
    np.testing.assert_allclose(book.levels[half:], levels, atol=1e-6)
    assert book.boundaries[half - 1] == 0
    np.testing.assert_array_equal(book.boundaries, -np.array(book.boundaries[::-1]))
    np.testing.assert_allclose(np.add(book.levels, book.levels[::-1]), 1, atol=1e-9)
    assert book.codes == tuple(range(2**bits))


def test_best_sixteen_intervals_of_gelu_under_the_normal_density_are_not_symmetric():
    book = fitted("gelu_erf", 4, "normal")
    boundaries = [-2.046252, -0.963479, -0.741376, -0.573763, -0.431149, -0.302394, -0.181676]
    boundaries += [-0.065267, 0.049678, 0.165734, 0.285678, 0.413070, 0.553332, 0.716517, 0.927728]
    levels = [-0.049169, -0.111320, -0.036662, 0.045734, 0.132076, 0.220809, 0.311051, 0.402202]
    levels += [0.493795, 0.585415, 0.676651, 0.767048, 0.856028, 0.942763, 1.025832, 1.101976]
    found = np.array(book.boundaries), np.array(book.levels)
    if found[0][0] > -1:  # the mirror image is equally good
        found = -found[0][::-1], 1 - found[1][::-1]
    np.testing.assert_allclose(book.error, 0.0005888, atol=1e-7)
    np.testing.assert_allclose(found[0], boundaries, atol=1.1e-6)
    np.testing.assert_allclose(found[1], levels, atol=1.1e-6)


ERRORS = {
    "softplus": (0.2902163, 0.0540502, 0.0121168, 0.0028956),
    "selu": (0.2553475, 0.1010052, 0.0183796, 0.0039092),
    "elu": (0.1621600, 0.0251112, 0.0051703, 0.0011841),
    "mish": (0.1688189, 0.0399808, 0.0135862, 0.0036032),
    "hard_silu": (0.5, 0.2520347, 0.0555556, 0.0102049),
    "sigmoid": (0.018074, 0.003783, 0.000878, 0.000212),
    "tanh": (0.158400, 0.031910, 0.007264, 0.001739),
    "tanhshrink": (0.158400, 0.031910, 0.007264, 0.001739),
    "soft_sign": (0.125219, 0.031305, 0.007826, 0.001957),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_intervals_are_those_of_the_specification(name):
    errors = [fitted(name, bits).error for bits in range(1, 5)]
    np.testing.assert_allclose(errors, ERRORS[name], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "errors", "digit"),
    [
        ("sigmoid", (0.0965, 0.0130, 0.00308, 0.00078), (1e-4, 1e-4, 1e-5, 1e-5)),
        ("tanh", (1.0115, 0.1136, 0.0259, 0.0065), (1e-4,) * 4),
    ],
)
def test_errors_without_parity_are_those_of_the_specification(name, errors, digit):
    of = slopes(name)
    found = [fit_steps(of, bits, "interval", parity=False).error for bits in range(1, 5)]
    np.testing.assert_allclose(np.subtract(found, errors) / digit, 0, atol=0.51)


@pytest.mark.parametrize(
    ("name", "boundaries", "levels"),
    [
        ("tanh", [0.57419, 1.03264, 1.70653], [0.90289, 0.55957, 0.23929, 0.00769]),
        ("sigmoid", [1.13017, 2.02170, 3.29052], [0.22640, 0.14266, 0.06387, 0.00534]),
    ],
)
def test_even_derivatives_code_the_absolute_value(name, boundaries, levels):
    book = fitted(name, 2)
    np.testing.assert_allclose(book.boundaries[3:], boundaries, atol=5.1e-6)
    np.testing.assert_allclose(book.levels, levels, atol=5.1e-6)
    assert book.codes == (3, 2, 1, 0, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("gelu_erf", (0.008094, 0.002117)),
        ("silu", (0.012217, 0.003163)),
        ("mish", (0.009783, 0.002464)),
        ("tanh", (0.007264013, 0.001738858)),
        ("sigmoid", (0.000877846, 0.000212411)),
    ],
)
def test_errors_of_values_are_those_of_the_specification(name, errors):
    found = [fitted(name, bits, coding="value").error for bits in (3, 4)]
    np.testing.assert_allclose(found, errors, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [x if x in PARITIES else pytest.param(x, marks=pytest.mark.full) for x in FUNCTIONS],
)
def test_coding_the_value_is_never_worse(name):
    of = slopes(name)
    for bits in (1, 2, 3):
        value, interval = (fit_steps(of, bits, coding).error for coding in CODINGS)
        assert value <= interval + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("density", ["uniform", "normal"])
def test_error_falls_fourfold_with_each_bit(density, coding):
    of = slopes("gelu_tanh", density)
    errors = np.array([fit_steps(of, bits, coding).error for bits in range(1, 8)])
    assert (np.diff(errors) < 0).all()
    np.testing.assert_allclose(errors[4:-1] / errors[5:], 4, rtol=0.06)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("density", ["uniform", "normal"])
@pytest.mark.parametrize("name", ["gelu_erf", "silu", "mish", "tanh", "hard_silu"])
def test_every_boundary_lies_where_both_levels_are_equally_near(name, density, coding):
    book = fitted(name, 4, density, coding)
    at = np.array(book.boundaries)
    sides = [slopes_at(name)(at + shift) for shift in (-1e-6, 0, 1e-6)]
    levels = np.array(book.levels)[list(book.codes)]
    middle = (levels[1:] + levels[:-1]) / 2
    jumps = np.abs(sides[2] - sides[0]) > 0.1
    np.testing.assert_allclose(sides[1][~jumps], middle[~jumps], atol=1e-8)
    assert ((sides[0] - middle) * (sides[2] - middle) <= 0)[jumps].all()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("density", ["uniform", "normal"])
def test_levels_are_means_and_the_error_is_the_integral(density, coding):
    book = fitted("silu", 3, density, coding)
    normal = lambda x: np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    weight = np.ones_like if density == "uniform" else normal
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    slope = lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x)))
    ends = [-10.0, *book.boundaries, 10.0]
    bias, error = np.zeros(len(book.levels)), 0.0
    for code, (start, stop) in zip(book.codes, itertools.pairwise(ends), strict=True):
        off = lambda x, power, level: (slope(x) - level) ** power * weight(x)
        level = book.levels[code]
        bias[code] += quad(off, start, stop, (1, level), epsabs=1e-13)[0]
        error += quad(off, start, stop, (2, level), epsabs=1e-13)[0]
    np.testing.assert_allclose(bias, 0, atol=1e-10)
    np.testing.assert_allclose(book.error, error, atol=1e-10)


def test_codes_and_largest_error_of_gelu_are_those_of_the_specification():
    book = fitted("gelu_erf", 3)
    x = jnp.array([-3, -1, -0.5, -0.1, 0, 0.1, 0.5, 1, 3])
    assert book.encode(x).tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    x = np.linspace(-10, 10, 400_001, dtype=np.float32)
    error = slopes_at("gelu_erf")(x) - recoded(book, x)
    np.testing.assert_allclose(np.abs(error).max(), 0.1279, atol=5e-5)


def test_tables_of_one_density_under_another():
    book, normal = fitted("gelu_erf", 3), slopes("gelu_erf", "normal")
    steps = fit_steps(slopes("gelu_erf"), 3, "interval")
    np.testing.assert_allclose(squared_error(steps, normal), 0.003385, atol=1e-6)
    np.testing.assert_allclose(squared_error(steps, slopes("gelu_erf")), book.error, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_dynamic_programme_finds_the_best_of_all_partitions(data):
    size = data.draw(st.integers(2, 9))
    number = st.floats(-3, 3).map(lambda x: round(x, 3))
    values = np.array(data.draw(st.lists(number, min_size=size, max_size=size)))
    weight = st.sampled_from([0.0, 0.5, 1, 2])
    weights = np.array(data.draw(st.lists(weight, min_size=size, max_size=size)))
    most = data.draw(st.integers(1, 4))
    sums = np.stack([np.append(0, np.cumsum(weights * values**p)) for p in range(3)])

    def error(cuts):
        total = 0.0
        for start, stop in itertools.pairwise([0, *cuts, size]):
            v, w = values[start:stop], weights[start:stop]
            mean = np.average(v, weights=w) if w.sum() else 0.0
            total += np.sum(w * (v - mean) ** 2)
        return total

    every = [error(c) for n in range(most) for c in itertools.combinations(range(1, size), n)]
    path = best_path(sums, most)
    assert len(path) < most
    np.testing.assert_allclose(error(path), min(every), atol=1e-9)


def test_best_of_all_few_level_functions_on_a_small_grid_is_not_better():
    """Levels by value: any set of levels, each x with the nearest, on its own coarse sum."""
    x = (np.arange(4000) + 0.5) / 200 - 10
    slope = slopes_at("mish")(x)
    candidates = np.linspace(slope.min(), slope.max(), 40)
    best = np.inf
    for levels in itertools.combinations(candidates, 3):
        gaps = np.min([(slope - level) ** 2 for level in levels], axis=0)
        best = min(best, gaps.sum() / 200) if levels[0] < 0.2 < 0.8 < levels[2] else best
    of = slopes("mish")
    assert fit_steps(of, 2, "value").error < best


PIECEWISE = {  # and how many slopes
    "relu": (jax.nn.relu, 2),
    "leaky_relu": (jax.nn.leaky_relu, 2),
    "hard_tanh": (jax.nn.hard_tanh, 2),
    "relu6": (jax.nn.relu6, 2),
    "hard_sigmoid": (jax.nn.hard_sigmoid, 2),
    "hard_shrink": (lambda x: jnp.where(jnp.abs(x) > 0.5, x, 0), 2),
    "soft_shrink": (lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.3, 0), 2),
    "threshold": (lambda x: jnp.where(x >= 0.7, 3 * x, x), 2),
    "abs": (jnp.abs, 2),
    "three slopes": (lambda x: jnp.where(x < -1, 0.25 * x, jnp.where(x < 2, x, 2 * x)), 3),
    "identity": (lambda x: x, 1),
    "zero": (jnp.zeros_like, 1),
}


@pytest.mark.combinations(1)
@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("domain", [10.0, 7.3])
def test_piecewise_linear_functions_are_exact_in_float32_with_few_levels(name, domain):
    fn, slopes = PIECEWISE[name]
    exactly = gradient(fn)
    for allowed in (1 if slopes < 3 else 2, 4):
        book = codebook(fn, allowed, domain=domain)
        near = np.float32([0, 0.3, 0.5, 0.7, 1, 2, 3, 6, *np.abs(book.boundaries), 1e-3, 5, 30])
        near = np.unique(np.concatenate([near, -near]))
        for _ in range(2):
            ulps = [np.nextafter(near, np.float32(to)) for to in (-np.inf, np.inf)]
            near = np.unique(np.concatenate([near, *ulps]))
        x = near[(np.abs(near) >= np.finfo(np.float32).tiny) | (near == 0)]
        exact, found = exactly(x), recoded(book, x)
        levels = np.float32(book.levels)
        takes_one = np.isin(exact, levels)
        assert takes_one.sum() > 0.8 * x.size
        np.testing.assert_array_equal(found[takes_one], exact[takes_one])
        assert book.error < 1e-12
        assert len(book.levels) == slopes


def test_relu_in_one_bit_is_its_gradient():
    book = codebook(jax.nn.relu, 1)
    assert (book.boundaries, book.levels) == ((0.0,), (0.0, 1.0))
    x = jnp.array([-2.0, -1e-30, 0.0, 1e-30, 2.0])
    expected = jax.vmap(jax.grad(jax.nn.relu))(x)
    assert book.decode(book.encode(x)).tolist() == expected.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["elu", "selu", "hard_silu"])
def test_derivatives_that_jump_have_boundaries_at_the_jumps(name):
    books = [fitted(name, bits, coding="value") for bits in range(1, 6)]
    assert all(a.error > 2 * b.error for a, b in itertools.pairwise(books))
    jumps = {"elu": [], "selu": [0.0], "hard_silu": [-3, 3]}[name]
    for jump in jumps:
        assert np.abs(np.array(books[-1].boundaries) - jump).min() < 1e-6


@pytest.mark.slow
def test_measured_inputs_weigh_the_error():
    samples = np.random.default_rng(0).normal(1.0, 0.5, 20_000)
    book = codebook(jax.nn.gelu, 2, density=np.append(samples, [400.0, -400.0]))
    slope = slopes_at("gelu_tanh")(samples)
    squared = lambda b: np.mean((slope - recoded(b, samples)) ** 2)
    np.testing.assert_allclose(book.error, squared(book), rtol=0.01)
    rng = np.random.default_rng(1)
    for _ in range(20):
        moved = np.array(book.levels) + rng.normal(0, 0.02, 4)
        nearest = np.min((slope[:, None] - moved) ** 2, axis=1)
        assert squared(book) < np.mean(nearest) * 1.005
    assert squared(book) < squared(codebook(jax.nn.gelu, 2, density="normal")) / 2


def test_one_repeated_input_and_narrow_ones_are_densities_too():
    assert codebook(jax.nn.gelu, 2, density=np.full(100, 0.5)).error < 1e-6
    narrow = codebook(jax.nn.gelu, 3, density=np.random.default_rng(0).normal(0, 1e-3, 1000))
    assert len(narrow.levels) == 8
    assert narrow.error < 1e-7
    integers = codebook(jnp.tanh, 2, density=jnp.array([[0, 1], [1, 2]]))
    assert integers.error < 1e-5


def test_domains_and_scales_move_with_the_function():
    small = fit(lambda x: jax.nn.gelu(x * 100) / 100, 3, "uniform", 0.1, "value")
    usual = fitted("gelu_tanh", 3, coding="value")
    np.testing.assert_allclose(np.array(small.boundaries) * 100, usual.boundaries, atol=1e-7)
    np.testing.assert_allclose(small.levels, usual.levels, atol=1e-8)
    large = fit(jax.nn.gelu, 3, "uniform", 1000.0, "value")
    np.testing.assert_allclose(large.boundaries, usual.boundaries, atol=0.02)


def test_codebooks_are_made_while_tracing_and_within_float32_programs():
    fn = lambda x: jax.nn.silu(x) + 0.1 * x

    @jax.jit
    def traced(x):
        book = codebook(fn, 2)
        assert all(isinstance(level, float) for level in book.levels)
        return book.decode(book.encode(x)), jnp.ones(2).dtype.name == "float32" and x

    x = jnp.linspace(-2, 2, 9)
    book = codebook(fn, 2)
    np.testing.assert_array_equal(traced(x)[0], book.decode(book.encode(x)))
    assert jnp.ones(1).dtype == jnp.float32
    assert codebook(fn, 2) is book


def test_function_that_rounds_to_float32_has_nearly_the_same_codebook():
    rough = codebook(lambda x: jax.nn.gelu(x.astype(jnp.float32)), 3)
    exact = fitted("gelu_tanh", 3, coding="value")
    assert len(rough.boundaries) == len(exact.boundaries)
    np.testing.assert_allclose(rough.boundaries, exact.boundaries, atol=1e-3)
    np.testing.assert_allclose(rough.levels, exact.levels, atol=1e-4)


def test_functions_with_rules_of_their_own_work():
    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), x), lambda x, g: (g * (jnp.abs(x) < 1),))
    book = codebook(straight_through, 1)
    assert book.levels == (0.0, 1.0)
    np.testing.assert_allclose(np.abs(book.boundaries), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits=0 must be an int from 1 to 8"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 2.0}, r"bits=2\.0"),
        ({"bits": True}, "bits=True"),
        ({"domain": 0.0}, r"domain=0\.0 must be a positive number"),
        ({"domain": float("nan")}, "domain=nan"),
        ({"domain": "10"}, "domain='10'"),
        ({"coding": "values"}, "coding='values' must be 'value' or 'interval'"),
        ({"density": "gaussian"}, "density='gaussian' must be 'uniform', 'normal' or an array"),
        ({"density": []}, "density holds no samples"),
        ({"density": [1.0, float("nan")]}, "1 samples of 2 that are not finite"),
        ({"density": [11.0]}, "all 1 samples lie off the domain"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    for fn in (jax.nn.gelu, lambda x: x**2):
        with pytest.raises(ValueError, match=message):
            codebook(fn, **{"bits": 3, **arguments})


@pytest.mark.parametrize(
    "fn", [lambda x: jnp.stack([x, x]), lambda x: (x, x), lambda x: x @ x, lambda x: x > 0, 3.0]
)
def test_what_takes_no_number_to_a_number_is_refused(fn):
    with pytest.raises(TypeError, match="must take a number to a"):
        codebook(fn)


def test_derivative_that_is_not_finite_says_where():
    with pytest.raises(ValueError, match=r"not finite at x = -9\.5"):
        codebook(jnp.sqrt)
