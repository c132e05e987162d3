"""The optimizer-side form: a plain transformation that holds the points ahead."""

from typing import Any

from harness.trees import GRADIENTS, PARAMS, assert_close, assert_equal, at, cast
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

OPTIMIZERS = {
    "sgd": optax.sgd(0.2),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "lars": optax.lars(0.5, weight_decay=0.01),
}
RATES = {"constant": 0.3, "schedule": lambda count: 0.3 / (1 + count)}


def loss(params: Any, x: Any) -> jax.Array:
    return sum(jnp.sum(jnp.cos(w + x)) for w in jax.tree.leaves(params))


def steps(tx: Any, count: int = 5) -> list[tuple[Any, Any]]:
    """Parameters and states after each step, as any training loop takes them."""

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        gradient = jax.grad(loss)(params, x)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    carries = [(PARAMS, tx.init(PARAMS))]
    for i in range(count):
        carries.append(step(*carries[-1], 0.3 * i))
    return carries


def descend(f: Any, inner: Any, count: int = 5) -> list[Any]:
    """Weights before and after each step of the functional form."""

    @jax.jit
    def step(w: Any, opt_state: Any, state: Any, x: Any) -> Any:
        _, gradient, state = f(w, state, x)
        updates, opt_state = inner.update(gradient, opt_state, w)
        return optax.apply_updates(w, updates), opt_state, state

    carries = [(PARAMS, inner.init(PARAMS), f.init(PARAMS))]
    for i in range(count):
        carries.append(step(*carries[-1], 0.3 * i))
    return [w for w, _, _ in carries]


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("nesterov", "constant"),
        ("adamw", "schedule"),
        ("lars", "constant"),
        pytest.param("galore", "constant", marks=pytest.mark.slow),
    ],
)
def test_is_the_functional_form_with_any_optimizer(name: str, rate: str) -> None:
    galore = lro.galore(0.05, rank=2, refresh_every=2)
    inner, inner_rate = {**OPTIMIZERS, "galore": galore}[name], RATES[rate]
    f = lro.extrapolated_value_and_grad(loss, "past_global", inner_rate)
    points = descend(f, inner)
    for (h, held), w in zip(steps(lro.extrapolate(inner, inner_rate)), points, strict=True):
        assert_close(lro.extrapolation_eval_params(h, held), w, 200)


def test_options_of_the_direction_are_those_of_the_functional_form() -> None:
    inner = OPTIMIZERS["nesterov"]
    for options in ({"direction": "normalized"}, {"max_norm": 0.5}):
        f = lro.extrapolated_value_and_grad(loss, "past_local", 0.3, **options)
        found = steps(lro.extrapolate(inner, 0.3, **options), 3)
        for (h, held), w in zip(found, descend(f, inner, 3), strict=True):
            assert_close(lro.extrapolation_eval_params(h, held), w, 200)


def test_around_sgd_it_is_optimistic_gradient_descent() -> None:
    tx = optax.optimistic_gradient_descent(1.0, alpha=0.2, beta=0.3)
    state = tx.init(PARAMS)
    state = (state[0]._replace(is_initial_step=jnp.array(False)), *state[1:])
    params = PARAMS
    for i, (h, _) in enumerate(steps(lro.extrapolate(optax.sgd(0.2), 0.3))):
        assert_close(h, params, 200)
        updates, state = tx.update(jax.grad(loss)(params, 0.3 * i), state, params)
        params = optax.apply_updates(params, updates)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["nesterov", *(pytest.param(n, marks=pytest.mark.full) for n in ("sgd", "adamw", "lars"))],
)
def test_zero_radius_is_the_wrapped_optimizer_to_the_last_bit(name: str) -> None:
    """Operation by operation: compiled, sums and products may be rounded together."""
    inner = OPTIMIZERS[name]
    with jax.disable_jit():
        plain = steps(inner, 2)
        for rate in (0.0, jnp.zeros(())):
            for (h, held), (w, state) in zip(
                steps(lro.extrapolate(inner, rate), 2), plain, strict=True
            ):
                assert_equal(h, w)
                assert_equal(held.inner, state)
                assert_equal(lro.extrapolation_eval_params(h, held), w)
    for (h, _), (w, _) in zip(steps(lro.extrapolate(inner, 0.0)), steps(inner), strict=True):
        assert_close(h, w)


def test_the_weights_are_found_wherever_the_state_is() -> None:
    labels = {"first": "a", "second": "b"}
    sgd = lambda rate: lro.extrapolate(optax.sgd(rate), 0.2)
    wrappers = {
        "chain": optax.chain(optax.clip_by_global_norm(1e9), sgd(0.1)),
        "inject": optax.inject_hyperparams(sgd)(rate=0.1),
        "multi_steps": optax.MultiSteps(sgd(0.1), 1).gradient_transformation(),
        "partition": optax.partition({"a": sgd(0.1), "b": sgd(0.1)}, labels),
        "masked": optax.masked(sgd(0.1), {"first": True, "second": False}),
    }
    plain = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, at(GRADIENTS, 0))
    for name, tx in wrappers.items():
        updates, state = tx.update(at(GRADIENTS, 0), tx.init(PARAMS), PARAMS)
        h = optax.apply_updates(PARAMS, updates)
        expected = {**plain, "second": h["second"]} if name == "masked" else plain
        assert_close(lro.extrapolation_eval_params(h, state), expected)


def test_a_state_without_extrapolation_is_refused() -> None:
    with pytest.raises(ValueError, match="no ExtrapolateState"):
        lro.extrapolation_eval_params(PARAMS, optax.adam(0.1).init(PARAMS))


def test_what_is_not_finite_in_a_gradient_is_not_looked_along() -> None:
    tx = lro.extrapolate(optax.sgd(0.1), 0.2)
    gradient = at(GRADIENTS, 0)
    bad = {**gradient, "second": {"kernel": gradient["second"]["kernel"].at[0, 0].set(jnp.nan)}}
    updates, state = tx.update(bad, tx.init(PARAMS))
    expected = 0.2 * gradient["second"]["kernel"].at[0, 0].set(0.0)
    assert_close(state.displacement["second"]["kernel"], expected)
    assert np.isnan(updates["second"]["kernel"][0, 0])
    assert_close(updates["first"], jax.tree.map(lambda g: -0.3 * g, gradient["first"]))


def test_a_step_on_a_cpu_copies_one_displacement_at_a_time() -> None:
    params = {name: jax.ShapeDtypeStruct((4, 64, 128), jnp.float32) for name in ("a", "b", "c")}
    tx = lro.extrapolate(optax.adamw(0.1), 0.1)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(tx.init, params), params
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.1 * 4 * 64 * 128 * 4


def test_bfloat16_does_not_drift_away_from_its_weights() -> None:
    """Each step rounds once: after 200 that add up to nothing, w is where it was."""
    params = {"w": jnp.linspace(0.5, 2.0, 64, dtype=jnp.bfloat16)}
    tx = lro.extrapolate(optax.sgd(0.0), 0.37)
    state, h = tx.init(params), params

    @jax.jit
    def step(h: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        gradient = {"w": jax.random.normal(key, (64,), jnp.bfloat16)}
        updates, state = tx.update(gradient, state, h)
        return optax.apply_updates(h, updates), state

    for key in jax.random.split(jax.random.key(0), 200):
        h, state = step(h, state, key)
    assert state.displacement["w"].dtype == jnp.bfloat16
    w = lro.extrapolation_eval_params(h, state)["w"]
    error = np.abs(np.asarray(w, np.float32) - np.asarray(params["w"], np.float32))
    # A random walk of 200 roundings, of at most half an ulp (2**-8) each in h and in the update.
    assert error.max() < 5 * np.sqrt(200 / 6) * 2.0**-7


def test_parameters_are_not_needed() -> None:
    tx = lro.extrapolate(optax.sgd(0.1), 0.2)
    state = tx.init(PARAMS)
    alone = tx.update(at(GRADIENTS, 0), state)
    assert_equal(alone, tx.update(at(GRADIENTS, 0), state, PARAMS))


def test_the_displacement_is_in_the_dtype_of_its_parameter() -> None:
    params = cast(PARAMS, jnp.bfloat16)
    state = lro.extrapolate(optax.sgd(0.1), 0.2).init(params)
    assert_equal(state.displacement, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_learning_rate": -1.0}, r"inner_learning_rate=-1\.0"),
        ({"inner_learning_rate": 0.1, "direction": "adam"}, "direction='adam'"),
        ({"inner_learning_rate": 0.1, "max_norm": -1}, "max_norm=-1"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.extrapolate(optax.sgd(0.1), **arguments)


def test_the_weights_of_an_nnx_optimizer() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    start = nnx.as_pure(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, lro.extrapolate(optax.sgd(0.1), 0.2), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 3)))))(model)
    optimizer.update(model, gradients)
    weights = lro.extrapolation_eval_params(
        nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)
    )
    expected = jax.tree.map(lambda w: w - 0.1, start)
    assert_close(nnx.to_pure_dict(weights), nnx.to_pure_dict(expected))
