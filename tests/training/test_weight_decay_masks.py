"""What parameters are, by the names that Flax gives them."""

import dataclasses
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices.paths import path_string
from lowrank_optax.training import decay_mask, parameter_kinds
from lowrank_optax.training.decay_masks import DECAYED

flax = pytest.importorskip("flax")
from flax import linen as nn  # noqa: E402
from flax import nnx  # noqa: E402

from lowrank_optax.models import Decoder, DecoderConfig  # noqa: E402

CONFIG = DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    attention_bias=True,
)


def by_path(tree: Any) -> dict[str, Any]:
    return {path_string(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def decoder(scan_layers: bool) -> nnx.State:
    make = lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=scan_layers)
    return nnx.state(nnx.eval_shape(make), nnx.Param)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_kinds_in_the_decoder_stacked_or_not(scan_layers: bool) -> None:
    kinds = by_path(parameter_kinds(decoder(scan_layers)))
    assert kinds.pop("embed/embedding") == "embeddings"
    assert kinds.pop("lm_head/kernel") == "head"
    assert kinds.pop("norm/scale") == "norms"
    for name, kind in kinds.items():
        end = name.rpartition("/")[2]
        assert kind == {"kernel": "matrices", "scale": "norms", "bias": "biases"}[end], name
    assert set(kinds.values()) == {"matrices", "norms", "biases"}


def test_a_tied_embedding_is_one_parameter_that_decays() -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    kinds = by_path(parameter_kinds(nnx.state(model, nnx.Param)))
    assert [name for name, kind in kinds.items() if kind in ("embeddings", "head")] == [
        "embed/embedding"
    ]


class Net(nnx.Module):
    """Layers of most types, under names of all sorts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.token_embed = nnx.Embed(9, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.lora = nnx.LoRA(8, 2, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)


def test_kinds_of_nnx_layers() -> None:
    kinds = by_path(parameter_kinds(nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)))
    for name, kind in kinds.items():
        if name.endswith("bias"):
            assert kind == "biases", name
    assert kinds["token_embed/embedding"] == "embeddings"
    assert kinds["conv/kernel"] == kinds["out/kernel"] == "matrices"
    assert kinds["bn/scale"] == "norms"
    for layer in ("query", "key", "value", "out"):
        assert kinds[f"attention/{layer}/kernel"] == "matrices"


def test_factors_of_an_adapter_are_adapters() -> None:
    params = {"up": {"kernel": leaf(4, 4), "lora_a": leaf(4, 2), "lora_b": leaf(2, 4)}}
    assert parameter_kinds(params)["up"] == {
        "kernel": "matrices",
        "lora_a": "adapters",
        "lora_b": "adapters",
    }


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(4)(nn.Dense(6)(x)), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(9, 4)(tokens)
        stack = nn.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(9, name="lm_head")(nn.RMSNorm()(x))


@pytest.mark.parametrize("collection", [False, True])
def test_kinds_of_linen_layers_stacked_by_a_scan(collection: bool) -> None:
    shapes = jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.zeros((1, 5), int))
    kinds = by_path(parameter_kinds(shapes if collection else shapes["params"]))
    kinds = {name.removeprefix("params/"): kind for name, kind in kinds.items()}
    assert kinds["Embed_0/embedding"] == "embeddings"
    assert kinds["lm_head/kernel"] == "head"
    assert kinds["RMSNorm_0/scale"] == kinds["blocks/LayerNorm_0/scale"] == "norms"
    for name, kind in kinds.items():
        if name.endswith("bias"):
            assert kind == "biases", name
        if name.startswith("blocks") and name.endswith("kernel"):
            assert kind == "matrices", name
    assert "others" not in kinds.values()


@pytest.mark.parametrize(
    ("path", "shape", "kind"),
    [
        ("wte", (9, 4), "embeddings"),
        ("wpe/embedding", (9, 4), "embeddings"),
        ("ln_f/weight", (4,), "norms"),
        ("rms_norm", (4,), "norms"),
        ("embed/norm/scale", (4,), "norms"),
        ("norm_projection/kernel", (4, 4), "matrices"),
        ("mlp/w", (4, 4), "matrices"),
        ("experts/up", (6, 4, 8), "matrices"),
        ("linear/b", (4,), "biases"),
        ("linear/B", (4, 4), "matrices"),
        ("up/adapters/default/arrays/B", (2, 4), "adapters"),
        ("adapter_groups/default/0/A", (4, 2), "adapters"),
        ("classifier/kernel", (4, 3), "head"),
        ("multi_head/kernel", (4, 3), "matrices"),
        ("attention/output/kernel", (4, 4), "matrices"),
        ("output/kernel", (4, 4), "head"),
        ("temperature", (), "others"),
        ("class_token", (4,), "others"),
    ],
)
def test_kinds_of_single_names(path: str, shape: tuple[int, ...], kind: str) -> None:
    tree: Any = leaf(*shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert by_path(parameter_kinds(tree)) == {path: kind}


def test_the_default_mask_decays_matrices_embeddings_and_the_head() -> None:
    params = decoder(True)
    kinds, mask = by_path(parameter_kinds(params)), by_path(decay_mask()(params))
    assert mask == {name: kind in DECAYED for name, kind in kinds.items()}
    assert {kinds[name] for name, decays in mask.items() if decays} == set(DECAYED)


def test_patterns_include_and_exclude() -> None:
    params = {"up": {"kernel": leaf(4, 4), "bias": leaf(4)}, "down": {"kernel": leaf(4, 4)}}
    mask = decay_mask(("biases",), include="kernel", exclude="^down")
    assert mask(params) == {"up": {"kernel": True, "bias": True}, "down": {"kernel": False}}
    with pytest.raises(ValueError, match="exclude='dwon' matches no parameter; near it are: down"):
        decay_mask(exclude="dwon")(params)
    part = params | {"down": optax.MaskedNode()}
    assert mask(part)["up"] == {"kernel": True, "bias": True}


def test_the_mask_says_the_same_of_parameters_updates_and_holes() -> None:
    params = {"up": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    holed = {"up": {"kernel": params["up"]["kernel"], "bias": optax.MaskedNode()}}
    assert decay_mask()(holed) == {"up": {"kernel": True, "bias": optax.MaskedNode()}}


@pytest.mark.parametrize("name", ["optax", "galore", "partition"])
def test_only_what_the_mask_says_decays(name: str) -> None:
    ones = lambda x: np.ones(x.shape, x.dtype)
    params = jax.tree.map(ones, nnx.to_pure_dict(decoder(True)))
    mask = decay_mask()
    tx = {
        "optax": optax.adamw(0.5, weight_decay=0.5, mask=mask),
        "galore": lro.galore(0.5, rank=2, weight_decay=0.5, weight_decay_mask=mask),
        "partition": optax.partition(
            {True: optax.adamw(0.5, weight_decay=0.5, mask=mask), False: optax.sgd(0.5)}, mask
        ),
    }[name]
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda params: tx.update(zero, tx.init(params), params))(params)
    mask, params = by_path(mask(params)), by_path(params)
    for path, update in by_path(updates).items():
        expected = -0.25 * np.asarray(params[path]) if mask[path] else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-7, err_msg=path)


def test_the_mask_works_in_an_nnx_optimizer() -> None:
    model = nnx.Linear(3, 2, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    tx = optax.adamw(0.5, weight_decay=0.5, mask=decay_mask())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
    for _ in range(2):
        update(optimizer, model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    assert_close(model.kernel[...], 0.75**2 * before)
    np.testing.assert_array_equal(model.bias[...], 1.0)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kinds='matrices'"):
        decay_mask("matrices")
    with pytest.raises(ValueError, match=r"kinds=.*kernels"):
        decay_mask(("kernels",))
    with pytest.raises(ValueError, match=r"include='\('"):
        decay_mask(include="(")
