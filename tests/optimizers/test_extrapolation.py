"""Gradients ahead of the weights: what the variants have in common, and what becomes of them."""

import functools
import pickle
from typing import Any

from close import assert_close
from harness.trees import assert_equal, is_zero
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.optimizers import ExtrapolationState

VARIANTS = ("past_local", "past_global", "fresh", "same", "noise", "none")
KERNEL, BIAS = np.linspace(-1, 1, 12).reshape(4, 3), np.array([0.1, 0, -0.2])
PARAMS = {"kernel": jnp.asarray(KERNEL, jnp.float32), "bias": jnp.asarray(BIAS, jnp.float32)}
BATCHES = np.random.default_rng(0).normal(size=(6, 8, 4)).astype(np.float32)


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.tanh(x @ params["kernel"] + params["bias"]) ** 2, -1))


gradient_of = jax.jit(jax.grad(loss_fn))


def made(*args: Any, **options: Any) -> tuple[Any, Any]:
    """`init` and the compiled call."""
    f = lro.extrapolated_value_and_grad(*args, **options)
    return f.init, jax.jit(f)


def more(variant: str, batch: Any) -> dict[str, Any]:
    """The batch of the first pass, of the variant that needs one."""
    return {"independent": (batch,)} if variant == "fresh" else {}


def run(
    variant: str,
    rate: Any,
    tx: optax.GradientTransformation,
    params: Any = PARAMS,
    batches: jax.Array = BATCHES,
    loss: Any = loss_fn,
    **options: Any,
) -> tuple[Any, Any]:
    """The weights after each step, stacked, and the last states."""
    f = lro.extrapolated_value_and_grad(loss, variant, rate, **options)

    def step(carry: Any, batch: jax.Array) -> tuple[Any, Any]:
        weights, opt_state, state = carry
        _, gradient, state = f(weights, state, batch, **more(variant, jnp.flip(batch)))
        updates, opt_state = tx.update(gradient, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, opt_state, state), weights

    carry, weights = jax.jit(lambda *carry: jax.lax.scan(step, carry, batches))(
        params, tx.init(params), f.init(params)
    )
    return weights, carry[1:]


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lars": optax.lars(0.1),
}


@functools.cache
def plain(name: str) -> Any:
    return run("none", 0.0, OPTIMIZERS[name])


@pytest.mark.parametrize(
    ("variant", "name", "rate"),
    [
        ("past_local", "sgd", 0.0),
        *((v, n, jnp.float32(0)) for v, n in zip(VARIANTS, [*OPTIMIZERS] * 2, strict=False)),
        *((v, "nesterov", lambda count: 0.0 * count) for v in VARIANTS[:-1]),
    ],
)
def test_zero_radius_is_the_wrapped_optimizer(variant: str, name: str, rate: Any) -> None:
    """As a number, traced, and from a schedule; whatever the optimizer."""
    expected, (expected_state, _) = plain(name)
    weights, (opt_state, _) = run(variant, rate, OPTIMIZERS[name])
    assert_close((weights, opt_state), (expected, expected_state), 100)


def linear(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(x @ params["kernel"]) + jnp.sum(params["bias"])


def test_a_constant_gradient_is_the_same_everywhere() -> None:
    batches = np.broadcast_to(BATCHES[:1], BATCHES.shape)
    descend = lambda variant, rate: run(
        variant, rate, OPTIMIZERS["nesterov"], batches=batches, loss=linear
    )[0]
    expected = descend("none", 0.0)
    for variant in VARIANTS[:-1]:
        assert_close(descend(variant, 0.7), expected)


@pytest.mark.parametrize("variant", ["past_local", "past_global"])
def test_past_variants_are_as_written_down(variant: str) -> None:
    """h = w - inner_learning_rate * (last gradient), in NumPy float64, with momentum."""
    target, w, rate, momentum, inner = np.array([1.0, -2.0]), np.zeros(2), 0.3, 0.9, 0.2
    curvature = np.array([1.0, 3.0])
    trace, last, expected = np.zeros(2), np.zeros(2), []
    for _ in range(5):
        gradient = curvature * (w - inner * last - target)
        trace = momentum * trace + gradient
        w, last = w - rate * trace, gradient
        expected.append(w)
    loss = lambda p, x: 0.5 * jnp.sum(jnp.asarray(curvature) * (p - jnp.asarray(target)) ** 2)
    tx = optax.sgd(rate, momentum=momentum)
    found, (_, state) = run(variant, inner, tx, jnp.zeros(2), jnp.zeros(5), loss)
    assert_close(found, expected, 800)
    assert_close(state.previous_gradient, last, 800)
    assert int(state.count) == 5


def test_two_pass_variants_are_as_written_down() -> None:
    x, y = BATCHES[0], BATCHES[1]
    for variant, first in (("same", x), ("fresh", y)):
        init, call = made(loss_fn, variant, 0.3)
        value, gradient, state = call(PARAMS, init(PARAMS), x, **more(variant, y))
        point = jax.tree.map(lambda w, g: w - 0.3 * g, PARAMS, gradient_of(PARAMS, first))
        expected = jax.jit(jax.value_and_grad(loss_fn))(point, x)
        assert_close((value, gradient), expected, 100)
        assert (state.previous_gradient, state.key) == ((), ())


@pytest.mark.parametrize("variant", ["past_local", "noise"])
def test_a_pickled_function_gives_the_same_gradients(variant: str) -> None:
    f = lro.extrapolated_value_and_grad(loss_fn, variant, 0.1)
    again = pickle.loads(pickle.dumps(f))
    assert_equal(f(PARAMS, f.init(PARAMS), BATCHES[0]), again(PARAMS, f.init(PARAMS), BATCHES[0]))


def test_the_first_step_is_plain() -> None:
    for variant in ("past_local", "past_global"):
        init, call = made(loss_fn, variant, 0.5)
        gradient = call(PARAMS, init(PARAMS), BATCHES[0])[1]
        assert_close(gradient, gradient_of(PARAMS, BATCHES[0]), 100)


def test_an_active_phase_ends_where_the_schedule_is_zero() -> None:
    """From then on the first pass is skipped: its batch may be anything."""
    schedule = lambda count: jnp.where(count < 2, 0.5, 0.0)
    plain = gradient_of(PARAMS, BATCHES[2])
    for variant in VARIANTS[:-1]:
        init, call = made(loss_fn, variant, schedule)
        _, _, state = call(PARAMS, init(PARAMS), BATCHES[0], **more(variant, BATCHES[1]))
        ahead, state = call(PARAMS, state, BATCHES[2], **more(variant, BATCHES[3]))[1:]
        assert not np.allclose(ahead["kernel"], plain["kernel"], rtol=1e-3), variant
        bad = np.full_like(BATCHES[3], np.nan)
        after = call(PARAMS, state, BATCHES[2], **more(variant, bad))[1]
        assert_close(after, plain, 100)


@pytest.mark.parametrize("variant", ["same", "fresh"])
def test_the_first_pass_does_not_run_at_a_rate_of_zero(variant: str) -> None:
    passes = []

    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: passes.append(1))
        return jnp.sum(params * x)

    f = lro.extrapolated_value_and_grad(loss, variant, lambda count: jnp.where(count > 0, 0.0, 0.1))
    w, x = jnp.ones(2), jnp.ones(2)
    step = jax.jit(lambda state: f(w, state, x, **more(variant, x)))
    state = f.init(w)
    counts = []
    for _ in range(2):
        passes.clear()
        state = step(state)[2]
        jax.effects_barrier()
        counts.append(len(passes))
    assert counts == [2, 1]


def test_after_a_gradient_that_is_not_finite_the_step_is_plain() -> None:
    plain = gradient_of(PARAMS, BATCHES[1])
    for variant in ("past_local", "past_global", "fresh"):
        init, call = made(loss_fn, variant, 0.5)
        for value in (np.nan, np.inf):
            bad = BATCHES[0].copy()
            bad[0, 0] = value
            state, batch = init(PARAMS), {"independent": (bad,)}
            if variant != "fresh":
                _, gradient, state = call(PARAMS, state, bad)
                assert not np.isfinite(gradient["kernel"]).all()  # is seen, as it would be plain
                assert is_zero(state.previous_gradient)
                batch = {}
            assert_close(call(PARAMS, state, BATCHES[1], **batch)[1], plain, 100)


def test_running_statistics_are_updated_once_and_ahead() -> None:
    """Of the two passes, the one that the gradient is taken from."""

    def loss(params: Any, x: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = x @ params["kernel"]
        batch_mean = hidden.mean(0)
        return jnp.mean((hidden - batch_mean) ** 3), 0.9 * mean + 0.1 * batch_mean

    mean = jnp.zeros(3)
    gradient_of = jax.jit(jax.grad(loss, has_aux=True))
    for variant in ("same", "fresh"):
        init, call = made(loss, variant, 0.3, has_aux=True)
        first = {"independent": (BATCHES[1], mean)} if variant == "fresh" else {}
        (value, after), _, _ = call(PARAMS, init(PARAMS), BATCHES[0], mean, **first)
        at = BATCHES[1] if variant == "fresh" else BATCHES[0]
        gradient = gradient_of(PARAMS, at, mean)[0]
        point = jax.tree.map(lambda w, g: w - 0.3 * g, PARAMS, gradient)
        hidden = BATCHES[0] @ np.asarray(point["kernel"])
        batch_mean = hidden.mean(0)
        size = np.mean(np.abs(hidden - batch_mean) ** 3)
        assert_close(value, np.mean((hidden - batch_mean) ** 3), 200, size=size)
        assert_close(after, 0.1 * batch_mean, 100)


def test_same_shares_the_keys_of_dropout_and_fresh_has_its_own() -> None:
    def loss(params: jax.Array, key: jax.Array, *, keep: float) -> jax.Array:
        return jnp.sum(jnp.where(jax.random.bernoulli(key, keep, params.shape), params**2, 0.0))

    w, keys = np.arange(1.0, 65.0, dtype=np.float32), [jax.random.key(i) for i in range(2)]
    kept = [np.asarray(jax.random.bernoulli(key, 0.5, w.shape)) for key in keys]
    for variant, first in (("same", kept[0]), ("fresh", kept[1])):
        init, call = made(loss, variant, 0.1)
        gradient = call(w, init(w), keys[0], keep=0.5, **more(variant, keys[1]))[1]
        expected = np.where(kept[0], 2 * w * np.where(first, 0.8, 1.0), 0.0)
        assert_close(gradient, expected)


def test_the_direction_is_bounded() -> None:
    for variant in ("past_local", "same"):
        init, call = made(lambda w, x: 50 * jnp.sum(w**2), variant, 1.0, max_norm=2)
        w = np.array([3.0, 4.0], np.float32)
        _, _, state = call(w, init(w), 0)
        gradient = call(w, state, 0)[1]
        assert_close(gradient, 100 * (w - 2 * w / 5), 100)


def test_a_normalized_direction_has_a_mean_square_of_one_in_every_leaf() -> None:
    scales = {"kernel": 1e-3, "bias": 7.0}
    loss = lambda p, _: sum(jnp.sum(s * p[n] ** 2) / 2 for n, s in scales.items())
    init, call = made(loss, "past_global", 0.1, direction="normalized")
    _, first, state = call(PARAMS, init(PARAMS), 0)
    gradient = call(PARAMS, state, 0)[1]
    for name, scale in scales.items():
        g = np.asarray(first[name])
        point = PARAMS[name] - 0.1 * g / np.sqrt(np.mean(g**2))
        np.testing.assert_allclose(gradient[name], scale * point, rtol=1e-4, atol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    _, _, state = call(zero, init(zero), 0)
    assert is_zero(call(zero, state, 0)[1])


def test_a_direction_may_be_preconditioned_by_the_optimizer() -> None:
    """What Adam would divide by: a gradient of one size then moves all weights alike."""
    curvature = np.array([1e-3, 1.0, 1e3], np.float32)
    loss = lambda w, _: 0.5 * jnp.sum(curvature * w**2)
    tx, w = optax.adam(0.1), jnp.ones(3)

    @jax.jit
    def step(w: Any, opt_state: Any, state: Any) -> tuple[Any, Any]:
        nu = opt_state[0].nu / (1 - 0.999 ** jnp.maximum(opt_state[0].count, 1))
        f = lro.extrapolated_value_and_grad(
            loss, "past_local", 0.1, direction=lambda g: g / (jnp.sqrt(nu) + 1e-8)
        )
        _, gradient, state = f(w, state, 0)
        return gradient, (tx.update(gradient, opt_state, w)[1], state)

    state = lro.extrapolated_value_and_grad(loss, "past_local", 0.1).init(w)
    _, states = step(w, tx.init(w), state)
    gradient, _ = step(w, *states)
    assert_close(gradient, curvature * 0.9, 800)


@settings(max_examples=12, deadline=None)
@given(
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32]),
    variant=st.sampled_from(VARIANTS),
    shape=st.sampled_from([(), (0,), (3,), (2, 3), (2, 3, 2)]),
)
def test_dtypes_shapes_and_structure_stay(dtype: Any, variant: str, shape: Any) -> None:
    params = {"w": jnp.ones(shape, dtype), "f32": jnp.ones(2), "hole": None}
    params |= {"masked": optax.MaskedNode()}
    leaves_loss = lambda p, x: sum(
        jnp.sum(w.astype(jnp.float32) ** 2) * x for w in jax.tree.leaves(p)
    )
    f = lro.extrapolated_value_and_grad(leaves_loss, variant, jnp.float32(0.1))
    call = lambda params, state: f(params, state, 1.0, **more(variant, 1.0))
    state = f.init(params)
    value, gradient, after = jax.eval_shape(call, params, state)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    assert types(gradient) == types(params)
    assert types(after) == types(state)
    assert value.shape == ()


def test_the_point_ahead_of_bfloat16_weights_is_rounded_once() -> None:
    draw = lambda seed: np.random.default_rng(seed).normal(size=500)
    w, slope = (jnp.asarray(draw(seed), jnp.bfloat16) for seed in (1, 2))
    loss = lambda w, _: (jnp.sum(w * slope), w)
    # Not compiled: the product is rounded before the difference, as NumPy's.
    call = lro.extrapolated_value_and_grad(loss, "past_global", 0.3, has_aux=True)
    state = call(w, call.init(w), 0)[2]
    (_, point), gradient, _ = call(w, state, 0)
    wide = lambda x: np.asarray(x, np.float32)
    assert_equal(point, jnp.asarray(wide(w) - np.float32(0.3) * wide(slope), jnp.bfloat16))
    twice = np.asarray(w) - np.asarray(jnp.bfloat16(0.3)) * np.asarray(slope)
    assert (np.asarray(point) != twice).any()  # what rounding twice would give
    assert gradient.dtype == jnp.bfloat16


def test_empty_trees_and_zero_gradients() -> None:
    for variant in VARIANTS:
        init, call = made(lambda p, x: 1.0 * x, variant, 0.1)
        value, gradient, _ = call({}, init({}), 2.0, **more(variant, 2.0))
        assert (float(value), gradient) == (2.0, {})
        if variant != "noise":
            init, call = made(lambda p, x: jnp.sum(p**2), variant, 0.1)
            zeros = np.zeros(2, np.float32)
            assert is_zero(call(zeros, init(zeros), 0.0, **more(variant, 0.0))[1])


def test_the_state_is_constant_under_cond_and_vmap() -> None:
    f = lro.extrapolated_value_and_grad(loss_fn, "past_local", 0.1)
    state = f.init(PARAMS)
    skip = lambda take: jax.lax.cond(
        take, lambda s: f(PARAMS, s, BATCHES[0])[2], lambda s: s, state
    )
    assert_equal(jax.jit(skip)(False), state)
    members = jax.tree.map(lambda w: np.stack([w, 2 * np.asarray(w)]), PARAMS)
    mapped, call = jax.jit(jax.vmap(f, in_axes=(0, 0, None))), jax.jit(f)
    _, _, states = mapped(members, jax.vmap(f.init)(members), BATCHES[0])
    gradient = mapped(members, states, BATCHES[1])[1]
    _, _, state = call(PARAMS, state, BATCHES[0])
    expected = call(PARAMS, state, BATCHES[1])[1]
    assert_close(jax.tree.map(lambda g: np.asarray(g)[0], gradient), expected, 100)


def test_the_stored_gradient_is_no_moment() -> None:
    from lowrank_optax.states.moment_names import moment_kinds

    state = ExtrapolationState(0, PARAMS, ())
    assert moment_kinds(state) == [None] * 3
    assert moment_kinds(lro.extrapolate(optax.sgd(0.1), 0.1).init(PARAMS)) == [None] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "past"}, "variant='past'"),
        ({"inner_learning_rate": -0.1}, r"inner_learning_rate=-0\.1"),
        ({"direction": "adam"}, "direction='adam'"),
        ({"max_norm": 0.0}, r"max_norm=0\.0"),
        ({"noise": "cauchy"}, "noise='cauchy'"),
        ({"local_groups": 0}, "local_groups=0"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_given(options: Any, message: str) -> None:
    good = {"variant": "same", "inner_learning_rate": 0.1}
    with pytest.raises(ValueError, match=message):
        lro.extrapolated_value_and_grad(loss_fn, **{**good, **options})


def test_an_independent_batch_is_given_to_fresh_and_to_no_other() -> None:
    x = BATCHES[0]
    for variant in VARIANTS:
        f = lro.extrapolated_value_and_grad(loss_fn, variant, 0.1)
        wrong = {} if variant == "fresh" else {"independent": (x,)}
        with pytest.raises(ValueError, match="independent"):
            f(PARAMS, f.init(PARAMS), x, **wrong)
    f = lro.extrapolated_value_and_grad(loss_fn, "fresh", 0.1)
    with pytest.raises(ValueError, match="must be a tuple"):
        f(PARAMS, f.init(PARAMS), x, independent=x)
