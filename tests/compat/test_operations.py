"""What the library assumes of the names and parameters of JAX's operations."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from lowrank_optax.compat import operations as compat
from lowrank_optax.compat.jax import primitive_name

X = jnp.ones((4, 3, 5))
MATRIX = jnp.ones((5, 5))


def last(fn: Any, *args: Any) -> Any:
    return jax.make_jaxpr(fn)(*args or (X,)).jaxpr.eqns[-1]


@pytest.mark.parametrize("name", ["exp", "neg", "rsqrt", "sign", "square", "erf", "tanh"])
def test_functions_of_one_number_are_elementwise_by_name(name: str) -> None:
    equation = last(getattr(lax, name))
    assert primitive_name(equation) == name
    assert compat.is_elementwise(equation)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "max", "min", "pow", "lt", "rem"])
def test_functions_of_two_numbers_are_elementwise_by_name(name: str) -> None:
    equation = last(getattr(lax, name), X, X)
    assert primitive_name(equation) == name
    assert compat.is_elementwise(equation)


def test_casts_choices_and_whole_powers_are_elementwise() -> None:
    for fn in (
        lambda x: x.astype(jnp.bfloat16),
        lambda x: lax.select(x > 0, x, x),
        lambda x: lax.integer_pow(x, 3),
        lambda x: lax.bitcast_convert_type(x, jnp.int32),
        lambda x: lax.reduce_precision(x, 8, 7),
    ):
        assert compat.is_elementwise(last(fn))
    assert not compat.is_elementwise(last(lambda x: lax.cumsum(x, 1)))


KEPT = {
    "reduce_sum": lambda x, axis: jnp.sum(x, axis),
    "reduce_max": lambda x, axis: jnp.max(x, axis),
    "argmax": lambda x, axis: lax.argmax(x, axis, jnp.int32),
    "cumsum": lambda x, axis: lax.cumsum(x, axis),
    "sort": lambda x, axis: lax.sort(x, dimension=axis),
    "rev": lambda x, axis: lax.rev(x, (axis,)),
    "concatenate": lambda x, axis: lax.concatenate([x, x], axis),
    "split": lambda x, axis: lax.split(x, (1, x.shape[axis] - 1), axis),
    "transpose": lambda x, axis: lax.transpose(x, (0, 2, 1) if axis else (1, 0, 2)),
    "pad": lambda x, axis: lax.pad(x, 0.0, [(i == axis, 0, 0) for i in range(3)]),
    "slice": lambda x, axis: lax.slice_in_dim(x, 1, 3, axis=axis),
    "dot_general": lambda x, axis: lax.dot_general(
        x, MATRIX[: x.shape[2 * axis]], (((2 * axis,), (0,)), ((), ()))
    ),
    "reshape": lambda x, axis: lax.reshape(x, (4, 15) if axis else (12, 5)),
}


@pytest.mark.parametrize("name", KEPT)
def test_operations_along_another_axis_than_the_first_keep_rows_and_along_it_do_not(
    name: str,
) -> None:
    equations = [last(lambda x, axis=axis: KEPT[name](x, axis)) for axis in (0, 1)]
    assert {primitive_name(x) for x in equations} <= {name, "squeeze"}
    assert [0 in compat.row_operands(x) for x in equations] == [False, True]


def test_products_keep_rows_of_batches_in_both_operands() -> None:
    batched = last(lambda x: jnp.einsum("ijk,ikl->ijl", x, x.mT))
    assert list(compat.row_operands(batched)) == [0, 1]
    assert list(compat.row_operands(last(lambda x: jnp.einsum("ijk,kl->ijl", x, MATRIX)))) == [0]


def test_a_broadcast_says_where_its_axes_go() -> None:
    along_rows = last(lambda x: lax.broadcast_in_dim(x, (7, 4), (1,)), jnp.ones(4))
    assert compat.repeats_rows(along_rows)
    assert not compat.row_operands(along_rows)
    along_columns = last(lambda x: lax.broadcast_in_dim(x, (4, 7), (0,)), jnp.ones(4))
    assert not compat.repeats_rows(along_columns)
    assert list(compat.row_operands(along_columns)) == [0]


def test_a_squeezed_axis_is_a_dimension() -> None:
    assert compat.row_operands(last(lambda x: lax.squeeze(x, (1,)), jnp.ones((4, 1))))
    assert not compat.row_operands(last(lambda x: lax.squeeze(x, (0,)), jnp.ones((1, 4))))


def test_an_iota_has_shape_and_dimension() -> None:
    assert compat.iota_size(last(lambda _: lax.broadcasted_iota(jnp.int32, (3, 6), 1))) == 6
    assert compat.iota_size(last(jnp.sin)) is None


@pytest.mark.parametrize(
    ("fn", "sizes"),
    [
        (lambda x: jnp.sum(x, (0, 2)), [4, 5]),
        (lambda x: lax.cumsum(x, 1), [3]),
        (lambda x: lax.sort(x, dimension=2), [5]),
        (lambda x: x @ MATRIX, [5]),
        (lambda x: jnp.any(x > 0), []),
        (jnp.sin, []),
    ],
)
def test_operations_say_the_axes_they_work_along(fn: Any, sizes: list[int]) -> None:
    assert compat.sizes_along(last(fn)) == sizes


def test_settings_are_what_is_no_size() -> None:
    part = lambda size: lambda x: lax.slice(x, (0, 1, 0), (size, 3, 2))
    assert compat.settings(last(part(4))) == compat.settings(last(part(6), jnp.ones((6, 3, 5))))
    assert compat.settings(last(part(4))) != compat.settings(last(part(3)))
    power = lambda n: compat.settings(last(lambda x: lax.integer_pow(x, n)))
    assert power(2) != power(3)
    loop = lambda x: lax.scan(lambda c, row: (c + row.sum(), None), 0.0, x)
    assert compat.settings(last(loop)) == compat.settings(last(loop, jnp.ones((6, 3, 5))))
    counted = lambda n: lambda x: lax.scan(lambda c, _: (c * 2, None), x, length=n)
    assert compat.settings(last(counted(4))) != compat.settings(last(counted(6)))


def test_what_is_linear_saves_no_operand_for_the_backward_pass() -> None:
    def saved(fn: Any, index: int, *args: Any) -> bool:
        other = lambda x: fn(*args[:index], x, *args[index + 1 :])
        return any(x.shape for x in jax.tree.leaves(jax.vjp(other, args[index])[1]))

    x = jnp.ones((4, 3))
    for fn, args in (
        (jnp.add, (x, x)),
        (jnp.subtract, (x, x)),
        (jnp.negative, (x,)),
        (jnp.transpose, (x,)),
        (lambda x: jax.lax.slice(x, (1, 0), (3, 3)), (x,)),
        (lambda x: jax.lax.convert_element_type(x, jnp.bfloat16), (x,)),
        (lambda x: jax.lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None), (x,)),
    ):
        (equation,) = jax.make_jaxpr(fn)(*args).jaxpr.eqns
        for index in range(len(args)):
            assert compat.is_linear_in(equation, index, others_vary=True)
            assert not saved(fn, index, *args)
    (product,) = jax.make_jaxpr(jnp.multiply)(x, x).jaxpr.eqns
    assert compat.is_multiplication(product)
    assert compat.is_linear_in(product, 0, others_vary=False)
    assert not compat.is_linear_in(product, 0, others_vary=True)
    assert compat.is_product(jax.make_jaxpr(jnp.dot)(x, x.T).jaxpr.eqns[-1])
    (tanh,) = jax.make_jaxpr(jnp.tanh)(x).jaxpr.eqns
    assert not compat.is_linear_in(tanh, 0, others_vary=False)


def test_views_and_conversions() -> None:
    first = lambda fn, x: jax.make_jaxpr(fn)(x).jaxpr.eqns[0]
    x = jnp.ones((4, 3))
    for fn in (jnp.transpose, jnp.ravel, lambda x: x.reshape(2, 6), jax.lax.stop_gradient):
        assert compat.is_view(first(fn, x))
    assert compat.is_view(first(lambda x: jax.device_put(x, jax.memory.Space.Host), x))
    assert compat.is_view(first(lambda x: jnp.broadcast_to(x, (1, 4, 3)), x))
    assert not compat.is_view(first(lambda x: jnp.broadcast_to(x, (2, 4, 3)), x))
    assert compat.is_passed_on(first(lambda x: jnp.broadcast_to(x, (2, 4, 3)), x))
    assert not compat.is_view(first(jnp.sin, x))
    assert compat.is_conversion(first(lambda x: x.astype(jnp.bfloat16), x))
