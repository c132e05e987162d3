"""The decoder with structured feed-forwards: a dense first block, and the others as one stack."""

import dataclasses
from pathlib import Path
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import BlockShuffle, LowRank
from lowrank_optax.models import Decoder, generate, save_huggingface
from tests.models.decoders import CONFIG, TOKENS, logits_of, random_decoder

DEEP = dataclasses.replace(CONFIG, num_hidden_layers=3)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_decoder(DEEP, feed_forward="blockshuffle")


def unrolled(model: Decoder, **options: Any) -> Decoder:
    """The same weights in a list of blocks."""
    make = lambda: Decoder(
        DEEP, rngs=nnx.Rngs(0), feed_forward="blockshuffle", scan_layers=False, **options
    )
    other, state = nnx.eval_shape(make), nnx.to_pure_dict(nnx.state(model))
    rest = [jax.tree.map(lambda x, i=i: x[i], state["blocks"]) for i in range(2)]
    blocks = dict(enumerate([state.pop("first_block"), *rest]))
    nnx.update(other, state | {"blocks": blocks})
    return other


def test_first_block_is_dense_and_the_others_are_structured(model: Decoder) -> None:
    assert model.first_block.mlp.gate.kernel.shape == (32, 56)
    assert model.blocks.mlp.gate_up.first.kernel.shape == (2, 4, 8, 8)
    assert model.blocks.mlp.gate_up.second.kernel.shape == (2, 4, 8, 28)
    assert model.blocks.mlp.down.first.kernel.shape == (2, 4, 14, 8)
    report = lro.layers.structured_layers(model)
    assert [row.path for row in report.rows] == ["blocks/mlp/down", "blocks/mlp/gate_up"]


@pytest.mark.slow
def test_scanned_unrolled_dense_and_cached_blocks_compute_the_same(model: Decoder) -> None:
    expected = logits_of(model, TOKENS)
    assert_close(logits_of(unrolled(model), TOKENS), expected, 200)
    dense = lro.layers.merge_structured(nnx.clone(model))
    assert_close(logits_of(dense, TOKENS), expected, 200)
    kept = lro.layers.keep_merged(nnx.clone(model), rows=2)
    prompt = TOKENS[:, :4]
    texts = [generate(m, prompt, 3, temperature=0) for m in (model, kept)]
    assert (texts[0] == texts[1]).all()  # by the factors, and token by token by the merged weight
    last = jnp.argmax(logits_of(model, texts[0])[:, 3:-1], axis=-1)
    assert (last == texts[0][:, 4:]).all()


@pytest.mark.slow
def test_few_bits_and_rematerialisation_leave_the_output_as_it_is(model: Decoder) -> None:
    options = {"feed_forward": "blockshuffle", "activation_bits": 3, "remat": "full"}
    assert_close(logits_of(random_decoder(DEEP, **options), TOKENS), logits_of(model, TOKENS), 200)


@pytest.mark.slow
def test_update_in_backward_passes_through_the_dense_block(model: Decoder) -> None:
    loss = lambda model, hidden, labels: optax.losses.softmax_cross_entropy_with_integer_labels(
        model.logits(hidden), labels
    ).mean()
    tx, batch = optax.sgd(1.0), (TOKENS[:, :-1], TOKENS[:, 1:])
    graph, params = nnx.split(nnx.clone(model))

    @jax.jit
    def both(params: Any) -> Any:
        whole = lambda p: loss(*(m := nnx.merge(graph, p), m.hidden(batch[0])), batch[1])
        gradient = jax.grad(whole)(params)
        plain = jax.tree.map(lambda p, g: p - g, params, gradient)
        update = lro.update_in_backward(nnx.merge(graph, params), tx, loss=loss)
        return plain, update.step(params, tx.init(params), batch, None)[0]

    plain, found = both(params)
    assert_close(nnx.to_pure_dict(found), nnx.to_pure_dict(plain), 400)


REFUSED = [
    ({"feed_forward": "monarch"}, "feed_forward must be a structure or one of 'lowrank'"),
    ({"guide": True}, "guide=True is for structured matrices"),
    ({"feed_forward": BlockShuffle(3)}, "does not fit hidden_size 32 and intermediate_size 56"),
    ({"feed_forward": LowRank(24)}, "rank=24 saves no parameter of a weight 56 × 32"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(CONFIG, rngs=nnx.Rngs(0), **options)


def test_one_block_and_other_files_are_refused(model: Decoder, tmp_path: Path) -> None:
    one = dataclasses.replace(CONFIG, num_hidden_layers=1)
    with pytest.raises(ValueError, match="feed_forward leaves the first block dense"):
        Decoder(one, rngs=nnx.Rngs(0), feed_forward="lowrank")
    with pytest.raises(ValueError, match="the model's parameters are not those"):
        save_huggingface(model, tmp_path / "model")
