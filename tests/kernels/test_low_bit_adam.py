"""Adam with its moments in codes: every implementation against NumPy, and each other."""

import functools
from typing import Any

from close import assert_close
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from kernels.steps import (
    SCALARS,
    Formats,
    Step,
    assert_moments,
    decoded,
    expected_of,
    formats_of,
    step_of,
)
import numpy as np
import pytest

from lowrank_optax.kernels import AdamScalars, low_bit_adam
from lowrank_optax.quantization import quantize
from tests.quantization.tables import table

# Implementation, shape, bits, block.
CASES = {
    "xla: whole blocks": ("xla", (64, 256), 8, 128),
    "xla: an axis": ("xla", (1000,), 8, 256),
    "xla: rows shorter than a block": ("xla", (40, 8), 8, 256),
    "xla: 4 bits": ("xla", (2, 4, 21, 128), 4, 128),
    "xla: 4 bits, odd": ("xla", (3, 5, 256), 4, 128),
    "tpu: whole blocks": ("mosaic_tpu", (64, 256), 8, 128),
    "tpu: one row": ("mosaic_tpu", (1, 300), 8, 128),
    "tpu: rows beyond a tile, a short last block": ("mosaic_tpu", (300, 300), 8, 128),
    "tpu: columns beyond a tile": ("mosaic_tpu", (9, 2600), 8, 256),
    "tpu: stacked": ("mosaic_tpu", (2, 3, 33, 128), 8, 128),
    "tpu: 4 bits by rows": ("mosaic_tpu", (192, 300), 4, 128),
    "tpu: 4 bits by rows, stacked, beyond a tile": ("mosaic_tpu", (2, 576, 130), 4, 128),
    "tpu: 4 bits by layers": ("mosaic_tpu", (2, 4, 21, 128), 4, 128),
    "tpu: 4 bits by layers of layers": ("mosaic_tpu", (3, 2, 5, 7, 256), 4, 256),
    "gpu: whole blocks": ("triton", (64, 256), 8, 128),
    "gpu: stacked": ("triton", (2, 3, 33, 128), 8, 128),
    "gpu: 4 bits, even rows": ("triton", (6, 128), 4, 64),
    "gpu: 4 bits by layers": ("triton", (2, 4, 21, 128), 4, 128),
    "gpu: 4 bits by layers of layers": ("triton", (3, 2, 5, 7, 256), 4, 256),
}
# Kernel, shape, bits, block, and why not.
UNSUPPORTED = [
    ("mosaic_tpu", (1000,), 8, 256, "no rows and columns"),
    ("mosaic_tpu", (40, 8), 8, 256, "shorter than a block"),
    ("mosaic_tpu", (4, 64), 8, 64, "no multiple of 128 lanes"),
    ("mosaic_tpu", (3, 5, 256), 4, 128, "along an odd axis"),
    ("mosaic_tpu", (6, 256), 4, 128, "no multiple of 64"),
    ("triton", (4, 300), 8, 128, "no multiple of the block"),
    ("triton", (4, 48), 8, 24, "no power of two"),
    ("triton", (3, 5, 256), 4, 128, "an odd one"),
]


# Two shapes that all implementations take, so that most tests run the same programs.
EIGHT_BITS, FOUR_BITS = (64, 256), (2, 4, 21, 128)


@functools.partial(jax.jit, static_argnames=("formats", "implementation", "interpret"))
def run_jitted(step: Step, scalars: AdamScalars, **options: Any) -> Any:
    return low_bit_adam(*step, scalars, **options)


def run(
    implementation: str,
    step: Step,
    formats: Formats,
    scalars: AdamScalars = SCALARS,
    interpret: Any = True,
) -> Any:
    interpret = interpret if implementation != "xla" else False
    options = {"formats": formats, "implementation": implementation, "interpret": interpret}
    return run_jitted(step, scalars, **options)


def assert_agrees(step: Step, formats: Formats, found: Any) -> None:
    """Parameter (or update) and moments are those of NumPy."""
    wanted, wanted_moments = expected_of(step, formats)
    assert_close(found[0], wanted, size=1 + np.abs(wanted))
    assert_moments(found[1:], wanted_moments, formats)


# Each is a part of what another case does.
IN_FULL = ("tpu: 4 bits by rows", "gpu: stacked")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.full] if x in IN_FULL else []) for x in CASES]
)
def test_agrees_with_float64(name: str) -> None:
    implementation, shape, bits, block = CASES[name]
    formats = formats_of(bits, block)
    step = step_of(shape, formats)
    assert_agrees(step, formats, run(implementation, step, formats))


@pytest.mark.parametrize(("implementation", "shape", "bits", "block", "why"), UNSUPPORTED)
def test_a_kernel_says_what_it_does_not_support_and_none_falls_back(
    implementation: str, shape: tuple[int, ...], bits: int, block: int, why: str
) -> None:
    formats = formats_of(bits, block)
    step = step_of(shape, formats)
    with pytest.raises(NotImplementedError, match=f"{implementation}: .*{why}"):
        run(implementation, step, formats)
    jax.eval_shape(lambda *args: low_bit_adam(*args, SCALARS, formats=formats), *step)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "xla", "triton"])
class TestEveryImplementation:
    """Kernels are interpreted: this is a CPU."""

    def test_without_a_parameter_returns_the_update(self, implementation: str) -> None:
        formats = formats_of(8, 128)
        step = step_of(EIGHT_BITS, formats)._replace(param=None)
        found = run(implementation, step, formats)
        assert found[0].dtype == jnp.float32
        assert_agrees(step, formats, found)

    def test_bfloat16_is_rounded_once(self, implementation: str) -> None:
        formats = formats_of(8, 128)
        step = step_of(EIGHT_BITS, formats, dtype=jnp.bfloat16)
        param, *moments = run(implementation, step, formats)
        wanted, wanted_moments = expected_of(step, formats)
        assert param.dtype == jnp.bfloat16
        rounded = wanted.astype(np.float32).astype(jnp.bfloat16)
        assert np.mean(np.asarray(param) != rounded) < 1e-3  # ties
        assert_moments(moments, wanted_moments, formats)

    @pytest.mark.parametrize(("shape", "bits"), [(EIGHT_BITS, 8), (FOUR_BITS, 4)])
    def test_no_gradient_ever_moves_nothing(
        self, implementation: str, shape: tuple[int, ...], bits: int
    ) -> None:
        formats = formats_of(bits, 128)
        step = step_of(shape, formats)
        zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), step)
        scalars = SCALARS._replace(weight_decay=0.0)
        param, *moments = run(implementation, zeros._replace(param=step.param), formats, scalars)
        np.testing.assert_array_equal(param, step.param)
        for moment in moments:
            assert not np.any(moment.scales)
        assert not any(map(np.any, decoded(moments, formats, shape)))

    def test_what_is_not_finite_stays_in_its_place(self, implementation: str) -> None:
        formats = formats_of(8, 128)
        step = step_of(EIGHT_BITS, formats)
        clean, *clean_moments = run(implementation, step, formats)
        usual = decoded(clean_moments, formats, EIGHT_BITS)
        elsewhere = np.ones(EIGHT_BITS, bool)
        elsewhere[1, 130] = False
        outside = np.ones(EIGHT_BITS, bool)
        outside[1, 128:] = False  # its block
        for bad in (np.nan, np.inf, -np.inf):
            gradient = np.array(step.gradient)
            gradient[1, 130] = bad
            bad_step = step._replace(gradient=jnp.asarray(gradient))
            param, *moments = run(implementation, bad_step, formats)
            assert not np.isfinite(param[1, 130])
            np.testing.assert_array_equal(
                np.asarray(param)[elsewhere], np.asarray(clean)[elsewhere]
            )
            stored = decoded(moments, formats, EIGHT_BITS)
            for x, other, moment, fmt in zip(stored, usual, moments, formats, strict=True):
                assert np.all(np.isfinite(moment.scales))
                np.testing.assert_array_equal(np.asarray(x)[outside], np.asarray(other)[outside])
                least = table("dynamic", 8, False)[1] if fmt.positive else 0
                assert_close(x[1, 130], np.float64(least * moment.scales[1, 1]))

    @pytest.mark.slow
    def test_under_vmap_each_is_as_alone(self, implementation: str) -> None:
        formats = formats_of(8, 128)
        steps = [step_of(EIGHT_BITS, formats, seed=i) for i in range(3)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *steps)
        rates = [np.float32(x) for x in (0.1, 0.2, 0.3)]

        def one(rate: Any, step: Step) -> Any:
            return run(implementation, step, formats, SCALARS._replace(learning_rate=rate))

        together = jax.jit(jax.vmap(one))(np.stack(rates), stacked)
        for i, step in enumerate(steps):
            alone = one(rates[i], step)
            for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                assert_close(np.asarray(x)[i], y)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "bits"), [((32, 2048), 8), ((64, 256), 4)])
def test_the_tpu_kernel_has_no_races_and_reads_nothing_unwritten(
    shape: tuple[int, ...], bits: int
) -> None:
    formats = formats_of(bits, 128)
    step = step_of(shape, formats)
    params = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    assert_agrees(step, formats, run("mosaic_tpu", step, formats, interpret=params))


def test_first_step_is_adams_whatever_the_codes() -> None:
    formats = formats_of(4, 128)
    step = step_of(FOUR_BITS, formats)._replace(param=None)
    zero = lambda moment: jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), moment)
    step = step._replace(first=zero(step.first), second=zero(step.second))
    scalars = SCALARS._replace(correction1=1 - 0.9, correction2=1 - 0.99, scale=1.0)
    update, *_ = jax.jit(lambda x: low_bit_adam(*x, scalars, formats=formats))(step)
    np.testing.assert_allclose(update, np.sign(step.gradient), rtol=1e-3)  # eps


def test_arguments_that_do_not_agree_are_refused() -> None:
    formats = formats_of(8, 128)
    step = step_of((8, 256), formats)
    other = step_of((8, 128), formats)
    with pytest.raises(ValueError, match="param of shape"):
        low_bit_adam(*step._replace(param=other.param), SCALARS, formats=formats)
    with pytest.raises(ValueError, match="second has codes and scales of shapes"):
        low_bit_adam(*step._replace(second=other.second), SCALARS, formats=formats)
    narrow = step.second._replace(scales=step.second.scales.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"second has .*bfloat16: .*must be uint8 and float32"):
        low_bit_adam(*step._replace(second=narrow), SCALARS, formats=formats)
    wide = step.first._replace(codes=step.first.codes.astype(jnp.int32))
    with pytest.raises(ValueError, match="first has codes and scales of dtypes int32"):
        low_bit_adam(*step._replace(first=wide), SCALARS, formats=formats)


def test_codes_that_are_not_in_rows_are_refused() -> None:
    step = step_of((8, 256), formats_of(8, 128))
    formats = tuple(fmt._replace(packing="auto") for fmt in formats_of(8, 128))
    first, second = (quantize(jnp.zeros((8, 256)), fmt) for fmt in formats)
    with pytest.raises(ValueError, match="first has packing='auto'"):
        low_bit_adam(step.gradient, first, second, step.param, SCALARS, formats=formats)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "triton"])
def test_kernels_refuse_scales_that_are_not_float32(implementation: str) -> None:
    formats = tuple(fmt._replace(scale_dtype=jnp.bfloat16) for fmt in formats_of(8, 128))
    step = step_of(EIGHT_BITS, formats)
    narrow = lambda x: x._replace(scales=x.scales.astype(jnp.bfloat16))
    step = step._replace(first=narrow(step.first), second=narrow(step.second))
    with pytest.raises(NotImplementedError, match="scales must be float32"):
        run(implementation, step, formats)
    new = jax.eval_shape(lambda x: low_bit_adam(*x, SCALARS, formats=formats), step)
    assert new[1].scales.dtype == jnp.bfloat16
