"""How close is close: one policy for comparing numbers that were rounded on the way.

Two right programs may add in another order, fuse a product with a sum, or use other instructions.
Their results then differ by some units in the last place *of what was summed*, and not of the sum:
where terms cancel, the relative error of a sum has no bound. So every comparison is

    |actual - expected| <= units * eps * size

with the `eps` of the coarser dtype of the two, and with the size of what was summed. By default
that is the largest entry of the array, a good measure where some entry does not cancel. Where
every entry may, pass `size`: for a product `x @ w` it is `abs(x) @ abs(w)`.

A sum of k terms is off by at most k units, and by about sqrt(k) of them. The default of 32 covers
the sums of up to some hundred terms that most tests compare; 800, which is 1e-4 in float32, is the
most that may be asked for. In bfloat16 and float16 sums are float32 and their results are rounded a
few times, so that at most 4 units of these dtypes' own eps are allowed, whatever is asked for. What
is statistical (a variance over many draws, say) or a truncated series is compared with
`numpy.testing` and a bound of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
MOST_UNITS, MOST_HALF_UNITS = 800, 4
EPS32 = float(jnp.finfo(jnp.float32).eps)


def eps_of(*arrays: Any) -> float:
    """The largest machine epsilon of the arrays' dtypes; 0 if all are integers."""
    dtypes = [x.dtype if hasattr(x, "dtype") else np.result_type(x) for x in arrays]
    inexact = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max((float(jnp.finfo(dtype).eps) for dtype in inexact), default=0.0)


def assert_close(
    actual: Tree, expected: Tree, units: float = 32, *, size: Any = None, dtype: Any = None
) -> None:
    """Asserts that two arrays, or trees of them, differ by rounding alone.

    Args:
        actual: array, or tree of arrays.
        expected: the same; shapes may broadcast.
        units: largest difference allowed, in units of `eps * size`; at most 800, and see above.
        size: magnitude of what was summed, a number or an array that broadcasts against the leaves;
            the largest finite magnitude in each leaf of `expected` by default.
        dtype: dtype in which `actual` was computed, if it was converted since, or if it is a
            half-precision one and `expected` is not.
    """
    if hasattr(actual, "dtype") or hasattr(expected, "dtype"):  # the other may be a list of numbers
        actual, expected = (x if hasattr(x, "dtype") else np.asarray(x) for x in (actual, expected))
    if units > MOST_UNITS:
        raise ValueError(f"units={units} is more than {MOST_UNITS}: see the module's docstring.")
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        if dtype is None and eps_of(x) > max(eps_of(y), EPS32):
            # Else a result that is bfloat16 by mistake would bring its own tolerance along.
            name = jax.tree_util.keystr(path)
            raise AssertionError(
                f"{name} is {x.dtype}, not {y.dtype}: pass `dtype` if that is right"
            )
        eps = eps_of(x, y) if dtype is None else float(jnp.finfo(dtype).eps)
        x, y = (z if np.iscomplexobj(z) else z.astype(np.float64) for z in map(np.asarray, (x, y)))
        magnitude = np.abs(np.where(np.isfinite(y), y, 0)).max(initial=0) if size is None else size
        allowed = min(units, MOST_HALF_UNITS) if eps > EPS32 else units
        bound = allowed * eps * np.asarray(magnitude, np.float64)
        with np.errstate(invalid="ignore"):  # inf - inf
            error = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        if not np.all(error <= bound):
            excess = np.where(np.isnan(error), np.inf, error - bound)
            worst = np.unravel_index(np.argmax(excess), excess.shape)
            x, y, error, bound = (np.broadcast_to(z, excess.shape) for z in (x, y, error, bound))
            raise AssertionError(
                f"{jax.tree_util.keystr(path)}[{', '.join(map(str, worst))}] is {x[worst]}, not "
                f"{y[worst]}: off by {error[worst]:.3g}, allowed {bound[worst]:.3g} ({allowed} "
                f"units); {np.count_nonzero(~(error <= bound))} of {error.size} entries are off"
            )
