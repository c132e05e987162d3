"""The trees every check works on, and what it means for two trees to be equal."""

from typing import Any

import close
import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
STEPS = 5


def normal(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers, their last axis scaled by 1, 1/2, 1/4, ...

    The scaling parts the singular values, so that a truncated basis is well conditioned and two
    ways to compute it can be compared.
    """
    values = np.random.default_rng(seed).normal(size=shape)
    if len(shape) > 1:
        values = values * 0.5 ** np.arange(shape[-1])
    return jnp.asarray(values.astype(dtype))


def normal_like(tree: Tree, seed: int, steps: int | None = None) -> Tree:
    """`normal` in the shapes and dtypes of a tree, with a leading axis if `steps` is given."""
    leaves, treedef = jax.tree.flatten(tree)
    leading = () if steps is None else (steps,)
    drawn = [normal(leading + x.shape, seed + i, x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


# The parameters of `harness.flax_checks.Model`: a tall and a wide matrix, and a vector.
PARAMS = {
    "first": {"bias": normal((4,), 1), "kernel": normal((6, 4), 2)},
    "second": {"kernel": normal((4, 5), 3)},
}
GRADIENTS = normal_like(PARAMS, 10, STEPS)


# The helpers below work in NumPy: an operation on jax.Arrays would be compiled for every shape.


def at(tree: Tree, index: Any) -> Tree:
    """Indexes the leading axis of every leaf."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), tree)


def stack(trees: list[Tree], axis: int = 0) -> Tree:
    """Stacks trees of equal structure on a new axis."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves, axis)), *trees)


def cast(tree: Tree, dtype: Any) -> Tree:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype)), tree)


def scale(tree: Tree, factor: Any) -> Tree:
    """Multiplies every leaf by a number, or by one for each step."""
    factor = np.asarray(factor, np.float32)
    transposed = lambda x: (np.asarray(x).T * factor).T
    return jax.tree.map(lambda x: jnp.asarray(transposed(x)), tree)


def is_zero(tree: Tree) -> bool:
    return not any(np.any(x) for x in jax.tree.leaves(tree))


def is_finite(tree: Tree) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def poison(tree: Tree, value: float, index: tuple[int, ...] = (0, 0)) -> Tree:
    """Puts one bad number into the first kernel of a tree like `PARAMS`."""
    kernel = np.array(tree["first"]["kernel"])
    kernel[index] = value
    return {**tree, "first": {**tree["first"], "kernel": jnp.asarray(kernel)}}


def assert_same_types(actual: Tree, expected: Tree) -> None:
    """Structure, shapes, dtypes, weak types and (on an explicit mesh) shardings are equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        assert jax.typeof(x) == jax.typeof(y), jax.tree_util.keystr(path)


def assert_close(actual: Tree, expected: Tree, units: float = 300) -> None:
    """Structure and dtypes are equal, values to rounding; see `close`."""
    assert_same_dtypes(actual, expected)
    close.assert_close(actual, expected, units)


def assert_mostly_close(actual: Tree, expected: Tree, units: float = 800) -> None:
    """As `assert_close` for updates ``[steps, ...]`` whose state was stored in codes between steps.

    Rounding may flip a code, and then a few entries differ by a code's step. So the first update,
    which no code has touched, is held to rounding; in each later one at most a quarter of the
    entries may be off by more, and none by more than a third of the leaf's largest. A
    fault of 1e-4 in the arithmetic moves all entries, a flipped code few.
    """
    assert_same_dtypes(actual, expected)
    first = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:1], tree)
    close.assert_close(first(actual), first(expected), units)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        eps = close.eps_of(x)
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        for step, wanted in zip(x[1:], y[1:], strict=True):
            size = np.abs(wanted).max(initial=0)
            error = np.abs(step - wanted)
            rounding = units * eps * np.maximum(np.abs(wanted), 1e-2 * size)
            assert np.mean(error <= rounding) >= 3 / 4 if error.size else True
            assert error.max(initial=0) <= size / 3


def assert_same_dtypes(actual: Tree, expected: Tree) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        assert x.dtype == y.dtype, jax.tree_util.keystr(path)


def assert_equal(actual: Tree, expected: Tree) -> None:
    """Equal to the last bit; typed PRNG keys are compared by their data."""
    assert_same_types(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
