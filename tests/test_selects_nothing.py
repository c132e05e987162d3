"""What selects parameters refuses to select none of a whole tree, and lets a part of one be."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

PARAMS = {"bias": jnp.ones(3), "norm": {"scale": jnp.ones(3)}}
PART = {"bias": jnp.ones(3), "norm": {"scale": optax.MaskedNode()}}
SELECTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "to_int8_weights": (lro.to_int8_weights, "no parameter is chosen: the largest, 'norm/scale'"),
    "update_int8_weights": (
        lambda params: lro.update_int8_weights(optax.sgd(1.0)).init(params),
        r"no Int8Weight: pass lro\.to_int8_weights",
    ),
    "powerprop": (
        lambda params: lro.layers.powerprop(params, 2.0, where=lambda path, shape: False),
        "selects none of the 2 leaves",
    ),
    "powerprop_updates": (
        lambda params: lro.layers.powerprop_updates(optax.sgd(1.0), 2.0).init(params),
        "where=None selects none of the 2 leaves",
    ),
    "maestro.prox": (
        lambda params: lro.layers.maestro.prox(0.1, 1.0).init(params),
        "prox finds no factor of a Maestro layer",
    ),
    "magnitude_masks": (
        lambda params: lro.layers.magnitude_masks(params, 0.5),
        "where=None selects none of the 2 leaves",
    ),
    "decay_mask": (
        lro.training.decay_mask(),
        r"decay_mask selects no parameter: kinds=.*, and these are biases, norms\.",
    ),
    "low_bit": (
        lambda params: lro.low_bit(optax.adam(1.0)).init(params),
        "has 3 elements, fewer than min_size=4096",
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_nothing_selected_is_an_error_but_not_in_a_part_of_a_tree(name: str) -> None:
    select, message = SELECTIONS[name]
    with pytest.raises(ValueError, match=message):
        select(PARAMS)
    select(PART)
    select({})
