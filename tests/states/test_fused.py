"""AdamW in one pass: the same steps and the same state as `low_bit(optax.adamw)`."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

OPTIONS = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
CODES = {"min_size": 64, "block_size": 16}


def tree(seed: int) -> dict[str, jax.Array]:
    """A stack in codes, one with rows that are no whole number of blocks, and a small vector."""
    rng = np.random.default_rng(seed)
    shapes = {"stack": (2, 8, 32), "kernel": (6, 40), "bias": (5,)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    return {name: draw(shape) for name, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_steps_and_state_are_those_of_low_bit_adamw(bits: Any) -> None:
    schedule = optax.linear_schedule(0.1, 0.01, 5)
    mask = {"stack": True, "kernel": False, "bias": True}
    adam = lro.low_bit(optax.scale_by_adam(0.8, 0.95, 1e-6), bits, **CODES)
    tail = optax.chain(optax.add_decayed_weights(0.1, mask), optax.scale_by_learning_rate(schedule))
    composed = optax.chain(adam, tail)
    fused = lro.fused_adamw(schedule, **OPTIONS, mask=mask, bits=bits, **CODES)

    @jax.jit
    def composed_step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = composed.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    expected = actual = tree(0)
    states = jax.jit(composed.init)(expected)
    state = jax.jit(fused.init)(actual)
    step = jax.jit(fused.step)
    for seed in range(1, 5):
        gradients = tree(seed)
        expected, states = composed_step(gradients, states, expected)
        actual, state = step(gradients, state, actual)
    assert jax.tree.structure(state) == jax.tree.structure(states[0])
    assert_close(actual, expected, 200)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(states[0]), strict=True):
        assert x.dtype == y.dtype
        if x.dtype == jnp.uint8:  # a number in the middle of two may be stored as either
            assert np.mean(np.asarray(x) != np.asarray(y)) < 0.01
        else:
            assert_close(x, y, 800)


@pytest.mark.slow
def test_bfloat16_parameters_are_rounded_once() -> None:
    params = {"kernel": jnp.ones((8, 32), jnp.bfloat16)}
    fused = lro.fused_adamw(2.0**-8, weight_decay=0.0, min_size=1)
    step = jax.jit(fused.step, donate_argnums=(1, 2))
    gradients = {"kernel": jnp.ones((8, 32), jnp.bfloat16)}
    params, state = step(gradients, jax.jit(fused.init)(params), params)
    assert params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(params["kernel"], np.float32), 1 - 2.0**-8)
    assert state.codes.mu["kernel"].dtype == jnp.uint8


def test_empty_trees_and_arrays_pass() -> None:
    fused = lro.fused_adamw(0.1, min_size=1)
    assert fused.step({}, fused.init({}), {})[0] == {}
    params = {"none": jnp.zeros((0, 4)), "one": jnp.ones(())}
    new, _ = jax.jit(lambda p: fused.step(p, fused.init(p), p))(params)
    assert new["none"].shape == (0, 4)
    assert new["one"] < 1


def test_both_moments_of_a_parameter_are_in_codes_or_neither() -> None:
    params = {"kernel": jnp.ones((64, 64))}
    fused = lro.fused_adamw(0.1, which=lambda path, x: False if path.startswith("nu") else None)
    with pytest.raises(ValueError, match="both moments"):
        jax.eval_shape(lambda p: fused.step(p, fused.init(p), p), params)


def test_an_implementation_that_cannot_serve_is_refused() -> None:
    params = {"kernel": jnp.ones((64, 64))}
    unknown: Any = "cpu"
    fused = lro.fused_adamw(0.1, implementation=unknown)
    with pytest.raises(ValueError, match="implementation='cpu'"):
        jax.eval_shape(lambda p: fused.step(p, fused.init(p), p), params)
