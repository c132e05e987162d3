"""Decoders for tests: weights from NumPy, so that nothing is compiled to make them."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 12), dtype=np.int32)

logits_of = jax.jit(lambda model, tokens: model(tokens))


def random_decoder(config: DecoderConfig = CONFIG, **options: Any) -> Decoder:
    """A decoder with normal weights; the scales of its norms are not one, nor its biases zero."""
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> jax.Array:
        noise = rng.normal(size=x.shape)
        is_scale = "scale" in jax.tree_util.keystr(path)
        drawn = 1 + 0.3 * noise if is_scale else config.initializer_range * noise
        return jnp.asarray(drawn.astype(x.dtype))

    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    nnx.update(model, jax.tree.map_with_path(draw, nnx.to_pure_dict(nnx.state(model))))
    return model


def like(model: Decoder, scan_layers: bool = True, **options: Any) -> Decoder:
    """A decoder with other options and the weights of a scanned one."""
    options["scan_layers"] = scan_layers
    other = nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(1), **options))
    state = nnx.to_pure_dict(nnx.state(model))
    if not scan_layers:
        layer = lambda i: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[i]), state["blocks"])
        state = state | {"blocks": {i: layer(i) for i in range(model.config.num_hidden_layers)}}
    nnx.update(other, state)
    return other
