"""Tucker decompositions of stacks: against NumPy in float64, their bound, and what ALS improves."""

import itertools
from typing import Any

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.methods.tucker import TuckerFactors, unfolding_vectors
from tests.adapters.compiled import compiled

# Few shapes and ranks, many values: each is compiled.
sizes_and_ranks = st.sampled_from([((1, 4, 4), 1), ((3, 2, 5), 3), ((4, 6, 3), 3)])
quick = settings(max_examples=12, deadline=None)


def random_stack(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def rebuilt(found: TuckerFactors) -> np.ndarray:
    a, core, b = (np.asarray(x, np.float64) for x in found[:3])
    return np.einsum("ia,sab,jb->sij", a, core, b)


def unfoldings(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(list(stack), axis=1), np.concatenate(list(stack), axis=0).T


@pytest.mark.slow
@quick
@given(sizes_and_ranks, st.sampled_from([0, 2]), st.integers(0, 9))
def test_the_error_is_what_is_lost_and_below_its_bound(
    case: tuple[tuple[int, int, int], int], sweeps: int, seed: int
) -> None:
    shape, rank = case
    stack = random_stack(shape, seed)
    found = lro.adapters.lotr_from_updates(jnp.asarray(stack, jnp.float32), rank, sweeps=sweeps)
    norm = np.linalg.norm(stack)
    lost = np.linalg.norm(stack - rebuilt(found))
    np.testing.assert_allclose(found.error, lost, atol=1e-5 * norm)
    values = [np.linalg.svd(x, compute_uv=False)[rank:] for x in unfoldings(stack)]
    np.testing.assert_allclose(
        found.bound, np.sqrt(sum((v**2).sum() for v in values)), atol=1e-5 * norm
    )
    assert lost <= float(found.bound) + 1e-5 * norm
    # And no approximation of this rank is better than the better unfolding's.
    assert lost >= max(np.linalg.norm(v) for v in values) - 1e-5 * norm


@quick
@given(sizes_and_ranks, st.integers(0, 9))
def test_no_sweep_ever_makes_the_error_larger(
    case: tuple[tuple[int, int, int], int], seed: int
) -> None:
    shape, rank = case
    stack = jnp.asarray(random_stack(shape, seed), jnp.float32)
    errors = [lro.adapters.lotr_from_updates(stack, rank, sweeps=n).error for n in range(3)]
    slack = 1e-5 * float(jnp.linalg.norm(stack))
    assert all(after <= before + slack for before, after in itertools.pairwise(errors))


def test_sweeps_find_what_hosvd_alone_misses() -> None:
    errors = [
        lro.adapters.lotr_from_updates(jnp.asarray(random_stack((3, 8, 8), 3), jnp.float32), 2,
                                       sweeps=n).error
        for n in (0, 8)
    ]  # fmt: skip
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("rank", [2, 7])
def test_stacks_of_this_tucker_rank_are_found_exactly(rank: int) -> None:
    a, b = random_stack((6, 2), 0), random_stack((5, 2), 1)
    stack = np.einsum("ia,sab,jb->sij", a, random_stack((4, 2, 2), 2), b)
    found = lro.adapters.lotr_from_updates(jnp.asarray(stack, jnp.float32), rank)
    np.testing.assert_allclose(rebuilt(found), stack, atol=1e-5)
    assert found.A.shape == (6, rank)
    assert found.core.shape == (4, rank, rank)


@pytest.mark.combinations(1)
@pytest.mark.parametrize("initial", ["tucker", "tucker_residual"])
@pytest.mark.parametrize("power_iterations", [None, 2])
def test_at_full_rank_the_start_rebuilds_every_weight(
    initial: Any, power_iterations: int | None
) -> None:
    weights = jnp.asarray(random_stack((3, 6, 6), 0), jnp.float32)
    method = lro.adapters.LoTR(rank=6, initial=initial, power_iterations=power_iterations)
    params = method.init(jax.random.key(0), weights)
    p = params.trainable
    core = jnp.einsum("ia,sij,jb->sab", p["A"], weights, p["B"])
    np.testing.assert_allclose(
        rebuilt(TuckerFactors(p["A"], core, p["B"], core, core)), weights, atol=1e-5
    )
    if initial == "tucker_residual":
        np.testing.assert_allclose(p["core"], core, atol=1e-5)
        np.testing.assert_allclose(params.base, 0, atol=1e-5)


@pytest.mark.parametrize("power_iterations", [None, 8])
def test_the_leading_vectors_are_those_of_numpy(power_iterations: int | None) -> None:
    stacks = [random_stack((3, 20, 4), 0), random_stack((1, 20, 6), 1)]
    stacks = [x * 2.0 ** -np.arange(20)[:, None] for x in stacks]
    both = np.concatenate([w for x in stacks for w in x], axis=1)
    u, values, _ = np.linalg.svd(both)
    arrays = [jnp.asarray(x, jnp.float32) for x in stacks]
    found, found_values = unfolding_vectors(
        arrays, 3, power_iterations=power_iterations, key=jax.random.key(0)
    )
    np.testing.assert_allclose(found @ found.T, u[:, :3] @ u[:, :3].T, atol=1e-4)
    assert_close(found_values[:3], values[:3], 800)


def test_small_directions_are_not_lost_to_squaring() -> None:
    # By a Gram matrix in float32 the second direction would be noise.
    stack = np.zeros((1, 4, 4))
    stack[0, 0, 0], stack[0, 1, 1] = 1.0, 3e-4
    turn = np.linalg.qr(random_stack((4, 4), 0))[0]
    found = lro.adapters.lotr_from_updates(jnp.asarray(turn @ stack, jnp.float32), 2)
    assert found.error < 1e-6


def test_the_shared_start_is_that_of_all_members_and_one_side_is_shared_alone() -> None:
    q, k = (jnp.asarray(random_stack((2, 6, n), n), jnp.float32) for n in (6, 3))
    method = lro.adapters.LoTR(rank=2, share="input", initial="tucker", power_iterations=None)
    shared = method.init_shared(jax.random.key(0), [q, k])
    both = np.concatenate([np.asarray(w) for x in (q, k) for w in x], axis=1)
    expected = np.linalg.svd(both)[0][:, :2]
    a = shared.trainable["A"]
    np.testing.assert_allclose(a @ a.T, expected @ expected.T, atol=1e-5)
    own = method.init_layers(jax.random.key(0), k, shared.trainable)
    assert own.trainable["B"].shape == (2, 3, 2)


def test_blocks_have_the_vectors_of_their_own_layers() -> None:
    weights = jnp.asarray(random_stack((5, 6, 6), 0), jnp.float32)
    method = lro.adapters.LoTR(
        rank=2, initial="tucker", group_by="kind_and_block", block_size=2, power_iterations=None
    )
    a = method.init(jax.random.key(0), weights).trainable["A"]
    assert a.shape == (3, 6, 2)
    alone = unfolding_vectors([weights[2:4]], 2)[0]
    np.testing.assert_allclose(a[1] @ a[1].T, alone @ alone.T, atol=1e-5)


@pytest.mark.slow
@quick
@given(st.sampled_from([([1], 2), ([2, 1, 2], 2), ([2, 1, 2], 5)]), st.integers(0, 9))
def test_factors_of_loras_are_decomposed_as_their_products(
    case: tuple[list[int], int], seed: int
) -> None:
    ranks, rank = case
    pairs = [
        (random_stack((7, k), seed + i), random_stack((k, 5), seed + 50 + i))
        for i, k in enumerate(ranks)
    ]
    thin = lro.adapters.lotr_from_lora(
        [(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)) for a, b in pairs], rank
    )
    products = np.stack([a @ b for a, b in pairs])
    full = lro.adapters.lotr_from_updates(jnp.asarray(products, jnp.float32), rank)
    norm = np.linalg.norm(products)
    np.testing.assert_allclose(thin.error, full.error, atol=1e-4 * norm)
    np.testing.assert_allclose(
        np.linalg.norm(products - rebuilt(thin)), thin.error, atol=1e-4 * norm
    )
    if rank >= sum(ranks):
        assert thin.error < 1e-5 * norm


@pytest.mark.slow
def test_a_trained_lora_stack_becomes_a_lotr_with_a_scale() -> None:
    weights = jnp.zeros((3, 8, 6))
    lora = compiled(lro.adapters.LoRA)(rank=2, alpha=4, initial="random")
    trained = lora.init(jax.random.key(0), weights)
    factors = lora.to_lora(lora.stack_arrays(trained, 3))
    found = lro.adapters.lotr_from_lora([factors], rank=6)
    method = compiled(lro.adapters.LoTR)(rank=6, alpha=3)
    params = method.init(jax.random.key(1), weights)
    arrays = {"A": found.A, "B": found.B, "core": found.core / 0.5}
    assert jax.tree.map(jnp.shape, arrays) == jax.tree.map(jnp.shape, dict(params.trainable))
    np.testing.assert_allclose(
        method.deltas(params._replace(trainable=arrays), weights),
        lora.deltas(trained, weights),
        atol=1e-5,
    )


def test_what_cannot_share_factors_is_refused() -> None:
    for updates, words in (
        ([np.ones((2, 3)), np.ones((2, 4))], "of one shape"),
        ([], "must be matrices or stacks"),
        (np.ones(3), "must be matrices or stacks"),
    ):
        with pytest.raises(ValueError, match=words):
            lro.adapters.lotr_from_updates(updates, 1)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="rank=0"):
        lro.adapters.lotr_from_updates(jnp.ones((1, 2, 2)), 0)
    with pytest.raises(ValueError, match=r"\[L, d_in, k\]"):
        lro.adapters.lotr_from_lora([(jnp.ones((2, 3)), jnp.ones((2, 2)))], 1)
    with pytest.raises(ValueError, match="key=None"):
        unfolding_vectors([jnp.ones((1, 2, 2))], 1, power_iterations=1)
