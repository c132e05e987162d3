"""Every subspace rule by name, and what tests of them share."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

_subspaces = lro.subspaces


def _eye(rank: int, length: int) -> Any:
    """A basis that the user gives: some coordinates."""
    return jnp.asarray(np.eye(length, dtype=np.float32)[:, ::-1][:, :rank])


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


class First(NamedTuple):
    """A basis, and what it makes of a gradient and of projected numbers."""

    basis: Any
    projected: Any  # the gradient
    lifted: Any  # the numbers
    captured: Any  # the gradient, lifted again
    dense: Any  # see `Case.dense`


class Case:
    """A rule on gradients of one shape, compiled once for all tests."""

    def __init__(self, rule: lro.subspaces.Subspace, view: lro.View) -> None:
        self.rule, self.view = rule, view
        self.refresh = jax.jit(lambda key, g, basis: rule.refresh(key, g, basis, None, view))
        self.project = jax.jit(lambda basis, g: rule.project(basis, g, view))
        self.lift = jax.jit(lambda basis, x: rule.lift(basis, x, view))
        self.turn = jax.jit(
            lambda old, new, x, squared=False: rule.rotate(old, new, x, view, squared),
            static_argnums=3,
        )
        self._found = jax.jit(lambda key, g: rule.refresh(key, g, rule.init(view), None, view))
        self._dense = jax.jit(self._lifted_identity)
        self._first = jax.jit(self._refreshed)
        self._turned = jax.jit(
            lambda old, new, x: {s: rule.rotate(old, new, x, view, s) for s in (False, True)}
        )

    def found(self, matrix: jax.Array, seed: int = 0) -> Any:
        """The first basis."""
        return self._found(jax.random.key(seed), matrix)

    def first(self, matrix: jax.Array, x: Any = None, seed: int = 0, last: Any = None) -> "First":
        """What a refresh of ``last``, or the first one, gives, from one program."""
        last = self.rule.init(self.view) if last is None else last
        x = np.zeros(self.view.projected_shape, np.float32) if x is None else x
        found = self._first(jax.random.key(seed), matrix, last, x)
        return First(found[0], *map(np.asarray, found[1:]))

    def _refreshed(self, key: jax.Array, matrix: jax.Array, last: Any, x: Any) -> Any:
        rule, view = self.rule, self.view
        basis = rule.refresh(key, matrix, last, None, view)
        projected = rule.project(basis, matrix, view)
        lifted = [rule.lift(basis, z, view) for z in (x, projected, self._identity())]
        return First(basis, projected, *lifted[:2], self._dense_of(lifted[2]))

    def turned(self, old: Any, new: Any, x: Any) -> dict[bool, jax.Array]:
        """Projected numbers in another basis, plain and squared, from one program."""
        return self._turned(old, new, x)

    def dense(self, basis: Any) -> np.ndarray:
        """The basis as a matrix ``[*batch, d, r]``: what the identity is lifted to."""
        return np.asarray(self._dense(basis))

    def _dense_of(self, lifted: Any) -> Any:
        return lifted if self.view.axis == -2 else lifted.mT

    def _lifted_identity(self, basis: Any) -> jax.Array:
        return self._dense_of(self.rule.lift(basis, self._identity(), self.view))

    def _identity(self) -> jax.Array:
        view = self.view
        shape = (*view.batch, view.rank, view.rank)
        return jnp.broadcast_to(jnp.eye(view.rank, dtype=view.dtype), shape)


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
