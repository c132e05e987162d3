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


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_state_shrinks_and_training_is_what_it_was(name: str) -> None:
    target = jax.random.normal(jax.random.key(0), (16, 1024))
    params = {"kernel": jnp.zeros((16, 1024)), "table": jnp.zeros(4096)}
    loss = lambda p: 0.5 * jnp.sum((p["kernel"] - target) ** 2) + jnp.sum((p["table"] - 1) ** 2)

    def trained(bits: Any) -> tuple[float, Any]:
        rate = optax.linear_schedule(0.1, 0.0, 60)
        tx = getattr(lro, name)(rate, state_bits=bits, **RECIPES[name])

        def step(carry: Any, _: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=60)[0])
        new, state = run(params)
        return float(loss(new)), state

    (plain, whole), (coded, state) = trained(None), trained(8)
    assert state_bytes(state) < 0.6 * state_bytes(whole)  # a basis and an error stay
    codes = [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint8]
    assert len(codes) >= 2
    start = float(loss(params))
    assert plain < 0.9 * start
    np.testing.assert_allclose(coded, plain, atol=0.05 * start)
