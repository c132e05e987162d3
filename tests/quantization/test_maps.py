"""Code maps: the numbers of their definition, and the nearest of them."""

import functools
from typing import Any

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from lowrank_optax.quantization import CodeMap, code_map
from tests.quantization.tables import MAPS, table

COUNT = 4096
EVERY = [*MAPS, ("linear", 5, True), ("normal", 1, True), ("normal", 3, True)]
NAMES = [f"{name}-{'signed' if signed else 'unsigned'}-{bits}" for name, bits, signed in EVERY]
every_map = pytest.mark.parametrize(("name", "bits", "signed"), EVERY, ids=NAMES)


def decoded(coder: CodeMap, codes: Any) -> np.ndarray:
    """In float64; calls of up to 256 codes share a compiled function."""
    codes = np.asarray(codes, np.int32)
    padded = np.zeros(max(256, len(codes)), np.int32)
    padded[: len(codes)] = codes
    return np.asarray(_decode(coder)(padded), np.float64)[: len(codes)]


def encoded(coder: CodeMap, x: Any) -> np.ndarray:
    x = np.asarray(x, np.float32)
    padded = np.zeros(COUNT, np.float32)
    padded[: len(x)] = x
    return np.asarray(_encode(coder)(padded))[: len(x)]


@functools.cache
def _decode(coder: CodeMap) -> Any:
    return jax.jit(coder.decode)


@functools.cache
def _encode(coder: CodeMap) -> Any:
    return jax.jit(coder.encode)


@every_map
def test_codes_stand_for_the_numbers_of_the_definition(name: Any, bits: Any, signed: bool) -> None:
    coder, values = code_map(name, bits, signed), table(name, bits, signed)
    assert coder.largest == len(values) - 1
    assert values[coder.least_positive] == min(values[values > 0])
    np.testing.assert_allclose(decoded(coder, np.arange(len(values))), values, rtol=2e-6, atol=0)


def test_the_dynamic_maps_have_the_ends_zeros_and_sums_of_the_paper() -> None:
    signed = decoded(code_map("dynamic", 8, True), np.arange(256))
    same = functools.partial(assert_close, dtype=np.float32)
    same(signed[[0, 254, 255]], [-0.99296875, 0.99296875, 1.0])
    same(signed[126:130], [-5.5e-7, 0, 5.5e-7, 3.25e-6])
    assert -1.0 not in signed
    same([signed.sum(), (signed**2).sum()], [1.0, 48.595837526], size=[48, 48])
    unsigned = decoded(code_map("dynamic", 8, False), np.arange(256))
    same(unsigned[:4], [0, 3.25e-7, 7.75e-7, 2.125e-6])
    same(unsigned[254:], [0.99648437, 1.0])
    sums = [unsigned.sum(), (unsigned**2).sum()]
    same(sums, [75.1052631, 48.597451844])
    four = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = [*(-x for x in reversed(four)), 0, *four, 1.0]
    found = decoded(code_map("dynamic", 4, True), np.arange(16))
    same(found, expected)


@every_map
def test_every_code_decodes_to_a_number_that_encodes_to_it(
    name: Any, bits: Any, signed: bool
) -> None:
    coder = code_map(name, bits, signed)
    codes = list(range(coder.largest + 1))
    assert encoded(coder, decoded(coder, codes)).tolist() == codes


@every_map
def test_no_number_is_nearer_than_the_one_of_the_code(name: Any, bits: Any, signed: bool) -> None:
    coder, values = code_map(name, bits, signed), table(name, bits, signed)
    decades = 10.0 ** np.arange(-8, 1)
    middles = (values[1:] + values[:-1]) / 2

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 2**31), spread=st.floats(1e-7, 1e-1))
    def check(seed: int, spread: float) -> None:
        rng = np.random.default_rng(seed)
        near = rng.choice(np.concatenate([decades, middles, values]), COUNT // 4)
        sizes = np.concatenate(
            [
                rng.uniform(-1, 1, COUNT // 2),
                10 ** rng.uniform(-9, 0, COUNT // 4) * rng.choice([-1, 1], COUNT // 4),
                near * (1 + spread * rng.normal(size=COUNT // 4)),
            ]
        )
        x = np.clip(sizes if signed else np.abs(sizes), -1, 1).astype(np.float32)
        found = decoded(coder, encoded(coder, x))
        wide = x.astype(np.float64)
        at = np.clip(np.searchsorted(values, wide), 1, len(values) - 1)
        nearest = np.minimum(np.abs(values[at] - wide), np.abs(values[at - 1] - wide))
        np.testing.assert_array_less(np.abs(found - wide) - nearest, 3e-6 * np.abs(wide) + 1e-12)

    check()


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("tree", 8, "map='tree'"),
        ("dynamic", 3, "bits=3 must be one of 8, 4 for map='dynamic'"),
        ("linear", 1, "bits=1"),
    ],
)
def test_unknown_maps_are_refused(name: Any, bits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_map(name, bits)
