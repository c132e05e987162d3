"""What holds of every recipe: bytes of state, arguments, decay. Each has a file in `recipes/`."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import state_bytes

PARAMS = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
RECIPES: dict[str, Callable[..., Any]] = {
    "galore": lro.galore,
    "fira": lro.fira,
    "adarankgrad": lro.adarankgrad,
    "online_subspace_descent": lro.online_subspace_descent,
    "dct_adamw": lro.dct_adamw,
    "apollo": lro.apollo,
    "apollo_mini": lro.apollo_mini,
    "ldadam": lro.ldadam,
}
EVERY_RECIPE = pytest.mark.parametrize("name", RECIPES)

M, N, R = 512, 1376, 128  # of a weight [m, n], m <= n
MOMENTS, BASIS = 2 * R * N, R * M
# Words of 4 bytes that scale with the matrix; then counters and floats for each matrix: the count,
# Adam's count, and when the basis is next due are three.
WORDS: dict[str, tuple[Any, int, int]] = {
    "galore": (lro.galore(0.1, R), BASIS + MOMENTS, 3),
    "fira": (lro.fira(0.1, R), BASIS + MOMENTS, 3 + 1),
    "adarankgrad": (lro.adarankgrad(0.1, R), BASIS + MOMENTS, 3 + 1 + 4),
    "online_subspace_descent": (lro.online_subspace_descent(0.1, R), 3 * BASIS + MOMENTS, 3 + 1),
    "online_subspace_descent_sgd": (
        lro.online_subspace_descent(0.1, R, subspace_optimizer=optax.sgd(0.1)),
        BASIS + MOMENTS,
        3,
    ),
    "dct_adamw": (lro.dct_adamw(0.1, R), R + MOMENTS, 3),
    "dct_adamw_32": (lro.dct_adamw(0.1, R, error_feedback=32), R + MOMENTS + M * N, 3),
    "dct_adamw_8": (
        lro.dct_adamw(0.1, R, error_feedback=8),
        R + MOMENTS + M * N // 4,
        3 + 2 * M,  # the least entry and the step of each row
    ),
    "apollo": (lro.apollo(0.1, R), MOMENTS, 3 + 1 + 1),
    "apollo_mini": (lro.apollo_mini(0.1), 2 * N, 3 + 1 + 1),
    "ldadam": (lro.ldadam(0.1, R), BASIS + MOMENTS + M * N, 3),
    "ldadam_without_feedback": (lro.ldadam(0.1, R, error_feedback=None), BASIS + MOMENTS, 3),
}


@pytest.mark.parametrize("case", WORDS)
def test_the_state_has_the_bytes_of_the_formula(case: str) -> None:
    tx, words, scalars = WORDS[case]
    state = jax.eval_shape(tx.init, {"kernel": jnp.zeros((M, N))})
    assert state_bytes(state) == 4 * (words + scalars)


@EVERY_RECIPE
def test_a_decay_is_of_the_full_weights(name: str) -> None:
    make = RECIPES[name]
    updates = [
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]
        for tx in (make(0.1, 2), make(0.1, 2, weight_decay=0.5))
    ]
    expected = jax.tree.map(lambda u, p: u - 0.1 * 0.5 * p, updates[0], PARAMS)
    chex.assert_trees_all_close(updates[1], expected, rtol=1e-5)


@EVERY_RECIPE
def test_a_decay_goes_by_its_mask(name: str) -> None:
    mask = {"kernel": False, "bias": True}
    tx = RECIPES[name](0.1, 2, weight_decay=0.5, weight_decay_mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert (updates["kernel"] == 0).all()
    assert jnp.allclose(updates["bias"], -0.05)


@EVERY_RECIPE
def test_other_leaves_get_plain_adam_and_need_no_parameters(name: str) -> None:
    b1, b2 = (0.908, 0.99) if name == "ldadam" else (0.9, 0.999)
    gradients = {"kernel": PARAMS["kernel"], "bias": jnp.arange(6.0)}
    ours, adam = RECIPES[name](0.1, 2, eps=1e-8), optax.adam(0.1, b1, b2)
    updates = [tx.update(gradients, tx.init(PARAMS))[0]["bias"] for tx in (ours, adam)]
    chex.assert_trees_all_close(updates[0], updates[1], rtol=1e-6)


@EVERY_RECIPE
def test_a_traced_rank_is_refused_under_inject_hyperparams(name: str) -> None:
    static = ("scale",) if name.startswith("apollo") else ()
    traced = optax.inject_hyperparams(RECIPES[name], static_args=static)
    with pytest.raises(TypeError, match="static_args"):
        traced(learning_rate=0.1, rank=2).init(PARAMS)
