"""Every kind of layer: with an adapter it computes what it would with the changed weight."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.nnx import placed
from lowrank_optax.matrices import from_matrix, to_matrix
from tests.adapters.nnx_models import randomized

RNGS = nnx.Rngs(0)


def conv(*args: Any, **options: Any) -> Callable[[], nnx.Conv]:
    return lambda: nnx.Conv(*args, **options, rngs=nnx.Rngs(0))


class MyLinear(nnx.Linear):
    """A subclass of a user's."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * super().__call__(x / 2)


class ForeignEinsum(nnx.Module):
    """As google-tunix and Gemma have it."""

    def __init__(self, einsum_str: str, shape: tuple[int, ...]) -> None:
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.einsum_str, x, self.w[...])


def general(inputs: Any, outputs: Any, **options: Any) -> Callable[[], nnx.LinearGeneral]:
    return lambda: nnx.LinearGeneral(inputs, outputs, **options, rngs=nnx.Rngs(0))


def einsum(equation: str, shape: tuple[int, ...], bias: Any = None) -> Callable[[], nnx.Einsum]:
    return lambda: nnx.Einsum(equation, shape, bias, rngs=nnx.Rngs(0))


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)), (2, 5, 4)),
    "linear of one row": (lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)), (4,)),
    "no bias": (lambda: nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), (2, 4)),
    "subclass": (lambda: MyLinear(4, 3, rngs=nnx.Rngs(0)), (2, 4)),
    "heads out": (general(4, (2, 3)), (2, 5, 4)),
    "heads in": (general((2, 3), 4, axis=(-2, -1)), (2, 5, 2, 3)),
    "inputs in front": (general((2, 3), 4, axis=(0, 2)), (2, 5, 3)),
    "batch axis": (general(4, 3, batch_axis={0: 5}), (5, 2, 4)),
    "two batch axes": (general(4, (3, 2), batch_axis={0: 5, 1: 2}), (5, 2, 3, 4)),
    "einsum": (einsum("btd,dnh->btnh", (4, 2, 3), (2, 3)), (2, 5, 4)),
    "einsum turned": (einsum("bd,ndh->nbh", (2, 4, 3)), (5, 4)),
    "einsum of two inputs": (einsum("btnh,nhd->btd", (2, 3, 4)), (2, 5, 2, 3)),
    "einsum with ellipsis": (einsum("...d,df->...f", (4, 3), (3,)), (2, 5, 4)),
    "experts": (einsum("ebd,edf->ebf", (2, 4, 3)), (2, 5, 4)),
    "experts turned": (einsum("bed,efd->bfe", (2, 3, 4)), (5, 2, 4)),
    "foreign einsum": (lambda: ForeignEinsum("BSD,CKDH->CBSKH", (2, 3, 4, 5)), (2, 6, 4)),
    "convolution 1-d": (conv(3, 4, kernel_size=(3,)), (2, 8, 3)),
    "convolution 2-d": (conv(3, 4, kernel_size=(3, 2), strides=(2, 1)), (2, 8, 7, 3)),
    "convolution 3-d": (conv(2, 3, kernel_size=(2, 2, 2)), (1, 4, 4, 4, 2)),
    "unpadded": (conv(3, 4, kernel_size=(3, 3), padding="VALID"), (2, 8, 8, 3)),
    "circular": (conv(3, 4, kernel_size=(3, 3), padding="CIRCULAR"), (2, 8, 8, 3)),
    "causal": (conv(3, 4, kernel_size=(3,), padding="CAUSAL"), (2, 8, 3)),
    "dilated": (conv(3, 4, kernel_size=(3,), kernel_dilation=2), (2, 9, 3)),
    "input dilated": (
        conv(3, 4, kernel_size=(3,), input_dilation=2, padding=((1, 1),)),
        (2, 9, 3),
    ),
    "convolution of one example": (conv(3, 4, kernel_size=(3, 3)), (8, 8, 3)),
}


def changed_weight(layer: Any) -> Any:
    """A copy of the layer before it was adapted, with the changed weight, in float64."""
    adapter = layer.adapters["default"]
    p = {name: np.asarray(v[...], np.float64) for name, v in adapter.arrays.items()}
    change = adapter.method.alpha / adapter.method.rank * p["A"] @ p["B"]
    plain = lro.adapters.detach(nnx.clone(layer))
    kernel = plain.w if hasattr(plain, "w") else plain.kernel
    spec, _ = placed(plain)
    total = np.asarray(to_matrix(kernel[...], spec), np.float64) + change
    kernel[...] = from_matrix(jnp.asarray(total, jnp.float32), spec, like=kernel[...])
    return plain


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_changed_weight(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), jax.random.normal(jax.random.key(1), shape)
    before = layer(x)
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2, alpha=3), ".*", rngs=0)
    assert bool((layer(x) == before).all())
    expected = changed_weight(randomized(layer))(x)
    assert not np.allclose(before, expected, atol=1e-2)
    np.testing.assert_allclose(layer(x), expected, atol=2e-5)
    lro.adapters.merge(layer)
    np.testing.assert_allclose(layer(x), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["experts", "heads in", "circular", "linear"])
def test_gradients_are_those_of_the_changed_weight(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), jax.random.normal(jax.random.key(1), shape)
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2, alpha=3), ".*", rngs=0)
    plain = changed_weight(randomized(layer))
    loss = lambda layer, x: jnp.sum(jnp.sin(layer(x)))
    of_kernel = nnx.grad(loss)(plain, x)["kernel"][...]
    of_matrix = np.asarray(to_matrix(of_kernel, placed(plain)[0]), np.float64)
    arrays = layer.adapters["default"].arrays
    a, b = (np.asarray(arrays[k][...], np.float64) for k in "AB")
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, lro.adapters.trainable))(layer, x)
    grads = grads["adapters"]["default"]["arrays"]
    swap = lambda m: np.swapaxes(m, -1, -2)
    np.testing.assert_allclose(grads["A"][...], 1.5 * of_matrix @ swap(b), atol=1e-4)
    np.testing.assert_allclose(grads["B"][...], 1.5 * swap(a) @ of_matrix, atol=1e-4)
    by_input = [jax.grad(lambda x, m=m: loss(m, x))(x) for m in (layer, plain)]
    np.testing.assert_allclose(*by_input, atol=1e-4)


def test_an_embedding_gets_a_table_of_r_columns_and_its_attend_stays_the_models_own() -> None:
    embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    query, index = jnp.ones((2, 4)), jnp.array([[1, 6], [0, 1]])
    before, logits = embed(index), embed.attend(query)
    lro.adapters.attach(embed, lro.adapters.LoRA(rank=2, alpha=3), nnx.Embed, rngs=0)
    arrays = embed.adapters["default"].arrays
    assert arrays["A"].shape == (7, 2)
    assert bool((embed(index) == before).all())
    assert not arrays["A"][...].any()
    randomized(embed)
    change = 1.5 * np.asarray(arrays["A"][...]) @ np.asarray(arrays["B"][...])
    np.testing.assert_allclose(embed(index), before + change[np.asarray(index)], atol=1e-5)
    assert bool((embed.attend(query) == logits).all())
    lro.adapters.merge(embed)  # folded in, the change is in both
    expected = logits + np.asarray(query) @ change.T
    np.testing.assert_allclose(embed.attend(query), expected, atol=1e-5)


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
    layer = nnx.Linear(4, 3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4), of_input)
    expected = layer(x).dtype
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), ".*", rngs=0)
    assert {v.dtype for v in layer.adapters["default"].arrays.values()} == {jnp.dtype("float32")}
    assert randomized(layer)(x).dtype == expected


def test_an_equation_at_the_call_is_followed_if_its_axes_are_the_same() -> None:
    layer = nnx.Einsum("bd,df->bf", (4, 3), rngs=nnx.Rngs(0))
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2, alpha=3), ".*", rngs=0)
    randomized(layer)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    expected = changed_weight(layer)(x, "btd,df->btf")
    np.testing.assert_allclose(layer(x, "btd,df->btf"), expected, atol=1e-5)
    np.testing.assert_allclose(layer(x, einsum_str="btd,df->btf"), expected, atol=1e-5)
    with pytest.raises(ValueError, match="other inputs and outputs"):
        layer(jnp.ones((2, 3)), "bf,df->bd")


def test_inputs_may_be_given_by_name() -> None:
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), ".*", rngs=0)
    randomized(layer)
    np.testing.assert_array_equal(layer(inputs=jnp.ones(4)), layer(jnp.ones(4)))


@pytest.mark.parametrize(
    "layer",
    [
        nnx.Conv(4, 4, kernel_size=(3,), feature_group_count=2, rngs=RNGS),
        nnx.ConvTranspose(4, 4, kernel_size=(3,), rngs=RNGS),
        nnx.LayerNorm(4, rngs=RNGS),
        nnx.Einsum("bde,de->bde", (4, 4), rngs=RNGS),
    ],
)
def test_layers_whose_weight_is_no_matrix_of_their_input_are_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        lro.adapters.attach(layer, lro.adapters.LoRA(rank=2), ".*", rngs=0)


def test_attention_is_adapted_by_its_projections() -> None:
    attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    before = attention(x)
    lro.adapters.attach(attention, lro.adapters.LoRA(rank=2, alpha=3), rngs=0)
    names = [row.path for row in lro.adapters.summary(attention).rows]
    assert names == ["key", "out", "query", "value"]
    assert bool((attention(x) == before).all())
    after = randomized(attention)(x)
    assert not np.allclose(after, before, atol=1e-2)
    lro.adapters.merge(attention)
    np.testing.assert_allclose(attention(x), after, atol=2e-5)
