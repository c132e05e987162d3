"""The decoder whose linear layers are Maestro layers starts as the dense one, and writes alike."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.layers import Factors, MaestroLinear, maestro
from lowrank_optax.models import Decoder, DecoderConfig, generate
from tests.close import assert_close

CONFIG = DecoderConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
TOKENS = jnp.arange(10).reshape(2, 5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_it_computes_what_the_dense_one_does(scan_layers: bool) -> None:
    make = lambda **options: Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=scan_layers, **options)
    dense, model = make(), make(linear="maestro", remat="full")
    layers = [x for _, x in nnx.iter_modules(model) if isinstance(x, MaestroLinear)]
    assert len(layers) == (7 if scan_layers else 14)
    assert_close(model(TOKENS), dense(TOKENS), units=200)
    # Of the tokens that are surely the largest, in either model.
    np.testing.assert_array_equal(
        *(generate(m, TOKENS, 3, key=jax.random.key(0), temperature=0.0) for m in (dense, model))
    )


@pytest.mark.slow
def test_scanned_unrolled_cached_and_merged_blocks_use_the_rank_of_each_layer() -> None:
    make = lambda scan: Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=scan, linear="maestro")
    model, apart = make(True), make(False)
    key = jax.random.key(1)
    ranks = maestro.sample_ranks(key, maestro.current_ranks(model), "independent")
    stacks, layers = dict(nnx.iter_modules(model)), dict(nnx.iter_modules(apart))
    for path, of_layers in ranks.items():
        names = tuple(path.split("/"))
        a, b = stacks[names].factors()
        for i, rank in enumerate(of_layers):
            layers["blocks", i, *names[1:]].set_factors(Factors(a[i], b[i]), rank)
    apart.embed, apart.lm_head = model.embed, model.lm_head
    maestro.set_ranks(model, ranks)
    expected = apart(TOKENS)
    assert_close(model(TOKENS), expected, units=200)
    cache = model.init_cache(2, 5)
    first, cache = model.decode(TOKENS[:, :3], cache, 0)
    rest, _ = model.decode(TOKENS[:, 3:], cache, 3)
    assert_close(jnp.concatenate([first, rest], 1), expected, units=200)
    assert_close(maestro.merge(apart)(TOKENS), expected, units=200)


def test_its_shapes_are_known_without_its_arrays() -> None:
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), linear="maestro"))
    assert "? / 8" in str(maestro.summary(model))


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="linear must be 'maestro' or None, got 'lora'"):
        Decoder(CONFIG, rngs=nnx.Rngs(0), linear="lora")  # pyrefly: ignore[bad-argument-type]
