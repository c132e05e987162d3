"""What the TPU compiler keeps for a train step of a model with frozen weights and an adapter."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config

pytestmark = pytest.mark.slow

CONFIG = decoder_config("llama-350m")


def temporary_bytes(allocated_for: Any, method: Any, shape: tuple[int, int], remat: Any) -> int:
    """Of a step of AdamW on everything (None), or on an adapter of all linear layers."""
    model, wrt = nnx.eval_shape(lambda: adapted(method, remat)), nnx.Param
    if method is not None:
        wrt = lro.adapters.trainable
    graphdef, params, rest = nnx.split(model, wrt, ...)
    tx = optax.adamw(1e-4)
    state = jax.eval_shape(tx.init, params)

    def loss(params: Any, rest: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest)(tokens)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    def step(params: Any, state: Any, rest: Any, tokens: jax.Array) -> Any:
        gradient = jax.grad(loss)(params, rest, tokens)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return allocated_for("v5e", step, params, state, rest, tokens, donate_argnums=(0, 1))[1]


def adapted(method: Any, remat: Any) -> Decoder:
    model = Decoder(
        CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=remat
    )
    return model if method is None else lro.adapters.attach(model, method, rngs=0)


@pytest.mark.parametrize(
    "method", [pytest.param(lro.adapters.LoRA, marks=pytest.mark.full), lro.adapters.LoTR]
)
def test_frozen_weights_leave_nothing_of_their_size_behind(
    allocated_for: Callable[..., Any], method: Any
) -> None:
    """On a short text activations are small, so gradients of the weights would be seen."""
    width, inner, vocab = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.vocab_size
    layer = 2 * (4 * width * width + 3 * width * inner)
    trained = temporary_bytes(allocated_for, method(rank=8), (1, 128), "full")
    everything = temporary_bytes(allocated_for, None, (1, 128), "full")
    print(f"{method.__name__}: {trained / 2**20:.0f} MiB, everything {everything / 2**20:.0f} MiB")
    assert trained < layer + 3 * 4 * 128 * vocab
    assert everything > CONFIG.num_hidden_layers * layer


def test_lora_fa_keeps_less_than_lora(allocated_for: Callable[..., Any]) -> None:
    """r numbers a token and layer in the place of the layer's input, in bfloat16 on a v5e."""
    methods = {"LoRA": lro.adapters.LoRA, "LoRA-FA": lro.adapters.LoRAFA}
    bytes_of = {
        name: temporary_bytes(allocated_for, method(rank=8), (8, 256), None)
        for name, method in methods.items()
    }
    print({name: f"{bytes_ / 2**20:.0f} MiB" for name, bytes_ in bytes_of.items()})
    assert bytes_of["LoRA-FA"] < bytes_of["LoRA"]


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.full
@pytest.mark.parametrize("every", [1, 2])
def test_lora_step_takes_what_is_counted(allocated_for: Callable[..., Any], every: int) -> None:
    config = dataclasses.replace(
        decoder_config("llama-1b"), num_hidden_layers=6, intermediate_size=5504
    )
    options = {"remat": "full", "remat_every": every, "attention_implementation": "chunked"}

    def make() -> Decoder:
        types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        model = Decoder(config, rngs=nnx.Rngs(0), **types, **options)
        return lro.adapters.attach(model, lro.adapters.LoRA(rank=16), rngs=nnx.Rngs(0))

    graphdef, *parts = nnx.split(nnx.eval_shape(make), lro.adapters.trainable, ...)
    params, rest = map(nnx.as_pure, parts)
    tx = optax.adamw(1e-4)
    state = jax.eval_shape(tx.init, params)

    def loss(params: Any, rest: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, rest)
        head, axis = model.head()
        hidden = model.hidden(tokens)
        return lro.losses.linear_cross_entropy(hidden, head, tokens, head_axis=axis)

    def step(params: Any, state: Any, rest: Any, tokens: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, rest, tokens), state, params)
        return optax.apply_updates(params, updates), state

    tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    arguments = (params, state, rest, tokens)
    _, temporary = allocated_for("v5e", step, *arguments, donate_argnums=(0, 1))

    row = 2 * tokens.size  # bfloat16
    saved = (config.num_hidden_layers // every + every - 1) * row * config.hidden_size
    adapters = 1.5 * nbytes(params)  # gradients, and factors cast for all layers at once
    block = row * (4 * config.intermediate_size + 11 * config.hidden_size)
    counted = saved + adapters + block
    print(f"temporaries {temporary / 2**20:.0f} MiB, counted {counted / 2**20:.0f}")
    assert temporary < counted
