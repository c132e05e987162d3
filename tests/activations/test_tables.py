"""The shipped codebooks: what the generator makes, found by name and by function."""

import dataclasses
import functools
import gzip
import itertools
import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.activations import Codebook, codebook, codebooks
from lowrank_optax.activations.codebooks import (
    DOMAIN,
    FUNCTIONS,
    TABLES,
    Coding,
    DensityName,
    known_name,
    table,
)
from lowrank_optax.activations.fitting import fit, squared_error
from lowrank_optax.activations.sampling import gradient, sample

DENSITIES, CODINGS = get_args(DensityName), get_args(Coding)
SOME = [
    ("gelu_tanh", 3, "uniform", "value"),
    ("gelu_erf", 4, "normal", "interval"),
    ("silu", 2, "uniform", "interval"),
    ("selu", 2, "normal", "value"),
    ("hard_tanh", 1, "uniform", "value"),
]


def _same(found: Codebook, expected: Codebook) -> None:
    assert (found.codes, found.bits) == (expected.codes, expected.bits)
    # Where two mirror images are equally good, rounding chooses.
    if len(found.levels) == 16 and not np.allclose(found.boundaries, expected.boundaries):
        boundaries = tuple(-x for x in found.boundaries[::-1])
        levels = tuple(1 - y for y in found.levels[::-1])
        found = dataclasses.replace(found, boundaries=boundaries, levels=levels)
    np.testing.assert_allclose(found.boundaries, expected.boundaries, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.levels, expected.levels, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.error, expected.error, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("row", SOME)
def test_shipped_row_is_what_the_generator_makes(row):
    name, bits, density, coding = row
    _same(table(*row), fit(FUNCTIONS[name], bits, density, DOMAIN, coding))


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_shipped_rows_are_what_the_generator_makes(name):
    for density in DENSITIES:
        for coding in CODINGS:
            for bits in range(1, 9):
                made = fit(FUNCTIONS[name], bits, density, DOMAIN, coding)
                _same(table(name, bits, density, coding), made)


def test_file_holds_exactly_the_functions_and_is_small():
    file = Path(codebooks.__file__).parent / TABLES
    assert file.stat().st_size < 700_000
    assert list(json.loads(gzip.decompress(file.read_bytes()))) == sorted(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shipped_rows_are_sound_and_the_best_nearby(name):
    """A wrong number in the file changes the error, or leaves a level that is not the mean."""
    slopes_at = gradient(FUNCTIONS[name])
    for density in DENSITIES:
        slopes = sample(slopes_at, DOMAIN, density)
        for coding in CODINGS:
            books = [table(name, bits, density, coding) for bits in range(1, 9)]
            for bits, book in enumerate(books, 1):
                assert book.bits == bits
                assert len(book.levels) <= 2**bits
                assert set(book.codes) == set(range(len(book.levels)))
                assert len(book.codes) == len(book.boundaries) + 1
                assert (np.diff(book.boundaries) > 0).all()
                assert (np.diff(book.codes) != 0).all()
                assert coding == "interval" or (np.diff(book.levels) > 0).all()
                # A boundary at a jump lies at the next number of float32, up to 5e-7 off.
                np.testing.assert_allclose(book.error, squared_error(book, slopes), atol=1e-6)
                ends = np.concatenate([[-DOMAIN], book.boundaries, [DOMAIN]])
                weight, first, _ = np.diff(slopes.integrals(ends), axis=1)
                weight, first = (np.bincount(book.codes, part) for part in (weight, first))
                np.testing.assert_allclose(first, weight * book.levels, atol=1e-6)
            errors = [book.error for book in books]
            assert all(b < a or b < 1e-12 for a, b in itertools.pairwise(errors))


def test_functions_are_known_however_they_are_written():
    assert known_name(jax.nn.gelu) == known_name(functools.partial(jax.nn.gelu)) == "gelu_tanh"
    assert known_name(functools.partial(jax.nn.gelu, approximate=True)) == "gelu_tanh"
    assert known_name(functools.partial(jax.nn.gelu, approximate=False)) == "gelu_erf"
    assert known_name(jax.nn.swish) == "silu"
    assert known_name(jax.nn.tanh) == known_name(jax.lax.tanh) == known_name(jnp.tanh) == "tanh"
    assert known_name(jax.nn.hard_swish) == "hard_silu"
    assert known_name(functools.partial(jax.nn.leaky_relu, negative_slope=0.01)) == "leaky_relu"
    assert known_name(functools.partial(jax.nn.leaky_relu, negative_slope=0.2)) is None
    assert known_name(functools.partial(jax.nn.squareplus, b=4)) == "squareplus"
    assert known_name(lro.activations.gelu) == "gelu_tanh"
    assert known_name(lro.activations.hard_silu) == "hard_silu"
    assert known_name(functools.partial(jax.nn.elu, jnp.ones(()))) is None
    assert known_name(jnp.sin) is None


def test_codebook_of_a_known_function_is_the_shipped_one():
    assert codebook(jax.nn.gelu, 3) == table("gelu_tanh", 3)
    exact = functools.partial(jax.nn.gelu, approximate=False)
    assert codebook(exact, 2, coding="interval") == table("gelu_erf", 2, coding="interval")
    assert codebook(jax.nn.silu, 2, density="normal") == table("silu", 2, "normal")
    assert codebook(jax.nn.gelu, 3, domain=9.0) != table("gelu_tanh", 3)


def test_codebooks_of_all_bits_are_shipped():
    for bits in range(1, 9):
        assert len(table("tanh", bits).levels) == 2**bits
        assert table("tanh", bits) == codebook(jnp.tanh, bits)


def test_shipped_relu_in_one_bit_is_its_gradient():
    for density in DENSITIES:
        book = table("relu", 1, density)
        assert (book.boundaries, book.codes, book.levels) == ((0.0,), (0, 1), (0.0, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gelu",), "name='gelu' must be one of celu, elu, gelu_erf"),
        (("silu", 0), "bits=0 must be"),
        (("silu", 3, "gaussian"), "density='gaussian' must be"),
        (("silu", 3, "normal", "x"), "coding='x' must be"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        table(*arguments)
