"""The decoder's own properties."""

import dataclasses

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, DecoderConfig, decoder_config
from tests.models.decoders import CONFIG, TOKENS, like, logits_of, random_decoder


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
    return random_decoder()


def test_logits_equal_a_numpy_reference(model):
    parameters = jax.tree.map(
        lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    expected = reference_logits(parameters, np.asarray(TOKENS), CONFIG)
    logits = logits_of(model, TOKENS)
    assert logits.dtype == jnp.float32
    assert_close(logits, expected, 100)
    assert np.abs(expected).max() > 0.5


def test_scanned_and_unrolled_layers_give_the_same_numbers(model):
    unrolled = like(model, scan_layers=False)
    assert isinstance(unrolled.blocks, nnx.List)
    assert unrolled.blocks[0].mlp.gate.kernel.shape == (32, 56)
    assert model.blocks.mlp.gate.kernel.shape == (2, 32, 56)
    assert_close(logits_of(unrolled, TOKENS), logits_of(model, TOKENS), 100)


@pytest.mark.slow
def test_stacked_layers_start_from_different_weights_of_the_right_spread():
    model = Decoder(decoder_config("llama-tiny", vocab_size=257), rngs=nnx.Rngs(0))
    kernels = np.asarray(model.blocks.mlp.gate.kernel[...])
    np.testing.assert_allclose(kernels.std(axis=(1, 2)), 0.02, rtol=0.02)
    assert not np.allclose(kernels[0], kernels[1])
    np.testing.assert_array_equal(model.blocks.mlp_norm.scale[...], 1)


def test_a_later_token_changes_no_earlier_logit(model):
    changed = TOKENS.copy()
    changed[:, 8] = (changed[:, 8] + 1) % CONFIG.vocab_size
    before, after = (np.asarray(logits_of(model, tokens)) for tokens in (TOKENS, changed))
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
    model = random_decoder(config)
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % CONFIG.vocab_size
    before, after = (np.asarray(logits_of(model, tokens)) for tokens in (TOKENS, changed))
    same = (before == after).all(axis=(0, 2))
    assert same.tolist() == [True, True] + [False] * 4 + [True] * 6  # itself and three after it


def gradients(model: Decoder) -> tuple[nnx.State, int]:
    """The gradients, and how many rematerialised calls there are in the program."""
    graphdef, state = nnx.split(model)

    def loss(state: nnx.State) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graphdef, state)(TOKENS)))

    traced = jax.jit(jax.grad(loss)).trace(state)
    return traced.lower().compile()(state), str(traced.jaxpr).count("remat")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(True, "full"), (False, jax.checkpoint_policies.nothing_saveable)],
)
def test_rematerialisation_changes_no_gradient(model, scan_layers, remat):
    plain, other = like(model, scan_layers), like(model, scan_layers, remat=remat)
    (expected, without), (actual, with_remat) = gradients(plain), gradients(other)
    assert without == 0
    assert with_remat > 0
    assert_close(nnx.to_pure_dict(actual), nnx.to_pure_dict(expected), 200)


def test_a_remat_policy_decides_what_is_kept_for_the_backward_pass(model):
    def kept(remat: str | None) -> int:
        graphdef, state = nnx.split(like(model, remat=remat))
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
    model = random_decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    wide = random_decoder(config)
    to_float32 = lambda x: jnp.asarray(np.asarray(x, np.float32))
    nnx.update(wide, jax.tree.map(to_float32, nnx.to_pure_dict(nnx.state(model))))
    logits, expected = (np.asarray(logits_of(m, TOKENS)) for m in (model, wide))
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).mean() < 0.03 * np.abs(expected).mean()


@pytest.mark.slow
def test_bfloat16_weights_have_finite_bfloat16_gradients():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=True)
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    found, _ = gradients(random_decoder(config, scan_layers=False, **types))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found))
    assert all(np.any(x) for x in jax.tree.leaves(found))


def test_the_model_may_be_a_constant_of_jit_and_grad(model):
    expected = np.asarray(logits_of(model, TOKENS))
    assert_close(jax.jit(lambda t: model(t))(TOKENS), expected, 100)
    onehot = np.eye(CONFIG.vocab_size, dtype=np.float32)[TOKENS]
    slope = jax.jit(jax.grad(lambda scale: jnp.sum(scale * onehot * model(TOKENS))))(1.0)
    summed = onehot * expected
    assert_close(slope, summed.sum(), 100, size=np.abs(summed).sum())


@pytest.mark.slow
def test_nnx_transformations_take_the_model_as_an_argument(model):
    value, gradient = nnx.jit(nnx.value_and_grad(lambda model: model(TOKENS).var()))(model)
    assert_close(value, np.asarray(logits_of(model, TOKENS)).var(), 100)
    assert all(np.any(x) for x in jax.tree.leaves(gradient))


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
        model.blocks.mlp = DroppingMLP(
            model.blocks.mlp, nnx.split_rngs(splits=CONFIG.num_hidden_layers)(make)(rngs)
        )
    else:
        model = like(model, scan_layers=False)
        for block in model.blocks:
            block.mlp = DroppingMLP(block.mlp, nnx.Dropout(0.5, rngs=rngs))
    call = nnx.jit(lambda model: model(TOKENS))
    assert np.abs(np.asarray(call(model)) - np.asarray(call(model))).max() > 0.1


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_hidden_states_times_the_head_are_the_logits(tie_word_embeddings):
    config = dataclasses.replace(
        CONFIG, num_hidden_layers=1, tie_word_embeddings=tie_word_embeddings
    )
    model = random_decoder(config, scan_layers=False)
    hidden, (head, axis) = jax.jit(lambda m: m.hidden(TOKENS))(model), model.head()
    assert (axis, head.shape[axis]) == (int(tie_word_embeddings), CONFIG.hidden_size)
    logits = np.tensordot(np.asarray(hidden, np.float64), np.asarray(head, np.float64), (2, axis))
    assert_close(logits_of(model, TOKENS), logits, 100)


def test_the_weight_of_an_adapted_head_is_refused():
    model = random_decoder()
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2), "lm_head", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'lm_head' computes more than a product"):
        model.head()
    lro.adapters.detach(model)
    assert model.head()[1] == 0


def test_the_weight_of_a_head_with_a_bias_is_refused():
    model = random_decoder()
    model.lm_head = nnx.Linear(CONFIG.hidden_size, CONFIG.vocab_size, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'lm_head' computes more than a product"):
        model.head()


def test_hidden_states_of_any_rank_have_logits(model):
    states = np.ones((3, CONFIG.hidden_size), np.float32)
    assert model.logits(states[0]).shape == (CONFIG.vocab_size,)
    assert model.logits(states).shape == (3, CONFIG.vocab_size)


def test_tokens_of_a_wrong_kind_are_refused(model):
    with pytest.raises(ValueError, match=r"integers of shape \[batch, length\], got float32"):
        model(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match=r"got int32 of shape \(3,\)"):
        model(np.zeros(3, np.int32))


@pytest.mark.slow
def test_a_batch_sharded_over_devices_gives_the_same_step(model):
    graphdef, state = nnx.split(model)
    tokens = np.resize(TOKENS, (8, 6))

    @jax.jit
    def step(state, tokens):
        def loss(state):
            logits = nnx.merge(graphdef, state)(tokens)
            return jnp.square(logits).mean(), logits

        return jax.grad(loss, has_aux=True)(state)

    one = step(state, tokens)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    many = step(put(state), put(tokens, "data"))
    assert_close(nnx.to_pure_dict(many[0]), nnx.to_pure_dict(one[0]), 200)
    assert_close(many[1], one[1], 100)
    assert many[1].sharding.shard_shape(many[1].shape) == (2, 6, CONFIG.vocab_size)


@pytest.mark.parametrize("window", [None, 5])
def test_every_implementation_of_attention_gives_the_same_logits(window):
    config = dataclasses.replace(CONFIG, model_type="mistral", sliding_window=window)
    plain, chunked = (
        logits_of(random_decoder(config, attention_implementation=name), TOKENS)
        for name in ("xla", "chunked")
    )
    assert_close(chunked, plain)


def test_a_wrong_implementation_of_attention_is_refused_with_the_names():
    with pytest.raises(ValueError, match="attention_implementation='flash' must be None or one of"):
        Decoder(CONFIG, rngs=nnx.Rngs(0), attention_implementation="flash")
