"""What the TPU compiler keeps for a train step of a model with frozen weights and an adapter."""

from collections.abc import Callable
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


def temporary_bytes(compile_for: Any, method: Any, shape: tuple[int, int], remat: Any) -> int:
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
    compiled = compile_for("v5e", step, params, state, rest, tokens, donate_argnums=(0, 1))
    return compiled.memory_analysis().temp_size_in_bytes


def adapted(method: Any, remat: Any) -> Decoder:
    model = Decoder(
        CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=remat
    )
    return model if method is None else lro.adapters.attach(model, method, rngs=0)


@pytest.mark.parametrize(
    "method", [pytest.param(lro.adapters.LoRA, marks=pytest.mark.full), lro.adapters.LoTR]
)
def test_frozen_weights_leave_nothing_of_their_size_behind(
    compile_for: Callable[..., Any], method: Any
) -> None:
    """On a short text activations are small, so gradients of the weights would be seen."""
    width, inner, vocab = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.vocab_size
    layer = 2 * (4 * width * width + 3 * width * inner)
    trained = temporary_bytes(compile_for, method(rank=8), (1, 128), "full")
    everything = temporary_bytes(compile_for, None, (1, 128), "full")
    print(f"{method.__name__}: {trained / 2**20:.0f} MiB, everything {everything / 2**20:.0f} MiB")
    assert trained < layer + 3 * 4 * 128 * vocab
    assert everything > CONFIG.num_hidden_layers * layer


def test_lora_fa_keeps_less_than_lora(compile_for: Callable[..., Any]) -> None:
    """r numbers a token and layer in the place of the layer's input, in bfloat16 on a v5e."""
    methods = {"LoRA": lro.adapters.LoRA, "LoRA-FA": lro.adapters.LoRAFA}
    bytes_of = {
        name: temporary_bytes(compile_for, method(rank=8), (8, 256), None)
        for name, method in methods.items()
    }
    print({name: f"{bytes_ / 2**20:.0f} MiB" for name, bytes_ in bytes_of.items()})
    assert bytes_of["LoRA-FA"] < bytes_of["LoRA"]
