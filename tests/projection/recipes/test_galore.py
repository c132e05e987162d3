"""GaLore: its worked example, decay, and a problem it must solve."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import first


def test_worked_example_of_the_specification() -> None:
    gradient = {"kernel": np.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]], np.float32)}
    tx = lro.galore(0.01, rank=1, subspace=lro.subspaces.svd(1), eps=1e-12)
    updates, state = first(tx, gradient)
    expected = [[-0.002228] * 3, [-0.001134] * 3]
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-6)
    basis = np.abs(state[0].basis["kernel"].ravel())
    np.testing.assert_allclose(basis, [0.891115, 0.453778], atol=1e-6)
    moment = np.abs(state[0].inner.mu["kernel"].ravel()) / (1 - 0.9)
    np.testing.assert_allclose(moment, [3.127122, 4.472015, 0.907555], atol=1e-5)


@pytest.mark.slow
def test_galore_finds_the_answer_of_a_low_rank_regression() -> None:
    key = jax.random.key(0)
    left, right, inputs = (
        jax.random.normal(k, shape)
        for k, shape in zip(jax.random.split(key, 3), [(12, 2), (2, 10), (64, 12)], strict=True)
    )
    target = left @ right
    loss = lambda p: jnp.mean((inputs @ (p["kernel"] - target)) ** 2)
    tx = lro.galore(optax.cosine_decay_schedule(0.5, 600), rank=4, refresh_every=20)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = {"kernel": jnp.zeros((12, 10))}
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=600))((start, tx.init(start)))
    np.testing.assert_allclose(params["kernel"], target, atol=0.02)
