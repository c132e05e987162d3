"""AdaRankGrad: ranks that follow the gradient, moments that follow the basis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import first, moved, normal_gradients, orthonormal, run

SPECTRUM = {"kernel": np.diag(np.array([4.0, 2.0, 1.0, 0.5], np.float32))}


@pytest.mark.parametrize(("threshold", "rank"), [(0.2, 3), (0.5, 1)])
def test_worked_ranks_of_the_specification(threshold: float, rank: int) -> None:
    tx = lro.adarankgrad(0.1, 4, threshold=threshold, subspace=lro.subspaces.svd(4))
    _, state = first(tx, SPECTRUM)
    assert state[0].basis.rank["kernel"].item() == rank


@pytest.mark.parametrize(("min_rank", "step", "rank"), [(4, 1, 4), (2, 2, 4)])
def test_ranks_are_of_the_grid(min_rank: int, step: int, rank: int) -> None:
    tx = lro.adarankgrad(0.1, 4, min_rank=min_rank, rank_step=step)
    _, state = first(tx, SPECTRUM)
    assert state[0].basis.rank["kernel"].item() == rank


@pytest.mark.slow
def test_with_a_constant_rank_a_fixed_period_and_kept_moments_it_is_galore() -> None:
    gradients, every = normal_gradients((6, 9), 5), lro.refresh.every(3)
    rule = lro.subspaces.randomized_svd(3)
    ada = lro.adarankgrad(0.1, 3, every, subspace=rule, min_rank=3, on_refresh="keep")
    galore = lro.galore(0.1, 3, every, subspace=rule)
    np.testing.assert_allclose(
        moved(ada, (6, 9), gradients), moved(galore, (6, 9), gradients), atol=1e-5
    )


def test_the_rank_falls_to_the_least_as_the_gradient_of_a_quadratic_collapses() -> None:
    directions = orthonormal(6, 6)
    curvatures = jnp.array([1.0, 30.0, 30.0, 30.0, 30.0, 30.0])
    hessian = (directions * curvatures) @ directions.T
    start = {"kernel": jax.random.normal(jax.random.key(0), (6, 8))}
    tx = lro.scale_by_projection(
        optax.scale(-0.03),
        lro.subspaces.adaptive_rank(lro.subspaces.svd(6), monotone=True),
        refresh_every=1,
    )

    def step(carry: tuple[dict[str, jax.Array], object], _: None) -> tuple[object, jax.Array]:
        params, state = carry
        updates, state = tx.update({"kernel": hessian @ params["kernel"]}, state)
        return (optax.apply_updates(params, updates), state), state.basis.rank["kernel"]

    _, ranks = jax.lax.scan(step, (start, tx.init(start)), length=12)
    assert ranks[0] >= 4
    assert ranks[-1] == 1
    assert (jnp.diff(ranks) <= 0).all()


@pytest.mark.slow
def test_an_int_is_the_longest_stay_and_convergence_ends_it_sooner() -> None:
    still = normal_gradients((6, 9), 1) * 12
    fading = [{"kernel": 0.3**i * g["kernel"]} for i, g in enumerate(still)]
    due = lambda tx, gradients: [
        int(state[0].next_refresh["kernel"]) for _, state in run(tx, still[0], gradients)
    ]
    make = lambda longest: lro.adarankgrad(0.1, 6, longest, threshold=0.0)
    assert due(make(8), still) == [8] * 8 + [16] * 4
    # The moving average of the norm halves at the ninth step.
    assert due(make(20), fading) == [20] * 8 + [9] + [29] * 3


def test_the_momentum_carried_to_another_subspace_never_grows() -> None:
    gradients = normal_gradients((6, 9), 4)
    tx = lro.adarankgrad(0.1, 3, lro.refresh.every(1), b1=0.999, subspace=lro.subspaces.svd(3))
    momenta = []
    for _, state in run(tx, {"kernel": jnp.zeros((6, 9))}, gradients):
        basis, mu = state[0].basis.basis["kernel"], state[0].inner.mu["kernel"]
        momenta.append(np.asarray(basis @ mu, np.float64))
    for before, after, g in zip(momenta, momenta[1:], gradients[1:], strict=False):
        fresh = 0.001 * np.linalg.norm(g["kernel"])
        assert np.linalg.norm(after) <= 0.999 * np.linalg.norm(before) + fresh
