"""NAG-GS in a subspace, in few bits, and with hyper-parameters that change."""

from typing import Any

from close import assert_close
from harness.trees import assert_mostly_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.optimizers.nag_gs_runs import final, normal, updates_of
from tests.projection.runs import moved, normal_gradients, orthonormal, state_bytes


@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate"])
def test_in_a_subspace_it_is_the_heavy_ball_in_that_subspace(on_refresh: Any) -> None:
    ball = lro.to_heavy_ball(0.5, 0.2, 1.0)
    project = lambda inner: lro.scale_by_projection(
        inner, lro.subspaces.randomized_svd(3), refresh_every=2, on_refresh=on_refresh
    )
    found = moved(
        project(lro.scale_by_nag_gs(0.5, 0.2, 1.0, constant_gamma=True)),
        (8, 12),
        normal_gradients((8, 12), 6),
    )
    sgd = optax.chain(optax.trace(ball.momentum), optax.scale(-ball.learning_rate))
    expected = moved(project(sgd), (8, 12), normal_gradients((8, 12), 6))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.linalg.matrix_rank(expected, tol=1e-4) > 3  # the basis turned


def test_a_reset_at_a_refresh_starts_gamma_anew_for_each_matrix_alone() -> None:
    tx = lro.scale_by_projection(
        lro.scale_by_nag_gs(0.5, 0.2, 1.0),
        lro.subspaces.fixed(orthonormal(8, 3)),
        side="rows",
        refresh_every=2,
        on_refresh="reset",
    )
    gradient = {"kernel": normal((8, 12)), "bias": normal((12,))}
    state, gammas = tx.init(gradient), []
    for _ in range(3):
        _, state = jax.jit(tx.update)(gradient, state)
        gammas.append({name: float(x) for name, x in state.inner.gamma.items()})
    after = 0.2 + 0.8 / 1.5 ** np.arange(1, 4)
    for name, expected in (("bias", after), ("kernel", after[[0, 1, 0]])):
        assert_close([g[name] for g in gammas], expected, 100, dtype=np.float32)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.2)])
def test_with_few_bits_updates_are_nearly_those_with_all(bits: Any, tolerance: float) -> None:
    gradients = {"kernel": normal((10, 64, 128))}
    options = {"mu": 0.2, "gamma": 1.5, "weight_decay": 0.1}
    few = updates_of(lro.nag_gs(0.3, state_bits=bits, **options), gradients)["kernel"]
    full = updates_of(lro.nag_gs(0.3, **options), gradients)["kernel"]
    wrapped = lro.low_bit(lro.nag_gs(0.3, **options), bits)
    assert_mostly_close(updates_of(wrapped, gradients)["kernel"], few)
    error = np.linalg.norm(few - full) / np.linalg.norm(full)
    assert 1e-4 < error < tolerance


@pytest.mark.parametrize(("bits", "share"), [(32, 0.5), (8, 0.127), (4, 0.067)])
def test_the_state_is_half_of_adams_and_less_in_few_bits(bits: Any, share: float) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    adam = state_bytes(jax.eval_shape(optax.adamw(1e-3).init, params))
    own = state_bytes(jax.eval_shape(lro.nag_gs(0.1, state_bits=bits).init, params))
    assert own == pytest.approx(share * adam, rel=0.02)


@pytest.mark.slow
def test_low_bit_momentum_in_a_subspace_that_turns_reaches_the_minimum() -> None:
    target = normal((24, 192))
    tx = lro.low_bit(
        lro.scale_by_projection(
            lro.scale_by_nag_gs(optax.linear_schedule(0.8, 0.0, 400)),
            lro.subspaces.randomized_svd(8),
            refresh_every=5,
            on_refresh="rotate",
        ),
        min_size=1024,
    )
    start = {"kernel": jnp.zeros_like(target)}
    params, state = final(tx, lambda p: {"kernel": p["kernel"] - target}, start, 400)
    assert state.codes.inner.momentum["kernel"].dtype == jnp.uint8
    assert np.linalg.norm(params["kernel"] - target) < 0.02 * np.linalg.norm(target)


def test_hyperparameters_may_be_injected_and_changed_on_the_way() -> None:
    inject = optax.inject_hyperparams(lro.nag_gs, ("state_bits", "state_dtype"), jnp.float32)
    tx = inject(learning_rate=0.3, mu=0.5, gamma=2.0, constant_gamma=True)
    gradient = jnp.ones(2)
    _, state = tx.update(gradient, tx.init(gradient), gradient)
    state.hyperparams["gamma"] = jnp.float32(0.7)
    updates, _ = tx.update(gradient, state, gradient)
    first, second = (lro.to_heavy_ball(0.3, 0.5, gamma) for gamma in (2.0, 0.7))
    expected = -second.momentum * first.learning_rate - second.learning_rate
    assert_close(updates, expected, 100)
