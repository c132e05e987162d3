"""Every recipe of the projected family with its moments in 8 bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import state_bytes

RECIPES = {
    "galore": {"rank": 8, "basis_bits": 4},
    "fira": {"rank": 8},
    "adarankgrad": {"rank": 8},
    "online_subspace_descent": {"rank": 8},
    "dct_adamw": {"rank": 8},
    "apollo": {"rank": 8},
    "apollo_mini": {"scale": 1.0},
    "ldadam": {"rank": 8},
}


PARAMS = {"kernel": np.zeros((16, 1024), np.float32), "table": np.zeros(4096, np.float32)}
# The others put the same wrapper around the same moments.
TRAINED = ("galore", "apollo_mini", "ldadam")


def make(name: str, bits: Any) -> optax.GradientTransformation:
    rate = optax.linear_schedule(0.1, 0.0, 60)
    return getattr(lro, name)(rate, state_bits=bits, **RECIPES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_state_shrinks_and_is_in_codes(name: str) -> None:
    whole, state = (jax.eval_shape(make(name, bits).init, PARAMS) for bits in (None, 8))
    assert state_bytes(state) < 0.6 * state_bytes(whole)  # a basis and an error stay
    assert sum(x.dtype == jnp.uint8 for x in jax.tree.leaves(state)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.full] * (x not in TRAINED)) for x in RECIPES]
)
def test_training_is_what_it_was(name: str) -> None:
    target = np.random.default_rng(0).normal(size=(16, 1024)).astype(np.float32)
    loss = lambda p: 0.5 * jnp.sum((p["kernel"] - target) ** 2) + jnp.sum((p["table"] - 1) ** 2)

    def trained(bits: Any) -> float:
        tx = make(name, bits)

        def step(carry: Any, _: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=60)[0][0])
        return float(loss(run(PARAMS)))

    plain, coded = trained(None), trained(8)
    start = float(loss(PARAMS))
    assert plain < 0.9 * start
    np.testing.assert_allclose(coded, plain, atol=0.05 * start)
