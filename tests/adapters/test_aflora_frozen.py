"""What a matrix that AFLoRA has frozen does no more, whatever optimizer is inside or around."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

# Decisions at steps 20 and 30 of a run whose factors are all frozen from step 41 on.
RUN = {"total_steps": 60, "warmup_steps": 10, "final_steps": 20}
PARAMS = jax.tree.map(
    lambda shape: np.ones(shape, np.float32),
    {"first": {"A": (3, 2), "b": (4,)}, "stack": {"B": (2, 2, 3), "A": (2,)}},
    is_leaf=lambda x: isinstance(x, tuple),
)
INNER = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1)),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2),
}


def gradients(steps: int, dtype: Any = jnp.float32) -> list[Any]:
    """Smallest in the second layer of the stack."""
    rng = np.random.default_rng(0)
    scales = {
        "first": {"A": 1.0, "b": 1.0},
        "stack": {"B": np.array([1.0, 1e-2])[:, None, None], "A": 1.0},
    }
    draw = lambda p, s: np.asarray(rng.uniform(0.5, 1.5, p.shape) * s, dtype)
    return [jax.tree.map(draw, PARAMS, scales) for _ in range(steps)]


def trajectory(tx: Any, steps: int, params: Any = None) -> list[tuple[Any, Any]]:
    params = PARAMS if params is None else params

    @jax.jit
    def step(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for gradient in gradients(steps, params["first"]["b"].dtype):
        params, state = step(gradient, state, params)
        seen.append((params, state))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("adamw", "factored"),
        *(pytest.param(x, marks=pytest.mark.full) for x in ("momentum", "clipped")),
    ],
)
def test_frozen_matrices_are_bit_identical_ever_after(name: str) -> None:
    seen = trajectory(lro.adapters.aflora_freezing(INNER[name], **RUN), 50)
    states = [state for _, state in seen]
    at = next(t for t, state in enumerate(states) if state.frozen["stack"]["B"][1])
    assert at == 20
    assert not states[at].frozen["stack"]["B"][0]
    # The deciding step moves it no more: it is what the step before left.
    for params, state in seen[at:]:
        assert state.frozen["stack"]["B"][1]
        np.testing.assert_array_equal(params["stack"]["B"][1], seen[at - 1][0]["stack"]["B"][1])
    assert np.any(seen[at][0]["stack"]["B"][0] != seen[at - 1][0]["stack"]["B"][0])
    assert all(np.all(flag) for flag in jax.tree.leaves(states[-1].frozen))
    # Vectors are trained on, also one that has the name of a matrix.
    for layer, vector in (("first", "b"), ("stack", "A")):
        assert np.any(seen[-1][0][layer][vector] != seen[-2][0][layer][vector])


def test_moments_and_scores_of_what_is_frozen_stay_as_they_were() -> None:
    seen = trajectory(lro.adapters.aflora_freezing(INNER["adamw"], **RUN), 50)
    frozen_at, last = seen[20][1], seen[-1][1]
    adam = lambda state: state.inner_state[0]
    for moment in ("mu", "nu"):
        then, now = getattr(adam(frozen_at), moment), getattr(adam(last), moment)
        before = getattr(adam(seen[19][1]), moment)
        np.testing.assert_array_equal(then["stack"]["B"][1], before["stack"]["B"][1])
        np.testing.assert_array_equal(now["stack"]["B"][1], then["stack"]["B"][1])
        assert np.any(now["first"]["b"] != then["first"]["b"])
    for field in ("window_mean", "sensitivity", "uncertainty"):
        then, now = getattr(frozen_at, field)["stack"]["B"], getattr(last, field)["stack"]["B"]
        np.testing.assert_array_equal(now[1], then[1])
        assert np.any(now[0] != then[0])


def test_until_the_first_decision_it_is_the_inner_optimizer() -> None:
    seen = trajectory(lro.adapters.aflora_freezing(INNER["clipped"], **RUN), 20)
    alone = trajectory(INNER["clipped"], 20)
    close = lambda x, y: assert_close(x, y)
    jax.tree.map(close, seen[-1][0], alone[-1][0])


def test_frozen_gradients_count_in_no_norm() -> None:
    """A huge gradient of what is frozen does not clip the others away."""
    tx = lro.adapters.aflora_freezing(optax.clip_by_global_norm(1.0), **RUN)
    params = {"A": jnp.ones((2, 2)), "d": jnp.ones(2)}
    state = tx.init(params)._replace(frozen={"A": jnp.asarray(True), "d": optax.MaskedNode()})
    gradient = {"A": jnp.full((2, 2), jnp.nan), "d": jnp.array([0.3, 0.4])}
    updates, _ = jax.jit(tx.update)(gradient, state)
    np.testing.assert_allclose(updates["d"], [0.3, 0.4])
    assert not np.any(updates["A"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("step", [5, 10])
def test_gradients_that_are_not_finite_do_not_get_into_scores(bad: float, step: int) -> None:
    tx = lro.adapters.aflora_freezing(optax.sgd(1e-2), **RUN)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t, gradient in enumerate(gradients(50)):
        if t == step:
            gradient["first"]["A"][0, 0] = bad
        updates, state = update(gradient, state)
        if t == step:
            assert not np.isfinite(updates["first"]["A"][0, 0])  # passed on, as optax does
    for field in ("window_mean", "sensitivity", "uncertainty"):
        assert np.all(np.isfinite(jax.tree.leaves(getattr(state, field))[0]))
    assert all(np.all(flag) for flag in jax.tree.leaves(state.frozen))


def test_steps_are_optimizer_steps_under_multi_steps() -> None:
    """Two equal micro-batches to a step."""
    tx = lro.adapters.aflora_freezing(optax.sgd(1e-2, momentum=0.9), **RUN)
    both = optax.MultiSteps(tx, 2)

    @jax.jit
    def step(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = both.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, both.init(PARAMS)
    for gradient in gradients(25):
        for _ in range(2):
            params, state = step(gradient, state, params)
    expected = trajectory(tx, 25)[-1]
    np.testing.assert_array_equal(
        state.inner_opt_state.frozen["stack"]["B"], expected[1].frozen["stack"]["B"]
    )
    jax.tree.map(lambda x, y: assert_close(x, y), params, expected[0])
    assert lro.adapters.frozen_leaves(state) == ()


def test_masked_leaves_are_not_its_own() -> None:
    mask = {"first": {"A": True, "b": True}, "stack": {"B": False, "A": False}}
    tx = optax.masked(lro.adapters.aflora_freezing(optax.sgd(1e-2), **RUN), mask)
    params, state = trajectory(tx, 45)[-1]
    assert lro.adapters.frozen_leaves(state) == ("first/A",)
    assert not np.any(params["stack"]["B"] == PARAMS["stack"]["B"])


def test_bfloat16_factors_have_float32_scores_and_keep_their_dtype() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    seen = trajectory(lro.adapters.aflora_freezing(optax.sgd(1e-1), **RUN), 45, params)
    new, state = seen[-1]
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.sensitivity)} == {jnp.dtype(jnp.float32)}
    full = trajectory(lro.adapters.aflora_freezing(optax.sgd(1e-1), **RUN), 45)[-1][1]
    np.testing.assert_allclose(
        state.sensitivity["first"]["A"], full.sensitivity["first"]["A"], rtol=1e-2
    )


def test_a_tree_without_factors_is_the_inner_optimizers() -> None:
    tx, params = lro.adapters.aflora_freezing(optax.adam(0.1), **RUN), {"kernel": jnp.ones((2, 2))}
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    expected, _ = optax.adam(0.1).update(params, optax.adam(0.1).init(params))
    assert_close(updates["kernel"], expected["kernel"])
    assert state.frozen == {"kernel": optax.MaskedNode()}
