"""Layers of stacks as leaves of their own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.slices.call import Whole
from lowrank_optax.slices.each_layer import each_layer

LAYERS = 4
PARAMS = {"stack": jnp.ones((LAYERS, 8, 32), jnp.bfloat16), "single": jnp.ones(64, jnp.bfloat16)}
GRADIENTS = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-9, x.dtype), PARAMS)
ROUNDED = optax.chain(lro.in_float32(optax.sgd(1.0)), lro.round_updates())


def is_stack(path: Any) -> bool:
    return "stack" in str(path)


def test_layers_draw_numbers_of_their_own_together_or_alone() -> None:
    tx = each_layer(ROUNDED, is_stack)
    state = tx.init(PARAMS)
    updates, _ = tx.update(GRADIENTS, state, PARAMS)
    layers = [np.asarray(layer, np.float32) for layer in updates["stack"]]
    assert len({(layer != 0).tobytes() for layer in layers}) == LAYERS
    for i, layer in enumerate(layers):
        one = lambda tree, i=i: {"stack": tree["stack"][i : i + 1], "single": optax.MaskedNode()}
        whole = Whole(PARAMS, rows=jnp.array([i]), run=1, settled=True)
        alone, _ = tx.update(one(GRADIENTS), state, one(PARAMS), whole=whole)
        np.testing.assert_array_equal(np.asarray(alone["stack"][0], np.float32), layer)


def test_the_state_is_that_of_a_layer_stacked_with_counts_once() -> None:
    tx = optax.chain(optax.adam(0.1), optax.novograd(0.1))
    state = each_layer(tx, is_stack).init(PARAMS)
    adam, novograd = state[0][0], state[1][0]
    assert adam.mu["stack"].shape == PARAMS["stack"].shape
    assert adam.count.shape == novograd.count.shape == ()
    assert (novograd.nu["stack"].shape, novograd.nu["single"].shape) == ((LAYERS,), ())
