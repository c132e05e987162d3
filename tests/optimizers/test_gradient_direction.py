"""Direction rules around any optimizer: what the sign of the gradient changes, and what not."""

from typing import Any

from close import assert_close
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.matrices import WeightDimensionNumbers, weight_dimension_numbers
from lowrank_optax.models import Decoder, DecoderConfig
from lowrank_optax.optimizers.gradient_direction import weight_axes, with_gradient_direction
from lowrank_optax.slices.call import Whole
from tests.optimizers.direction_runs import MODES, normal, reference, updates_of

SCALES = ("mean_clamped", "count_plus_one", "none")
LION = optax.chain(optax.scale_by_lion(), optax.scale_by_learning_rate(0.1))
MATRIX = WeightDimensionNumbers(-2, -1)


@pytest.mark.parametrize(
    ("mode", "scale"), [("grams", "mean_clamped"), *(("cautious", scale) for scale in SCALES)]
)
def test_updates_are_the_inner_ones_turned(mode: Any, scale: Any) -> None:
    gradients, inner = normal((5, 4)), optax.adam(0.1)
    wanted = updates_of(inner, gradients)
    found = updates_of(with_gradient_direction(inner, mode, scale), gradients)
    for update, plain, gradient in zip(found, wanted, gradients, strict=True):
        assert_close(update, reference(plain, gradient, mode, scale), 100)


def test_cautious_lion_is_that_of_the_official_code() -> None:
    """C-Lion: the mask of what Lion does with the sign, scaled by n / (sum + 1)."""
    gradients = normal((7,))
    found = updates_of(with_gradient_direction(LION, "cautious", "count_plus_one"), gradients)
    momentum = np.zeros(7)
    for update, g in zip(found, np.float64(gradients), strict=True):
        u = np.sign(0.9 * momentum + 0.1 * g)
        momentum = 0.99 * momentum + 0.01 * g
        mask = (u * g > 0) * 7 / ((u * g > 0).sum() + 1)
        assert_close(update, -0.1 * u * mask, 100)


@pytest.mark.parametrize("mode", MODES)
def test_before_and_after_the_learning_rate_are_the_same(mode: Any) -> None:
    inside = with_gradient_direction(optax.adam(0.1), mode)
    before = with_gradient_direction(optax.scale_by_adam(), mode, along_gradient=True)
    outside = optax.chain(before, optax.scale_by_learning_rate(0.1))
    gradients = normal((5, 4))
    for one, other in zip(*(updates_of(tx, gradients) for tx in (inside, outside)), strict=True):
        assert_close(one, other)


@pytest.mark.slow
@settings(deadline=None, max_examples=8)
@given(
    shape=st.sampled_from([(), (0, 3), (2, 3, 4)]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 99),
)
def test_the_signs_never_agree_with_the_gradient(
    shape: tuple[int, ...], dtype: str, seed: int
) -> None:
    gradients = [g.astype(dtype) for g in normal(shape, 3, seed)]
    momentum = optax.sgd(0.5, momentum=0.9)
    plain = updates_of(momentum, gradients, jitted=False)[-1]
    sign = np.sign(np.float32(gradients[-1]))
    for mode in MODES:
        scale = {"scale": "none"} if mode == "cautious" else {}
        tx = with_gradient_direction(momentum, mode, **scale)
        update = updates_of(tx, gradients, jitted=False)[-1]
        assert update.dtype == jnp.dtype(dtype)
        assert np.all(np.float32(update) * sign <= 0)
        assert np.all(np.abs(update) <= np.abs(plain))
        if mode == "grams":
            moves = sign != 0
            np.testing.assert_array_equal(np.abs(update)[moves], np.abs(plain)[moves])
            assert not update[~moves].any()


@pytest.mark.parametrize("scale", SCALES)
def test_the_mask_of_cautious_keeps_its_sum(scale: Any) -> None:
    """Point 7: kept elements times their scale are all elements, while there are enough of them."""
    gradients = [np.ones(2000), np.where(np.arange(2000) < 500, 0.1, -0.1)]
    gradients = [g.astype(np.float32) for g in gradients]
    inner = optax.trace(0.9)
    tx = with_gradient_direction(inner, "cautious", scale, along_gradient=True)
    update, plain = (updates_of(x, gradients)[-1] for x in (tx, inner))
    sizes = update / plain
    assert np.count_nonzero(sizes) == 500
    wanted = {"mean_clamped": 2000, "count_plus_one": 500 * 2000 / 501, "none": 500}
    assert_close(sizes.sum(), wanted[scale], 100)


def test_a_mask_of_few_elements_is_scaled_by_a_thousand_at_most() -> None:
    gradients = np.ones((2, 5000), np.float32)
    gradients[1] = np.where(np.arange(5000) == 0, 0.1, -0.1)
    tx = with_gradient_direction(optax.trace(0.9), "cautious", along_gradient=True)
    update = updates_of(tx, gradients)[-1]
    assert_close(update[0], 1000.0, 100)


@pytest.mark.parametrize("scale", SCALES)
def test_a_mask_without_elements_leaves_nothing(scale: Any) -> None:
    gradients = [jnp.ones(4), jnp.full(4, -0.1)]
    update = updates_of(with_gradient_direction(optax.sgd(1.0, 0.9), "cautious", scale), gradients)[
        -1
    ]
    assert not update.any()


@pytest.mark.parametrize("kept", [0, 1])
def test_scales_beyond_the_range_of_float16(kept: int) -> None:
    first = np.ones(200_000, np.float16)
    gradients = [first, np.where(np.arange(200_000) < kept, 0.1, -0.1).astype(np.float16)]
    tx = with_gradient_direction(optax.sgd(1e-3, 0.9), "cautious", "count_plus_one")
    update = np.float64(updates_of(tx, gradients)[-1])
    wanted = np.where(np.arange(200_000) < kept, -1e-3 * 200_000 / 2, 0)
    np.testing.assert_allclose(update, wanted, rtol=2e-3)


@pytest.mark.parametrize("tiny", [1e-30, 6e-8])
def test_products_of_small_numbers_do_not_underflow(tiny: float) -> None:
    dtype = jnp.float32 if tiny < 1e-8 else jnp.float16
    gradient = jnp.full(3, tiny, dtype)
    tx = with_gradient_direction(optax.sgd(1.0), "cautious")
    np.testing.assert_array_equal(updates_of(tx, [gradient])[0], -gradient)


@pytest.mark.parametrize("mode", MODES)
def test_nan_is_seen_in_its_element(mode: Any) -> None:
    gradient = jnp.array([1.0, jnp.nan, -1.0])
    update = updates_of(with_gradient_direction(optax.sgd(1.0), mode), [gradient])[0]
    np.testing.assert_array_equal(np.isnan(update), [False, True, False])


# Layers stacked in one array


@pytest.mark.parametrize("scale", [pytest.param(SCALES[0], marks=pytest.mark.full), SCALES[1]])
def test_stacked_layers_move_as_separate_ones(scale: Any) -> None:
    """Matrices, norms and biases of three layers; and of two times three in two leading axes."""
    tx = with_gradient_direction(optax.sgd(1.0, momentum=0.9), "cautious", scale)

    def layer(seed: int) -> list[Any]:
        leaves = {"kernel": (4, 3), "norm": (4,), "bias": (3,), "gate": ()}
        drawn = {k: normal(shape, seed=seed + i) for i, (k, shape) in enumerate(leaves.items())}
        trees = [{k: x[t] for k, x in drawn.items()} for t in range(6)]
        return [{"block": {**tree, "norm": {"scale": tree["norm"]}}} for tree in trees]

    layers = [layer(10 * i) for i in range(6)]
    wanted = [updates_of(tx, gradients) for gradients in layers]
    for leading in ((6,), (2, 3)):
        stack = lambda *leaves, leading=leading: np.reshape(leaves, (*leading, *leaves[0].shape))
        stacked = [jax.tree.map(stack, *step) for step in zip(*layers, strict=True)]
        for gradient in stacked:
            gradient["head"] = {"kernel": np.ones((6, 2), np.float32)}
        spec = {"block": {"kernel": MATRIX, "norm": None, "bias": None, "gate": None}, "head": None}
        numbers = with_gradient_direction(
            optax.sgd(1.0, momentum=0.9), "cautious", scale, weight_dimension_numbers=spec
        )
        found = [x["block"] for x in updates_of(numbers, stacked)]
        together = [
            jax.tree.map(stack, *[x["block"] for x in step]) for step in zip(*wanted, strict=True)
        ]
        for one, other in zip(found, together, strict=True):
            jax.tree.map(lambda x, y: assert_close(x, y, 100), one, other)


def test_stacked_layers_of_the_decoder_are_known_by_name_and_by_type() -> None:
    config = DecoderConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    params = nnx.as_pure(nnx.split(model)[1])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for rule in (None, weight_dimension_numbers(model)):
        for (path, leaf), axes in zip(leaves, weight_axes(rule, params), strict=True):
            stacked = leaf.shape[0] == 3
            assert (0 not in axes) == stacked, jax.tree_util.keystr(path)
            assert set(range(1, leaf.ndim)) <= set(axes)


def test_axes_of_leaves_that_nothing_explains_are_all_of_them() -> None:
    cube = {"cube": jnp.zeros((2, 3, 4)), "scalar": jnp.zeros(())}
    assert weight_axes(None, cube) == [(0, 1, 2), ()]
    assert weight_axes(None, {"experts": {"kernel": jnp.zeros((3, 4))}, "bias": jnp.zeros(3)}) == [
        (0,),
        (0, 1),
    ]


# Optimizers whose updates are all of one size


def test_lion_under_grams_is_sign_descent_and_warned_of() -> None:
    """Point 6: momentum has no effect."""
    tx = with_gradient_direction(LION)
    gradients = normal((20,))
    with pytest.warns(UserWarning, match="sign descent"):
        found = updates_of(tx, gradients)
    for update, gradient in zip(found, gradients, strict=True):
        assert_close(update, -0.1 * np.sign(gradient))


def test_sign_descent_under_grams_is_sign_descent() -> None:
    gradients = normal((20,))
    tx = with_gradient_direction(optax.sign_sgd(0.1))
    for one, other in zip(
        *(updates_of(x, gradients) for x in (tx, optax.sign_sgd(0.1))), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_decay_in_the_inner_optimizer_is_a_part_of_the_update() -> None:
    """Why `add_decayed_weights` stands after the rule."""
    params, gradient = jnp.array([10.0]), jnp.array([-1.0])
    decay = optax.add_decayed_weights(0.5)
    inside = with_gradient_direction(optax.chain(decay, optax.sgd(1.0)))
    outside = optax.chain(
        with_gradient_direction(optax.identity(), along_gradient=True), decay, optax.sgd(1.0)
    )
    assert updates_of(inside, [gradient], params)[0] == 4.0  # away from zero
    assert updates_of(outside, [gradient], params)[0] == -4.0


# Bad arguments


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="mode='gram' must be 'grams' or 'cautious'"):
        with_gradient_direction(optax.adam(1.0), "gram")
    with pytest.raises(ValueError, match="scale='mean' must be 'mean_clamped', 'count_plus_one'"):
        with_gradient_direction(optax.adam(1.0), "cautious", "mean")


def test_a_leaf_that_the_whole_tree_lacks_is_named() -> None:
    tx = with_gradient_direction(optax.sgd(0.1), "cautious")
    params = {"kernel": jnp.ones(3)}
    with pytest.raises(KeyError, match="kernel"):
        tx.update(params, tx.init(params), params, whole=Whole({"other": jnp.ones(3)}))


def test_complex_gradients_are_refused_and_split() -> None:
    tx = with_gradient_direction(optax.sgd(1.0, momentum=0.9))
    gradient = jnp.array([1.0 - 2.0j])
    with pytest.raises(ValueError, match="split_real_and_imaginary"):
        tx.update(gradient, tx.init(gradient))
    split = optax.contrib.split_real_and_imaginary(tx)
    updates, _ = jax.jit(split.update)(gradient, split.init(gradient))
    np.testing.assert_array_equal(updates, [-1.0 + 2.0j])
