"""Weights as batches of matrices, against NumPy's transposes and reshapes."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.matrices import (
    WeightDimensionNumbers,
    from_matrix,
    matrix_partition,
    matrix_shape,
    to_matrix,
)

quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def weights_and_specs(draw: st.DrawFn) -> tuple[np.ndarray, WeightDimensionNumbers]:
    """A weight of distinct numbers, and any valid spec: axes in any order, of either sign."""
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=2, max_size=5)))
    order = draw(st.permutations(range(len(shape))))
    rows = draw(st.integers(1, len(shape) - 1))
    columns = draw(st.integers(1, len(shape) - rows))
    signed = [axis - len(shape) * draw(st.booleans()) for axis in order]
    named = signed[:rows], signed[rows : rows + columns]
    forms = [tuple, list]
    as_given = [
        x[0] if len(x) == 1 and draw(st.booleans()) else draw(st.sampled_from(forms))(x)
        for x in named
    ]
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape), WeightDimensionNumbers(
        *as_given
    )


def numpy_matrix(x: np.ndarray, spec: WeightDimensionNumbers) -> np.ndarray:
    rows, columns = (list(np.atleast_1d(axes) % x.ndim) for axes in spec)
    batch = [axis for axis in range(x.ndim) if axis not in rows + columns]
    size = lambda axes: math.prod(x.shape[axis] for axis in axes)
    return np.transpose(x, batch + rows + columns).reshape(
        *(x.shape[axis] for axis in batch), size(rows), size(columns)
    )


@pytest.mark.slow
@quick
@given(weights_and_specs())
def test_matrix_agrees_with_numpy_transpose_and_reshape(case: tuple) -> None:
    weight, spec = case
    expected = numpy_matrix(weight, spec)
    assert matrix_shape(weight.shape, spec) == expected.shape
    np.testing.assert_array_equal(to_matrix(jnp.asarray(weight), spec), expected)


@pytest.mark.slow
@quick
@given(weights_and_specs())
def test_from_matrix_undoes_to_matrix(case: tuple) -> None:
    weight, spec = case
    back = from_matrix(jnp.asarray(numpy_matrix(weight, spec)), spec, weight)
    np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8])
def test_views_keep_the_dtype(dtype: jnp.dtype) -> None:
    spec, weight = WeightDimensionNumbers((1, 2), 0), jnp.ones((2, 3, 4), dtype)
    matrix = to_matrix(weight, spec)
    assert matrix.dtype == from_matrix(matrix, spec, weight).dtype == dtype


def test_a_spec_counted_from_the_end_serves_a_weight_and_a_stack_of_them() -> None:
    spec = WeightDimensionNumbers(-3, (-2, -1))
    stack = jnp.arange(5 * 4 * 2 * 3.0).reshape(5, 4, 2, 3)
    one_by_one = jnp.stack([to_matrix(weight, spec) for weight in stack])
    np.testing.assert_array_equal(to_matrix(stack, spec), one_by_one)


@pytest.mark.parametrize(
    "theirs",
    [
        optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0, 2)),
        optax.contrib.GaLoreDimensionNumbers(reduction_axis=(1,), output_axis=(0, 2)),
    ],
)
def test_dimension_numbers_of_optax_are_accepted(theirs: tuple) -> None:
    weight = jnp.arange(24.0).reshape(2, 3, 4)
    ours = WeightDimensionNumbers((1,), (0, 2))
    np.testing.assert_array_equal(to_matrix(weight, theirs), to_matrix(weight, ours))
    np.testing.assert_array_equal(from_matrix(to_matrix(weight, ours), theirs, weight), weight)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (WeightDimensionNumbers(0, 3), "output_axis=(3,) at 'mlp/kernel'"),
        (WeightDimensionNumbers(-4, 1), "reduction_axis=(-4,) at 'mlp/kernel'"),
        (WeightDimensionNumbers((), 1), "reduction_axis=() at 'mlp/kernel'"),
        (WeightDimensionNumbers(0, -3), "at 'mlp/kernel' name an axis twice"),
        (WeightDimensionNumbers((0, 1), (1, 2)), "at 'mlp/kernel' name an axis twice"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_with_the_path(
    spec: WeightDimensionNumbers, complaint: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is what is tested)
        matrix_shape((2, 3, 4), spec, "mlp/kernel")
    assert complaint in str(error.value)


def test_views_work_under_jit_vmap_and_grad() -> None:
    spec, weight = WeightDimensionNumbers(1, 0), jnp.arange(24.0).reshape(4, 2, 3)
    view = lambda x: to_matrix(x, spec)
    np.testing.assert_array_equal(jax.jit(jax.vmap(view))(weight), weight.transpose(0, 2, 1))
    gradient = jax.grad(lambda x: jnp.sum(view(x)[0] ** 2))(weight[0])
    np.testing.assert_array_equal(gradient[:, 0], 2 * weight[0, :, 0])
    np.testing.assert_array_equal(gradient[:, 1:], 0)


def test_without_explicit_sharding_there_is_no_partition() -> None:
    spec = WeightDimensionNumbers()
    assert matrix_partition(jnp.ones((2, 3)), spec) is None
    assert matrix_partition(jax.ShapeDtypeStruct((2, 3), jnp.float32), spec) is None
