"""`randomized_linear`: exact but for the kernel's gradient, and what it keeps for that."""

import functools
import math
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


def arrays(*shape: int, features: int = 6, outputs: int = 5, dtype: Any = np.float32) -> Any:
    """x, kernel, bias and a cotangent of the output."""
    rng = np.random.default_rng(sum(shape))
    sizes = (*shape, features), (features, outputs), (outputs,), (*shape, outputs)
    return [np.asarray(rng.standard_normal(size)).astype(dtype) for size in sizes]


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """As ``nnx.Linear`` computes it."""
    y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def value_and_gradients(fn: Any, x: Any, kernel: Any, bias: Any, y: Any) -> Any:
    out, vjp = jax.vjp(fn, x, kernel, bias)
    return out, *vjp(y)


@functools.cache
def compiled(sketch: Sketch) -> Any:
    """The output and the gradients of x, kernel and bias."""

    @jax.jit
    def run(x: Any, kernel: Any, bias: Any, y: Any, key: Any = KEY, valid: Any = None) -> Any:
        linear = lambda *args: randomized_linear(*args, key=key, sketch=sketch, valid=valid)
        return value_and_gradients(linear, x, kernel, bias, y)

    return run


def gradient(x: Any, y: Any, key: Any, sketch: Sketch, valid: Any = None) -> np.ndarray:
    """That of a kernel, for the cotangent y."""
    kernel = np.zeros((x.shape[-1], y.shape[-1]), x.dtype)
    return compiled(sketch)(x, kernel, kernel[0], y, key, valid)[2]


def assert_product(found: Any, x: np.ndarray, y: np.ndarray) -> None:
    """Asserts that a kernel's gradient is the dense one."""
    x, y = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (x, y))
    assert_close(found, x.T @ y, size=np.abs(x).T @ np.abs(y))


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_of_input_and_bias_are_the_dense_ones_bit_by_bit(
    kind: SketchKind, dtype: Any
) -> None:
    """Outside `jit`, where both run the same small programs: within it fusions may round anew."""
    linear = lambda *args: randomized_linear(*args, key=KEY, sketch=Sketch(kind, size=5))
    args = arrays(3, 7, dtype=dtype)
    found, expected = (value_and_gradients(fn, *args) for fn in (linear, dense))
    for i in (0, 1, 3):  # output, gradients of x and of the bias
        np.testing.assert_array_equal(found[i], expected[i])
    assert (found[2].dtype, found[2].shape) == (args[1].dtype, args[1].shape)
    assert not np.array_equal(found[2], expected[2])


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
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
    args = arrays(*shape, features=features, outputs=outputs, dtype=jnp.dtype(dtype))
    count = math.prod(shape)
    valid = np.arange(count).reshape(shape) % 3 > 0 if masked and features else None
    out, *gradients = compiled(Sketch(kind, size=size))(*args, valid=valid)
    x, kernel, bias = (array.astype(np.float64) for array in args[:3])
    sizes = np.abs(x) @ np.abs(kernel) + np.abs(bias)
    assert_close(out, x @ kernel + bias, size=sizes, dtype=jnp.dtype(dtype))
    for array, bar in zip(args, gradients, strict=False):
        assert (array.shape, array.dtype) == (bar.shape, bar.dtype)
        assert np.isfinite(bar.astype(np.float32)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_of_all_rows_is_the_dense_layer(kind: SketchKind) -> None:
    x, _, _, y = arrays(3, 4)
    # With some rows that do not count, all the others are kept.
    valid = np.arange(12).reshape(3, 4) % 3 > 0
    found, larger, masked = jax.jit(
        lambda: [
            gradient(x, y, KEY, Sketch(kind, size=size), mask)
            for size, mask in ((12, None), (99, None), (12, valid))
        ]
    )()
    assert_product(found, x, y)
    assert_product(larger, x, y)
    assert_product(masked, x[valid], y[valid])


@pytest.mark.parametrize("kind", ["rows", "stratified"])
def test_rows_that_count_are_all_kept_if_there_is_room(kind: SketchKind) -> None:
    x, _, _, y = arrays(20)
    valid = np.isin(np.arange(20), [2, 5, 11, 17])
    got = gradient(x, y, KEY, Sketch(kind, size=6), valid)
    assert_product(got, x[valid], y[valid])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_count_have_no_influence_on_the_kernel(kind: SketchKind) -> None:
    x, _, _, y = arrays(16)
    valid = np.arange(16) < 11
    spoilt = [np.where(valid[:, None], v, np.float32(np.nan)) for v in (x, y)]
    got = gradient(*spoilt, KEY, Sketch(kind, size=4), valid)
    np.testing.assert_array_equal(got, gradient(x, y, KEY, Sketch(kind, size=4), valid))
    none = gradient(x, y, KEY, Sketch(kind, size=4), np.zeros(16, bool))
    np.testing.assert_array_equal(none, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_determines_the_gradient_of_the_kernel_alone(kind: SketchKind) -> None:
    args = arrays(16)
    run = compiled(Sketch(kind, size=4))
    first, again, other = (run(*args, jax.random.key(seed)) for seed in (7, 7, 8))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for i in (0, 1, 3):
        np.testing.assert_array_equal(first[i], other[i])
    assert not np.allclose(first[2], other[2])
    if kind in ("rows", "srht"):  # the words of a key are the key
        words = run(*args, np.asarray(jax.random.key_data(jax.random.key(7))))
        assert_close(words[2], first[2], 100)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_gradient_is_linear_in_the_cotangent(kind: SketchKind) -> None:
    x, _, _, y = arrays(16)
    sketch = Sketch(kind, size=4)
    once = gradient(x, y, KEY, sketch)
    assert_close(gradient(x, 4 * y, KEY, sketch), 4 * once, 100)
    np.testing.assert_array_equal(gradient(x, 0 * y, KEY, sketch), 0)


def residuals(fn: Any, *args: Any) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], *args))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_are_the_sketch_the_key_and_the_kernel(kind: SketchKind, dtype: Any) -> None:
    x, kernel, bias, _ = arrays(4, 8, dtype=dtype)
    linear = lambda *args: randomized_linear(*args, key=KEY, sketch=Sketch(kind, fraction=0.25))
    kept = residuals(linear, x, kernel, bias)
    rest = [array for array in kept if array.shape != kernel.shape]
    bytes_kept = sum(array.size * array.dtype.itemsize for array in rest)
    chosen = 8 * 8 if kind in ("norm_weighted", "winner_take_all") else 0
    key = 0 if chosen else 8
    assert bytes_kept == 8 * 6 * dtype.dtype.itemsize + key + chosen
    assert sum(array.shape == kernel.shape for array in kept) == 1


@pytest.mark.slow
def test_what_is_not_differentiated_costs_nothing() -> None:
    x, kernel, bias, _ = arrays(4, 8)
    kept = lambda fn, *args: {array.shape for array in residuals(fn, *args) if array.size}
    linear = lambda *args: randomized_linear(*args, key=KEY, sketch=Sketch(size=3))
    assert kept(lambda x: linear(x, kernel, bias), x) == {kernel.shape}  # the kernel is frozen
    assert kept(lambda kernel: linear(x, kernel, bias), kernel) == {(3, 6), ()}
    assert kept(lambda bias: linear(x, kernel, bias), bias) == set()
    # And so in a jitted scan with a checkpoint, where the kernel alone is differentiated.
    body = jax.checkpoint(lambda x, kernel: (linear(x, kernel), None))

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        square = jax.lax.scan(lambda c, k: (body(c, k)[0], None), x, kernels)[0]
        return jnp.sum(square * square)

    kernels = np.stack([kernel @ kernel.T] * 2)
    products = lambda argument: str(jax.make_jaxpr(jax.grad(jax.jit(loss), argument))(kernels, x))
    # Backward: the product again, Y·Wᵀ, and X_sᵀ·Y_s; without the last for the input's gradient.
    assert products(0).count("dot_general") == products(1).count("dot_general") + 1


def test_arithmetic_in_bfloat16_sums_the_kernels_gradient_in_float32() -> None:
    x, kernel, _, _ = arrays(512)
    y = np.ones((512, 5), jnp.bfloat16)
    linear = lambda kernel: randomized_linear(
        x, kernel, key=KEY, sketch=Sketch("rows", size=256), dtype=jnp.bfloat16
    )

    @jax.jit
    def run(kernel: jax.Array) -> Any:
        out, vjp = jax.vjp(linear, kernel)
        return out, vjp(y)[0], jax.random.permutation(KEY, 512)[:256]

    out, got, rows = run(kernel)
    assert (out.dtype, got.dtype) == (jnp.bfloat16, jnp.float32)
    chosen = x.astype(jnp.bfloat16).astype(np.float64)[rows]
    assert_close(got[:, 0], 2 * chosen.sum(0), size=2 * np.abs(chosen).sum(0))


def test_an_output_of_another_dtype_has_the_dense_gradients() -> None:
    x, kernel, _, y = arrays(16, dtype=jnp.bfloat16)
    linear = lambda x: randomized_linear(
        x, kernel, key=KEY, sketch=Sketch(size=4), preferred_element_type=jnp.float32
    )
    plain = lambda x: jax.lax.dot_general(
        x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )

    def both(fn: Any) -> Any:
        out, vjp = jax.vjp(fn, x)
        return out, vjp(y.astype(np.float32))[0]

    found, expected = jax.jit(lambda: (both(linear), both(plain)))()
    assert [a.dtype for a in found] == [a.dtype for a in expected]
    assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "gaussian"])
def test_second_derivatives_are_right_on_average(kind: SketchKind) -> None:
    x, kernel, _, y = arrays(8, features=2, outputs=2)
    direction = np.ones_like(kernel)

    def loss(kernel: jax.Array, linear: Any) -> jax.Array:
        return jnp.sum(y * jnp.tanh(linear(kernel)))

    def product(key: Any, forward_over_reverse: bool) -> jax.Array:
        linear = lambda kernel: randomized_linear(x, kernel, key=key, sketch=Sketch(kind, size=4))
        slope = jax.grad(lambda kernel: loss(kernel, linear))
        if forward_over_reverse:
            return jax.jvp(slope, (kernel,), (direction,))[1]
        return jax.grad(lambda kernel: jnp.sum(slope(kernel) * direction))(kernel)

    slope = jax.grad(lambda kernel: loss(kernel, lambda kernel: x @ kernel))
    exact = jax.jit(lambda kernel: jax.jvp(slope, (kernel,), (direction,))[1])(kernel)
    keys = jax.random.split(KEY, 1000)
    for way in (True, False):
        many = np.asarray(jax.jit(jax.vmap(lambda key: product(key, way)))(keys), np.float64)  # noqa: B023
        standard_error = many.std(0) / len(many) ** 0.5
        assert (abs(many.mean(0) - exact) < 4 * standard_error).all()


def test_forward_mode_says_that_it_does_not_exist() -> None:
    x, kernel, _, _ = arrays(8)
    linear = lambda kernel: randomized_linear(x, kernel, key=KEY, sketch=Sketch(size=2))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda kernel: jax.jvp(linear, (kernel,), (kernel,)))(kernel)


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
        ({"size": 0}, "size=0 must be an integer of at least 1"),
        ({"size": 2.5}, "size=2.5"),
        ({"size": 2, "min_size": 0}, "min_size=0"),
        ({"size": 2, "min_size": 5, "max_size": 4}, "max_size=4 must be at least min_size=5"),
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
    with pytest.raises(TypeError, match=r"sketch=0\.1 must be a lro\.layers\.Sketch"):
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


@pytest.mark.combinations(1)
@pytest.mark.parametrize("kind", ["stratified", "norm_weighted", "rademacher"])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_layers_of_equal_shapes_may_be_differentiated_by_other_arguments(
    kind: SketchKind, masked: bool
) -> None:
    x, _, _, _ = arrays(16)
    kernels = [np.random.default_rng(i).standard_normal((6, 6), np.float32) for i in range(3)]
    valid = jnp.arange(16) % 3 > 0 if masked else None
    keys = jax.random.split(KEY, 3)

    def gradients(layer: Any) -> Any:
        def loss(first: jax.Array, last: jax.Array) -> jax.Array:
            # Differentiated by the kernel alone, by the input alone, and by both.
            y = layer(layer(x, first, keys[0]), kernels[1], keys[1])
            return jnp.sum(layer(y, last, keys[2]) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(kernels[0], kernels[2])

    sketch = Sketch(kind, size=4)
    layer = lambda x, kernel, key: randomized_linear(x, kernel, key=key, sketch=sketch, valid=valid)
    jax.tree.map(
        lambda *pair: assert_close(*pair, 100), gradients(jax.jit(layer)), gradients(layer)
    )


def test_the_sketch_has_a_name_for_policies() -> None:
    x, kernel, _, _ = arrays(16)
    policy = jax.checkpoint_policies.save_only_these_names("linear_sketch")

    shapes = lambda fn: {a.shape for a in residuals(fn, kernel)}
    body = lambda kernel: jnp.sum(randomized_linear(x, kernel, key=KEY, sketch=Sketch(size=4)) ** 2)
    named = jax.checkpoint(body, policy=policy)
    assert (4, 6) in shapes(named)
    assert (4, 6) not in shapes(jax.checkpoint(body))
    assert_close(
        *jax.jit(lambda kernel: [jax.grad(fn)(kernel) for fn in (named, body)])(kernel), 100
    )


def test_public_names() -> None:
    for name in ("Sketch", "randomized_linear", "sketch_variance", "choose_sketch_size"):
        assert name in lro.layers.__all__
