"""The decoder's own properties."""

import dataclasses
import os
import subprocess
import sys

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.models import Decoder, DecoderConfig, decoder_config

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)

logits_of = jax.jit(lambda model, tokens: model(tokens))


def reference_logits(parameters: dict, tokens: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """The decoder in NumPy float64, one head and one position at a time."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def turned(x):  # [length, head_dim]: pairs as complex numbers
        half = config.head_dim // 2
        angle = np.arange(len(x))[:, None] * config.rope_theta ** (-np.arange(half) / half)
        pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    def attend(x, weights):
        q, k, v = (x @ weights[n]["kernel"] for n in ("query", "key", "value"))
        width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        heads = []
        for head in range(config.num_attention_heads):
            ours, shared = (slice(h * width, (h + 1) * width) for h in (head, head // group))
            scores = turned(q[:, ours]) @ turned(k[:, shared]).T / np.sqrt(width)
            mixed = []
            for i, row in enumerate(scores):
                p = np.exp(row[: i + 1] - row[: i + 1].max())
                mixed.append(p / p.sum() @ v[: i + 1, shared])
            heads.append(np.stack(mixed))
        return np.concatenate(heads, axis=1) @ weights["output"]["kernel"]

    def logits(text):
        x = parameters["embed"]["embedding"][text]
        for i in range(config.num_hidden_layers):
            block = jax.tree.map(lambda a: a[i], parameters["blocks"])  # noqa: B023
            x = x + attend(norm(x, block["attention_norm"]["scale"]), block["attention"])
            h, mlp = norm(x, block["mlp_norm"]["scale"]), block["mlp"]
            gate = h @ mlp["gate"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
        return norm(x, parameters["norm"]["scale"]) @ parameters["lm_head"]["kernel"]

    return np.stack([logits(text) for text in tokens])


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    for name in ("attention_norm", "mlp_norm"):  # away from one
        scale = getattr(model.blocks, name).scale
        scale.set_value(1 + 0.3 * jax.random.normal(jax.random.key(2), scale.shape))
    return model


def unrolled_from(model: Decoder, **options) -> Decoder:
    """The unrolled decoder with the weights of a scanned one."""
    unrolled = Decoder(model.config, rngs=nnx.Rngs(1), scan_layers=False, **options)
    state = nnx.to_pure_dict(nnx.state(model))
    layers = range(model.config.num_hidden_layers)
    state["blocks"] = {i: jax.tree.map(lambda x: x[i], state["blocks"]) for i in layers}  # noqa: B023
    nnx.update(unrolled, state)
    return unrolled


def test_logits_equal_a_numpy_reference(model):
    parameters = jax.tree.map(
        lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    expected = reference_logits(parameters, np.asarray(TOKENS), CONFIG)
    logits = logits_of(model, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert np.abs(expected).max() > 0.5


def test_scanned_and_unrolled_layers_give_the_same_numbers(model):
    unrolled = unrolled_from(model)
    assert isinstance(unrolled.blocks, nnx.List)
    assert unrolled.blocks[0].mlp.gate.kernel.shape == (32, 56)
    assert model.blocks.mlp.gate.kernel.shape == (3, 32, 56)
    np.testing.assert_allclose(
        logits_of(model, TOKENS), logits_of(unrolled, TOKENS), atol=1e-5, rtol=1e-5
    )


def test_stacked_layers_start_from_different_weights_of_the_right_spread():
    model = Decoder(decoder_config("llama-tiny", vocab_size=257), rngs=nnx.Rngs(0))
    kernels = np.asarray(model.blocks.mlp.gate.kernel[...])
    np.testing.assert_allclose(kernels.std(axis=(1, 2)), 0.02, rtol=0.02)
    assert not np.allclose(kernels[0], kernels[1])
    np.testing.assert_array_equal(model.blocks.mlp_norm.scale[...], 1)


def test_a_later_token_changes_no_earlier_logit(model):
    changed = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % CONFIG.vocab_size)
    before, after = logits_of(model, TOKENS), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any(axis=(0, 2)).all()


def test_a_sliding_window_forgets_what_lies_outside_it():
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        sliding_window=4,
        model_type="mistral",
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    changed = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % CONFIG.vocab_size)
    same = (logits_of(model, TOKENS) == logits_of(model, changed)).all(axis=(0, 2))
    assert same.tolist() == [True, True] + [False] * 4 + [True] * 6  # itself and three after it


def gradients(model: Decoder) -> tuple[nnx.State, int]:
    """The gradients, and how many rematerialised calls there are in the program."""
    graphdef, state = nnx.split(model)

    def loss(state: nnx.State) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graphdef, state)(TOKENS)))

    traced = jax.jit(jax.grad(loss)).trace(state)
    return traced.lower().compile()(state), str(traced.jaxpr).count("remat")


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(True, "full"), (False, jax.checkpoint_policies.nothing_saveable)],
)
def test_rematerialisation_changes_no_gradient(model, scan_layers, remat):
    if scan_layers:
        plain, other = model, Decoder(CONFIG, rngs=nnx.Rngs(0), remat=remat)
        nnx.update(other, nnx.state(model))
    else:
        plain, other = unrolled_from(model), unrolled_from(model, remat=remat)
    (expected, without), (actual, with_remat) = gradients(plain), gradients(other)
    assert without == 0
    assert with_remat > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), actual, expected
    )


def test_a_remat_policy_decides_what_is_kept_for_the_backward_pass(model):
    def kept(remat: str | None) -> int:
        other = Decoder(CONFIG, rngs=nnx.Rngs(0), remat=remat)
        graphdef, state = nnx.split(other)
        _, backward = jax.eval_shape(
            lambda state: jax.vjp(lambda s: nnx.merge(graphdef, s)(TOKENS), state), state
        )
        return sum(x.size for x in jax.tree.leaves(backward))

    sizes = [kept(remat) for remat in ("full", "dots_saveable", "everything_saveable")]
    assert sizes[0] < sizes[1] < sizes[2]
    assert kept("nothing_saveable") == sizes[0]


def test_a_wrong_remat_name_is_refused_with_the_list():
    # save_only_these_names makes a policy; taken for one it would save everything.
    for name in ("everything", "save_only_these_names"):
        with pytest.raises(ValueError, match=rf"'full'.*dots_saveable.*got '{name}'"):
            Decoder(CONFIG, rngs=nnx.Rngs(0), remat=name)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_bfloat16_gives_float32_logits_near_those_of_float32(tie_word_embeddings):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tie_word_embeddings)
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    wide = Decoder(config, rngs=nnx.Rngs(0))
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    logits, expected = logits_of(model, TOKENS), logits_of(wide, TOKENS)
    assert logits.dtype == jnp.float32
    assert 0 < jnp.abs(logits - expected).mean() < 0.03 * jnp.abs(expected).mean()


def test_bfloat16_weights_have_finite_bfloat16_gradients():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=True)
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    found, _ = gradients(Decoder(config, rngs=nnx.Rngs(0), scan_layers=False, **types))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    assert all(bool(jnp.abs(x).max() > 0) for x in jax.tree.leaves(found))


def test_the_model_may_be_a_constant_of_jit_and_grad(model):
    expected = logits_of(model, TOKENS)
    np.testing.assert_allclose(jax.jit(lambda t: model(t))(TOKENS), expected, atol=1e-6)
    onehot = jax.nn.one_hot(TOKENS, CONFIG.vocab_size)
    slope = jax.jit(jax.grad(lambda scale: jnp.sum(scale * onehot * model(TOKENS))))(1.0)
    assert_close(slope, jnp.sum(onehot * expected), 100)


def test_nnx_transformations_take_the_model_as_an_argument(model):
    value, gradient = nnx.jit(nnx.value_and_grad(lambda model: model(TOKENS).var()))(model)
    assert_close(value, logits_of(model, TOKENS).var(), 100)
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


class DroppingMLP(nnx.Module):
    def __init__(self, mlp: nnx.Module, dropout: nnx.Dropout) -> None:
        self.mlp, self.dropout = mlp, dropout

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.mlp(x))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_dropout_put_into_the_blocks_draws_anew_at_every_call(model, scan_layers):
    rngs = nnx.Rngs(dropout=0)
    if scan_layers:
        model = nnx.clone(model)
        make = nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
        model.blocks.mlp = DroppingMLP(model.blocks.mlp, nnx.split_rngs(splits=3)(make)(rngs))
    else:
        model = unrolled_from(model)
        for block in model.blocks:
            block.mlp = DroppingMLP(block.mlp, nnx.Dropout(0.5, rngs=rngs))
    call = nnx.jit(lambda model: model(TOKENS))
    assert jnp.abs(call(model) - call(model)).max() > 0.1


def test_tokens_of_a_wrong_kind_are_refused(model):
    with pytest.raises(ValueError, match=r"integers of shape \[batch, length\], got float32"):
        model(jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"got int32 of shape \(3,\)"):
        model(jnp.zeros(3, jnp.int32))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lowrank_optax.models import Decoder, decoder_config
config = decoder_config(
    "llama-tiny", vocab_size=61, num_hidden_layers=2, hidden_size=32, intermediate_size=56
)
tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 61)
graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))

@jax.jit
def step(state, tokens):
    def loss(state):
        logits = nnx.merge(graphdef, state)(tokens)
        return jnp.square(logits).mean(), logits
    return jax.grad(loss, has_aux=True)(state)

one = step(state, tokens)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
many = step(put(state, P()), put(tokens, P("data")))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, many)
logits = many[1]
print(jax.device_count(), logits.sharding.shard_shape(logits.shape))
"""


@pytest.mark.slow
def test_a_batch_sharded_over_devices_gives_the_same_step():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "4 (2, 6, 61)"
