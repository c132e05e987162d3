"""Every subspace rule by name, and what tests of them share."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

_subspaces = lro.subspaces


def _eye(rank: int, length: int) -> Any:
    """A basis that the user gives: some coordinates."""
    return jnp.eye(length)[:, ::-1][:, :rank]


# From the rank and the size of the compressed axis.
RULES: dict[str, Callable[[int, int], lro.subspaces.Subspace]] = {
    "svd": lambda r, d: _subspaces.svd(r),
    "randomized_svd": lambda r, d: _subspaces.randomized_svd(r),
    "warm_start": lambda r, d: _subspaces.randomized_svd(r, warm_start=True),
    "power_iteration": lambda r, d: _subspaces.power_iteration(r),
    "online_pca": lambda r, d: _subspaces.online_pca(r),
    "dct": lambda r, d: _subspaces.dct(r),
    "dct_fft": lambda r, d: _subspaces.dct(r, order=2, transform="fft"),
    "gaussian": lambda r, d: _subspaces.random(r),
    "orthonormal": lambda r, d: _subspaces.random(r, "orthonormal"),
    "rademacher": lambda r, d: _subspaces.random(r, "rademacher"),
    "sparse": lambda r, d: _subspaces.random(r, "sparse"),
    "fixed": lambda r, d: _subspaces.fixed(_eye(r, d)),
    "adaptive_rank": lambda r, d: _subspaces.adaptive_rank(_subspaces.randomized_svd(r)),
}
FIND_FROM_GRADIENT = ("svd", "randomized_svd", "warm_start", "power_iteration", "online_pca")
EVERY_RULE = pytest.mark.parametrize("name", RULES)
AXES = pytest.mark.parametrize("axis", [-2, -1], ids=["rows", "columns"])


class Case:
    """A rule on gradients of one shape, compiled once for all tests."""

    def __init__(self, rule: lro.subspaces.Subspace, view: lro.View) -> None:
        self.rule, self.view = rule, view
        self.refresh = jax.jit(lambda key, g, basis: rule.refresh(key, g, basis, None, view))
        self.project = jax.jit(lambda basis, g: rule.project(basis, g, view))
        self.lift = jax.jit(lambda basis, x: rule.lift(basis, x, view))
        self.turn = jax.jit(
            lambda old, new, x, squared=False: rule.turn(old, new, x, view, squared),
            static_argnums=3,
        )
        self._dense = jax.jit(self._lifted_identity)

    def found(self, matrix: jax.Array, seed: int = 0) -> Any:
        """The first basis."""
        return self.refresh(jax.random.key(seed), matrix, self.rule.init(self.view))

    def dense(self, basis: Any) -> np.ndarray:
        """The basis as a matrix ``[*batch, d, r]``: what the identity is lifted to."""
        lifted = np.asarray(self._dense(basis))
        return lifted if self.view.axis == -2 else lifted.swapaxes(-1, -2)

    def _lifted_identity(self, basis: Any) -> jax.Array:
        view = self.view
        shape = (*view.batch, view.rank, view.rank)
        eye = jnp.broadcast_to(jnp.eye(view.rank, dtype=view.dtype), shape)
        return self.rule.lift(basis, eye, view)


@functools.cache
def case(name: str, shape: tuple[int, ...], axis: int = -2, rank: int = 3) -> Case:
    """A rule by its name, on float32 gradients ``[*batch, m, n]`` (or lower precision)."""
    rule = RULES[name](min(rank, *shape[-2:]), shape[axis])
    return Case(rule, lro.View.of(jax.ShapeDtypeStruct(shape, jnp.float32), axis, rule.rank))


@functools.cache
def case_of_both(name: str, shape: tuple[int, ...], rank: int = 3) -> Case:
    """A rule on both sides of square matrices."""
    one = case(name, shape, -2, rank)
    return Case(lro.subspaces.both_sides(one.rule), one.view._replace(both=True))


def gram_error(basis: np.ndarray, active: Any = None) -> float:
    """Largest entry of ``PᵀP - I`` in float64; of the active columns only, if told."""
    basis = np.asarray(basis, np.float64)
    eye = np.eye(basis.shape[-1])
    if active is not None:
        eye = eye * (np.arange(basis.shape[-1]) < np.asarray(active)[..., None])[..., None, :]
    return float(np.abs(basis.swapaxes(-1, -2) @ basis - eye).max())


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def decaying(rows: int, columns: int, power: float = 1.0, seed: int = 0) -> jax.Array:
    """A matrix with singular values ``1 / i**power``."""
    rng, small = np.random.default_rng(seed), min(rows, columns)
    u, _ = np.linalg.qr(rng.normal(size=(rows, small)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, small)))
    return jnp.asarray((u / np.arange(1, small + 1) ** power) @ v.T, jnp.float32)
