"""Weights in 8 bits: rounded at random to the right mean, trained nearly as float32."""

from pathlib import Path
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
import pytest

import lowrank_optax as lro
from lowrank_optax.states import Int8Weight

SHAPE = (8, 512)


def weights(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=SHAPE).astype(np.float32)), "bias": jnp.ones(5)}


def int8(params: Any) -> Any:
    return jax.jit(lambda p: lro.to_int8_weights(p, min_size=64))(params)


back = jax.jit(lro.from_int8_weights)


def test_errors_are_at_most_half_a_step_of_a_group_of_256() -> None:
    params = weights()
    stored = int8(params)
    assert stored["kernel"].scales.shape == stored["kernel"].zeros.shape == (8, 2)
    groups = np.asarray(params["kernel"]).reshape(8, 2, 256)
    error = np.abs(np.asarray(back(stored)["kernel"]).reshape(8, 2, 256) - groups).max(-1)
    assert (error <= np.ptp(groups, axis=-1) / 255 * 0.501).all()
    np.testing.assert_array_equal(back(stored)["bias"], params["bias"])


def test_which_weights_are_stored_so() -> None:
    params = {
        "embed": jnp.ones((64, 64), jnp.bfloat16),
        "long": jnp.ones(8192),
        "small": jnp.ones((8, 8)),
        "table": jnp.ones((64, 64), jnp.int32),
    }
    chosen = lambda tree: {name for name, x in tree.items() if isinstance(x, Int8Weight)}
    stored = lambda **options: jax.eval_shape(lambda p: lro.to_int8_weights(p, **options), params)
    assert chosen(stored()) == {"embed"}
    assert chosen(stored(which=lambda path, x: path == "long")) == {"long"}
    assert chosen(stored(min_size=0)) == {"embed", "small"}
    decoded = jax.eval_shape(lambda p: lro.from_int8_weights(p, jnp.bfloat16), stored())
    assert decoded["embed"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_the_mean_over_seeds_is_the_sum_of_weight_and_update() -> None:
    stored, count = int8(weights()), 400
    change = jax.tree.map(lambda x: 1e-3 * x, weights(1))
    tx = lro.update_int8_weights(optax.identity())
    state = tx.init(stored)

    def one(count: jax.Array) -> jax.Array:
        updates, _ = tx.update(change, state._replace(count=count), stored)
        return lro.from_int8_weights(optax.apply_updates(stored, updates))["kernel"]

    mean = jax.jit(lambda counts: jnp.mean(jax.lax.map(one, counts, batch_size=50), 0))(
        jnp.arange(count, dtype=jnp.int32)
    )
    wanted = np.asarray(back(stored)["kernel"] + change["kernel"])
    step = float(np.asarray(stored["kernel"].scales).max()) * 1.05
    # Five standard deviations of a mean of coin tosses, also of extremes, which are not clipped.
    np.testing.assert_array_less(np.abs(mean - wanted), 5 * 0.5 * step / np.sqrt(count))


@pytest.mark.slow
def test_applied_updates_are_the_new_codes_and_repeat_with_the_seed() -> None:
    stored = int8(weights())
    change = weights(1)

    def step(seed: int) -> Any:
        tx = lro.update_int8_weights(optax.identity(), seed)
        updates, state = tx.update(change, tx.init(stored), stored)
        return optax.apply_updates(stored, updates), state

    new, state = jax.jit(lambda: step(0))()
    assert state.count == 1
    assert isinstance(new["kernel"], Int8Weight)
    assert [x.dtype for x in new["kernel"]] == [jnp.uint8, jnp.float32, jnp.uint8]
    wanted = np.asarray(back(stored)["kernel"] + change["kernel"]).reshape(8, 2, 256)
    found = np.asarray(back(new)["kernel"]).reshape(8, 2, 256)
    error = np.abs(found - wanted).max(-1)
    assert (error <= np.asarray(new["kernel"].scales) * 1.001).all()
    np.testing.assert_array_equal(new["bias"], stored["bias"] + change["bias"])
    same, other = jax.jit(lambda: step(0))()[0], jax.jit(lambda: step(1))()[0]
    np.testing.assert_array_equal(same["kernel"].codes, new["kernel"].codes)
    assert (np.asarray(other["kernel"].codes) != new["kernel"].codes).mean() > 0.2


def test_parameters_are_needed() -> None:
    stored, tx = int8(weights()), lro.update_int8_weights(optax.sgd(1.0))
    with pytest.raises(ValueError, match="update_int8_weights needs params"):
        tx.update(weights(), tx.init(stored))


def q_galore(learning_rate: Any) -> Any:
    """All parts: 8-bit weights and moments, a basis in 4 bits, lazy refreshes."""
    rule = lro.subspaces.quantized(lro.subspaces.randomized_svd(rank=4), bits=4)
    galore = lro.galore(
        learning_rate, subspace=rule, refresh_every=lro.refresh.lazily(5), scale=1.0
    )
    return lro.update_int8_weights(lro.low_bit(galore, min_size=64))


def regression() -> tuple[Any, Any]:
    """Loss of a linear model on noisy data, and a kernel to start from."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(128, 16)).astype(np.float32))
    low = rng.normal(size=(16, 2)) @ rng.normal(size=(2, 64))
    targets = inputs @ jnp.asarray(low.astype(np.float32))
    targets += 0.5 * jnp.asarray(rng.normal(size=targets.shape).astype(np.float32))
    loss = lambda p: jnp.mean((inputs @ p["kernel"] - targets) ** 2)
    return loss, {"kernel": jnp.asarray(0.1 * rng.normal(size=(16, 64)).astype(np.float32))}


def make_step(tx: Any, loss: Any) -> Any:
    def step(params: Any, state: Any) -> Any:
        gradient = jax.grad(loss)(lro.from_int8_weights(params))
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.slow
def test_q_galore_trains_a_regression_to_nearly_the_loss_of_float32() -> None:
    loss, params = regression()
    rate = optax.linear_schedule(0.1, 0.0, 200)
    rule = lro.subspaces.randomized_svd(rank=4)
    plain = lro.galore(rate, subspace=rule, refresh_every=lro.refresh.lazily(5), scale=1.0)

    def final(tx: Any, params: Any) -> float:
        step = make_step(tx, loss)
        whole = lambda p: jax.lax.fori_loop(0, 200, lambda _, carry: step(*carry), (p, tx.init(p)))[
            0
        ]
        return float(loss(lro.from_int8_weights(jax.jit(whole)(params))))

    wide, narrow = final(plain, params), final(q_galore(rate), int8(params))
    assert wide < 0.1 * float(loss(params))
    assert narrow < 1.25 * wide


@pytest.mark.slow
def test_q_galore_with_donation_and_through_orbax(tmp_path: Path) -> None:
    loss, params = regression()
    tx = q_galore(1e-2)
    step = jax.jit(make_step(tx, loss), donate_argnums=(0, 1))
    params = int8(params)
    state = jax.jit(tx.init)(params)
    for _ in range(2):
        given = params
        params, state = step(params, state)
        assert given["kernel"].codes.is_deleted()
    saved = {"params": params, "state": state}
    ocp.save(tmp_path / "mid-run", saved)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    restored = ocp.load(tmp_path / "mid-run", jax.tree.map(abstract, saved))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(x, y)
    again, new = step(restored["params"], restored["state"]), step(params, state)
    assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, new)
    assert_close(again[0]["kernel"].scales, new[0]["kernel"].scales)
