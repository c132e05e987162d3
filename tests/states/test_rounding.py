"""bfloat16 parameters rounded at random or compensated: what is below a digit is not lost."""

import itertools
from typing import Any

from close import assert_close
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.states import stochastic_round

ways = pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
BF16 = ml_dtypes.bfloat16


def draw(x: float, count: int = 200_000, seed: int = 0) -> np.ndarray:
    fill = jax.jit(stochastic_round)(jnp.full(count, x, jnp.float32), jax.random.key(seed))
    return np.asarray(fill, np.float64)


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers next below and above, in size, as float64: by their bits."""
    cut = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    up = np.where(x.astype(np.float32).view(np.uint32) & 0xFFFF, cut + 1, cut).astype(np.uint16)
    return cut.view(BF16).astype(np.float64), up.view(BF16).astype(np.float64)


@pytest.mark.parametrize("sign", [1, -1])
def test_roundings_of_a_quarter_step_are_the_two_neighbours_and_right_on_average(sign: int) -> None:
    found = draw(sign * (1 + 2.0**-9))
    assert set(found * sign) == {1.0, 1.0078125}
    assert abs(sign * found.mean() - 1.00195) < 2e-5


def test_the_chance_is_the_fraction_at_any_size() -> None:
    x = np.float32([3.14159, -1e-20, 7.7e30, 1.0 + 2**-16, -0.1])
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = np.asarray(jax.jit(jax.vmap(lambda key: stochastic_round(x, key)))(keys), np.float64)
    low, high = neighbours(x)
    assert np.isin(found, [low, high]).all()
    sigma = np.abs(high - low) / 2 / np.sqrt(len(keys))
    np.testing.assert_array_less(np.abs(found.mean(0) - x), 5 * sigma)


def test_numbers_that_bfloat16_holds_and_what_is_not_finite_stay() -> None:
    x = np.float32([0.0, -0.0, 1.0, -2.5, 1.0078125, 1e-40, np.nan, np.inf, -np.inf])
    x = x.astype(BF16).astype(np.float32)
    found = np.asarray(jax.jit(stochastic_round)(x, jax.random.key(0)))
    np.testing.assert_array_equal(found.view(np.uint32)[:6], x.view(np.uint32)[:6])
    np.testing.assert_array_equal(found, x)


@ways
def test_applied_updates_give_exactly_a_bfloat16_next_to_the_sum(rounding: Any) -> None:
    size, tx = 512, lro.round_updates(rounding)

    def step(p: jax.Array, u: jax.Array, count: jax.Array) -> jax.Array:
        state = tx.init(p)
        state = state._replace(count=count) if rounding == "stochastic" else state
        updates, _ = tx.update(u, state, p)
        return optax.apply_updates(p, updates)

    step = jax.jit(step)

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**31 - 1), ratio=st.floats(-12, 6), exponent=st.floats(-25, 25))
    def check(seed: int, ratio: float, exponent: float) -> None:
        rng = np.random.default_rng(seed)
        p = (rng.normal(size=size) * 10.0**exponent).astype(BF16)
        u = (rng.normal(size=size) * 10.0 ** (exponent + ratio)).astype(np.float32)
        new = step(p, u, np.int32(seed))
        assert new.dtype == jnp.bfloat16
        low, high = neighbours(p.astype(np.float32) + u)
        found = np.asarray(new, np.float64)
        assert ((found == low) | (found == high)).all()

    check()


@ways
def test_an_update_that_bfloat16_holds_is_exact(rounding: Any) -> None:
    p = jnp.asarray([1.0, -2.0, 0.5, 3.0], jnp.bfloat16)
    u = jnp.asarray([0.0078125, 0.5, -0.5, 0.0])
    tx = lro.round_updates(rounding)
    updates, _ = tx.update(u, tx.init(p), p)
    np.testing.assert_array_equal(updates, u)


def trained(tx: Any, params: Any, gradient: Any, steps: int) -> np.ndarray:
    """The parameters after steps of one gradient, averaged over the array."""

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def whole(params: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return np.asarray(jax.jit(whole)(params), np.float64)


@pytest.mark.slow
def test_weight_decay_of_a_millionth_is_kept_at_random_and_lost_by_the_nearest() -> None:
    params = jnp.ones(2048, jnp.bfloat16)
    decayed = optax.chain(optax.add_decayed_weights(1e-3), optax.scale(-1e-3))
    steps, wide = 1000, lro.in_float32(decayed)
    nothing, wanted = jnp.zeros_like(params), (1 - 1e-6) ** 1000
    assert (trained(wide, params, nothing, steps) == 1).all()
    random = trained(optax.chain(wide, lro.round_updates()), params, nothing, steps).mean()
    assert abs(random - wanted) < 0.2 * (1 - wanted)


def test_compensated_parameters_are_rounded_float32_ones() -> None:
    """The lower halves of bits, added to a parameter's, make of it what float32 training has."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=256).astype(BF16))
    updates = jnp.asarray((3e-5 * rng.normal(size=(500, 256)) - 1e-6).astype(np.float32))
    tx = lro.round_updates("compensated")

    def step(carry: Any, u: jax.Array) -> tuple[Any, None]:
        params, state, wide = carry
        changes, state = tx.update(u, state, params)
        return (optax.apply_updates(params, changes), state, wide + u), None

    start = params, tx.init(params), params.astype(jnp.float32)
    (new, state, wide), _ = jax.jit(lambda c: jax.lax.scan(step, c, updates))(start)
    upper = np.asarray(new).view(np.uint16).astype(np.uint32) << 16
    bits = upper.astype(np.int64) + np.asarray(state.compensation, np.int64)
    np.testing.assert_array_equal(bits.astype(np.uint32).view(np.float32), wide)
    gap = np.abs(np.asarray(new, np.float64) - np.asarray(wide, np.float64))
    assert np.all(gap <= 2.0**-8 * np.abs(wide))


def test_updates_that_nearest_rounding_loses_are_kept_by_compensation() -> None:
    params, update = jnp.ones(4, jnp.bfloat16), jnp.full(4, -1e-6)

    def after(tx: Any) -> np.ndarray:
        def step(carry: Any, _: Any) -> tuple[Any, None]:
            params, state = carry
            changes, state = tx.update(update, state, params)
            return (optax.apply_updates(params, changes), state), None

        run = lambda p: jax.lax.scan(step, (p, tx.init(p)), length=4000)[0][0]
        return np.asarray(jax.jit(run)(params), np.float64)

    np.testing.assert_array_equal(after(optax.identity()), 1.0)
    np.testing.assert_allclose(after(lro.round_updates("compensated")), 0.996, atol=2e-3)


def test_compensated_parameters_that_overflow_are_infinite() -> None:
    params, tx = jnp.full(3, 3e38, jnp.bfloat16), lro.round_updates("compensated")
    update = jnp.array([3e38, jnp.nan, 0.0])
    changes, state = tx.update(update, tx.init(params), params)
    new = np.asarray(optax.apply_updates(params, changes), np.float32)
    assert np.isinf(new[0])
    assert np.isnan(new[1])
    assert np.isfinite(new[2])
    assert not np.any(np.asarray(state.compensation))


@ways
def test_other_dtypes_are_left_to_apply_updates(rounding: Any) -> None:
    params = {"a": jnp.ones(4), "b": jnp.ones(4, jnp.float16), "c": jnp.ones(4, jnp.bfloat16)}
    updates = jax.tree.map(lambda x: jnp.full(4, 1e-5, jnp.float32), params)
    tx = lro.round_updates(rounding)
    found, state = jax.jit(lambda u, p: tx.update(u, tx.init(p), p))(updates, params)
    np.testing.assert_array_equal(found["a"], updates["a"])
    np.testing.assert_array_equal(found["b"], updates["b"])
    if rounding == "compensated":
        assert [x.dtype for x in jax.tree.leaves(state)] == [jnp.int16]


def test_random_roundings_differ_between_steps_and_equal_leaves() -> None:
    params = {name: jnp.ones(256, jnp.bfloat16) for name in "ab"}
    updates = jax.tree.map(lambda x: jnp.full(256, 2.0**-8, jnp.float32), params)

    def thrice(seed: int) -> list[Any]:
        tx = lro.round_updates(seed=seed)
        state, found = tx.init(params), []
        for _ in range(2):
            new, state = jax.jit(tx.update)(updates, state, params)
            found += [np.asarray(new["a"]), np.asarray(new["b"])]
        return found

    found = thrice(0)
    for i in range(4):
        for j in range(i):
            assert (found[i] != found[j]).mean() > 0.3
    for x, y in zip(found, thrice(0), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (thrice(1)[0] != found[0]).mean() > 0.3


@ways
def test_parameters_are_needed(rounding: Any) -> None:
    tx = lro.round_updates(rounding)
    x = jnp.ones(3, jnp.bfloat16)
    with pytest.raises(ValueError, match="round_updates needs params"):
        tx.update(x, tx.init(x))


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="rounding='nearest'"):
        lro.round_updates("nearest")  # pyrefly: ignore


@ways
def test_before_the_optimizer_it_is_refused(rounding: Any) -> None:
    params = {"kernel": jnp.ones(4, BF16)}
    for tx in (
        optax.chain(lro.round_updates(rounding), optax.sgd(1.0)),
        optax.chain(optax.sgd(1.0), lro.round_updates(rounding)),  # rounded by the optimizer
    ):
        with pytest.raises(ValueError, match=r"as of 'kernel'.* last in the chain.*in_float32"):
            tx.update(params, tx.init(params), params)
    frozen = {"trained": lro.in_float32(optax.sgd(1.0)), "frozen": optax.set_to_zero()}
    params = {"kernel": jnp.ones(4, BF16), "embed": jnp.ones(4, BF16)}
    labels = {"kernel": "trained", "embed": "frozen"}
    tx = optax.chain(optax.partition(frozen, labels), lro.round_updates(rounding))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert_close(updates, {"kernel": -jnp.ones(4), "embed": jnp.zeros(4)}, dtype=jnp.float32)
    params = {"kernel": jnp.ones(4), "embed": jnp.ones(4, BF16)}  # an adapter beside its base
    with pytest.warns(UserWarning, match=r"as of 'embed'.*\(All bfloat16 parameters may be frozen"):
        tx.update(params, tx.init(params), params)


def test_in_float32_keeps_state_and_updates_in_float32() -> None:
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16), "half": jnp.ones(3, jnp.float16)}
    tx = lro.in_float32(optax.adamw(1e-3))
    updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    plain = optax.adamw(1e-3)
    wanted = jax.jit(lambda p: plain.update(p, plain.init(p), p))(wide)[0]
    assert_close(updates, wanted)


def bfloat16_adamw(rounding: Any) -> Any:
    return optax.chain(lro.in_float32(optax.adamw(1e-3)), lro.round_updates(rounding))


@ways
def test_jit_with_donation_and_accumulated_gradients(rounding: Any) -> None:
    params = {"kernel": jnp.ones((8, 8), jnp.bfloat16)}
    tx = optax.MultiSteps(bfloat16_adamw(rounding), 2).gradient_transformation()

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    donated = jax.jit(step, donate_argnums=(0, 1))
    state = tx.init(params)
    seen = [params["kernel"].copy()]
    for _ in range(4):
        params, state = donated(params, state)
        assert params["kernel"].dtype == jnp.bfloat16
        seen.append(params["kernel"].copy())
    moved = [bool((a != b).any()) for a, b in itertools.pairwise(seen)]
    assert moved[0] == moved[2] is False
    assert any(moved) or rounding == "compensated"


@pytest.mark.parametrize(
    "rounding", ["stochastic", pytest.param("compensated", marks=pytest.mark.slow)]
)
def test_nnx_optimizer_keeps_bfloat16_parameters(rounding: Any) -> None:
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, bfloat16_adamw(rounding), wrt=nnx.Param)
    before = np.asarray(model.kernel[...], np.float32)
    loss = lambda m: jnp.sum(m(jnp.ones((2, 8), jnp.bfloat16)) ** 2).astype(jnp.float32)
    step = nnx.jit(lambda m, o: o.update(m, nnx.grad(loss)(m)))
    for _ in range(3):
        step(model, optimizer)
    after = model.kernel[...]
    assert after.dtype == jnp.bfloat16
    assert (np.asarray(after, np.float32) != before).any()
