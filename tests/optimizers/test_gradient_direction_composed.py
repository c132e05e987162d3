"""Direction rules with projections, accumulated and clipped gradients, and fewer bits."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.optimizers.gradient_direction import with_gradient_direction
from lowrank_optax.projection import galore, scale_by_projection, subspaces
from lowrank_optax.states import in_float32, low_bit
from tests.optimizers.direction_runs import MODES, normal, reference, updates_of
from tests.projection.runs import normal_gradients, orthonormal, state_bytes


@pytest.mark.parametrize("mode", MODES)
def test_in_projected_space_signs_are_compared_in_the_subspace(mode: Any) -> None:
    """Inside: the answer to the projected gradient, lifted. By NumPy on a known basis."""
    basis = orthonormal(8, 3)
    gradients = normal_gradients((8, 10), 4)
    inner = with_gradient_direction(optax.trace(0.9), mode, along_gradient=True)
    tx = scale_by_projection(inner, subspaces.fixed(lambda path, shape: basis))
    found = updates_of(tx, gradients)[-1]["kernel"]
    lengths = [np.float64(basis).T @ np.float64(g["kernel"]) for g in gradients]
    momentum = sum(0.9**i * x for i, x in enumerate(reversed(lengths)))
    scale = "mean_clamped"
    turned = -reference(-momentum, lengths[-1], mode, scale)
    np.testing.assert_allclose(found, np.float64(basis) @ turned, atol=1e-5)
    assert np.linalg.matrix_rank(found, tol=1e-4) == 3


@pytest.mark.parametrize("mode", MODES)
def test_in_full_space_the_projected_update_is_turned_and_leaves_the_subspace(mode: Any) -> None:
    gradients = normal_gradients((8, 10), 4)
    plain = galore(0.1, rank=3, refresh_every=2)
    tx = with_gradient_direction(galore(0.1, rank=3, refresh_every=2), mode)
    wanted = updates_of(plain, gradients)[-1]["kernel"]
    found = updates_of(tx, gradients)[-1]["kernel"]
    gradient = np.asarray(gradients[-1]["kernel"])
    np.testing.assert_allclose(
        found, reference(wanted, gradient, mode, "mean_clamped"), rtol=1e-4, atol=1e-6
    )
    assert np.all(found * gradient <= 0)
    assert np.linalg.matrix_rank(wanted, tol=1e-5) == 3
    assert np.linalg.matrix_rank(found, tol=1e-5) == 8


@pytest.mark.slow
@pytest.mark.parametrize("on_refresh", [pytest.param("keep", marks=pytest.mark.full), "rotate"])
def test_as_the_inner_optimizer_of_galore_for_stacked_layers(on_refresh: Any) -> None:
    inner = with_gradient_direction(optax.scale_by_adam(), "cautious", along_gradient=True)
    tx = galore(0.1, rank=3, refresh_every=2, inner=inner, on_refresh=on_refresh)
    gradients = normal_gradients((2, 8, 10), 4)
    stack = [{"kernel": g["kernel"], "norm": jnp.ones((2, 8))} for g in gradients]
    separate = [updates_of(tx, [{"kernel": g["kernel"][i]} for g in gradients]) for i in range(2)]
    together = updates_of(tx, stack)
    for step in range(4):
        for i in range(2):
            one, other = together[step]["kernel"][i], separate[i][step]["kernel"]
            np.testing.assert_allclose(one, other, atol=2e-3)


def test_gradients_that_arrive_projected_are_refused_in_full_space() -> None:
    tx = with_gradient_direction(galore(0.1, rank=3))
    params = {"kernel": jnp.ones((8, 10))}
    with pytest.raises(ValueError, match=r"shape \(3, 10\) with an update of shape \(8, 10\)"):
        tx.update({"kernel": jnp.ones((3, 10))}, tx.init(params), params)


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_gradients_give_the_sign_of_their_mean(mode: Any) -> None:
    """Also where the last micro-batch has the other sign."""
    scale = {"scale": "none"} if mode == "cautious" else {}
    tx = with_gradient_direction(optax.sgd(1.0, momentum=0.9), mode, **scale)
    means = [jnp.array([1.0, -2.0, 0.5]), jnp.array([-0.25, -1.0, 0.0])]
    micro = [x for mean in means for x in (3 * mean, -mean)]
    steps = optax.MultiSteps(tx, 2).gradient_transformation()
    for found, wanted in zip(updates_of(steps, micro)[1::2], updates_of(tx, means), strict=True):
        assert_close(found, wanted)


def test_clipping_the_global_norm_before_keeps_the_signs() -> None:
    gradients = normal((6,))
    tx = optax.chain(optax.clip_by_global_norm(0.1), with_gradient_direction(optax.adam(0.1)))
    for update, gradient in zip(updates_of(tx, gradients), gradients, strict=True):
        np.testing.assert_array_equal(np.sign(update), -np.sign(gradient))


def test_the_state_is_the_inner_one_and_takes_fewer_bits() -> None:
    params = {"kernel": np.ones((64, 256), np.float32)}
    inner = optax.scale_by_adam()
    tx = with_gradient_direction(inner, along_gradient=True)
    coded = low_bit(tx)
    states = [jax.eval_shape(x.init, params) for x in (inner, tx, coded)]
    assert jax.tree.structure(states[1]) == jax.tree.structure(states[0])
    assert state_bytes(states[2]) < 0.26 * state_bytes(states[1])
    updates, _ = jax.jit(lambda p: coded.update(p, coded.init(p)))(params)
    np.testing.assert_allclose(updates["kernel"], 1.0, rtol=1e-3)


def test_bfloat16_in_float32() -> None:
    gradients = [g.astype(jnp.bfloat16) for g in normal((8,))]
    tx = in_float32(with_gradient_direction(optax.adam(0.1)))
    wide = updates_of(with_gradient_direction(optax.adam(0.1)), [jnp.float32(g) for g in gradients])
    for one, other in zip(updates_of(tx, gradients), wide, strict=True):
        assert one.dtype == jnp.float32
        assert_close(one, other)
