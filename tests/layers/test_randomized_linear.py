"""`randomized_linear`: exact but for the kernel's gradient, and what it keeps for that."""

from typing import Any, get_args

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import Sketch, randomized_linear
from lowrank_optax.layers.randomized.sketch import SketchKind

KINDS = get_args(SketchKind)
KEY = jax.random.key(7)


def arrays(*shape: int, features: int = 6, outputs: int = 5, dtype: Any = jnp.float32) -> Any:
    """x, kernel, bias and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(sum(shape)), 4)
    sizes = (*shape, features), (features, outputs), (outputs,), (*shape, outputs)
    draw = zip(keys, sizes, strict=True)
    return [jax.random.normal(key, size).astype(dtype) for key, size in draw]


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """As ``nnx.Linear`` computes it."""
    y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def gradient(x: Any, y: Any, key: Any, sketch: Sketch, valid: Any = None) -> jax.Array:
    """That of a kernel, for the cotangent y."""
    kernel = jnp.zeros((x.shape[-1], y.shape[-1]), x.dtype)
    linear = lambda kernel: randomized_linear(x, kernel, key=key, sketch=sketch, valid=valid)
    return jax.jit(lambda kernel, y: jax.vjp(linear, kernel)[1](y)[0])(kernel, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_output_and_gradients_of_input_and_bias_are_the_dense_ones_bit_by_bit(
    kind: SketchKind, dtype: Any
) -> None:
    x, kernel, bias, y = arrays(3, 7, dtype=dtype)
    sketch = Sketch(kind, size=5)

    def both(fn: Any, *args: Any) -> Any:
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(y)

    linear = lambda *args: randomized_linear(*args, key=KEY, sketch=sketch)
    got, (x_bar, kernel_bar, bias_bar) = jax.jit(lambda *a: both(linear, *a))(x, kernel, bias)
    expected, (x_bar_0, kernel_bar_0, bias_bar_0) = jax.jit(lambda *a: both(dense, *a))(
        x, kernel, bias
    )
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(x_bar, x_bar_0)
    np.testing.assert_array_equal(bias_bar, bias_bar_0)
    assert (kernel_bar.dtype, kernel_bar.shape) == (dtype, kernel.shape)
    assert not np.array_equal(kernel_bar, kernel_bar_0)


@settings(max_examples=8, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    features=st.integers(0, 4),
    outputs=st.integers(0, 4),
    size=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    masked=st.booleans(),
)
def test_any_shape_gives_the_dense_output_and_finite_gradients_of_its_shapes(
    shape: list[int], features: int, outputs: int, size: int, kind: Any, dtype: str, masked: bool
) -> None:
    x, kernel, bias, y = arrays(*shape, features=features, outputs=outputs, dtype=dtype)
    valid = jnp.arange(x[..., 0].size).reshape(shape) % 3 > 0 if masked and features else None
    linear = lambda *args: randomized_linear(
        *args, key=KEY, sketch=Sketch(kind, size=size), valid=valid
    )
    out, vjp = jax.vjp(linear, x, kernel, bias)
    np.testing.assert_array_equal(out, dense(x, kernel, bias))
    for array, bar in zip((x, kernel, bias), vjp(y), strict=True):
        assert (array.shape, array.dtype) == (bar.shape, bar.dtype)
        assert np.isfinite(bar.astype(np.float32)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_of_all_rows_is_the_dense_layer(kind: SketchKind) -> None:
    x, kernel, _, y = arrays(3, 4)
    exact = jax.jit(lambda y: jax.vjp(lambda kernel: x @ kernel, kernel)[1](y)[0])(y)
    np.testing.assert_array_equal(gradient(x, y, KEY, Sketch(kind, size=12)), exact)
    np.testing.assert_array_equal(gradient(x, y, KEY, Sketch(kind, size=99)), exact)
    # With some rows that do not count, all the others are kept.
    valid = jnp.arange(12).reshape(3, 4) % 3 > 0
    masked = jnp.where(valid[..., None], x, 0)
    exact = jnp.einsum("abi,abj->ij", masked, y)
    got = gradient(x, y, KEY, Sketch(kind, size=12), valid)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "stratified"])
def test_rows_that_count_are_all_kept_if_there_is_room(kind: SketchKind) -> None:
    x, _, _, y = arrays(20)
    valid = jnp.zeros(20, bool).at[jnp.array([2, 5, 11, 17])].set(True)
    exact = x[valid].T @ y[valid]
    got = gradient(x, y, KEY, Sketch(kind, size=6), valid)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_count_have_no_influence_on_the_kernel(kind: SketchKind) -> None:
    x, _, _, y = arrays(16)
    valid = jnp.arange(16) < 11
    spoilt = [jnp.where(valid[:, None], v, jnp.nan) for v in (x, y)]
    got = gradient(*spoilt, KEY, Sketch(kind, size=4), valid)
    np.testing.assert_array_equal(got, gradient(x, y, KEY, Sketch(kind, size=4), valid))
    none = gradient(x, y, KEY, Sketch(kind, size=4), jnp.zeros(16, bool))
    np.testing.assert_array_equal(none, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_determines_the_gradient_of_the_kernel_alone(kind: SketchKind) -> None:
    x, kernel, bias, y = arrays(16)
    sketch = Sketch(kind, size=4)

    def gradients(key: Any) -> Any:
        linear = lambda *args: randomized_linear(*args, key=key, sketch=sketch)
        return jax.vjp(linear, x, kernel, bias)[1](y)

    first, again, other = gradients(KEY), gradients(KEY), gradients(jax.random.key(8))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first[0], other[0])
    np.testing.assert_array_equal(first[2], other[2])
    assert not np.allclose(first[1], other[1])
    # The words of a key are the key.
    np.testing.assert_array_equal(gradients(jax.random.key_data(KEY))[1], first[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_gradient_is_linear_in_the_cotangent(kind: SketchKind) -> None:
    x, _, _, y = arrays(16)
    sketch = Sketch(kind, size=4)
    np.testing.assert_array_equal(gradient(x, 4 * y, KEY, sketch), 4 * gradient(x, y, KEY, sketch))
    np.testing.assert_array_equal(gradient(x, 0 * y, KEY, sketch), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_are_the_sketch_the_key_and_the_kernel(kind: SketchKind, dtype: Any) -> None:
    x, kernel, bias, _ = arrays(4, 8, dtype=dtype)
    linear = lambda *args: randomized_linear(*args, key=KEY, sketch=Sketch(kind, fraction=0.25))
    kept = jax.tree.leaves(jax.vjp(linear, x, kernel, bias)[1])
    bytes_kept = sum(array.nbytes for array in kept if array.shape != kernel.shape)
    chosen = 8 * 8 if kind in ("norm_weighted", "winner_take_all") else 0
    key = 0 if chosen else 8
    assert bytes_kept == 8 * 6 * dtype.dtype.itemsize + key + chosen
    assert sum(array.shape == kernel.shape for array in kept) == 1


def test_what_is_not_differentiated_costs_nothing() -> None:
    x, kernel, bias, _ = arrays(4, 8)

    def kept(fn: Any, *args: Any) -> set[tuple[int, ...]]:
        return {array.shape for array in jax.tree.leaves(jax.vjp(fn, *args)[1])}

    linear = lambda *args: randomized_linear(*args, key=KEY, sketch=Sketch(size=3))
    assert kept(lambda x: linear(x, kernel, bias), x) == {kernel.shape}  # the kernel is frozen
    assert kept(lambda kernel: linear(x, kernel, bias), kernel) == {(3, 6), ()}
    assert kept(lambda bias: linear(x, kernel, bias), bias) == set()
    # And so in a jitted scan with a checkpoint, where the kernel alone is differentiated.
    body = jax.checkpoint(lambda x, kernel: (linear(x, kernel), None))

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        square = jax.lax.scan(lambda c, k: (body(c, k)[0], None), x, kernels)[0]
        return jnp.sum(square * square)

    kernels = jnp.stack([kernel @ kernel.T, kernel @ kernel.T])
    products = lambda argument: str(jax.make_jaxpr(jax.grad(jax.jit(loss), argument))(kernels, x))
    # Backward: the product again, Y·Wᵀ, and X_sᵀ·Y_s; without the last for the input's gradient.
    assert products(0).count("dot_general") == products(1).count("dot_general") + 1


def test_arithmetic_in_bfloat16_sums_the_kernels_gradient_in_float32() -> None:
    x, kernel, _, _ = arrays(512)
    y = jnp.ones((512, 5), jnp.bfloat16)
    linear = lambda kernel: randomized_linear(
        x, kernel, key=KEY, sketch=Sketch("rows", size=256), dtype=jnp.bfloat16
    )
    out, vjp = jax.vjp(linear, kernel)
    assert (out.dtype, vjp(y)[0].dtype) == (jnp.bfloat16, jnp.float32)
    rows = np.asarray(jax.random.permutation(KEY, 512)[:256])
    exact = 2 * np.asarray(x.astype(jnp.bfloat16)).astype(np.float64)[rows].sum(0)
    np.testing.assert_allclose(vjp(y)[0][:, 0], exact, rtol=1e-5, atol=1e-4)


def test_an_output_of_another_dtype_has_the_dense_gradients() -> None:
    x, kernel, _, y = arrays(16, dtype=jnp.bfloat16)
    linear = lambda x: randomized_linear(
        x, kernel, key=KEY, sketch=Sketch(size=4), preferred_element_type=jnp.float32
    )
    plain = lambda x: jax.lax.dot_general(
        x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    wide = y.astype(jnp.float32)
    for got, expected in zip(jax.vjp(linear, x), jax.vjp(plain, x), strict=True):
        value = lambda v: v(wide)[0] if callable(v) else v
        assert value(got).dtype == value(expected).dtype
        np.testing.assert_array_equal(value(got), value(expected))


@pytest.mark.parametrize("kind", ["rows", "gaussian"])
def test_second_derivatives_are_right_on_average(kind: SketchKind) -> None:
    x, kernel, _, y = arrays(8, features=2, outputs=2)
    direction = jnp.ones_like(kernel)

    def loss(kernel: jax.Array, linear: Any) -> jax.Array:
        return jnp.sum(y * jnp.tanh(linear(kernel)))

    def product(key: Any, forward_over_reverse: bool) -> jax.Array:
        linear = lambda kernel: randomized_linear(x, kernel, key=key, sketch=Sketch(kind, size=4))
        slope = jax.grad(lambda kernel: loss(kernel, linear))
        if forward_over_reverse:
            return jax.jvp(slope, (kernel,), (direction,))[1]
        return jax.grad(lambda kernel: jnp.sum(slope(kernel) * direction))(kernel)

    exact = jax.jvp(
        jax.grad(lambda kernel: loss(kernel, lambda kernel: x @ kernel)), (kernel,), (direction,)
    )[1]
    keys = jax.random.split(KEY, 1000)
    for way in (True, False):
        many = np.asarray(jax.jit(jax.vmap(lambda key: product(key, way)))(keys), np.float64)  # noqa: B023
        standard_error = many.std(0) / len(many) ** 0.5
        assert (abs(many.mean(0) - exact) < 4 * standard_error).all()


def test_forward_mode_says_that_it_does_not_exist() -> None:
    x, kernel, _, _ = arrays(8)
    linear = lambda kernel: randomized_linear(x, kernel, key=KEY, sketch=Sketch(size=2))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(linear, (kernel,), (kernel,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of fraction and size, not fraction=None and size=None"),
        ({"fraction": 0.5, "size": 3}, "Give one of fraction and size"),
        ({"kind": "row", "size": 3}, "kind='row' must be one of 'rows', 'stratified'"),
        ({"fraction": 0.0}, "fraction=0.0 must be above 0"),
        ({"fraction": 1.5}, "at most 1"),
        ({"fraction": float("nan")}, "fraction=nan"),
        ({"fraction": True}, "fraction=True"),
        ({"size": 0}, "size=0 must be an integer, 1 at least"),
        ({"size": 2.5}, "size=2.5"),
        ({"size": 2, "min_size": 0}, "min_size=0"),
        ({"size": 2, "min_size": 5, "max_size": 4}, "max_size=4 must be min_size=5"),
    ],
)
def test_bad_sketches_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sketch(**options)


def test_sizes_of_sketches_are_rounded_down_and_bounded() -> None:
    assert Sketch(fraction=0.29).rows(100) == 29  # 0.29 * 100 is 28.999...
    assert Sketch(fraction=0.1).rows(9) == 1
    assert Sketch(fraction=0.1).rows(0) == 0
    assert Sketch(fraction=0.5, max_size=8).rows(100) == 8
    assert Sketch(size=5).rows(3) == 3
    assert Sketch(fraction=0.1).kind == "stratified"
    assert hash(Sketch(size=np.int64(5))) == hash(Sketch(size=5))


def test_bad_arguments_are_refused() -> None:
    x, kernel, bias, _ = arrays(4)
    call = lambda *args, **options: randomized_linear(
        *args, **{"key": KEY, "sketch": Sketch(size=2)} | options
    )
    with pytest.raises(TypeError, match=r"sketch=0\.1 must be a Sketch"):
        call(x, kernel, sketch=0.1)
    with pytest.raises(ValueError, match=r"x \(4, 6\) and kernel \(5, 6\)"):
        call(x, kernel.T)
    with pytest.raises(ValueError, match="bias"):
        call(x, kernel, bias[:2])
    with pytest.raises(ValueError, match="valid"):
        call(x, kernel, valid=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="valid"):
        call(x, kernel, valid=jnp.ones(4))
    with pytest.raises(TypeError, match="floating point"):
        call(jnp.ones((4, 6), int), kernel.astype(int))


def test_the_sketch_has_a_name_for_policies() -> None:
    x, kernel, _, _ = arrays(16)
    policy = jax.checkpoint_policies.save_only_these_names("linear_sketch")

    shapes = lambda fn: {a.shape for a in jax.tree.leaves(jax.vjp(fn, kernel)[1])}
    body = lambda kernel: jnp.sum(randomized_linear(x, kernel, key=KEY, sketch=Sketch(size=4)) ** 2)
    named = jax.checkpoint(body, policy=policy)
    assert (4, 6) in shapes(named)
    assert (4, 6) not in shapes(jax.checkpoint(body))
    assert_close(jax.grad(named)(kernel), jax.grad(body)(kernel), 100)


def test_public_names() -> None:
    for name in ("Sketch", "randomized_linear", "sketch_variance", "choose_sketch_size"):
        assert name in lro.layers.__all__
