"""The decoder with a few bits kept for backward of what its MLPs' nonlinearities meet."""

import dataclasses
import functools
import math

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.models import Decoder, load_huggingface, save_huggingface
from tests.models.decoders import CONFIG, TOKENS, like, logits_of, random_decoder

KEEP_CODES = jax.checkpoint_policies.save_only_these_names("few_bit_codes")


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_decoder()


def gradient(model: Decoder) -> np.ndarray:
    """All gradients of the mean of squared logits, stacked layer by layer, as one vector."""
    graphdef, state = nnx.split(model)
    loss = lambda state: jnp.mean(jnp.square(nnx.merge(graphdef, state)(TOKENS)))
    found = nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))
    if isinstance(model.blocks, nnx.List):
        layers = [found["blocks"][i] for i in range(len(model.blocks))]
        found["blocks"] = jax.tree.map(lambda *x: np.stack(x), *layers)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_those_of_the_plain_decoder(model, dtype):
    plain, few_bit = like(model, dtype=dtype), like(model, activation_bits=3, dtype=dtype)
    units = 100 if dtype == jnp.float32 else 2
    assert_close(logits_of(few_bit, TOKENS), logits_of(plain, TOKENS), units, dtype=dtype)


@functools.cache
def gradient_with(bits: int | None) -> np.ndarray:
    return gradient(random_decoder(activation_bits=bits))


@pytest.mark.slow
def test_the_gradient_is_the_closer_the_more_bits():
    expected = gradient_with(None)
    cosines = []
    for bits in (2, 3, 8):
        found = gradient_with(bits)
        norms = np.linalg.norm(found) * np.linalg.norm(expected)
        cosines.append(float(found @ expected / norms))
    assert cosines == sorted(cosines)
    assert cosines[1] > 0.97
    assert cosines[2] > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        pytest.param(True, "full", marks=pytest.mark.full),
        (True, KEEP_CODES),
        (False, None),
        pytest.param(False, KEEP_CODES, marks=pytest.mark.full),
    ],
)
def test_unrolling_and_rematerialisation_change_no_few_bit_gradient(model, scan_layers, remat):
    other = like(model, activation_bits=3, scan_layers=scan_layers, remat=remat)
    expected = gradient_with(3)
    # An input that rounding moves over a threshold gets another code.
    difference = np.linalg.norm(gradient(other) - expected) / np.linalg.norm(expected)
    assert difference < 1e-3


def kept(model: Decoder) -> list[jax.ShapeDtypeStruct]:
    """What is kept for the backward pass, but for the weights."""
    graphdef, state = nnx.split(model)
    backward = jax.eval_shape(
        lambda state: jax.vjp(lambda s: nnx.merge(graphdef, s)(TOKENS), state)[1], state
    )
    return jax.tree.leaves(backward)


@pytest.mark.slow
def test_fewer_bytes_are_kept_for_the_backward_pass(model):
    hidden = (CONFIG.num_hidden_layers, TOKENS.size, CONFIG.intermediate_size)
    floats = lambda model: sum(x.shape == hidden and x.dtype == jnp.float32 for x in kept(model))
    few_bit = like(model, activation_bits=4)
    # Of the MLP's width only the input of `down` is left, which its kernel's gradient needs.
    assert floats(few_bit) == 1 < floats(model)
    codes = lambda arrays: [x.size for x in arrays if x.dtype == jnp.uint8]  # two in a byte
    assert codes(kept(few_bit)) == [math.prod(hidden) // 2] * 2
    by_name = kept(like(model, activation_bits=4, remat=KEEP_CODES))
    assert codes(by_name) == [math.prod(hidden) // 2] * 2
    assert not any(x.shape == hidden and x.dtype == jnp.float32 for x in by_name)


def test_weights_and_files_are_those_of_the_plain_decoder(model, tmp_path):
    pytest.importorskip("safetensors")
    few_bit = like(model, activation_bits=2)
    structures = [jax.tree.structure(nnx.to_pure_dict(nnx.state(m))) for m in (model, few_bit)]
    assert structures[0] == structures[1]
    save_huggingface(few_bit, tmp_path / "few_bit")
    save_huggingface(model, tmp_path / "plain")
    name = "model.safetensors"
    files = [(tmp_path / folder / name).read_bytes() for folder in ("few_bit", "plain")]
    assert files[0] == files[1]
    loaded = load_huggingface(tmp_path / "plain", activation_bits=2)
    assert loaded.blocks.mlp.activation_bits == 2
    assert load_huggingface(tmp_path / "few_bit").blocks.mlp.activation_bits is None
    assert_close(logits_of(loaded, TOKENS), logits_of(model, TOKENS), 100)


def test_without_bits_the_nonlinearity_is_the_plain_one(model):
    programs = [
        str(jax.make_jaxpr(lambda t, m=m: m(t))(TOKENS))
        for m in (model, like(model, activation_bits=4))
    ]
    assert ["custom_vjp_call" in program for program in programs] == [False, True]


def test_wrong_bits_are_refused():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    for bits in (0, 9, 2.5):
        with pytest.raises(ValueError, match=rf"activation_bits={bits} must be an integer from 1"):
            Decoder(config, rngs=nnx.Rngs(0), activation_bits=bits)
