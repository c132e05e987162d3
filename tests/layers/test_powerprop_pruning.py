"""Masks by magnitude, and optimizers that leave pruned weights alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

random = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return np.float32(random.normal(size=shape))


def magnitude_masks(params: Any, *args: Any, **options: Any) -> Any:
    return jax.jit(lambda params: lro.layers.magnitude_masks(params, *args, **options))(params)


PARAMS = {
    "up": {"kernel": normal(10, 20), "bias": normal(20)},
    "down": {"kernel": normal(20, 5), "bias": normal(5)},
}


def kept(masks: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(masks)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): int(m.sum()) for p, m in leaves}


def test_each_layer_keeps_its_share_of_the_largest() -> None:
    masks = magnitude_masks(PARAMS, 0.1)
    assert kept(masks) == {"down/kernel": 10, "up/kernel": 20}
    for name in ("up", "down"):
        sizes, mask = np.abs(PARAMS[name]["kernel"]), np.asarray(masks[name]["kernel"])
        assert sizes[mask].min() > sizes[~mask].max()
        assert masks[name]["bias"] == optax.MaskedNode()


def test_the_output_layer_keeps_twice_the_share() -> None:
    assert kept(magnitude_masks(PARAMS, 0.1, output="down")) == {
        "down/kernel": 20,
        "up/kernel": 20,
    }
    assert kept(magnitude_masks(PARAMS, 0.7, output="down"))["down/kernel"] == 100


def test_the_global_share_is_of_all_weights_together() -> None:
    params = {"up": {"kernel": 10 * PARAMS["up"]["kernel"]}, "down": PARAMS["down"]}
    masks = magnitude_masks(params, 0.1, scope="global")
    assert sum(kept(masks).values()) == 30
    both = np.concatenate([np.abs(params[n]["kernel"]).ravel() for n in ("down", "up")])
    mask = np.concatenate([masks[n]["kernel"].ravel() for n in ("down", "up")])
    largest = np.zeros(300, bool)
    largest[np.argsort(-both)[:30]] = True
    differ = np.flatnonzero(largest != mask)
    assert set(differ) <= {int(np.argmax(both[:100])), int(np.argsort(-both)[29])}


def test_every_layer_keeps_at_least_one_weight() -> None:
    tiny = {"a": {"kernel": 1e-3 * normal(2, 2)}, "b": {"kernel": normal(2, 2)}}
    for scope in ("layer", "global"):
        assert kept(magnitude_masks(tiny, 0.01, scope)) == {"a/kernel": 1, "b/kernel": 1}


def test_all_are_kept_at_one_and_shares_are_not_lost_to_rounding() -> None:
    assert kept(magnitude_masks(PARAMS, 1)) == {"down/kernel": 100, "up/kernel": 200}
    assert kept(magnitude_masks(PARAMS, 0.29))["down/kernel"] == 29


def test_of_equal_sizes_the_first_are_kept() -> None:
    masks = magnitude_masks({"kernel": np.float32([[1, -1, 1, -1]])}, 0.5)
    assert masks["kernel"].tolist() == [[True, True, False, False]]


def test_stacked_layers_are_pruned_one_by_one() -> None:
    stack = {
        "norm": {"scale": np.ones((3, 6), np.float32)},
        "up": {"kernel": normal(3, 6, 6) * np.float32([1, 10, 100])[:, None, None]},
    }
    mask = magnitude_masks(stack, 0.25)["up"]["kernel"]
    for layer in range(3):
        alone = magnitude_masks({"kernel": stack["up"]["kernel"][layer]}, 0.25)
        np.testing.assert_array_equal(mask[layer], alone["kernel"])


@pytest.mark.parametrize("alpha", [1.375, 2.0, 4.0])
def test_masks_of_weights_and_of_what_is_trained_agree(alpha: float) -> None:
    theta = jax.jit(lambda p: lro.layers.powerprop_inverse(p, alpha))(PARAMS)
    of_theta = magnitude_masks(theta, 0.3)
    weights = jax.jit(lambda t: lro.layers.powerprop(t, alpha))(theta)
    of_weights = magnitude_masks(weights, 0.3)
    jax.tree.map(np.testing.assert_array_equal, of_theta, of_weights)


def test_masked_parameters_are_exact_zeros_and_so_are_their_gradients() -> None:
    masks = magnitude_masks(PARAMS, 0.3)
    poisoned = jax.tree.map(np.copy, PARAMS)
    kernel = poisoned["up"]["kernel"].ravel()
    kernel[np.argmin(np.abs(kernel))] = np.nan
    pruned = jax.jit(lro.layers.apply_masks)(poisoned, masks)
    for name in ("up", "down"):
        mask = np.asarray(masks[name]["kernel"])
        expected = np.where(mask, PARAMS[name]["kernel"], 0)
        np.testing.assert_array_equal(pruned[name]["kernel"], expected)
        np.testing.assert_array_equal(pruned[name]["bias"], PARAMS[name]["bias"])
    total = lambda p: optax.tree.sum(lro.layers.apply_masks(p, masks))
    gradient = jax.jit(jax.grad(total))(PARAMS)
    np.testing.assert_array_equal(gradient["up"]["kernel"], masks["up"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_neither_momentum_nor_decay_moves_a_pruned_weight(alpha: float) -> None:
    masks = magnitude_masks(PARAMS, 0.3)
    inner = lro.layers.powerprop_updates(optax.sgd(0.1, momentum=0.9), alpha, "plain")
    inner = optax.chain(inner, optax.add_decayed_weights(-0.01))
    params = PARAMS  # weights that are off, but not zero, stay as they are too
    tx = lro.layers.mask_updates(inner, masks)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(4):
        gradients = jax.tree.map(lambda p, s=seed: np.cos(p + np.float32(s)), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    for name in ("up", "down"):
        mask = np.asarray(masks[name]["kernel"])
        same = np.asarray(params[name]["kernel"] == PARAMS[name]["kernel"])
        np.testing.assert_array_equal(same, ~mask)
        assert (params[name]["bias"] != PARAMS[name]["bias"]).all()


def test_masks_may_be_a_function_of_the_parameters() -> None:
    masks = lambda params: lro.layers.magnitude_masks(params, 0.3)
    states = [
        lro.layers.mask_updates(optax.sgd(1.0), m).init(PARAMS) for m in (masks, masks(PARAMS))
    ]
    jax.tree.map(np.testing.assert_array_equal, states[0].mask, states[1].mask)


def test_bad_arguments_are_refused() -> None:
    masks = lro.layers.magnitude_masks
    for keep in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="keep="):
            masks(PARAMS, keep)
    for keep in (jnp.float32(0.5), True):
        with pytest.raises(TypeError, match="keep="):
            masks(PARAMS, keep)
    with pytest.raises(ValueError, match="scope='local'"):
        masks(PARAMS, 0.5, "local")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="output='down'"):
        masks(PARAMS, 0.5, "global", output="down")
    tx = lambda name: lro.layers.mask_updates(
        optax.sgd(0.1), {name: {"kernel": jnp.ones((2, 2), bool)}}
    )
    with pytest.raises(ValueError, match=r"mask of 'up/kernel' has the shape \(2, 2\)"):
        tx("up").init(PARAMS)
    with pytest.raises(ValueError, match="'side/kernel', which is not a parameter"):
        tx("side").init(PARAMS)
