"""LoRA+: which leaves learn faster, and by how much."""

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro


def _ones(*shape, value=1):
    return np.full(shape, value, np.float32)


PARAMS = {
    "block": {
        "query": {"A": _ones(4, 2), "B": _ones(2, 3, value=0.5), "magnitude": _ones(2, 3)},
        "norm": {"scale": _ones(2, 3)},
        "gate": _ones(5),
        "down": {"kernel": _ones(4, 3), "bias": _ones(3)},
    },
    "Embed_0": {
        "adapters": {"A": _ones(9, 2), "B": _ones(2, 4)},
        "embedding": _ones(9, 4),
    },
}
GROUPS = {
    "block": {
        "query": {"A": "A", "B": "B", "magnitude": "B"},
        "norm": {"scale": "B"},
        "gate": "B",
        "down": {"kernel": "A", "bias": "B"},
    },
    "Embed_0": {"adapters": {"A": "E", "B": "E"}, "embedding": "A"},
}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)


def trajectory(tx, steps=4):
    @jax.jit
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    for seed in range(steps):
        params, state = step(gradients(seed), state, params)
    return params


def first_update(tx, params, gradient):
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, gradient)


def test_with_sgd_it_is_a_rate_for_each_leaf():
    tx = optax.chain(optax.sgd(0.1), lro.adapters.scale_lora_plus(16.0, 0.25))
    rates = {"A": 0.1, "B": 1.6, "E": 0.025}
    expected = jax.tree.map(lambda g, group: -rates[group] * g, gradients(0), GROUPS)
    assert_close(first_update(tx, PARAMS, gradients(0)), expected)


def test_the_decay_is_multiplied_too():
    adamw = optax.adamw(0.01, weight_decay=0.1)
    tx = optax.chain(adamw, lro.adapters.scale_lora_plus(8.0))
    fast, slow = optax.adamw(0.08, weight_decay=0.1), adamw
    got = first_update(tx, PARAMS, gradients(0))
    for name, one in (("B", fast), ("A", slow)):
        alone = lambda tree, name=name: {name: tree["block"]["query"][name]}
        params, g = alone(PARAMS), alone(gradients(0))
        expected = first_update(one, params, g)
        assert_close(alone(got), expected, 100)


@pytest.mark.slow
def test_a_ratio_of_one_is_lora():
    chain = optax.chain(optax.adamw(0.01), lro.adapters.scale_lora_plus(1.0))
    assert_close(trajectory(chain), trajectory(optax.adamw(0.01)))
    alias = lro.adapters.lora_plus_adamw(0.01, 1.0, embedding_learning_rate=0.01)
    assert_close(trajectory(alias), trajectory(optax.adam(0.01)))


def test_the_alias_has_the_official_groups():
    tx = lro.adapters.lora_plus_adamw(0.01, 20.0, weight_decay=0.1, embedding_learning_rate=1e-6)
    groups = {
        "slow": optax.adamw(0.01, weight_decay=0.1),
        "fast": optax.adamw(0.2, weight_decay=0.1),
        "fast, no decay": optax.adamw(0.2, weight_decay=0.0),
        "embedding": optax.adamw(1e-6, weight_decay=0.1),
    }
    labels = {
        "block": {
            "query": {"A": "slow", "B": "fast", "magnitude": "fast"},
            "norm": {"scale": "fast, no decay"},
            "gate": "fast",
            "down": {"kernel": "slow", "bias": "fast, no decay"},
        },
        "Embed_0": {"adapters": {"A": "embedding", "B": "embedding"}, "embedding": "slow"},
    }
    assert_close(trajectory(tx), trajectory(optax.partition(groups, labels)), 100)


def test_schedules_are_multiplied_at_every_step():
    warmup = optax.linear_schedule(0.0, 0.1, 3)
    alias = lro.adapters.lora_plus_adamw(warmup, 4.0, embedding_learning_rate=warmup)
    chain = optax.chain(optax.adam(warmup), lro.adapters.scale_lora_plus(4.0))
    assert_close(trajectory(alias), trajectory(chain), 200)


def test_updates_keep_their_dtype_and_the_ratio_may_be_traced():
    tx = optax.inject_hyperparams(lro.adapters.scale_lora_plus, static_args="embeddings")(ratio=2.0)
    params = {"A": jnp.ones((2, 2), jnp.bfloat16), "B": jnp.ones((2, 2), jnp.bfloat16)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    updates, state = step(params, state)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    state.hyperparams["ratio"] = jnp.asarray(3.0)
    updates, _ = step(params, state)
    assert float(updates["B"][0, 0]) == 3
    assert updates["B"].dtype == jnp.bfloat16


def test_bad_options_are_refused_by_name():
    with pytest.raises(ValueError, match="ratio=0"):
        lro.adapters.scale_lora_plus(0)
    with pytest.raises(ValueError, match="embedding_ratio=-1"):
        lro.adapters.scale_lora_plus(16, -1)
    with pytest.raises(ValueError, match="embeddings"):
        lro.adapters.lora_plus_adamw(1e-3, embeddings="(")
