"""The policy of closeness tells rounding from faults."""

from typing import Any

from close import MOST_UNITS, assert_close
import jax.numpy as jnp
import numpy as np
import pytest

X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
NAN, INFINITE, SHORT = (np.array([1.0, x], np.float32) for x in (np.nan, np.inf, 0.5))
CLOSE: dict[str, tuple[Any, Any]] = {
    "rounded otherwise": (X * np.float32(1 + 2**-22), X),
    "a tree": ({"a": X, "b": [X]}, {"a": X, "b": [X]}),
    "NaN where NaN should be": (NAN, NAN),
    "infinite where it should be": (INFINITE, INFINITE),
    "nothing at all": (X[:0], X[:0]),
    "float32 beside bfloat16": (X, jnp.asarray(X, jnp.bfloat16)),
}
FAR: dict[str, tuple[Any, Any]] = {
    "off by 1e-4": (X * np.float32(1 + 1e-4), X),
    "transposed": (X[:, :4].T, X[:, :4]),
    "a diagonal": (X + np.eye(4, 5, dtype=np.float32) * np.float32(1e-4), X),
    "NaN for a number": (NAN, SHORT),
    "a number for NaN": (SHORT, NAN),
    "infinite for a number": (INFINITE, SHORT),
    "of the other sign": (-INFINITE, INFINITE),
    "something for nothing": (np.float32([1e-30]), np.float32([0.0])),
    "another tree": ({"a": X}, [X]),
    "bfloat16 for float32": (jnp.asarray(X, jnp.bfloat16), X),
}


@pytest.mark.distinct
@pytest.mark.parametrize("name", CLOSE)
def test_rounding_is_close(name: str) -> None:
    assert_close(*CLOSE[name])


@pytest.mark.distinct
@pytest.mark.parametrize("name", FAR)
def test_a_fault_is_far(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_close(*FAR[name])


def test_size_is_that_of_what_was_summed() -> None:
    terms = np.float32([1e4, 1.0, -1e4])
    found = np.float32(terms[0] + terms[1]) + terms[2] + np.float32(1e-3)
    with pytest.raises(AssertionError, match=r"off by 0\.00"):
        assert_close(found, 1.0, dtype=np.float32)
    assert_close(found, 1.0, size=np.abs(terms).sum(), dtype=np.float32)


def test_half_precision_is_held_to_a_few_units() -> None:
    narrow = jnp.asarray(X, jnp.bfloat16)
    assert_close(narrow, X, MOST_UNITS, dtype=jnp.bfloat16)
    with pytest.raises(AssertionError, match="4 units"):
        assert_close(narrow * 1.1, X, MOST_UNITS, dtype=jnp.bfloat16)


def test_no_more_units_than_make_a_fault() -> None:
    with pytest.raises(ValueError, match="units=801"):
        assert_close(X, X, 801)
