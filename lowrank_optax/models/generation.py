"""Sampling text from a decoder, one token after the other, with cached keys and values."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.models.decoder import Decoder


def generate(
    model: Decoder,
    prompt: jax.Array,
    max_new_tokens: int,
    *,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """Continues texts by sampling.

    Compiled once for each shape of the prompt and number of new tokens.

    Args:
        model: the decoder.
        prompt: integers [batch, prompt_length], at least one token each.
        max_new_tokens: how many tokens to append.
        key: random key; the same key gives the same text. Not needed at temperature 0.
        temperature: divides the logits; 0 always takes the most probable token.

    Returns:
        [batch, prompt_length + max_new_tokens] in the prompt's dtype, the prompt first.

    Raises:
        ValueError: an empty prompt, a negative number of tokens or temperature, or no key at a
            temperature above 0.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from lowrank_optax.models import Decoder, decoder_config, generate
        >>> config = decoder_config("llama-tiny", vocab_size=257, num_hidden_layers=1)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> prompt = jnp.array([[72, 105]])
        >>> generate(model, prompt, 3, key=jax.random.key(0), temperature=0.8).shape
        (1, 5)
    """
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or prompt.shape[1] == 0 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            "prompt must be integers of shape [batch, prompt_length] with at least one token, "
            f"got {prompt.dtype} of shape {prompt.shape}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(f"sampling at temperature {temperature} needs a key")
    if max_new_tokens == 0:
        return prompt
    graphdef, state = nnx.split(model)
    if temperature == 0:
        key = None  # which makes the compiled program the greedy one
    return _generate(graphdef, state, prompt, max_new_tokens, key, jnp.float32(temperature))


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def _generate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompt: jax.Array,
    max_new_tokens: int,
    key: jax.Array | None,
    temperature: jax.Array,
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    batch, prompt_length = prompt.shape

    def next_token(logits: jax.Array, step: jax.Array | int) -> jax.Array:
        if key is None:
            token = jnp.argmax(logits[:, -1], axis=-1)
        else:
            step_key = jax.random.fold_in(key, step)
            token = jax.random.categorical(step_key, logits[:, -1] / temperature)
        return token.astype(prompt.dtype)

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, jax.Array]:
        token, cache = carry
        logits, cache = model.decode(token[:, None], cache, prompt_length + index)
        return (next_token(logits, index + 1), cache), token

    cache = model.init_cache(batch, prompt_length + max_new_tokens)
    logits, cache = model.decode(prompt, cache, 0)
    first = next_token(logits, 0)
    (last, _), tokens = jax.lax.scan(step, (first, cache), jnp.arange(max_new_tokens - 1))
    return jnp.concatenate([prompt, tokens.T, last[:, None]], axis=1)
