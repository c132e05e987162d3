"""Random features of the exponential kernel: positive and trigonometric, orthogonal."""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.counts import check_count
from lowrank_optax.matrices.orthonormal import in_turn

FeatureKind = Literal["positive", "positive_pm", "trig"]

PRNG = "threefry2x32"


@dataclasses.dataclass(frozen=True)
class RandomFeatures:
    """Random features whose products approximate ``exp(q · k)``, as options of a layer.

    The projection is made from the seed when a program is traced, and is a constant of it: it is
    not in the state, and neither optimizers nor checkpoints see it.

    Attributes:
      num_features: Number ``m`` of random directions.
      kind: ``"positive"``, ``exp(w · x - |x|²/2)``; ``"positive_pm"``, with those of ``-w``, too;
        or ``"trig"``, cosines and sines, whose products can be negative. The last two have ``2 m``
        features.
      orthogonal: Whether directions are orthogonal in blocks of ``d``, which lowers the variance.
      seed: Seed of the projection.
      chunk_size: Number of positions that causal attention computes at once.

    Raises:
      ValueError: If a number is not a positive integer (the seed: an integer), or the kind is
        unknown.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.layers.RandomFeatures(num_features=256).projection(64).shape
      (256, 64)

    Reference:
      Choromanski et al., 2020, https://arxiv.org/abs/2009.14794; Peng et al., 2021,
      https://arxiv.org/abs/2103.02143.
    """

    num_features: int = 128
    kind: FeatureKind = "positive"
    orthogonal: bool = True
    seed: int = 0
    chunk_size: int = 128

    def __post_init__(self) -> None:
        check_count("num_features", self.num_features)
        check_count("chunk_size", self.chunk_size)
        check_kind(self.kind)
        check_seed(self.seed)

    def width(self) -> int:
        """Number of features of a vector: ``m``, or ``2 m``."""
        return self.num_features * (1 if self.kind == "positive" else 2)

    def projection(self, width: int) -> np.ndarray:
        """The random directions ``[m, width]``, float32: the same for each call."""
        return _projection(self.seed, self.num_features, width, self.orthogonal)


@functools.lru_cache(maxsize=64)
def _projection(seed: int, num_features: int, width: int, orthogonal: bool) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(
            random_projection(key_of(seed), num_features, width, orthogonal=orthogonal)
        )


def random_projection(
    key: jax.Array, num_features: int, width: int, *, orthogonal: bool = True
) -> jax.Array:
    """Draw random directions, each of which is standard normal.

    Args:
      key: PRNG key.
      num_features: Number ``m`` of directions.
      width: Width ``d`` of the vectors that they are for.
      orthogonal: Whether rows are orthogonal in blocks of ``d``; the last block may be partial.

    Returns:
      Directions ``[m, d]``, float32. Orthogonal rows have the norms of independent normal ones:
      with equal norms the estimates would be biased.

    Raises:
      ValueError: If a number is not a positive integer.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> lro.layers.random_projection(jax.random.key(0), 6, 4).shape
      (6, 4)

    Reference:
      Choromanski et al., 2020, https://arxiv.org/abs/2009.14794, section 2.4.
    """
    check_count("num_features", num_features)
    check_count("width", width)
    if not orthogonal:
        return jax.random.normal(key, (num_features, width), jnp.float32)
    block_key, norm_key = jax.random.split(key)
    blocks = -(-num_features // width)
    gaussians = jax.random.normal(block_key, (blocks, width, width), jnp.float32)
    q, r = in_turn(jnp.linalg.qr, gaussians)
    # QR chooses signs by its own rule: only with a positive diagonal of R is Q uniform.
    signs = jnp.where(jnp.diagonal(r, axis1=1, axis2=2) < 0, -1.0, 1.0)
    rows = jnp.swapaxes(q * signs[:, None, :], 1, 2).reshape(blocks * width, width)
    normal = jax.random.normal(norm_key, (num_features, width), jnp.float32)
    return rows[:num_features] * jnp.linalg.norm(normal, axis=1, keepdims=True)


def scaled_features(
    x: jax.Array, projection: jax.Array, kind: FeatureKind = "positive"
) -> tuple[jax.Array, jax.Array]:
    """Compute the features of vectors, each divided by its own scale, so that none overflows.

    Args:
      x: Vectors ``[..., d]``.
      projection: Random directions ``[m, d]``.
      kind: As for `RandomFeatures`.

    Returns:
      Features ``[..., F]`` and the logarithms ``[...]`` of the scales, in float32 at least: the
      product ``φ(q) · φ(k)`` of features times scales is an unbiased estimate of ``exp(q · k)``.

    Raises:
      ValueError: If the kind is unknown, or the widths differ.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> directions = lro.layers.random_projection(jax.random.key(0), 4096, 4)
      >>> q, k = jnp.array([0.5, -0.3, 0.2, 0.1]), jnp.array([0.4, 0.1, -0.2, 0.6])
      >>> (u, a), (v, b) = (lro.layers.scaled_features(x, directions) for x in (q, k))
      >>> print(bool(jnp.abs(u @ v * jnp.exp(a + b) - jnp.exp(q @ k)) < 0.1))
      True

    Reference:
      Choromanski et al., 2020, https://arxiv.org/abs/2009.14794, lemma 1.
    """
    check_kind(kind)
    if x.shape[-1] != projection.shape[-1]:
        raise ValueError(
            f"x has shape {x.shape}; its last axis must have the projection's width "
            f"{projection.shape[-1]}."
        )
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    projected = x @ projection.astype(x.dtype).T
    half = jnp.sum(jnp.square(x), axis=-1) / 2
    count = projection.shape[0]
    if kind == "trig":
        both = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], axis=-1)
        return both / np.sqrt(count), half
    if kind == "positive_pm":
        projected, count = jnp.concatenate([projected, -projected], axis=-1), 2 * count
    logs = projected - half[..., None]
    scale = jax.lax.stop_gradient(jnp.max(logs, axis=-1))
    return jnp.exp(logs - scale[..., None]) / np.sqrt(count), scale


def key_of(seed: int) -> jax.Array:
    """The key of a seed, whose draws are the same for any ``jax_default_prng_impl``."""
    return jax.random.key(seed, impl=PRNG)


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is an integer."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"seed={seed!r} must be an integer.")


def check_kind(kind: str) -> None:
    """Raise ValueError unless there are such features."""
    if kind not in get_args(FeatureKind):
        names = ", ".join(map(repr, get_args(FeatureKind)))
        raise ValueError(f"kind={kind!r} must be one of {names}.")
