"""Every kind of layer: with an adapter it computes what it would with the changed weight."""

from collections.abc import Callable
from typing import Any, ClassVar

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.adapted_layers import spec_of
from lowrank_optax.matrices import from_matrix, to_matrix
from lowrank_optax.models import DecoderConfig
from tests.adapters.nnx_models import call, randomized


def drawn(key: Any, shape: tuple[int, ...], dtype: Any = np.float32) -> jax.Array:
    """Initial values that compile nothing."""
    del key
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) * 0.4, dtype)


def made(kind: Any, *args: Any, **options: Any) -> Callable[[], Any]:
    """A function that makes a layer."""
    options = {"kernel_init": drawn, "bias_init": drawn} | options
    return lambda: kind(*args, **options, rngs=nnx.Rngs(0))


def conv(*args: Any, **options: Any) -> Callable[[], nnx.Conv]:
    return made(nnx.Conv, *args, **options)


class MyLinear(nnx.Linear):
    """A subclass of a user's, which multiplies by its kernel."""

    plain_weights: ClassVar[bool] = True

    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * super().__call__(x / 2)


class ForeignEinsum(nnx.Module):
    """As google-tunix and Gemma have it."""

    def __init__(self, einsum_str: str, shape: tuple[int, ...]) -> None:
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(drawn(None, shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.einsum_str, x, self.w[...])


def general(inputs: Any, outputs: Any, **options: Any) -> Callable[[], nnx.LinearGeneral]:
    return made(nnx.LinearGeneral, inputs, outputs, **options)


def einsum(equation: str, shape: tuple[int, ...], bias: Any = None) -> Callable[[], nnx.Einsum]:
    return made(nnx.Einsum, equation, shape, bias)


# Sides of the matrices are equal where they can be: the initial values are compiled for each.
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (made(nnx.Linear, 4, 6), (2, 5, 4)),
    "linear of one row": (made(nnx.Linear, 4, 6), (4,)),
    "no bias": (made(nnx.Linear, 4, 6, use_bias=False), (2, 4)),
    "subclass": (made(MyLinear, 4, 6), (2, 4)),
    "heads out": (general(4, (2, 3)), (2, 5, 4)),
    "heads in": (general((2, 3), 4, axis=(-2, -1)), (2, 5, 2, 3)),
    "inputs in front": (general((2, 3), 4, axis=(0, 2)), (2, 5, 3)),
    "batch axis": (general(4, 6, batch_axis={0: 5}), (5, 2, 4)),
    "two batch axes": (general(4, (3, 2), batch_axis={0: 5, 1: 2}), (5, 2, 3, 4)),
    "einsum": (einsum("btd,dnh->btnh", (4, 2, 3), (2, 3)), (2, 5, 4)),
    "einsum turned": (einsum("bd,ndh->nbh", (2, 4, 3)), (5, 4)),
    "einsum of two inputs": (einsum("btnh,nhd->btd", (2, 3, 4)), (2, 5, 2, 3)),
    "einsum with ellipsis": (einsum("...d,df->...f", (4, 6), (6,)), (2, 5, 4)),
    "experts": (einsum("ebd,edf->ebf", (5, 4, 6)), (5, 2, 4)),
    "experts turned": (einsum("bed,efd->bfe", (5, 6, 4)), (2, 5, 4)),
    "foreign einsum": (lambda: ForeignEinsum("BSD,CKDH->CBSKH", (2, 3, 4, 5)), (2, 6, 4)),
    "convolution 1-d": (conv(3, 4, kernel_size=(3,)), (2, 8, 3)),
    "convolution 2-d": (conv(3, 4, kernel_size=(3, 2), strides=(2, 1)), (2, 8, 7, 3)),
    "convolution 3-d": (conv(3, 4, kernel_size=(3, 2, 1)), (1, 4, 4, 4, 3)),
    "unpadded": (conv(3, 4, kernel_size=(3, 2), padding="VALID"), (2, 8, 8, 3)),
    "circular": (conv(3, 4, kernel_size=(3, 2), padding="CIRCULAR"), (2, 8, 8, 3)),
    "causal": (conv(3, 4, kernel_size=(3,), padding="CAUSAL"), (2, 8, 3)),
    "dilated": (conv(3, 4, kernel_size=(3,), kernel_dilation=2), (2, 9, 3)),
    "input dilated": (
        conv(3, 4, kernel_size=(3,), input_dilation=2, padding=((1, 1),)),
        (2, 9, 3),
    ),
    "convolution of one example": (conv(3, 4, kernel_size=(3, 2)), (8, 8, 3)),
}


def kernel_of(layer: Any) -> nnx.Param:
    return layer.w if hasattr(layer, "w") else layer.kernel


def changed_weight(layer: Any) -> Any:
    """A copy of the layer before it was adapted, with the changed weight."""
    adapter = layer.adapters["default"]
    p = {name: np.asarray(v[...], np.float64) for name, v in adapter.arrays.items()}
    change = adapter.method.alpha / adapter.method.rank * p["A"] @ p["B"]
    plain = lro.adapters.detach(nnx.clone(layer))
    kernel = kernel_of(plain)
    spec = spec_of(plain).axes
    add = lambda w, change: from_matrix(to_matrix(w, spec) + change, spec, w)
    kernel[...] = jax.jit(add)(kernel[...], change.astype(np.float32))
    return plain


def input_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_changed_weight(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), input_of(shape)
    before = call(layer, x)
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2, alpha=3), ".*", rngs=0)
    assert_close(call(layer, x), before)
    plain = changed_weight(randomized(layer))
    expected = call(plain, x)
    assert not np.allclose(before, expected, atol=1e-2)
    np.testing.assert_allclose(call(layer, x), expected, atol=2e-5)
    lro.adapters.merge(layer)
    assert_close(kernel_of(layer)[...], kernel_of(plain)[...])
    assert_close(call(lro.adapters.detach(layer), x), expected)


@pytest.mark.parametrize("name", ["experts", "heads in", "circular", "linear"])
def test_a_layer_starts_bit_for_bit_and_has_the_gradients_of_the_changed_weight(
    name: str,
) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), input_of(shape)
    before = layer(x)  # eagerly: the layer's own operations are the same programs
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2, alpha=3), ".*", rngs=0)
    np.testing.assert_array_equal(layer(x), before)
    plain = changed_weight(randomized(layer))
    loss = lambda layer, x: jnp.sum(jnp.sin(layer(x)))
    slopes = lambda wrt: nnx.jit(nnx.grad(loss, argnums=(nnx.DiffState(0, wrt), 1)))
    of_plain, by_input = slopes(nnx.Param)(plain, x)
    spec = spec_of(plain).axes
    of_matrix = np.asarray(jax.jit(lambda w: to_matrix(w, spec))(of_plain["kernel"][...]))
    arrays = layer.adapters["default"].arrays
    a, b = (np.asarray(arrays[k][...], np.float64) for k in "AB")
    grads, of_adapted = slopes(lro.adapters.trainable)(layer, x)
    grads = grads["adapters"]["default"]["arrays"]
    swap = lambda m: np.swapaxes(m, -1, -2)
    np.testing.assert_allclose(grads["A"][...], 1.5 * of_matrix @ swap(b), atol=1e-4)
    np.testing.assert_allclose(grads["B"][...], 1.5 * swap(a) @ of_matrix, atol=1e-4)
    np.testing.assert_allclose(of_adapted, by_input, atol=1e-4)
    lro.adapters.merge(layer)
    assert_close(layer(x), call(plain, x))


@pytest.mark.slow
def test_an_embedding_gets_a_table_of_r_columns_and_its_attend_stays_the_models_own() -> None:
    embed = nnx.Embed(7, 4, embedding_init=drawn, rngs=nnx.Rngs(0))
    query, index = np.ones((2, 4), np.float32), np.array([[1, 6], [0, 1]])
    before, logits = embed(index), embed.attend(query)
    lro.adapters.attach(embed, lro.adapters.LoRA(rank=2, alpha=3), nnx.Embed, rngs=0)
    arrays = embed.adapters["default"].arrays
    assert arrays["A"].shape == (7, 2)
    np.testing.assert_array_equal(embed(index), before)
    assert not np.any(arrays["A"][...])
    randomized(embed)
    change = 1.5 * np.asarray(arrays["A"][...]) @ np.asarray(arrays["B"][...])
    np.testing.assert_allclose(embed(index), before + change[np.asarray(index)], atol=1e-5)
    np.testing.assert_array_equal(embed.attend(query), logits)
    lro.adapters.merge(embed)
    np.testing.assert_allclose(embed(index), before + change[np.asarray(index)], atol=1e-5)


@pytest.mark.parametrize("method", [lro.adapters.LoRA(rank=2), lro.adapters.PiSSA(rank=2)], ids=str)
def test_a_change_of_a_tied_table_is_refused_and_never_reaches_the_head(method: Any) -> None:
    class Tied(nnx.Module):
        def __init__(self, config: Any = None) -> None:
            self.config = config
            self.embed = nnx.Embed(7, 4, embedding_init=drawn, rngs=nnx.Rngs(0))

        def __call__(self, index: jax.Array) -> jax.Array:
            return self.embed.attend(self.embed(index))

    config = DecoderConfig(7, 8, 8, 1, 1, tie_word_embeddings=True)
    moves = method.changes_base
    index, told, untold = np.array([1, 6]), Tied(config), Tied()
    attach = lambda model: lro.adapters.attach(model, method, "embed", rngs=0)
    refuses = pytest.raises(ValueError, match=r"embed: the adapter 'default'.* same table")
    for model in (told, untold):
        before = model(index)
        if model is told and moves:
            with refuses:
                attach(model)
            assert not hasattr(model.embed, "adapters")
            continue
        attach(model)
        if moves:
            with pytest.raises(ValueError, match=r"`attend`.*'default' \(PiSSA\) moves .* table"):
                model(index)
            lro.adapters.detach(model)
        elif model is told:
            with refuses:
                lro.adapters.merge(model)
        else:
            lro.adapters.merge(model)
            with pytest.raises(ValueError, match=r"`attend`.*merged into the table.*`unmerge`"):
                model(index)
            lro.adapters.unmerge(model)
        assert_close(model(index), before)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "of_input"),
    [
        (None, jnp.float32, jnp.bfloat16),
        (None, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_a_layer_keeps_the_dtype_of_its_output(dtype: Any, param_dtype: Any, of_input: Any) -> None:
    layer = made(nnx.Linear, 4, 6, dtype=dtype, param_dtype=param_dtype)()
    x, dtype_of = np.ones((2, 4), of_input), nnx.eval_shape
    expected = dtype_of(lambda layer: layer(x), layer).dtype
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), ".*", rngs=0)
    assert {v.dtype for v in layer.adapters["default"].arrays.values()} == {jnp.dtype("float32")}
    assert dtype_of(lambda layer: layer(x), randomized(layer)).dtype == expected


def test_an_equation_at_the_call_is_followed_if_its_axes_are_the_same() -> None:
    layer = einsum("bd,df->bf", (4, 6))()
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2, alpha=3), ".*", rngs=0)
    randomized(layer)
    x = input_of((2, 5, 4))
    expected = changed_weight(layer)(x, "btd,df->btf")
    np.testing.assert_allclose(layer(x, "btd,df->btf"), expected, atol=1e-5)
    np.testing.assert_allclose(layer(x, einsum_str="btd,df->btf"), expected, atol=1e-5)
    with pytest.raises(ValueError, match="other inputs and outputs"):
        layer(np.ones((2, 6), np.float32), "bf,df->bd")


@pytest.mark.parametrize(
    ("equation", "kernel", "bias", "shape"),
    [
        ("ebd,edf->ebf", (5, 4, 6), (5, 1, 6), (5, 2, 4)),
        ("bed,efd->bfe", (5, 6, 4), (6, 5), (2, 5, 4)),
        ("btd,dnh->bhtn", (4, 2, 3), (3, 2), (2, 5, 4)),
    ],
)
def test_the_bias_of_an_einsum_is_read_in_the_order_of_its_output(
    equation: str, kernel: tuple[int, ...], bias: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    layer, x = einsum(equation, kernel, bias)(), input_of(shape)
    lro.adapters.attach(layer, lro.adapters.DoRA(rank=2, alpha=3), ".*", rngs=0)
    out = call(randomized(layer), x)
    lro.adapters.merge(layer)
    np.testing.assert_allclose(call(lro.adapters.detach(layer), x), out, atol=2e-5)


def test_inputs_may_be_given_by_name() -> None:
    layer, x = made(nnx.Linear, 4, 6)(), input_of((4,))
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), ".*", rngs=0)
    randomized(layer)
    np.testing.assert_array_equal(layer(inputs=x), layer(x))


def test_layers_whose_weight_is_no_matrix_of_their_input_are_refused() -> None:
    for layer in (
        conv(4, 4, kernel_size=(3,), feature_group_count=2)(),
        made(nnx.ConvTranspose, 4, 4, kernel_size=(3,))(),
        nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
        einsum("bde,de->bde", (4, 4))(),
    ):
        with pytest.raises(ValueError, match="matches no layer"):
            lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), ".*", rngs=0)


def test_attention_is_adapted_by_its_projections() -> None:
    attention = made(nnx.MultiHeadAttention, 2, 6, decode=False)()
    x = input_of((2, 5, 6))
    before = call(attention, x)
    lro.adapters.attach(attention, lro.adapters.LoRA(rank=2, alpha=3), rngs=0)
    names = [row.path for row in lro.adapters.summary(attention).rows]
    assert names == ["key", "out", "query", "value"]
    assert_close(call(attention, x), before)
    after = call(randomized(attention), x)
    assert not np.allclose(after, before, atol=1e-2)
    lro.adapters.merge(attention)
    np.testing.assert_allclose(call(lro.adapters.detach(attention), x), after, atol=2e-5)


def test_a_masked_convolution_multiplies_by_another_weight() -> None:
    mask = np.ones((3, 4, 6), np.float32)
    mask[0] = 0
    model = conv(4, 6, (3,), mask=jnp.asarray(mask))()
    with pytest.raises(TypeError, match="PiSSA reads the layer's weight, but the call of Conv"):
        lro.adapters.attach(model, lro.adapters.PiSSA(rank=2), where=".*", rngs=0)
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2), where=".*", rngs=0)
    with pytest.raises(TypeError, match="another weight than the parameter"):
        lro.adapters.merge(model)
