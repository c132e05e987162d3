"""Arguments of subspace rules that are refused by name, and the rule of a basis that is given."""

from collections.abc import Callable
import re
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.rules import Case, normal
from tests.projection.runs import first

NAMES = ("svd", "randomized_svd", "online_pca", "dct", "random", "power_iteration")
TAKE_A_RANK = pytest.mark.parametrize("rule", [getattr(lro.subspaces, n) for n in NAMES], ids=NAMES)


@TAKE_A_RANK
@pytest.mark.parametrize(
    ("rank", "error"),
    [(0, ValueError), (-1, ValueError), (True, ValueError), (1.5, ValueError), ("4", TypeError)],
)
def test_a_rank_that_is_none_is_refused_by_name(
    rule: Callable[..., Any], rank: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"rank={re.escape(repr(rank))}"):
        rule(rank)


@TAKE_A_RANK
def test_a_traced_rank_is_refused_with_the_remedy(rule: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(lambda rank: rule(rank) and 0)(2)


@pytest.mark.parametrize("name", ["oversample", "power_iterations"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_bad_options_of_the_randomized_svd_are_refused_by_name(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"{name}={value}"):
        lro.subspaces.randomized_svd(2, **{name: value})


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("dct", {"order": 3}),
        ("dct", {"transform": "wavelet"}),
        ("random", {"kind": "uniform"}),
        ("online_pca", {"penalty": -0.1}),
        ("power_iteration", {"momentum": 1.0}),
        ("power_iteration", {"momentum": -0.1}),
    ],
)
def test_bad_options_are_refused_by_name(rule: str, options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))}"):
        getattr(lro.subspaces, rule)(2, **options)


def test_both_sides_refuse_a_rule_that_follows_the_momentum() -> None:
    with pytest.raises(ValueError, match="both"):
        lro.subspaces.both_sides(lro.subspaces.power_iteration(2))


@pytest.mark.parametrize("options", [{"min_rank": 0}, {"rank_step": 0}, {"threshold": 1.5}])
def test_bad_options_of_an_adaptive_rank_are_refused_by_name(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        lro.subspaces.adaptive_rank(lro.subspaces.svd(2), **options)


@pytest.mark.parametrize("rule", ["random", "online_pca", "dct"])
def test_an_adaptive_rank_refuses_rules_that_keep_no_orthonormal_array(rule: str) -> None:
    with pytest.raises(ValueError, match="orthonormal array"):
        lro.subspaces.adaptive_rank(getattr(lro.subspaces, rule)(2)).init(
            lro.View.of(jnp.zeros((4, 4)), -2, 2)
        )


def test_a_fixed_basis_is_given_by_pattern_or_function_or_for_each_layer() -> None:
    gradient = {
        name: np.asarray(normal(4, 6, seed=i)) for i, name in enumerate(["first", "second"])
    }
    one, other = np.eye(4, dtype=np.float32)[:, :2], np.eye(4, dtype=np.float32)[:, 2:]
    expected = {"first": one @ one.T @ gradient["first"]}
    expected["second"] = other @ other.T @ gradient["second"]
    by_path = lambda path, shape: one if path == "first" else other
    for source in ({"first": one, ".*": other}, by_path):
        tx = lro.scale_by_projection(optax.identity(), lro.subspaces.fixed(source))
        assert_close(first(tx, gradient)[0], expected)
    stack = np.stack(list(gradient.values()))
    rule = lro.subspaces.fixed(np.stack([one, other]))
    found = Case(rule, lro.View.of(stack, -2, rule.rank)).first(stack)
    assert_close(found.captured, np.stack(list(expected.values())))


@pytest.mark.parametrize(
    ("basis", "match"),
    [
        (np.eye(5, 2), r"basis of shape \(5, 2\) does not fit 'kernel'"),
        (np.eye(4, 4), r"basis of shape \(4, 4\) does not fit 'kernel'"),
        ({"attention": np.eye(4, 2)}, "no pattern for 'kernel'"),
    ],
    ids=["rows", "columns", "pattern"],
)
def test_a_fixed_basis_that_does_not_fit_is_refused(basis: Any, match: str) -> None:
    rule = lro.subspaces.fixed(basis)
    tx = lro.scale_by_projection(optax.identity(), rule, side="rows")
    with pytest.raises(ValueError, match=match):
        tx.init({"kernel": jnp.zeros((4, 3))})
