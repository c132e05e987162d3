"""Recipes: what each adds to `scale_by_projection`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

PARAMS = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_galore_state_is_what_the_formula_says():
    params = {"kernel": jnp.zeros((512, 1376))}
    state = jax.eval_shape(lro.galore(1e-2, rank=128).init, params)
    floats = 128 * 512 + 2 * 128 * 1376
    counters = 3 * 4  # the count, Adam's, and when the basis is next due
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 4 * floats + counters


def test_galore_at_full_rank_and_scale_one_moves_unprojected_leaves_as_adam():
    ours, theirs = lro.galore(0.1, rank=4, eps=1e-8), optax.adam(0.1)
    update = lambda tx: tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]["bias"]
    np.testing.assert_array_equal(update(ours), update(theirs))


def test_galore_decays_the_full_weights():
    plain, decayed = lro.galore(0.1, 2), lro.galore(0.1, 2, weight_decay=0.5)
    one, other = (tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0] for tx in (plain, decayed))
    expected = jax.tree.map(lambda u, p: u - 0.1 * 0.5 * p, one, PARAMS)
    chex.assert_trees_all_close(other, expected, rtol=1e-6)


def test_galore_decays_only_what_the_mask_says():
    tx = lro.galore(0.1, 2, weight_decay=0.5, weight_decay_mask={"kernel": True, "bias": False})
    plain = lro.galore(0.1, 2)
    one, other = (t.update(PARAMS, t.init(PARAMS), PARAMS)[0] for t in (plain, tx))
    np.testing.assert_array_equal(one["bias"], other["bias"])
    assert (one["kernel"] != other["kernel"]).all()


def test_galore_without_decay_needs_no_parameters():
    tx = lro.galore(0.1, rank=2)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    chex.assert_tree_all_finite(updates)


def test_galore_finds_the_answer_of_a_low_rank_regression():
    key = jax.random.key(0)
    left, right, inputs = (
        jax.random.normal(k, shape)
        for k, shape in zip(jax.random.split(key, 3), [(12, 2), (2, 10), (64, 12)], strict=True)
    )
    target = left @ right
    loss = lambda p: jnp.mean((inputs @ (p["kernel"] - target)) ** 2)
    tx = lro.galore(optax.cosine_decay_schedule(0.5, 600), rank=4, refresh_every=20)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = {"kernel": jnp.zeros((12, 10))}
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=600)
    np.testing.assert_allclose(params["kernel"], target, atol=0.02)


def test_a_traced_rank_is_refused_under_inject_hyperparams():
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(lro.galore)(learning_rate=0.1, rank=2).init(PARAMS)
