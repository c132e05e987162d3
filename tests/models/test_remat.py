"""A decoder that saves the input of every few blocks: the same numbers, fewer saved arrays."""

import dataclasses
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder
from lowrank_optax.planning import saved_residuals
from tests.models.decoders import CONFIG, TOKENS, like, random_decoder

LAYERS = 4
EVERY_SECOND: dict[str, Any] = {"remat": "full", "remat_every": 2}
DEEP = dataclasses.replace(CONFIG, num_hidden_layers=LAYERS)


def adapted(model: Decoder) -> Decoder:
    """The model with adapters on its queries, which have dropout."""
    lora = lro.adapters.LoRA(rank=2, dropout=0.5)
    lro.adapters.attach(model, lora, "query", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    nnx.update(model, jax.tree.map(draw, nnx.state(model, lro.adapters.trainable)))
    return model


def trained(model: Decoder, wrt: Any) -> Any:
    """Loss, gradients by what `wrt` selects, and the counts of random streams after a call."""
    graphdef, *parts = nnx.split(model, wrt, ...)
    params, rest = map(nnx.as_pure, parts)

    def loss(params: Any, rest: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        value = jnp.mean(jnp.square(model.hidden(TOKENS)))
        return value, nnx.as_pure(nnx.state(model, nnx.RngCount))

    (value, counts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rest)
    return value, gradients, jax.tree.leaves(counts)


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.full)])
def test_loss_gradients_and_random_streams_are_the_same(scan_layers: bool) -> None:
    model = random_decoder(DEEP if scan_layers else CONFIG)
    found = [
        trained(adapted(like(model, scan_layers, **options)), lro.adapters.trainable)
        for options in ({}, EVERY_SECOND)
    ]
    assert_close(found[1], found[0], 200)
    assert all(np.any(x) for x in jax.tree.leaves(found[1][1]))
    counts = found[1][2]
    assert counts
    assert all(np.all(np.asarray(x) == 1) for x in counts)


def test_gradients_by_all_weights_and_their_derivatives_are_the_same() -> None:
    model, found = random_decoder(DEEP), []
    for options in ({}, EVERY_SECOND):
        graphdef, params = nnx.split(like(model, **options))
        params = nnx.as_pure(params)

        @jax.jit
        def both(params: Any, graphdef: Any = graphdef) -> Any:
            loss = lambda p: jnp.mean(jnp.square(nnx.merge(graphdef, p).hidden(TOKENS)))
            return jax.jvp(jax.grad(loss), (params,), (jax.tree.map(jnp.sin, params),))

        found.append(both(params))
    assert_close(found[1], found[0], 400)


@pytest.mark.parametrize(("scan_layers", "every"), [(True, 4), (False, 2)])
def test_fewer_inputs_are_saved(scan_layers: bool, every: int) -> None:
    model, saved = random_decoder(DEEP), {}
    for n in (1, every):
        other = like(model, scan_layers, remat="full", remat_every=n)
        loss = lambda model: jnp.mean(jnp.square(model.hidden(TOKENS)))
        saved[n] = saved_residuals(loss, other, compiled=False).total_bytes
    of_input = 4 * TOKENS.size * CONFIG.hidden_size
    numbers = 4 * LAYERS * scan_layers  # of the blocks
    assert saved[1] - saved[every] == (LAYERS - LAYERS // every) * of_input - numbers


def test_a_cache_and_a_first_block_are_as_without() -> None:
    config = dataclasses.replace(DEEP, num_hidden_layers=LAYERS + 1)
    model = random_decoder(config, feed_forward="lowrank", **EVERY_SECOND)
    cache = model.init_cache(2, TOKENS.shape[1])

    @jax.jit
    def in_parts(model: Decoder) -> jax.Array:
        first, filled = model.decode(TOKENS[:, :5], cache, 0)
        return jnp.concatenate([first, model.decode(TOKENS[:, 5:], filled, 5)[0]], axis=1)

    plain = random_decoder(config, feed_forward="lowrank")
    assert_close(in_parts(model), jax.jit(lambda m: m(TOKENS))(plain), 100)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"remat_every": 0}, "remat_every must be an int of at least 1, got 0"),
        ({"remat_every": 2.0}, "an int of at least 1"),
        ({"remat_every": True}, "an int of at least 1, got True"),
        ({"remat_every": 2, "remat": None}, "set remat='full', not None"),
        ({"remat_every": 2, "remat": {"mlp_up": "save"}}, "set remat='full', not {'mlp_up'"),
        ({"remat_every": 3}, "must divide the number of blocks, which is 4"),
        ({"remat_every": 2, "feed_forward": "lowrank"}, "blocks, which is 3 .without first_block"),
    ],
)
def test_what_cannot_be_saved_so_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Decoder(DEEP, rngs=nnx.Rngs(0), **{"remat": "full", **options})
