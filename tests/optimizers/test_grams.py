"""Grams and cautious AdamW: the official codes' numbers, and what follows from the definitions."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.optimizers.grams import cautious_adamw, grams
from tests.optimizers.direction_runs import reference
from tests.projection.runs import state_bytes

WORKED = [[1.0, -2.0, 0.5], [-1.0, -2.0, 0.0], [-1.0, 1.0, 1e-5]]
START = [1.0, -1.0, 0.5]
OFFICIAL = [
    [0.90000316, -0.90000158, 0.40000632],
    [0.9052662, -0.8000027, 0.40000632],
    [0.94548687, -0.8515675, 0.34821263],
]
AFTER_CORRECTION = [
    [0.9000001, -0.90000005, 0.4000002],
    [0.90526325, -0.8000001, 0.4000002],
    [0.94548462, -0.85156541, 0.3482034],
]
DECAYED = [
    [0.89000316, -0.89000158, 0.39500632],
    [0.88636617, -0.78110268, 0.39105626],
    [0.91772318, -0.82485645, 0.335352],
]
CAUTIOUS = [
    [0.92500237, -0.92500119, 0.42500474],
    [0.93026541, -0.8250023, 0.42500474],
    [0.97048608, -0.8250023, 0.37321105],
]


def positions(tx: optax.GradientTransformation, gradients: Any, start: Any) -> np.ndarray:
    """The parameters after each step."""

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    scan = lambda start, gradients: jax.lax.scan(step, (start, tx.init(start)), gradients)[1]
    return np.asarray(jax.jit(scan)(start, gradients))


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Point 4: the worked run


@pytest.mark.parametrize(
    ("tx", "wanted"),
    [
        (grams(0.1), OFFICIAL),
        (grams(0.1, eps_placement="after_bias_correction"), AFTER_CORRECTION),
        (grams(0.1, weight_decay=0.1), DECAYED),
        (cautious_adamw(0.1, scale="count_plus_one"), CAUTIOUS),
    ],
    ids=["official", "eps after correction", "decayed", "cautious"],
)
def test_the_worked_run_of_the_official_code(tx: Any, wanted: list[list[float]]) -> None:
    with jax.enable_x64(True):
        found = positions(tx, np.asarray(WORKED), np.asarray(START))
    # The printed digits; eps_t is at hand in float32 where hyper-parameters are Python floats.
    np.testing.assert_allclose(found, wanted, atol=1.1e-8)


@pytest.mark.parametrize("scale", ["mean_clamped", "count_plus_one"])
def test_cautious_scales_of_float64_are_float64(scale: Any) -> None:
    gradients = np.random.default_rng(0).normal(size=(6, 7))
    with jax.enable_x64(True):
        adam, tx = (
            positions(x, gradients, np.zeros(7))
            for x in (
                optax.adam(0.1, eps=1e-6),
                cautious_adamw(0.1, scale=scale, eps_placement="after_bias_correction"),
            )
        )
    plain, found = (np.diff(x, axis=0, prepend=np.zeros((1, 7))) for x in (adam, tx))
    for u, update, g in zip(plain, found, gradients, strict=True):
        np.testing.assert_allclose(update, reference(u, g, "cautious", scale), atol=1e-13)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_without_bias_correction_it_is_the_listing_as_it_stands(eps: float) -> None:
    """Step 3 of the definition with s = lr, in float64."""
    gradients = normal((6, 4))
    m, v, p = np.zeros(4), np.zeros(4), np.ones(4)
    for g in np.float64(gradients):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - 0.1 * 0.2 * p
        p = p - 0.1 * np.sign(g) * np.abs(m) / (np.sqrt(v) + eps)
    tx = grams(0.1, eps=eps, weight_decay=0.2, bias_correction=False)
    assert_close(positions(tx, gradients, np.ones(4, "f4"))[-1], p, 100)


# Points 1 to 3, 5 and 8: against Adam


def both(gradients: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Updates of Grams and of Adam."""
    zeros = np.zeros(np.shape(gradients)[1:], np.float32)
    ours = grams(0.1, eps_placement="after_bias_correction", **options)
    return tuple(
        np.diff(positions(tx, gradients, zeros), axis=0, prepend=zeros[None])
        for tx in (ours, optax.adam(0.1, **{"eps": 1e-6} | options))
    )


def test_sizes_are_those_of_adam_and_signs_those_against_the_gradient() -> None:
    gradients = np.where(np.abs(drawn := normal((40, 6))) < 0.2, 0, drawn)
    found, adam = both(gradients)
    moves = gradients != 0
    np.testing.assert_allclose(np.abs(found)[moves], np.abs(adam)[moves], atol=1e-6)
    assert np.all(found * gradients <= 0)
    assert np.abs(found - adam).max() > 0.01  # they are not the same


def test_the_first_step_is_that_of_adam() -> None:
    found, adam = both(normal((1, 6)))
    assert_close(found, adam)


def test_gradients_of_constant_sign_give_adam_for_ever() -> None:
    signs = np.array([1.0, -1.0, 1.0], np.float32)
    found, adam = both(np.abs(normal((300, 3))) * signs)
    np.testing.assert_allclose(found, adam, atol=1e-6)


def test_without_momentum_it_is_adam() -> None:
    found, adam = both(normal((100, 5)), b1=0.0)
    np.testing.assert_allclose(found, adam, atol=1e-6)


@pytest.mark.parametrize("recipe", [grams, cautious_adamw])
def test_a_frozen_weight_never_moves(recipe: Any) -> None:
    gradients = normal((50, 4)) * np.array([1.0, 0.0, 1.0, 0.0], np.float32)
    moved = positions(recipe(0.1), gradients, np.ones(4, "f4"))[-1] != 1
    np.testing.assert_array_equal(moved, [True, False, True, False])


def test_a_zero_gradient_stops_what_momentum_would_move() -> None:
    gradients = np.array([[1.0, 1.0], [1.0, 0.0]], np.float32)
    for tx in (grams(0.1), cautious_adamw(0.1, scale="none")):
        first, second = positions(tx, gradients, np.zeros(2, "f4"))
        assert second[1] == first[1]
        assert second[0] < first[0]


# Facts and options


def test_the_order_of_first_order_decreases() -> None:
    """Grams at least the unscaled cautious one, and that at least Adam."""
    gradients = normal((10, 200))
    zeros = np.zeros(200, np.float32)
    options = {"eps_placement": "after_bias_correction"}
    before = None
    for tx in (
        grams(0.1, **options),
        cautious_adamw(0.1, scale="none", **options),
        optax.adam(0.1, eps=1e-6),
    ):
        moves = np.diff(positions(tx, gradients, zeros), axis=0)
        decrease = -(gradients[1:] * moves).sum(axis=1)
        assert before is None or np.all(before > decrease)
        before = decrease


def test_cautious_with_the_current_scale_is_written_out() -> None:
    """The current C-Optim in NumPy, for one tensor, decay before the step and left unmasked."""
    gradients = normal((6, 5, 4))
    m, v, p = (np.zeros((5, 4)) for _ in range(3))
    p = p + 1
    for t, g in enumerate(np.float64(gradients), 1):
        p = p * (1 - 0.01 * 0.1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        mask = (m * g > 0).astype(float)
        mask /= max(mask.mean(), 1e-3)
        size = 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        p = p - size * m * mask / (np.sqrt(v) + 1e-6)
    tx = cautious_adamw(0.01, weight_decay=0.1)
    assert_close(positions(tx, gradients, np.ones((5, 4), "f4"))[-1], p, 100)


def test_decay_is_masked_by_leaf() -> None:
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    for recipe in (grams, cautious_adamw):
        tx = recipe(0.1, weight_decay=0.5, weight_decay_mask={"kernel": True, "bias": False})
        zero = jax.tree.map(np.zeros_like, params)
        updates = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p)[0])(zero, params)
        assert_close(updates["kernel"], -0.05)
        assert not np.any(updates["bias"])


@pytest.mark.parametrize("recipe", [grams, cautious_adamw])
@pytest.mark.parametrize("bits", [8, 4])
def test_moments_in_few_bits_train_as_before(recipe: Any, bits: Any) -> None:
    target = jnp.asarray(normal((8, 512)))

    def train(tx: optax.GradientTransformation) -> tuple[float, Any]:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(params - target, state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), length=60)[0])
        params, state = run(jnp.zeros_like(target))
        return float(jnp.mean((params - target) ** 2)), state

    rate = optax.linear_schedule(0.1, 0.0, 60)
    (plain, whole), (coded, state) = train(recipe(rate)), train(recipe(rate, state_bits=bits))
    assert state_bytes(state) < {8: 0.27, 4: 0.15}[bits] * state_bytes(whole)
    assert plain < 0.05
    assert coded < plain + 0.02


def test_the_first_moment_in_bfloat16() -> None:
    gradients = normal((20, 64))
    for recipe in (grams, cautious_adamw):
        state = jax.eval_shape(recipe(0.1, mu_dtype=jnp.bfloat16).init, gradients[0])
        assert optax.tree.get(state, "mu").dtype == jnp.bfloat16
        assert optax.tree.get(state, "nu").dtype == jnp.float32
        narrow, wide = (
            positions(recipe(0.1, mu_dtype=dtype), gradients, np.zeros(64, "f4"))
            for dtype in (jnp.bfloat16, None)
        )
        np.testing.assert_allclose(narrow, wide, atol=0.02)


def test_bfloat16_parameters_have_float32_moments() -> None:
    for recipe in (grams, cautious_adamw):
        tx = recipe(0.1)
        params = jnp.ones(4, jnp.bfloat16)
        updates, state = jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p)), params)
        assert updates.dtype == jnp.bfloat16
        assert optax.tree.get(state, "mu").dtype == jnp.float32


@pytest.mark.parametrize("recipe", [grams, cautious_adamw])
def test_bad_arguments_are_refused(recipe: Any) -> None:
    with pytest.raises(ValueError, match="eps_placement='before' must be 'before_bias_correction'"):
        recipe(0.1, eps_placement="before")
    with pytest.raises(ValueError, match=r"b2=1\.0 must be at least 0 and below 1"):
        recipe(0.1, b2=1.0)
    with pytest.raises(ValueError, match=r"b1=-0\.1 must be"):
        recipe(0.1, b1=-0.1)


# Noise


def quadratic_losses(tx: Any, curvatures: np.ndarray, noise: float, steps: int) -> np.ndarray:
    """Losses ``[steps]`` on a quadratic, from ones: the mean of 16 runs with noise of their own."""
    drawn = np.random.default_rng(0).normal(size=(16, steps, len(curvatures)))
    curvatures = jnp.asarray(curvatures, jnp.float32)

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(curvatures * params + noise, state)
        params = optax.apply_updates(params, updates)
        return (params, state), 0.5 * jnp.sum(curvatures * params**2)

    start = jnp.ones(curvatures.shape)
    run = lambda noise: jax.lax.scan(step, (start, tx.init(start)), noise)[1]
    losses = jax.jit(jax.vmap(run))(jnp.asarray(noise * drawn, jnp.float32))
    return np.asarray(losses).mean(axis=0)


OPTIMIZERS = {"adam": optax.adam, "grams": grams, "cautious": cautious_adamw}


@pytest.mark.full
def test_noise_costs_grams_what_momentum_would_average() -> None:
    """The specification's quadratic in 50 dimensions: at step 1000, and around step 3750."""
    curvatures = np.geomspace(0.01, 1, 50)
    losses = {
        name: quadratic_losses(make(3e-3), curvatures, 1.0, 4000)
        for name, make in OPTIMIZERS.items()
    }
    wanted = {"adam": (0.88, 0.23), "grams": (1.8, 0.52), "cautious": (0.8, 0.22)}
    for name, (early, late) in wanted.items():
        np.testing.assert_allclose(losses[name][1000], early, rtol=0.06, err_msg=name)
        np.testing.assert_allclose(losses[name][-500:].mean(), late, rtol=0.1, err_msg=name)


@pytest.mark.full
def test_noise_slows_grams_down_and_its_own_floor_is_lower() -> None:
    """With one curvature all have arrived: what looked like a high floor was the way to it."""
    floors = {
        name: quadratic_losses(make(3e-3), np.ones(50), 1.0, 5000)[-1000:].mean()
        for name, make in OPTIMIZERS.items()
    }
    assert floors["grams"] < 0.6 * floors["adam"] < 0.6 * floors["cautious"]


def test_without_noise_all_fall_alike_until_signs_flip_and_grams_ends_lowest() -> None:
    curvatures = np.geomspace(0.01, 1, 50)
    losses = {
        name: quadratic_losses(make(1e-2), curvatures, 0.0, 500)
        for name, make in OPTIMIZERS.items()
    }
    for name in ("grams", "cautious"):
        np.testing.assert_allclose(losses[name][:200], losses["adam"][:200], rtol=0.01)
    assert losses["grams"][-1] < 1e-3 * losses["cautious"][-1] < 1e-3 * losses["adam"][-1]
