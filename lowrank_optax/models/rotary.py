"""Rotary positions: RoFormer (https://arxiv.org/abs/2104.09864), eq. 34, in Hugging Face's layout.

One frequency rotates the pair (feature i, feature i + head_dim / 2), not neighbours; this is the
order in which Hugging Face stores Llama's published weights.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.storage.fields import is_number

_FIELDS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the length of the pre-training.

    Attributes:
        rope_type: `"linear"` (every frequency divided by `factor`) or `"llama3"` (only the low
            frequencies, with a smooth passage; Llama 3.1, whose numbers are the defaults).
        factor: by how much the frequencies fall.
        low_freq_factor: llama3 only; wavelengths above
            `original_max_position_embeddings / low_freq_factor` are divided by `factor`.
        high_freq_factor: llama3 only; wavelengths below
            `original_max_position_embeddings / high_freq_factor` stay as they are.
        original_max_position_embeddings: llama3 only; the length of the pre-training.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if not isinstance(self.rope_type, str) or self.rope_type not in _FIELDS:
            raise ValueError(
                f"rope_scaling has rope_type {self.rope_type!r}; "
                "supported are 'linear' and 'llama3' (and no scaling at all)"
            )
        for name in _FIELDS[self.rope_type]:
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ValueError(
                    f"rope_scaling of type {self.rope_type!r} needs a positive number as {name}, "
                    f"got {value!r}"
                )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "rope_scaling needs low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )

    def to_huggingface(self) -> dict[str, Any]:
        """The scaling as a plain dict, without the fields its type does not have."""
        names = ("rope_type", *_FIELDS[self.rope_type])
        return {name: getattr(self, name) for name in names}


def rope_scaling_from(parameters: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling a dict in a Hugging Face configuration stands for; None for the default."""
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return None
    # A missing field becomes None, which RopeScaling refuses: Hugging Face has no default either.
    names = _FIELDS.get(str(rope_type), ("factor",))
    fields: dict[str, Any] = {name: parameters.get(name) for name in names}
    return RopeScaling(rope_type, **fields)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """The angle by which each pair of features rotates from one position to the next.

    Args:
        head_dim: width of a head.
        theta: base of the geometric sequence of frequencies.
        scaling: how the frequencies are stretched, if at all.

    Returns:
        float32 [head_dim / 2], in falling order.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.rope_type == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    # Llama 3.1: 1 keeps a frequency, 0 divides it, by the number of its periods in the length of
    # the pre-training.
    cycles = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return ((keep + (1 - keep) / scaling.factor) * frequencies).astype(np.float32)


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's rotation, float32 [length, 1, head_dim / 2]."""
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates queries or keys [batch, length, heads, head_dim] by their positions, in float32."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
