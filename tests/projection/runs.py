"""Trajectories of optimizers, and the parts that float64 references are made of."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def run(
    tx: optax.GradientTransformation, params: Any, gradients: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Parameters and states after each of a list of gradient trees."""
    state, trajectory = tx.init(params), []
    for gradient in gradients:
        params, state = _step(tx, params, state, gradient)
        trajectory.append((params, state))
    return trajectory


@functools.partial(jax.jit, static_argnums=0)
def _step(tx: optax.GradientTransformation, params: Any, state: Any, gradient: Any) -> Any:
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=0)
def first(tx: optax.GradientTransformation, gradient: Any, params: Any = None) -> tuple[Any, Any]:
    """Updates and state after the first gradient."""
    return tx.update(gradient, tx.init(gradient if params is None else params), params)


def moved(tx: optax.GradientTransformation, start: Any, gradients: Sequence[Any]) -> np.ndarray:
    """The kernel after all gradients; ``start`` is a tree, or the shape of a kernel of zeros."""
    params = (
        {"kernel": jnp.asarray(np.zeros(start, np.float32))} if isinstance(start, tuple) else start
    )
    return np.asarray(run(tx, params, gradients)[-1][0]["kernel"])


def normal_gradients(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Any]:
    drawn = np.random.default_rng(seed).normal(size=(count, *shape))
    return [{"kernel": jnp.asarray(x, jnp.float32)} for x in drawn]


def state_bytes(tree: Any) -> int:
    """Bytes of a state, or of its shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def orthonormal(length: int, rank: int, seed: int = 0) -> jax.Array:
    """A random basis ``[length, rank]``."""
    drawn = np.random.default_rng(seed).normal(size=(length, rank))
    return jnp.asarray(np.linalg.qr(drawn)[0], jnp.float32)


class Adam:
    """Adam's moments in float64, as a book has them."""

    def __init__(self, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> None:
        self.b1, self.b2, self.eps = b1, b2, eps
        self.first, self.second, self.count = np.zeros(()), np.zeros(()), 0

    @property
    def corrections(self) -> tuple[float, float]:
        """``1 - b**count`` of both moments."""
        return 1 - self.b1**self.count, 1 - self.b2**self.count

    def update(self, gradient: np.ndarray) -> np.ndarray:
        """The direction for the next gradient."""
        self.count += 1
        self.first = self.b1 * self.first + (1 - self.b1) * gradient
        self.second = self.b2 * self.second + (1 - self.b2) * gradient**2
        one, two = self.corrections
        return (self.first / one) / (np.sqrt(self.second / two) + self.eps)

    def turn(self, between: np.ndarray) -> None:
        """Moments into another basis, with variances of independent coordinates."""
        one, two = self.corrections
        mean, raw = self.first / one, self.second / two
        self.first = between @ self.first
        variance = between**2 @ (raw - mean**2)
        self.second = two * np.abs(variance + (self.first / one) ** 2)


def float64(gradients: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(g["kernel"], np.float64) for g in gradients]
