"""What a TPU's compiler allocates for the update inside the backward pass."""

import dataclasses
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, DecoderConfig, decoder_config

pytestmark = pytest.mark.slow

TOKENS = 512
CONFIG = DecoderConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=8,
    num_key_value_heads=8,
)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def loss(model: Decoder, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.tensordot(hidden, model.head()[0], 1, preferred_element_type=jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


@pytest.mark.parametrize(
    ("clip", "each"),
    [
        (None, None),
        pytest.param("global", None, marks=pytest.mark.full),
        pytest.param(None, "slice", marks=pytest.mark.full),
    ],
)
def test_stacks_stay_in_place(allocated_for: Any, clip: Any, each: Any) -> None:
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), **types))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    tx = lro.in_float32(optax.adamw(1e-3) if each is None else optax.lamb(1e-3))
    update = lro.update_in_backward(
        model, tx, loss=loss, clip=clip, max_norm=None if clip is None else 1.0, each=each
    )
    state = jax.eval_shape(update.init, params)
    tokens = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    step = lambda params, state, tokens: update.step(params, state, (tokens, tokens))
    program, temporary = allocated_for("v5e", step, params, state, tokens, donate_argnums=(0, 1))

    layers, width = CONFIG.num_hidden_layers, CONFIG.hidden_size
    shapes = {x.shape for x in jax.tree.leaves(params["blocks"]) if x.ndim > 2}
    for shape in shapes:
        stack = rf"\[{','.join(map(str, shape))}\]"
        in_memory = r"\{(?![^}]*S\(1\))[^}]*\}"  # S(1) is on the chip
        made = (
            rf"= \w+{stack}{in_memory} (copy|copy-start|transpose|convert|broadcast|custom-call)\("
        )
        assert not re.search(made, program.as_text())
    of_block = nbytes(params["blocks"]) // layers
    inputs = layers * TOKENS * width * 2
    scores = CONFIG.num_attention_heads * TOKENS**2 * 4
    activations = TOKENS * (8 * width + 4 * CONFIG.intermediate_size) * 4 + 3 * scores
    assert program.memory_analysis().alias_size_in_bytes >= nbytes((params, state))
    assert temporary < 1.1 * (inputs + 2 * of_block + activations)


@pytest.mark.full
def test_llama_1b_takes_what_is_counted(allocated_for: Any) -> None:
    config = dataclasses.replace(decoder_config("llama-1b"), intermediate_size=5504)
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **types))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    tx = lro.in_float32(optax.adamw(1e-3))

    def loss(model: Decoder, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        head, axis = model.head()
        return lro.losses.linear_cross_entropy(
            hidden, head, targets, head_axis=axis, design="recompute"
        )

    update = lro.update_in_backward(model, tx, loss=loss)
    state, tokens = jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    step = lambda params, state, tokens: update.step(params, state, (tokens, tokens))
    program, temporary = allocated_for("v5e", step, params, state, tokens, donate_argnums=(0, 1))
    activations = 2048 * (8 * config.hidden_size + 4 * config.intermediate_size) * 2
    counted = (
        nbytes((params, state))
        + nbytes(params["blocks"]) // config.num_hidden_layers
        + config.num_hidden_layers * 2048 * config.hidden_size * 2
        + activations
    )
    assert program.memory_analysis().argument_size_in_bytes + temporary < 1.05 * counted
