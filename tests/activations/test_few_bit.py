"""Few-bit functions: forward exact, and the codes alone kept, under all transformations."""

import functools
import pickle
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.activations.coded_backward import few_bit

pytestmark = pytest.mark.usefixtures("coarse_grid")
BITS = range(1, 9)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = [(), (1,), (7,), (0,), (0, 4), (4, 0), (5, 33), (2, 3, 17), (16, 128)]


def wave(x: jax.Array) -> jax.Array:
    """A function whose derivative rises and falls often."""
    return jnp.sin(2 * x) + x


def normal(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.asarray(2 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def levels_at(fn: Any, x: Any) -> np.ndarray:
    """What stands in for the derivative at x: of NumPy."""
    book = fn.codebook
    boundaries = np.asarray(book.boundaries, np.float32)
    place = np.searchsorted(boundaries, np.asarray(x, np.float32), side="left")
    return np.asarray(book.levels)[np.asarray(book.codes)[place]]


def backward(fn: Any, x: Any, y: Any) -> jax.Array:
    return jax.vjp(fn, x)[1](y)[0]


def compiled(fn: Any, x: Any, y: Any) -> jax.Array:
    return jax.jit(lambda x, y: backward(fn, x, y))(x, y)


def equal(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def kept(fn: Any, x: Any) -> list[jax.ShapeDtypeStruct]:
    """What the backward pass keeps."""
    return jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(fn, x)[1], x))


def kept_bytes(fn: Any, x: Any) -> float:
    """Its bytes; a uint4 is half a byte."""
    return sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) / 8 for leaf in kept(fn, x))


@functools.cache
def slope(fn: Any) -> Any:
    return jax.jit(jax.vmap(jax.grad(fn)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_gradient_is_the_cotangent_times_the_level(bits: int) -> None:
    fn = few_bit(wave if bits < 5 else jax.nn.gelu, bits)
    dtypes = [DTYPES[(bits + i) % 3] for i in range(len(SHAPES))]
    xs, ys = (
        [normal(shape, dtype, seed) for shape, dtype in zip(SHAPES, dtypes, strict=True)]
        for seed in (0, 1)
    )
    results = jax.jit(lambda xs, ys: [backward(fn, x, y) for x, y in zip(xs, ys, strict=True)])
    for x, y, found in zip(xs, ys, results(xs, ys), strict=True):
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        expected = np.asarray(y, np.float64) * levels_at(fn, x)
        digits = float(jnp.finfo(x.dtype).eps)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=digits, atol=1e-6)


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", ["uint4", "planes", "uint8"])
def test_the_forward_pass_is_the_functions_own(packing: Any, dtype: Any) -> None:
    fn, x = few_bit(wave, 3, packing=packing), normal((8, 33), dtype)
    for forward in (fn, lambda x: jax.vjp(fn, x)[0]):
        np.testing.assert_array_equal(forward(x), wave(x))  # the same small programs
        assert_close(jax.jit(forward)(x), jax.jit(wave)(x))  # another fusion may round anew


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_the_largest_of_the_derivative(bits: int) -> None:
    fn = few_bit(jax.nn.gelu, bits)
    grid = np.linspace(-12, 12, 100_001, dtype=np.float32)
    worst = np.abs(slope(jax.nn.gelu)(grid) - levels_at(fn, grid)).max()
    x, y = normal((4000,)), normal((4000,), seed=1)
    error = np.abs(compiled(fn, x, y) - y * slope(jax.nn.gelu)(x))
    assert np.all(error <= np.abs(y) * (worst + 1e-5))
    assert worst < 1.05 * 2.0**-bits  # the derivative spans 1.26


def test_the_error_of_the_papers_codes_is_as_published() -> None:
    book = lro.activations.codebook(jax.nn.gelu, 3, coding="interval")
    fn = few_bit(jax.nn.gelu, codebook=book)
    grid = np.linspace(-10, 10, 100_001, dtype=np.float32)
    worst = np.abs(slope(jax.nn.gelu)(grid) - levels_at(fn, grid)).max()
    assert worst == pytest.approx(0.1279, abs=2e-4)


def test_the_papers_codes_are_kept() -> None:
    book = lro.activations.codebook(jax.nn.gelu, 3, coding="interval")
    # Of numbers at most 0, and below that, the middle boundary is 0 up to rounding.
    x = np.float32([-3, -1, -0.5, -0.1, -1e-6, 0.1, 0.5, 1, 3])
    fn = few_bit(jax.nn.gelu, codebook=book, packing="uint8")
    (codes,) = jax.tree.leaves(jax.jit(lambda x: jax.vjp(fn, x)[1])(x))
    np.testing.assert_array_equal(codes, [0, 1, 2, 3, 3, 4, 5, 6, 7])


@pytest.mark.slow
def test_gradients_converge_to_the_exact_one_as_four_to_the_bits() -> None:
    x, y = normal((20_000,)), normal((20_000,), seed=1)
    fns = [jax.nn.gelu, *(few_bit(jax.nn.gelu, b) for b in BITS)]
    exact, *found = jax.jit(lambda x, y: [backward(fn, x, y) for fn in fns])(x, y)
    errors = np.array([np.mean(np.square(np.subtract(y, exact))) for y in found])
    assert np.all(errors[1:] < errors[:-1] / 2.5)
    assert errors[-1] / errors[2] == pytest.approx(4.0**-5, rel=0.5)
    assert errors[-1] < 2e-5


# What is kept.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 128), (8, 2, 64), (5, 33), (7,)])
@pytest.mark.parametrize("bits", BITS)
def test_bits_over_eight_bytes_are_kept_of_each_element(
    bits: int, shape: tuple[int, ...], dtype: Any
) -> None:
    x = normal(shape, dtype)
    padding = kept_bytes(few_bit(jax.nn.gelu, bits), x) - x.size * bits / 8
    assert 0 <= padding < bits
    assert padding == 0 or x.size % 8


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_nothing_of_the_inputs_dtype_is_kept(bits: int) -> None:
    fn, x = few_bit(jax.nn.gelu, bits), normal((16, 128))
    for f in (fn, jax.jit(fn), jax.vmap(fn)):
        leaves = kept(f, x)
        assert leaves
        assert all(jnp.issubdtype(leaf.dtype, jnp.unsignedinteger) for leaf in leaves)


TOKENS, WIDTH, HIDDEN = 256, 32, 256


def scanned(gelu: Any, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    layer = lambda x, weights: (x + gelu(x @ weights[0]) @ weights[1], None)
    return jnp.sum(jnp.square(jax.lax.scan(layer, x, (up, down))[0]))


def temporary_bytes(gelu: Any, layers: int) -> int:
    """Of a training step whose second products are frozen."""
    shapes = [(TOKENS, WIDTH), (layers, WIDTH, HIDDEN), (layers, HIDDEN, WIDTH)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = jax.jit(jax.grad(functools.partial(scanned, gelu), argnums=1))
    return step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_each_layer_of_a_compiled_step_with_frozen_second_products_keeps_its_codes(
    bits: int,
) -> None:
    gelu = few_bit(jax.nn.gelu, bits)
    per_layer = (temporary_bytes(gelu, 16) - temporary_bytes(gelu, 8)) / 8
    inputs = 4 * TOKENS * WIDTH  # of the first product, which is trained
    assert per_layer == pytest.approx(inputs + TOKENS * HIDDEN * bits / 8, rel=0.02)


# What is refused, and what is the same.


@pytest.fixture(params=[3, 8])
def gelu(request: pytest.FixtureRequest) -> Any:
    return few_bit(jax.nn.gelu, request.param)


def test_second_derivatives_are_refused(gelu: Any) -> None:
    x, loss = normal((5,)), lambda x: gelu(x).sum()
    attempts = [
        jax.hessian(loss),
        jax.jit(jax.hessian(loss)),
        jax.grad(lambda x: jax.grad(loss)(x).sum()),
        lambda x: jax.jvp(jax.grad(loss), (x,), (x,)),
        jax.grad(lambda x: jax.jit(jax.grad(jax.checkpoint(loss)))(x).sum()),
    ]
    for attempt in attempts:
        with pytest.raises(NotImplementedError, match="few-bit gelu has no second derivatives"):
            attempt(x)


def test_forward_mode_is_refused(gelu: Any) -> None:
    x = normal((5,))
    for attempt in (lambda x: jax.jvp(gelu, (x,), (x,)), jax.jacfwd(gelu)):
        with pytest.raises(TypeError, match=r"can't apply forward-mode .*jvp.* custom_vjp"):
            jax.jit(attempt)(x)


@pytest.mark.parametrize("x", [1, True, 1j, np.arange(3)], ids=repr)
def test_what_is_not_floating_point_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match=r"few_bit\(gelu, bits=3\) needs floating point; x has"):
        few_bit(jax.nn.gelu)(x)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="fn=3 must be a function"):
        few_bit(3)  # type: ignore[arg-type]
    for bits in (0, 9, 32, 2.5, None, True):
        with pytest.raises(ValueError, match=f"bits={bits!r} must be .*1 to 8"):
            few_bit(wave, bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="density='gauss' must be"):
        few_bit(wave, density="gauss")
    with pytest.raises(ValueError, match="packing='bits' must be one of"):
        few_bit(wave, packing="bits")  # type: ignore[arg-type]
    book = lro.activations.codebook(wave, 2)
    with pytest.raises(TypeError, match=r"fn must keep shape and dtype; sum made float32\[3\]"):
        few_bit(jnp.sum, codebook=book)(jnp.ones(3))


def test_equal_arguments_give_the_same_function_and_compile_once() -> None:
    assert few_bit(wave, 3) is few_bit(wave, 3)
    assert few_bit(wave, 3) != few_bit(wave, 4)
    assert repr(few_bit(wave, 3)) == "few_bit(wave, bits=3)"
    copy = pickle.loads(pickle.dumps(few_bit(jax.nn.gelu, 3)))
    assert copy == few_bit(jax.nn.gelu, 3)
    assert hash(copy) == hash(few_bit(jax.nn.gelu, 3))
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(fn: Any, x: jax.Array) -> jax.Array:
        traced.append(fn)
        return fn(x)

    for _ in range(3):
        apply(few_bit(wave, 3), jnp.ones(3))
    assert len(traced) == 1


def test_it_decorates() -> None:
    @functools.partial(few_bit, bits=4)
    def square(x: jax.Array) -> jax.Array:
        return x**2 / 8

    assert square(np.ones(2, np.float32)).tolist() == [0.125, 0.125]
    assert kept_bytes(square, np.ones(16, np.float32)) == 8


@pytest.mark.slow
def test_python_numbers_and_numpy_arrays_are_taken() -> None:
    gelu = few_bit(jax.nn.gelu, 3)
    assert float(gelu(2.0)) == float(jax.nn.gelu(2.0))
    equal(jax.grad(gelu)(2.0), levels_at(gelu, 2))
    equal(gelu(np.float32([1, 2])), jax.nn.gelu(np.float32([1, 2])))


@pytest.mark.slow
def test_a_codebook_of_measured_inputs_fits_them_better() -> None:
    x = 0.5 * normal((4000,)) + 1
    error = lambda fn: float(np.mean(np.square(compiled(fn, x, np.ones_like(x)) - slope(wave)(x))))
    measured = few_bit(wave, 2, density=x)
    assert error(measured) < error(few_bit(wave, 2))
    assert error(few_bit(wave, codebook=measured.codebook)) == error(measured)
