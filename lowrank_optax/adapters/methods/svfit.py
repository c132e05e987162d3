"""SVFit: the largest singular values of a weight are trained, its singular vectors are frozen."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights
from lowrank_optax.adapters.low_rank import LowRank, to_float32
from lowrank_optax.adapters.spectra import (
    check_power_iterations,
    nonzero,
    singular_values,
    truncated_svd,
    values_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVFit(LowRank):
    r"""Fine-tuning of the largest singular values, ``r`` numbers for each weight.

    With :math:`W = U S V^\top`, cut to the ``r`` largest singular values, in delta form:

    .. math:: y = x W + ((x U_r) \odot t)\, V_r^\top, \qquad t = 0 \text{ at the start},

    which is the paper's :math:`x W_e + ((x U_r) \odot s) V_r^\top` with :math:`s = S_r + t`: the
    same function and gradients, but bit for bit the model's at the start, and weight decay pulls
    to the pretrained values instead of to zero. Parameters of a stack ``[L, d_in, d_out]``:
    ``t [L, r]``, trained; ``U [L, d_in, r]`` and ``V [L, d_out, r]``, frozen, with columns of
    zeros beyond a layer's rank and for singular values of zero, whose vectors mean nothing.
    Checkpoints hold ``U`` and ``V``: computed again elsewhere, vectors of equal singular values
    may differ.

    A step is of the size of a change of the singular values, whatever these are: with Adam,
    learning rates from 1e-3 to 1e-2 times the largest of them serve. The branch costs a LoRA's
    of the same rank: at ``r = min(d_in, d_out)`` two products of the layer's own size.

    Args:
      rank: The number of singular values ``r``, or one for each layer of a stack; at most
        ``min(d_in, d_out)``.
      alpha: Must be None: there is no scale.
      energy: If given, each weight has a rank of its own instead of ``rank``: the number of
        singular values that hold this fraction of the sum of their squares (`energy_rank`). The
        paper's "over 99% of the information" is 0.99. Under ``jax.jit``, where shapes cannot
        depend on values, arrays then have ``min(d_in, d_out)`` columns, and zeros in the others.
      power_iterations: None for the exact decomposition; the number of iterations of a randomized
        one, for ranks far below ``min(d_in, d_out)``.

    Other options, and errors, are those of `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method = lro.adapters.SVFit(rank=1)
      >>> weights = jnp.diag(jnp.array([3.0, 1.0]))[None]
      >>> p = method.layer_arrays(method.init(jax.random.key(0), weights), 0)
      >>> of_weight = jnp.array([[2.0, 5.0], [5.0, 7.0]])  # the loss's gradient
      >>> loss = lambda t: jnp.sum(of_weight * method.delta(p | {"t": t}, weights[0]))
      >>> print(p["t"], jax.grad(loss)(p["t"]))
      [0.] [2.]
      >>> print(method.merged(p | {"t": jnp.array([-1.0])}, weights[0]).weight)
      [[2. 0.]
       [0. 1.]]

    References:
      Sun et al., SVFit, 2024, https://arxiv.org/abs/2409.05926. With every singular value it is the
      plain form of Lingam et al., SVFT, 2024, https://arxiv.org/abs/2405.19597.
    """

    axes: ClassVar[Axes] = {"U": ("in", None), "V": ("out", None)}

    energy: float | None = None
    power_iterations: int | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.alpha is not None:
            raise ValueError(f"alpha={self.alpha!r} must be None: SVFit has no scale.")
        _check_energy(self.energy)
        check_power_iterations(self.power_iterations)

    @property
    def reads_weights(self) -> bool:
        """True: they are decomposed."""
        return True

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """The singular vectors, and zeros."""
        del shared, embedding
        weights = values_of(weights)
        if self.energy is None:
            ranks, columns = self.ranks(weights.shape[0]), self.max_rank
        else:
            ranks = energy_rank(singular_values(weights), self.energy)
            traced = isinstance(ranks, jax.core.Tracer)
            columns = min(weights.shape[1:]) if traced else int(jnp.max(ranks))
        iterations = self.power_iterations
        u, s, v = truncated_svd(weights, columns, power_iterations=iterations, key=key)
        used = nonzero(s) & (jnp.arange(s.shape[-1]) < ranks[:, None])
        masked = lambda x: jnp.where(used[:, None, :], x, 0.0).astype(self.param_dtype)
        t = jnp.zeros(s.shape, self.param_dtype)
        return AdapterParams({"t": t}, {"U": masked(u), "V": masked(v)})

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``U`` and ``diag(t) Vᵀ``."""
        t, v = to_float32(p, "t", "V")
        return p["U"], t[..., :, None] * v.mT


def energy_rank(singular_values: jax.Array, energy: float) -> jax.Array:
    r"""The smallest ``r`` with :math:`\sum_{i \le r} S_i^2 \ge e \sum_i S_i^2`.

    Args:
      singular_values: ``[..., k]``, descending.
      energy: The fraction ``e``, above 0 and at most 1.

    Returns:
      int32 ``[...]``, at least 1.

    Raises:
      ValueError: If ``energy`` is out of its range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> print(lro.adapters.energy_rank(jnp.array([10.0, 1.0, 1.0]), 0.99))  # 101 of 102
      2
    """
    _check_energy(energy)
    largest = singular_values[..., :1]
    relative = singular_values / jnp.where(largest > 0, largest, 1)  # squares that fit in float32
    sums = jnp.cumsum(jnp.square(relative.astype(jnp.float32)), axis=-1)
    missing = jnp.sum(sums < energy * sums[..., -1:], axis=-1)
    return jnp.minimum(missing + 1, singular_values.shape[-1]).astype(jnp.int32)


def _check_energy(energy: float | None) -> None:
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} must be above 0 and at most 1.")
