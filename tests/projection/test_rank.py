"""Ranks: numbers, fractions, functions and patterns, and what is refused by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.projection.view import check_rank, resolve_rank

SHAPE = (12, 64, 256)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, 1), (16, 16), (64, 64), (1000, 64), (np.int64(5), 5), (0.25, 16), (0.26, 17), (1e-9, 1)],
)
def test_a_rank_is_a_number_or_a_fraction_rounded_up_and_never_above_the_shorter_side(
    rank: Any, expected: int
) -> None:
    resolved = resolve_rank(rank, "kernel", SHAPE)
    assert type(resolved) is int
    assert resolved == expected


def test_a_fraction_that_fits_exactly_is_not_rounded_up_by_its_last_bit() -> None:
    ranks = [resolve_rank(percent / 100, "kernel", (100, 200)) for percent in range(1, 100)]
    assert ranks == list(range(1, 100))


def test_a_function_is_told_path_and_shape() -> None:
    seen = []
    rank = lambda path, shape: seen.append((path, shape)) or 0.5
    assert resolve_rank(rank, "blocks/up/kernel", SHAPE) == 32
    assert seen == [("blocks/up/kernel", SHAPE)]


def test_the_first_pattern_that_is_found_in_the_path_holds() -> None:
    rank = {"attention/(query|key)": 4, "attention": 0.25, ".*": 8}
    paths = ("h/attention/key/kernel", "h/attention/value/kernel", "h/mlp/kernel")
    assert [resolve_rank(rank, path, SHAPE) for path in paths] == [4, 16, 8]


def test_a_path_without_a_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="no pattern for 'mlp/kernel'"):
        resolve_rank({"attention": 4}, "mlp/kernel", SHAPE)


@pytest.mark.parametrize(
    ("rank", "error", "match"),
    [
        (0, ValueError, "rank=0 must be at least 1"),
        (1.0, ValueError, "rank=1.0 must be an int, or a fraction"),
        (-0.5, ValueError, "rank=-0.5"),
        (float("nan"), ValueError, "rank=nan"),
        (True, ValueError, "rank=True"),
        (None, TypeError, "rank=None"),
        ("8", TypeError, "rank='8'"),
        ({"mlp": 0}, ValueError, r"rank\['mlp'\]=0"),
        (jnp.array(4), TypeError, "rank=4 is an array"),
    ],
)
def test_what_is_no_rank_is_refused_by_name(rank: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_rank(rank)


def test_what_a_function_returns_is_checked_with_the_path() -> None:
    with pytest.raises(ValueError, match="rank of 'kernel'=0 must be at least 1"):
        resolve_rank(lambda path, shape: 0, "kernel", SHAPE)


def test_a_traced_rank_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(lambda rank: check_rank(rank) and 0)(4)


def test_each_leaf_of_an_optimizer_has_the_rank_of_its_pattern() -> None:
    params = {"attention": {"kernel": jnp.ones((8, 12))}, "mlp": {"kernel": jnp.ones((3, 8, 16))}}
    rule = lro.subspaces.svd({"attention": 2, "mlp": 0.5})
    spec = lro.WeightDimensionNumbers(-2, -1)
    tx = lro.scale_by_projection(optax.scale_by_adam(), rule, weight_dimension_numbers=spec)
    state = jax.eval_shape(tx.init, params)
    assert state.basis["attention"]["kernel"].shape == (8, 2)
    assert state.basis["mlp"]["kernel"].shape == (3, 8, 4)
    assert state.inner.mu["mlp"]["kernel"].shape == (3, 4, 16)


def test_every_pattern_must_match_a_matrix() -> None:
    params = {"attention": {"kernel": jnp.ones((8, 12))}, "mlp": {"kernel": jnp.ones((8, 16))}}
    basis = jnp.eye(8, 2)
    fixed = lro.subspaces.fixed({"atention": basis, ".*": basis})
    for subspace, argument in (
        (lro.subspaces.svd({"atention": 2, ".*": 4}), "rank"),
        (fixed, "basis"),
        (lro.subspaces.power_iteration(2, initial=fixed), "basis"),
        (lro.subspaces.online_pca({"atention": 2, ".*": 4}), "rank"),
    ):
        sides = ("rows",) if subspace.follow_momentum else ("rows", "both")
        message = f"{argument}='atention' matches no matrix; near it are: attention"
        for side in sides:
            tx = lro.scale_by_projection(optax.identity(), subspace, side=side)
            with pytest.raises(ValueError, match=message):
                tx.init(params)
    with pytest.raises(ValueError, match=r"rank='\(' is no regular expression"):
        lro.subspaces.svd({"(": 2})


def test_a_view_of_integers_has_float32_arithmetic() -> None:
    assert lro.View.of(np.ones((4, 6), np.int32), -2, 2).dtype == jnp.float32
