"""Random steps for the kernels, and the same steps in NumPy float64."""

import functools
from typing import Any, NamedTuple

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.kernels import AdamScalars
from lowrank_optax.kernels.adam import coded_shapes
from lowrank_optax.quantization import BlockFormat, Quantized, code_map, dequantize, quantize
from tests.quantization.tables import assert_same_codes

SCALARS = AdamScalars(0.1, 0.9, 0.99, 1e-8, 0.01, 1 - 0.9**3, 1 - 0.99**3, 0.5)
Formats = tuple[BlockFormat, BlockFormat]


def formats_of(bits: int, block: int) -> Formats:
    """Signed for the first moment, unsigned and never zero for the second."""
    return (
        BlockFormat(code_map("dynamic", bits, True), block),
        BlockFormat(code_map("dynamic", bits, False), block, positive=True),
    )


class Step(NamedTuple):
    """Arguments of `low_bit_adam`."""

    gradient: jax.Array
    first: Any
    second: Any
    param: jax.Array | None


def step_of(
    shape: tuple[int, ...], formats: Formats, dtype: Any = jnp.float32, seed: int = 0
) -> Step:
    """A step in the middle of a run: nothing in it is zero."""
    rng = np.random.default_rng(seed)
    normal = lambda *size: rng.normal(size=size)
    array = lambda x, dtype=jnp.float32: jnp.asarray(np.asarray(x, dtype))  # compiles nothing
    first = random_codes(shape, formats[0], rng)
    second = random_codes(shape, formats[1], rng, formats[1].map.least_positive)
    gradient, param = (array(normal(*shape), dtype) for _ in range(2))
    return Step(gradient, first, second, param)


def random_codes(
    shape: tuple[int, ...], fmt: BlockFormat, rng: np.random.Generator, least: int = 0
) -> Quantized:
    """Any code of the map from the least on in any place, and scales of about one."""
    codes_shape, scales_shape = coded_shapes(shape, fmt)
    draw = lambda: rng.integers(least, fmt.map.largest + 1, codes_shape).astype(np.uint8)
    codes = draw() if fmt.map.bits == 8 else draw() | (draw() << 4)
    scales = rng.uniform(0.5, 1.5, scales_shape).astype(np.float32)
    return Quantized(jnp.asarray(codes), jnp.asarray(scales))


@functools.partial(jax.jit, static_argnames=("formats", "shape"))
def decoded(moments: Any, formats: Formats, shape: tuple[int, ...]) -> list[jax.Array]:
    return [dequantize(x, fmt, shape) for x, fmt in zip(moments, formats, strict=True)]


@functools.partial(jax.jit, static_argnames="formats")
def coded(moments: Any, formats: Formats) -> list[Quantized]:
    return [quantize(x, fmt) for x, fmt in zip(moments, formats, strict=True)]


def expected_of(
    step: Step, formats: Formats, s: AdamScalars = SCALARS
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The new parameter (or the update) and both moments before they are put in codes."""
    g = np.asarray(step.gradient, np.float64)
    moments = decoded([step.first, step.second], formats, g.shape)
    first, second = (np.asarray(x, np.float64) for x in moments)
    first = s.b1 * first + (1 - s.b1) * g
    second = s.b2 * second + (1 - s.b2) * g * g
    update = s.scale * (first / s.correction1) / (np.sqrt(second / s.correction2) + s.eps)
    if step.param is None:
        return update, [first, second]
    p = np.asarray(step.param, np.float64)
    return p - s.learning_rate * (update + s.weight_decay * p), [first, second]


def assert_moments(found: list[Any], expected: list[np.ndarray], formats: Formats) -> None:
    """That moments are the codes of the expected ones, but for ties in the last place."""
    codes = coded([np.asarray(x, np.float32) for x in expected], formats)
    for x, wanted, fmt in zip(found, codes, formats, strict=True):
        assert_same_codes(x.codes, wanted.codes, fmt.map.bits)
        assert_close(x.scales, wanted.scales, 100)
