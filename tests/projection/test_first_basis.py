"""Rules whose first basis another rule finds."""

from typing import Any

from close import assert_close
import jax
import numpy as np
import optax
import pytest

import lowrank_optax as lro

RULES = [lro.subspaces.online_pca, lro.subspaces.power_iteration]
BASIS = np.float32(np.linalg.qr(np.random.default_rng(0).normal(size=(8, 3)))[0])
GRADIENT = {"kernel": np.random.default_rng(1).normal(size=(8, 12)).astype(np.float32)}
REFUSED: dict[str, tuple[lro.subspaces.Subspace, str]] = {
    "shared": (lro.subspaces.random(3), "one array"),
    "indices": (lro.subspaces.dct(3), "floats; it stores int32"),
    "moved too": (lro.subspaces.online_pca(3), "one array"),
    "with ranks": (lro.subspaces.adaptive_rank(lro.subspaces.svd(3)), "one array"),
    "coded": (lro.subspaces.quantized(lro.subspaces.svd(3), bits=8), "one array"),
    "wider": (lro.subspaces.svd(5), "the rank 5 for 'kernel': it must be 3"),
    "narrower and given": (lro.subspaces.fixed(BASIS[:, :2]), "the rank 2 for 'kernel'"),
}


def first_update(rule: lro.subspaces.Subspace) -> Any:
    tx = lro.scale_by_projection(optax.identity(), rule, refresh_every=None)
    return jax.jit(tx.update)(GRADIENT, tx.init(GRADIENT))[0]["kernel"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_basis_that_is_given_is_the_first(rule: Any, stacked: bool) -> None:
    given = BASIS[None] if stacked else BASIS
    gradient = {"kernel": GRADIENT["kernel"][None]} if stacked else GRADIENT
    axes = lro.WeightDimensionNumbers(-2, -1)
    tx = lro.scale_by_projection(
        optax.identity(),
        rule(3, initial=lro.subspaces.fixed(given)),
        refresh_every=None,
        weight_dimension_numbers=axes,
    )
    update, _ = jax.jit(tx.update)(gradient, tx.init(gradient))
    assert_close(update["kernel"], given @ np.swapaxes(given, -1, -2) @ gradient["kernel"], 100)


@pytest.mark.parametrize("rule", RULES)
def test_a_basis_that_is_found_is_the_first(rule: Any) -> None:
    u, s, v = np.linalg.svd(GRADIENT["kernel"].astype(np.float64))
    found = first_update(rule(3, initial=lro.subspaces.svd(3)))
    assert_close(found, (u[:, :3] * s[:3]) @ v[:3], 100)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("rule", RULES)
def test_rules_that_make_no_such_basis_are_refused(rule: Any, name: str) -> None:
    initial, why = REFUSED[name]
    with pytest.raises(ValueError, match=f"initial .*{why}"):
        first_update(rule(3, initial=initial))


def test_power_iteration_starts_from_an_orthonormal_basis() -> None:
    given = lro.subspaces.fixed(5 * BASIS, orthonormal=False)
    with pytest.raises(ValueError, match="initial must be orthonormal"):
        lro.subspaces.power_iteration(3, initial=given)
    update = first_update(lro.subspaces.online_pca(3, initial=given))
    assert_close(update, 25 * BASIS @ BASIS.T @ GRADIENT["kernel"], 100)


def test_a_basis_that_was_given_can_be_compacted() -> None:
    rule = lro.subspaces.power_iteration(3, initial=lro.subspaces.fixed(BASIS))
    rule = lro.subspaces.adaptive_rank(rule, threshold=0.9)
    tx = lro.scale_by_projection(optax.identity(), rule, refresh_every=2)
    _, state = tx.update(GRADIENT, tx.init(GRADIENT))
    compacted = lro.compact(state)
    assert compacted.basis.basis["kernel"].shape[-1] < 3
    tx.update(GRADIENT, compacted)
