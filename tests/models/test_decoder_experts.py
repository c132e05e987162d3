"""The decoder with one block for all layers, and with experts in place of its MLPs."""

import dataclasses
from pathlib import Path
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import (
    Decoder,
    generate,
    load_huggingface,
    save_huggingface,
    share_blocks,
    unshare_blocks,
)
from tests.models.decoders import CONFIG, TOKENS, logits_of, random_decoder

LAYERS = 3
DEEP = dataclasses.replace(CONFIG, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def wide() -> Decoder:
    return random_decoder(DEEP, share_blocks=True, experts=4)


def test_only_norms_are_stacked(wide: Decoder) -> None:
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(wide.blocks, nnx.Param)))
    assert shapes["attention_norm"]["scale"] == shapes["mlp_norm"]["scale"] == (LAYERS, 32)
    assert shapes["mlp"]["experts"]["up"]["kernel"] == (4, 32, 56)
    assert shapes["mlp"]["router"] == (32, 4)
    assert shapes["attention"]["query"]["kernel"] == (32, 32)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_blocks_of_their_own_with_the_same_weights_compute_the_same(scan_layers: bool) -> None:
    model = random_decoder(DEEP, share_blocks=True, scan_layers=scan_layers)
    apart = unshare_blocks(model)
    assert not apart.share_blocks
    assert_close(logits_of(apart, TOKENS), np.asarray(logits_of(model, TOKENS), np.float64))
    again = share_blocks(apart)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    with pytest.raises(ValueError, match="have weights of their own already"):
        unshare_blocks(apart)
    with pytest.raises(ValueError, match="shared already"):
        share_blocks(model)
    layer = apart.blocks.mlp.up if scan_layers else apart.blocks[2].mlp.up
    value = layer.kernel[...]
    layer.kernel.set_value(value.at[-1].add(1.0) if scan_layers else value + 1)
    with pytest.raises(ValueError, match=r"mlp/up/kernel of block 2 is not that of block 0"):
        share_blocks(apart)


def test_scanned_unrolled_and_rematerialised_blocks_have_one_gradient(wide: Decoder) -> None:
    """Also of noise and capacity: the keys of the layers are the same."""

    def step(model: Decoder) -> Any:
        def loss(params: Any) -> Any:
            hidden, routing = nnx.merge(graphdef, params).hidden_and_routing(TOKENS, key)
            return jnp.mean(jnp.square(hidden)) + routing.balance_loss.sum(), routing

        graphdef, params = nnx.split(model)
        key = jax.random.key(3)
        (_, routing), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return routing, gradient

    routing, gradient = step(wide)
    assert routing.load.shape == (LAYERS, 4)
    np.testing.assert_allclose(routing.load.sum(axis=1), 1, rtol=1e-6)
    apart = unshare_blocks(wide)
    same, of_layers = step(apart)
    assert_close(same, routing)
    found = lambda state: state["blocks"]["mlp"]["experts"]["down"]["kernel"][...]
    kernel = lambda state: np.asarray(found(state), np.float64)
    summed = kernel(of_layers).sum(axis=0)
    assert_close(found(gradient), summed, units=64)
    again = random_decoder(DEEP, share_blocks=True, experts=4, remat="full", remat_every=LAYERS)
    same, other = step(again)
    assert_close(same, routing)
    assert_close(found(other), kernel(gradient), units=64)


def test_generated_text_does_not_depend_on_the_batch(wide: Decoder) -> None:
    """No token is dropped: each text is what it is alone, and what all of its logits say."""
    prompt = jnp.asarray(TOKENS[:, :4])
    both = generate(wide, prompt, 3, temperature=0)
    assert (generate(wide, prompt[:1], 3, temperature=0)[0] == both[0]).all()
    logits = logits_of(wide, both[:, :-1])
    assert (logits[:, 3:].argmax(-1) == both[:, 4:]).all()


def test_optimizer_state_exists_once_and_training_goes_on(wide: Decoder) -> None:
    model = nnx.clone(wide)
    numbers = lro.weight_dimension_numbers(model)
    tx = lro.galore(3e-3, rank=8, weight_dimension_numbers=numbers)
    graphdef, params = nnx.split(model)
    state = tx.init(params)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(state) < size(tx.init(nnx.state(unshare_blocks(model)))) / 2

    def step(carry: Any, key: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden, routing = model.hidden_and_routing(TOKENS[:, :-1], key)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                model.logits(hidden), TOKENS[:, 1:]
            )
            return losses.mean() + 0.01 * routing.balance_loss.sum()

        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), 20)
    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, state))
    assert losses[-1] < losses[0] - 0.5


def test_what_cannot_be_is_refused(tmp_path: Path, wide: Decoder) -> None:
    make = lambda **options: Decoder(DEEP, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="feed_forward has a first block"):
        make(share_blocks=True, feed_forward="lowrank")
    with pytest.raises(ValueError, match="does not convert experts"):
        make(experts=4, linear="maestro")
    with pytest.raises(ValueError, match="num_experts must be a positive integer"):
        make(experts=0)
    with pytest.raises(ValueError, match="the model has no experts"):
        make(share_blocks=True).hidden_and_routing(TOKENS)
    with pytest.raises(ValueError, match="not trained block by block"):
        wide.before_blocks(TOKENS)
    with pytest.raises(ValueError, match="cannot hold experts"):
        save_huggingface(wide, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_unshared_blocks_are_saved_for_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = random_decoder(DEEP, share_blocks=True)
    with pytest.raises(ValueError, match="only after unshare_blocks"):
        save_huggingface(model, tmp_path)
    save_huggingface(unshare_blocks(model), tmp_path)
    loaded = load_huggingface(tmp_path)
    assert_close(logits_of(loaded, TOKENS), np.asarray(logits_of(model, TOKENS), np.float64))
