"""`compact`: the memory of ranks that fell, given back between steps."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.projection.compaction import rounded_rank
from tests.projection.runs import orthonormal, run, state_bytes


def _of_rank(rank: int, shape: tuple[int, int], seed: int) -> jax.Array:
    """A matrix of that rank, of which no direction is small enough to be left out."""
    rows, columns = shape
    sizes = np.linspace(1.0, 0.8, rank)
    return (orthonormal(rows, rank, seed) * sizes) @ orthonormal(columns, rank, seed + 50).T


def _gradients(count: int) -> list[Any]:
    return [
        {"a": {"kernel": _of_rank(2, (8, 12), i)}, "b": {"kernel": _of_rank(5, (12, 10), i)}}
        for i in range(count)
    ]


def _adaptive(on_refresh: Any, inner: Any = None, **options: Any) -> Any:
    return lro.scale_by_projection(
        optax.scale_by_adam() if inner is None else inner,
        lro.subspaces.adaptive_rank(lro.subspaces.svd(8)),
        on_refresh=on_refresh,
        **{"refresh_every": 2, **options},
    )


# "keep" runs the inner optimizer on the whole tree, the others on each leaf.
@pytest.mark.slow
@pytest.mark.parametrize(
    "on_refresh", ["keep", pytest.param("reset", marks=pytest.mark.full), "rotate_moments"]
)
def test_updates_are_the_same_with_the_smaller_state(on_refresh: Any) -> None:
    steps, gradients = 2, _gradients(5)
    start = jax.tree.map(jnp.zeros_like, gradients[0])
    tx = _adaptive(on_refresh)
    whole = run(tx, start, gradients)
    params, state = whole[steps - 1]
    smaller = lro.compact(state)
    chex.assert_trees_all_equal(state.basis.rank, smaller.basis.rank)
    assert jax.tree.structure(smaller) == jax.tree.structure(state)
    step = jax.jit(tx.update)
    for gradient in gradients[steps:]:
        updates, smaller = step(gradient, smaller, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, whole[-1][0], atol=2e-4)
    ranks = [x.shape[-1] for x in jax.tree.leaves(smaller.basis.basis)]
    assert ranks == [2, 6]  # 2, and 5 rounded up


def test_a_state_in_a_chain_is_found_and_its_bytes_are_reported() -> None:
    gradients = _gradients(1)
    tx = optax.chain(optax.clip(10.0), _adaptive("keep"), optax.trace(0.9))
    _, state = run(tx, gradients[0], gradients)[-1]
    said: list[str] = []
    smaller = lro.compact(state, report=said.append)
    # Basis and two moments, of 8 x 12 (rows compressed, 8 to 2) and 12 x 10 (columns, 8 to 6).
    saved = 4 * (6 * (8 + 2 * 12) + 2 * (10 + 2 * 12))
    assert state_bytes(state) - state_bytes(smaller) == saved
    sizes = f"{state_bytes(state):,} -> {state_bytes(smaller):,} bytes"
    ranks = "(ranks: a/kernel 8 -> 2, b/kernel 8 -> 6)"
    assert said == [f"optimizer state: {sizes} {ranks}"]
    chex.assert_trees_all_equal(smaller[2], state[2])
    assert lro.compact(smaller, report=said.append) is not None
    assert said[1].endswith("(ranks: as they were)")


@pytest.mark.slow
def test_the_largest_rank_of_a_stack_counts() -> None:
    stack = jnp.stack([_of_rank(rank, (8, 12), rank) for rank in (1, 3)])
    spec = lro.WeightDimensionNumbers(-2, -1)
    tx = _adaptive("rotate_moments", weight_dimension_numbers=spec)
    _, state = run(tx, {"kernel": stack}, [{"kernel": stack}])[-1]
    smaller = lro.compact(state)
    assert smaller.basis.rank["kernel"].tolist() == [1, 3]
    assert smaller.basis.basis["kernel"].shape == (2, 8, 3)
    assert smaller.inner.mu["kernel"].shape == (2, 3, 12)
    assert smaller.inner.count["kernel"].shape == (2,)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_square_matrices_whose_kept_moments_tell_no_axis_are_left_alone(side: Any) -> None:
    full = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    low = {"kernel": _of_rank(2, (8, 8), 0)}
    tx = _adaptive("keep", side=side, refresh_every=1)
    _, state = run(tx, full, [full, low])[-1]
    smaller = lro.compact(state)
    chex.assert_trees_all_equal(smaller, state)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_square_matrices_of_full_rank_lose_the_right_axis(side: Any) -> None:
    """Where the first steps fill all directions, and later ones two."""
    full = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    low = [{"kernel": _of_rank(2, (8, 8), seed)} for seed in range(3)]
    tx = _adaptive("rotate_moments", side=side, refresh_every=1)
    gradients = [full, *low]
    whole = run(tx, full, gradients)
    params, state = whole[1]
    smaller = lro.compact(state)
    expected = (8, 2) if side == "columns" else (2, 8)
    assert smaller.inner.mu["kernel"].shape == expected
    step = jax.jit(tx.update)
    for gradient in low[1:]:
        updates, smaller = step(gradient, smaller, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, whole[-1][0], atol=2e-4)


@pytest.mark.slow
def test_accumulated_gradients_are_cut_as_well() -> None:
    gradients = _gradients(3)
    tx = _adaptive("keep", accumulate_steps=2)
    trajectory = run(tx, jax.tree.map(jnp.zeros_like, gradients[0]), [*gradients, gradients[2]])
    params, state = trajectory[2]  # in the midst of a step
    smaller = lro.compact(state)
    assert smaller.accumulated["a"]["kernel"].shape == (2, 12)
    updates, _ = jax.jit(tx.update)(gradients[2], smaller, params)
    expected = jax.tree.map(jnp.subtract, trajectory[3][0], params)
    chex.assert_trees_all_close(updates, expected, atol=1e-4)


def test_nothing_is_cut_before_the_first_refresh() -> None:
    params = {"kernel": jnp.zeros((8, 12))}
    state = _adaptive("keep").init(params)
    chex.assert_trees_all_equal(lro.compact(state), state)


def test_ranks_can_not_grow_beyond_what_is_left() -> None:
    low = {"kernel": _of_rank(2, (8, 12), 0)}
    tx = _adaptive("rotate_moments", refresh_every=1)
    params, state = run(tx, low, [low])[-1]
    full = {"kernel": jax.random.normal(jax.random.key(1), (8, 12))}
    updates, state = jax.jit(tx.update)(full, lro.compact(state), params)
    assert state.basis.rank["kernel"].item() == 2
    assert np.linalg.matrix_rank(updates["kernel"], tol=1e-4) == 2


def test_a_state_without_ranks_that_fall_is_refused() -> None:
    tx = lro.galore(0.1, rank=2)
    with pytest.raises(ValueError, match=r"no rank that could have fallen.*adarankgrad"):
        lro.compact(tx.init({"kernel": jnp.zeros((4, 6))}))


def test_shapes_can_not_change_under_jit() -> None:
    state = _adaptive("keep").init({"kernel": jnp.zeros((8, 12))})
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lro.compact)(state)


def test_ranks_are_rounded_up_to_two_sizes_an_octave() -> None:
    sizes = sorted({rounded_rank(rank) for rank in range(1, 257)})
    expected = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert sizes == expected
    assert all(rank <= rounded_rank(rank) < 1.5 * rank for rank in range(1, 257))
