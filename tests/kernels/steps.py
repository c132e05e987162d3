"""Random steps for the kernels, and the same steps in NumPy float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.kernels import AdamScalars
from lowrank_optax.quantization import BlockFormat, Quantized, code_map, dequantize, quantize

SCALARS = AdamScalars(0.1, 0.9, 0.99, 1e-8, 0.01, 1 - 0.9**3, 1 - 0.99**3, 0.5)
Formats = tuple[BlockFormat, BlockFormat]


def formats_of(bits: int, block: int, first: str = "dynamic", second: str = "") -> Formats:
    """Signed for the first moment, unsigned and never zero for the second."""
    second = second or ("dynamic" if bits == 8 else "linear")
    return (
        BlockFormat(code_map(first, bits, True), block),
        BlockFormat(code_map(second, bits, False), block, positive=True),
    )


class Step(NamedTuple):
    """Arguments of `low_bit_adam`, or with a basis of `projected_adam`."""

    gradient: jax.Array
    basis: jax.Array | None
    first: Any
    second: Any
    param: jax.Array | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(self) if self.basis is not None else (self.gradient, *self[2:])


def step_of(
    shape: tuple[int, ...],
    formats: Formats | None,
    rank: int | None = None,
    axis: int = -2,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> Step:
    """A step in the middle of a run: nothing in it is zero."""
    rng = np.random.default_rng(seed)
    normal = lambda *size: rng.normal(size=size)
    batch, basis, moment = shape[:-2], None, shape
    if rank is not None:
        d = shape[axis]
        basis = jnp.asarray(np.linalg.qr(normal(*batch, d, rank))[0], jnp.float32)
        moment = (*batch, rank, shape[-1]) if axis == -2 else (*shape[:-1], rank)
    first = jnp.asarray(0.1 * normal(*moment), jnp.float32)
    second = jnp.asarray(normal(*moment) ** 2 + 0.1, jnp.float32)
    if formats is not None:
        first, second = quantize(first, formats[0]), quantize(second, formats[1])
    gradient, param = jnp.asarray(normal(*shape), dtype), jnp.asarray(normal(*shape), dtype)
    return Step(gradient, basis, first, second, param)


def expected_of(
    step: Step, formats: Formats | None, axis: int = -2, s: AdamScalars = SCALARS
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The new parameter (or the update) and both moments before they are put in codes."""
    g = np.asarray(step.gradient.astype(jnp.float32), np.float64)
    if step.basis is not None:
        basis = np.asarray(step.basis, np.float64)
        g = np.swapaxes(basis, -1, -2) @ g if axis == -2 else g @ basis
    moments = [step.first, step.second]
    if formats is not None:
        moments = [dequantize(x, f, g.shape) for x, f in zip(moments, formats, strict=True)]
    first, second = (np.asarray(x, np.float64) for x in moments)
    first = s.b1 * first + (1 - s.b1) * g
    second = s.b2 * second + (1 - s.b2) * g * g
    update = s.scale * (first / s.correction1) / (np.sqrt(second / s.correction2) + s.eps)
    if step.basis is not None:
        update = basis @ update if axis == -2 else update @ np.swapaxes(basis, -1, -2)
    if step.param is None:
        return update, [first, second]
    p = np.asarray(step.param.astype(jnp.float32), np.float64)
    return p - s.learning_rate * (update + s.weight_decay * p), [first, second]


def assert_moments(found: list[Any], expected: list[np.ndarray], formats: Formats | None) -> None:
    """That moments are the expected ones, or their codes, but for ties in the last place."""
    if formats is None:
        for x, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, wanted, rtol=3e-6, atol=5e-7)
        return
    for x, wanted, fmt in zip(found, expected, formats, strict=True):
        codes = quantize(jnp.asarray(wanted, jnp.float32), fmt)
        assert_codes(x, codes, fmt, wanted.shape)


def assert_codes(found: Quantized, wanted: Quantized, fmt: BlockFormat, shape: Any) -> None:
    """Scales to rounding; of the codes one in two hundred may be that of a neighbour."""
    assert found.codes.dtype == wanted.codes.dtype
    assert found.codes.shape == wanted.codes.shape
    np.testing.assert_allclose(found.scales, wanted.scales, rtol=2e-6, atol=1e-7)
    unit = BlockFormat(fmt.map, fmt.block_size, fmt.positive)
    ones = jax.tree.map(jnp.ones_like, wanted.scales)
    numbers = [
        np.asarray(dequantize(Quantized(x.codes, ones), unit, shape)) for x in (found, wanted)
    ]
    table = np.unique(np.asarray(fmt.map.decode(jnp.arange(2**fmt.map.bits))))
    at = [np.searchsorted(table, x) for x in numbers]
    apart = np.abs(at[0] - at[1])
    assert apart.max(initial=0) <= 1
    assert np.mean(apart != 0) <= 0.005
