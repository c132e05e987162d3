"""Two 4-bit codes to a byte: nothing is lost, and half the bytes are left."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.quantization import pack, packing_of, unpack

SHAPES = [
    (1,), (7,), (256,), (300,), (2, 5), (3, 5), (128, 3), (3, 5, 7), (2, 64, 3), (5, 1, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_loses_nothing_and_halves_an_axis(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    packed = jax.jit(pack)(codes)
    axis = packing_of(shape).axis
    halved = tuple(-(-n // 2) if i == axis else n for i, n in enumerate(shape))
    assert (packed.shape, packed.dtype) == (halved, jnp.uint8)
    if any(n % 2 == 0 for n in shape[:-1] or shape):
        assert packed.nbytes == math.prod(shape) / 2
    np.testing.assert_array_equal(jax.jit(unpack, static_argnums=1)(packed, shape), codes)


def test_the_last_axis_is_packed_only_where_there_is_no_other() -> None:
    assert all(packing_of(shape).axis < len(shape) - 1 for shape in SHAPES if len(shape) > 1)


def test_no_byte_joins_rows_of_different_runs_of_64() -> None:
    row = np.zeros((256, 4), np.uint8)
    row[130] = 15  # row 2 of the third run
    (touched,) = np.unique(np.nonzero(np.asarray(jax.jit(pack)(row)))[0])
    assert touched == 2 * 32 + 2


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_an_empty_array_stays_empty(shape: tuple[int, ...]) -> None:
    assert unpack(pack(jnp.zeros(shape, jnp.uint8)), shape).shape == shape
