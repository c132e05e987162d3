"""What holds of every recipe: bytes of state, arguments, decay. Each has a file in `recipes/`."""

from collections.abc import Callable
import functools
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.rules import decaying
from tests.projection.runs import first, state_bytes

PARAMS = {"kernel": np.ones((4, 6), np.float32), "bias": np.ones(6, np.float32)}
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
    state = jax.eval_shape(tx.init, {"kernel": jax.ShapeDtypeStruct((M, N), jnp.float32)})
    assert state_bytes(state) == 4 * (words + scalars)


adam_of = functools.cache(lambda b1, b2: optax.adam(0.1, b1, b2))


@EVERY_RECIPE
def test_a_decay_is_of_the_full_weights_by_its_mask_and_other_leaves_get_plain_adam(
    name: str,
) -> None:
    make, b1, b2 = RECIPES[name], *((0.908, 0.99) if name == "ldadam" else (0.9, 0.999))
    gradients = {"kernel": decaying(4, 6), "bias": np.arange(6, dtype=np.float32)}
    plain = make(0.1, 2, eps=1e-8)
    updates = first(plain, gradients, PARAMS)[0]
    adam = first(adam_of(b1, b2), gradients)[0]
    assert_close(updates["bias"], adam["bias"])
    expected = jax.tree.map(lambda u, p: np.asarray(u) - 0.1 * 0.5 * p, updates, PARAMS)
    mask = None if name == "galore" else {"kernel": True, "bias": False}
    decayed = make(0.1, 2, eps=1e-8, weight_decay=0.5, weight_decay_mask=mask)
    seen = first(decayed, gradients, PARAMS)[0]
    assert_close(seen["kernel"], expected["kernel"], 100)
    assert_close(seen["bias"], (updates if mask else expected)["bias"], 100)


@EVERY_RECIPE
def test_no_parameters_are_needed_without_decay(name: str) -> None:
    tx = RECIPES[name](0.1, 2)
    jax.eval_shape(lambda gradients: tx.update(gradients, tx.init(PARAMS)), PARAMS)


@EVERY_RECIPE
def test_a_traced_rank_is_refused_under_inject_hyperparams(name: str) -> None:
    static = ("scale",) if name.startswith("apollo") else ()
    traced = optax.inject_hyperparams(RECIPES[name], static_args=static)
    with pytest.raises(TypeError, match="static_args"):
        traced(learning_rate=0.1, rank=2).init(PARAMS)
