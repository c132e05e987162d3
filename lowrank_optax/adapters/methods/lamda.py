"""LaMDA: a small square core between two factors from the weight's singular vectors."""

import dataclasses
from typing import ClassVar, Literal, Self, get_args

import jax
from jax.nn import initializers
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights, product
from lowrank_optax.adapters.low_rank import LowRank, for_each, kaiming_uniform, thin_product
from lowrank_optax.adapters.operands import Operand, Rows
from lowrank_optax.adapters.spectra import check_power_iterations, truncated_svd

CoreInit = Literal["sigma", "eye", "zero", "code"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaMDA(LowRank):
    r"""Spectrally decomposed low-dimensional adaptation: a core that is trained to the end.

    .. math::
      y = x W_{\mathrm{main}} + c \, (((x A) S) B), \qquad
      W \approx U_r \, \mathrm{diag}(\sigma_r) \, V_r^\top

    Parameters of a stack ``[L, d_in, d_out]``: ``A [L, d_in, r]`` is frozen, ``S [L, r, r]``
    trained, and so is ``B [L, r, d_out]`` until `lamda_freezing` has frozen its rows, that of the
    largest singular value first. The rank is capped at ``min(d_in, d_out)``.

    .. warning::
      With ``"sigma"`` and ``"eye"`` a part of the weight is in ``S`` and ``B``, and weight decay
      shrinks it: leave them out, ``mask=lro.training.decay_mask(exclude=r"(^|/)[SB]$")``, or let
      them decay towards where they started, `add_weight_decay` with ``anchor="initial"``.

    Args:
      rank: The rank ``r``, or one for each layer of a stack (LaMDA++: see `allocate_ranks`).
      core_init: How the singular values are spread; the function at the start is the same.
        ``"sigma"``: ``A = U_r``, ``S = diag(sigma_r) / c``, ``B = V_rᵀ``, and
        ``W_main = W - U_r diag(sigma_r) V_rᵀ``. ``"eye"``: ``A = U_r sqrt(sigma_r)``,
        ``S = I / c``, ``B = sqrt(sigma_r) V_rᵀ``, the same ``W_main``. ``"zero"``: ``A`` and ``B``
        as the first, ``S = 0``, and the weight stays as it is. ``"code"``: what the official code
        does, which has no SVD: ``A`` uniform as LoRA's, ``S`` in ``U(±1/sqrt(r))``, ``B = 0``.
      power_iterations: None for an exact SVD; the number of iterations of a randomized one, whose
        error ``W_main`` makes up for.
      dropout: As for `LowRank`; with ``"sigma"`` and ``"eye"`` that drops a part of the weight too.
      param_dtype: Dtype of ``A`` and ``B``; ``S`` is float32.

    Other options, and errors, are those of `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> weights = jnp.diag(jnp.array([9.0, 4.0, 1.0]))[None]
      >>> params = lro.adapters.LaMDA(rank=1).init(jax.random.key(0), weights)
      >>> print(jnp.diag(params.base[0]), params.trainable["S"][0])
      [0. 4. 1.] [[9.]]

    Reference:
      Azizi et al., LaMDA, 2024, https://arxiv.org/abs/2406.12832, and its code,
      https://github.com/ArminAzizi98/LaMDA.
    """

    axes: ClassVar[Axes] = {"A": ("in", None), "B": (None, "out"), "principal": (None, "out")}

    core_init: CoreInit = "sigma"
    power_iterations: int | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.core_init not in get_args(CoreInit):
            raise ValueError(f"core_init={self.core_init!r} must be one of {get_args(CoreInit)}.")
        check_power_iterations(self.power_iterations)

    @property
    def changes_base(self) -> bool:
        """Whether a part of the weights moves into the adapter."""
        return self.core_init in ("sigma", "eye")

    @property
    def reads_weights(self) -> bool:
        """Whether there is an SVD."""
        return self.core_init != "code"

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """``A``, ``S`` and ``B`` as ``core_init`` says."""
        del shared, embedding
        layers, d_in, d_out = weights.shape
        method = self._capped(min(d_in, d_out))
        within = method.within_ranks(layers)
        rows, columns = within[:, :, None], within[:, None, :]
        start = method._random if self.core_init == "code" else method._spectral
        a, s, b = start(key, weights)
        a = jnp.where(columns, a, 0).astype(self.param_dtype)
        b = jnp.where(rows, b, 0).astype(self.param_dtype)
        trained = {"S": jnp.where(rows & columns, s, 0), "B": b}
        constants = method.rank_scales(layers) | {"A": a}
        if not self.changes_base:
            return AdapterParams(trained, constants)
        # From the factors as they are stored, so that the sum is the weight whatever they lack.
        principal = self.factors(trained | constants)[1]
        base = jnp.asarray(weights, jnp.float32) - product(a, principal)
        return AdapterParams(trained, constants | {"principal": principal}, base)

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``c S B``."""
        return p["A"], product(self._core(p), p["B"])

    def times(self, p: Arrays, x: Operand) -> jax.Array:
        """``((x A) c S) B``, in this order: once ``B`` is frozen, it has no backward."""
        return thin_product(Rows(x @ p["A"]), self._core(p), p["B"])

    def removed_factors(self, p: Arrays) -> tuple[jax.Array, jax.Array] | None:
        """``A`` and ``c S B`` at the start, if they were removed from the weight."""
        return (p["A"], p["principal"]) if "principal" in p else None

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and the change of ``c S B``: as ``A`` is frozen, the rank stays ``r``."""
        first, second = self.factors(p)
        return first, second - p["principal"] if "principal" in p else second

    def _core(self, p: Arrays) -> jax.Array:
        """``c S``, float32 ``[..., r, r]``."""
        return self._capped(p["S"].shape[-1]).scaled(p, p["S"])

    def _capped(self, limit: int) -> Self:
        """The same method with no rank above ``limit``."""
        if isinstance(self.rank, tuple):
            return dataclasses.replace(self, rank=tuple(min(r, limit) for r in self.rank))
        return dataclasses.replace(self, rank=min(self.rank, limit))

    def _spectral(self, key: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array, jax.Array]:
        steps = self.power_iterations
        u, sigma, v = truncated_svd(
            jnp.asarray(weights), self.max_rank, power_iterations=steps, key=key
        )
        vt = v.mT
        if self.core_init == "eye":
            root = jnp.sqrt(sigma)
            u, vt, sigma = u * root[..., None, :], root[..., :, None] * vt, jnp.ones_like(sigma)
        elif self.core_init == "zero":
            sigma = jnp.zeros_like(sigma)
        scales = self.scales(weights.shape[0])[:, None]
        return u, (sigma / scales)[..., None] * jnp.eye(self.max_rank), vt

    def _random(self, key: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array, jax.Array]:
        layers, d_in, d_out = weights.shape
        of_first, of_core = jax.random.split(key)
        a = for_each(kaiming_uniform(), of_first, (layers, d_in, self.max_rank), jnp.float32)
        # PyTorch's start of a linear layer with the layer's rank of inputs.
        core = (layers, self.max_rank, self.max_rank)
        s = for_each(initializers.uniform(2.0), of_core, core, jnp.float32) - 1.0
        s = s / jnp.sqrt(self.ranks(layers))[:, None, None]
        return a, s, jnp.zeros((layers, self.max_rank, d_out))
