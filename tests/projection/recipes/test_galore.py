"""GaLore: its worked example, decay, and a problem it must solve."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

PARAMS = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}


def test_worked_example_of_the_specification() -> None:
    gradient = {"kernel": jnp.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]])}
    tx = lro.galore(0.01, rank=1, subspace=lro.subspaces.svd(1), eps=1e-12)
    updates, state = tx.update(gradient, tx.init(gradient))
    expected = [[-0.002228] * 3, [-0.001134] * 3]
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-6)
    basis = np.abs(state[0].basis["kernel"].ravel())
    np.testing.assert_allclose(basis, [0.891115, 0.453778], atol=1e-6)
    moment = np.abs(state[0].inner.mu["kernel"].ravel()) / (1 - 0.9)
    np.testing.assert_allclose(moment, [3.127122, 4.472015, 0.907555], atol=1e-5)


def test_galore_at_full_rank_and_scale_one_moves_unprojected_leaves_as_adam() -> None:
    ours, theirs = lro.galore(0.1, rank=4, eps=1e-8), optax.adam(0.1)
    update = lambda tx: tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]["bias"]
    np.testing.assert_array_equal(update(ours), update(theirs))


def test_galore_decays_the_full_weights() -> None:
    plain, decayed = lro.galore(0.1, 2), lro.galore(0.1, 2, weight_decay=0.5)
    one, other = (tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0] for tx in (plain, decayed))
    expected = jax.tree.map(lambda u, p: u - 0.1 * 0.5 * p, one, PARAMS)
    chex.assert_trees_all_close(other, expected, rtol=1e-6)


def test_galore_decays_only_what_the_mask_says() -> None:
    tx = lro.galore(0.1, 2, weight_decay=0.5, weight_decay_mask={"kernel": True, "bias": False})
    plain = lro.galore(0.1, 2)
    one, other = (t.update(PARAMS, t.init(PARAMS), PARAMS)[0] for t in (plain, tx))
    np.testing.assert_array_equal(one["bias"], other["bias"])
    assert (one["kernel"] != other["kernel"]).all()


def test_galore_without_decay_needs_no_parameters() -> None:
    tx = lro.galore(0.1, rank=2)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    chex.assert_tree_all_finite(updates)


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
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=600)
    np.testing.assert_allclose(params["kernel"], target, atol=0.02)
