"""Options of every recipe: the official codes' epsilon and decay, and any inner optimizer."""

from collections.abc import Callable
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.states.assemble import scale_by_adam
from tests.projection.runs import Adam, first, float64, moved, normal_gradients, run

SHAPE = (5, 8)
RECIPES: dict[str, Callable[..., Any]] = {
    name: getattr(lro, name)
    for name in (
        "galore",
        "fira",
        "adarankgrad",
        "online_subspace_descent",
        "dct_adamw",
        "ldadam",
        "apollo",
        "apollo_mini",
    )
}
DECAYING = RECIPES | {"grams": lro.grams, "cautious_adamw": lro.cautious_adamw}

OFTEN = ("galore", "apollo")  # the others take the same way


def _every(names: Any) -> Any:
    marked = lambda name: name if name in OFTEN else pytest.param(name, marks=pytest.mark.full)
    return pytest.mark.parametrize("name", [marked(name) for name in names])


def _rank(name: str) -> dict[str, int]:
    return {} if name in ("grams", "cautious_adamw") else {"rank": 2}


@_every(RECIPES)
def test_epsilon_may_be_added_before_bias_correction(name: str) -> None:
    gradient, eps, b1, b2 = normal_gradients(SHAPE, 1)[0], 0.03, 0.8, 0.95
    options = {"rank": 2}
    before = RECIPES[name](
        0.1, b1=b1, b2=b2, eps=eps, eps_placement="before_bias_correction", **options
    )
    # sqrt(v) + eps, times what the correction is at the first step.
    after = RECIPES[name](0.1, b1=b1, b2=b2, eps=eps / (1 - b2) ** 0.5, **options)
    assert_close(first(before, gradient)[0], first(after, gradient)[0], 100)


def test_epsilon_before_bias_correction_is_that_of_hugging_face() -> None:
    gradients, eps, adam = normal_gradients(SHAPE, 5), 0.01, Adam()
    tx = scale_by_adam(0.9, 0.999, eps, "before_bias_correction")
    state = tx.init(gradients[0])
    for gradient, g in zip(gradients, float64(gradients), strict=True):
        updates, state = tx.update(gradient, state)
        adam.update(g)
        one, two = adam.corrections
        expected = np.sqrt(two) / one * adam.first / (np.sqrt(adam.second) + eps)
        assert_close(updates["kernel"], expected, 100, dtype=np.float32)


@_every(RECIPES)
def test_every_recipe_takes_an_inner_optimizer(name: str) -> None:
    gradients, make = normal_gradients(SHAPE, 3), RECIPES[name]
    # With one of its own, the limiter does not see norms after bias correction.
    options = {"rank": 2} | ({"gamma": 1e9} if name in ("fira", "apollo", "apollo_mini") else {})
    inner = optax.chain(optax.scale(8.0), optax.scale_by_adam(0.9, 0.99, 0.0))
    ours, theirs = (
        moved(tx, SHAPE, gradients)
        for tx in (make(1.0, inner=inner, **options), make(1.0, b1=0.9, b2=0.99, eps=0, **options))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@_every(DECAYING)
def test_weights_may_decay_after_the_step(name: str) -> None:
    gradients, params = normal_gradients(SHAPE, 3), {"kernel": jnp.ones(SHAPE)}
    rate, decay = optax.linear_schedule(0.2, 0.1, 3), 0.5
    after, plain = (
        DECAYING[name](rate, **_rank(name), **options)
        for options in ({"weight_decay": decay, "decay_placement": "after_step"}, {})
    )
    states = after.init(params), plain.init(params)
    step = jax.jit(
        lambda g, states: (after.update(g, states[0], params), plain.update(g, states[1]))
    )
    for i, gradient in enumerate(gradients):
        (found, one), (update, other) = step(gradient, states)
        states = one, other
        moved = np.float64(params["kernel"]) + np.float64(update["kernel"])
        expected = moved * (1 - float(rate(i)) * decay) - np.float64(params["kernel"])
        assert_close(found["kernel"], expected, 100, size=1, dtype=np.float32)


def test_decay_after_the_step_heeds_masks_and_micro_batches() -> None:
    params = {name: jnp.ones(SHAPE) for name in ("decays", "stays")}
    mask, options = {"decays": True, "stays": False}, {"rank": 2, "accumulate_steps": 2}
    gradient = {name: normal_gradients(SHAPE, 1)[0]["kernel"] for name in params}
    tx = lro.galore(
        0.1, weight_decay=0.5, decay_placement="after_step", weight_decay_mask=mask, **options
    )
    plain = lro.galore(0.1, **options)
    (same, _), (found, _) = run(tx, params, [gradient] * 2)
    (_, _), (update, _) = run(plain, params, [gradient] * 2)
    assert_close(same, params)
    assert_close(found["stays"], update["stays"])
    assert_close(found["decays"], 0.95 * update["decays"], 100)


def test_online_subspace_descent_starts_from_a_given_basis() -> None:
    gradients, basis = normal_gradients(SHAPE, 2), jnp.eye(5, 2)
    tx = lro.online_subspace_descent(0.1, 2, initial=lro.subspaces.fixed(basis))
    (_, state), (_, moved) = run(tx, gradients[0], gradients)
    assert_close(state[0].basis.basis["kernel"], basis)
    assert np.abs(moved[0].basis.basis["kernel"] - basis).max() > 1e-3


@pytest.mark.parametrize(
    ("option", "known"),
    [("eps_placement", "before_bias_correction"), ("decay_placement", "before_step")],
)
def test_unknown_placements_are_refused(option: str, known: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}='middle' must be '{known}' or"):
        lro.galore(0.1, **{option: "middle"})
