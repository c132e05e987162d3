"""PiSSA: the principal part of a weight is trained, as a LoRA, and the residual is frozen."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights, product
from lowrank_optax.adapters.low_rank import LowRank, difference
from lowrank_optax.adapters.operands import Operand
from lowrank_optax.adapters.spectra import (
    check_power_iterations,
    nonzero,
    singular_values,
    truncated_svd,
    values_of,
)
from lowrank_optax.quantization.nf4 import NF4_BLOCK, nf4_round


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(LowRank):
    r"""Principal singular values and vectors adaptation.

    With :math:`W = U S V^\top`, cut to the ``r`` largest singular values, and LoRA's scale
    :math:`s`,

    .. math::
        A = U_r (S_r / s)^{1/2}, \quad B = (S_r / s)^{1/2} V_r^\top, \quad
        W_\mathrm{res} = W - s A B, \quad y = x W_\mathrm{res} + s\,(x A) B,

    so that the start function is the model's, to rounding, and ``A`` and ``B`` both have gradients
    from the first step. Parameters of a stack ``[L, d_in, d_out]``: ``A [L, d_in, r]`` and
    ``B [L, r, d_out]``, trained; ``A_0`` and ``B_0``, as they were at the start, frozen. Beyond
    ``min(d_in, d_out)`` there are no further components.

    Train it without weight decay, which would shrink the pretrained part, and with a tenth of
    LoRA's learning rate: its gradients are larger at the start.

    Args:
      alpha: The scale is ``alpha / rank``; None for ``alpha = rank``. It moves size between ``A``
        and ``B`` and the product, not the start function.
      rank_stabilized: Whether to scale by ``alpha / sqrt(rank)`` instead.
      dropout: Must be 0: it would drop a part of the pretrained weight.
      power_iterations: None for the exact decomposition; the number of iterations of a randomized
        one, which takes seconds instead of minutes on a large model. The start function is exact
        either way, since ``W_res`` absorbs the error; 4 to 16 serve.
      residual: Whether the layer's weight becomes ``W_res``. If not, it stays, and the layer
        computes :math:`x W + s [(x (A - A_0)) B + (x A_0) (B - B_0)]`, which is the same function:
        the start is bit for bit the model's in any dtype, adapters can be switched and combined,
        and the branch costs twice as much.
      nf4_rounds: 0, or rounds ``T`` of QPiSSA: ``W_res`` is rounded to NF4 (see
        `quantization.nf4_quantize`), and each of the ``T`` rounds decomposes what the NF4 weights
        of the round before leave over. 1 is plain QPiSSA, the paper's tables have 5. The original
        weight cannot be restored then, nor the change expressed as a LoRA of it.

    Other options, and errors, are those of `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> weights = jnp.diag(jnp.array([9.0, 4.0, 1.0]))[None]
      >>> params = lro.adapters.PiSSA(rank=1).init(jax.random.key(0), weights)
      >>> print(params.trainable["A"][0].ravel(), params.trainable["B"][0].ravel())
      [3. 0. 0.] [3. 0. 0.]
      >>> print(params.base[0].diagonal())
      [0. 4. 1.]

    Reference:
      Meng, Wang and Zhang, PiSSA, 2024, https://arxiv.org/abs/2404.02948, equations 2 to 4 and
      Algorithm 1, whose factors belong to the same round as the base, as in the official code.
    """

    axes: ClassVar[Axes] = {
        "A": ("in", None),
        "B": (None, "out"),
        "A_0": ("in", None),
        "B_0": (None, "out"),
    }

    rank_stabilized: bool = False
    power_iterations: int | None = None
    residual: bool = True
    nf4_rounds: int = 0

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout!r} must be 0: PiSSA's branch holds a part of the pretrained"
                " weight, which dropout would drop."
            )
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha!r} must be above 0: S / s has a square root.")
        check_power_iterations(self.power_iterations)
        if self.nf4_rounds < 0:
            raise ValueError(f"nf4_rounds={self.nf4_rounds!r} must be at least 0.")
        if self.nf4_rounds and not self.residual:
            raise ValueError(
                f"nf4_rounds={self.nf4_rounds!r} quantizes the residual, which residual=False "
                "does not make: leave one of them out."
            )

    @property
    def reads_weights(self) -> bool:
        """True: they are decomposed."""
        return True

    @property
    def changes_base(self) -> bool:
        """Whether the weight becomes ``W_res``."""
        return self.residual

    def scale_of(self, rank: int) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``."""
        return super().scale_of(rank) * (rank**0.5 if self.rank_stabilized else 1)

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """The factors of the principal part, and what is left of the weights."""
        del shared, embedding
        a, b, base = _decomposed(self, key, values_of(weights))
        scales = self.rank_scales(weights.shape[0])
        scales = {name: x[:, : a.shape[-1]] for name, x in scales.items()}
        # Copies: the trained ones may be donated to a training step.
        frozen = {"A_0": jnp.copy(a), "B_0": jnp.copy(b)} | scales
        return AdapterParams({"A": a, "B": b}, frozen, base if self.residual else None)

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``s B``; without a residual, those of `to_lora`."""
        return (p["A"], self.scaled(p, p["B"])) if self.residual else self._change(p)

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``[A - A_0 | A_0]`` and ``s [B; B - B_0]``, of rank ``2r``, beside the original weight.

        Raises:
          TypeError: If the base was quantized: it is not the original weight less ``s A_0 B_0``.
        """
        self._check_original("has no change of low rank")
        return self._change(p)

    def removed_factors(self, p: Arrays) -> tuple[jax.Array, jax.Array] | None:
        """``A_0`` and ``s B_0``; nothing without a residual."""
        return (p["A_0"], self.scaled(p, p["B_0"])) if self.residual else None

    def removed(self, p: Arrays, x: Operand) -> jax.Array | None:
        """``s (x A_0) B_0``; raises TypeError if the base was quantized."""
        self._check_original("cannot be switched off")
        return super().removed(p, x)

    def removed_weight(self, p: Arrays) -> jax.Array | None:
        """``s A_0 B_0``; raises TypeError if the base was quantized."""
        self._check_original("cannot give the weight back")
        return super().removed_weight(p)

    def _change(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        return difference((p["A"], self.scaled(p, p["B"])), (p["A_0"], self.scaled(p, p["B_0"])))

    def _check_original(self, consequence: str) -> None:
        if self.nf4_rounds:
            raise TypeError(
                f"PiSSA(nf4_rounds={self.nf4_rounds}) {consequence}: the weights were quantized "
                "when it was attached, and the original ones are not stored. Keep or merge it, or "
                "load the model again."
            )


@functools.partial(jax.jit, static_argnums=0)
def _decomposed(
    method: PiSSA, key: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``A [L, d_in, r]``, ``B [L, r, d_out]`` and the residual, one layer after the other."""
    layers, *sides = weights.shape
    scales = jnp.asarray(method.scales(layers))
    within = jnp.asarray(method.within_ranks(layers)[:, : min(sides)])
    keys = None if method.power_iterations is None else jax.random.split(key, layers)

    def one(layer: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        w, scale, within, key = layer
        whole = w.astype(jnp.float32)

        def split(target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            a, b = _principal(method, target, scale, within, key)
            residual = whole - scale * product(a, b)
            return a, b, nf4_round(residual) if method.nf4_rounds else residual

        a, b, base = split(whole)
        for _ in range(1, method.nf4_rounds):
            a, b, base = split(whole - base)
        return a, b, base.astype(w.dtype)

    return jax.lax.map(one, (weights, scales, within, keys))


def _principal(
    method: PiSSA, w: jax.Array, scale: jax.Array, within: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Balanced factors of the leading components of ``w / scale`` that are within the rank.

    Where a singular value is zero, both factors would be, and stay so for want of a gradient: the
    column of ``A`` is then a unit vector, with a row of zeros in ``B``, as LoRA starts.
    """
    iterations = method.power_iterations
    u, s, v = truncated_svd(w, within.shape[0], power_iterations=iterations, key=key)
    root, live = jnp.sqrt(s / scale), nonzero(s)
    a = u * jnp.where(within, jnp.where(live, root, 1.0), 0.0)
    b = v.mT * jnp.where(within & live, root, 0.0)[:, None]
    return a.astype(method.param_dtype), b.astype(method.param_dtype)


def reduction_ratio(
    weights: jax.Array, approximation: jax.Array, block_size: int = NF4_BLOCK
) -> jax.Array:
    r"""The part of NF4's quantization error that an approximation of weights removes, in per cent.

    :math:`100 \, (1 - \lVert W - \hat W \rVert_* / \lVert W - \mathrm{NF4}(W) \rVert_*)`, in
    nuclear norms: 0 for the weights rounded as they are (QLoRA), 100 for no error.

    Args:
      weights: ``[..., d_in, d_out]``.
      approximation: ``[..., d_in, d_out]``; for QPiSSA, the base plus the product of the factors.
      block_size: Weights per scale of the quantization compared with.

    Returns:
      float32 ``[...]``, one value for each matrix.

    Raises:
      ValueError: If the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> weights = jax.random.normal(jax.random.key(0), (1, 64, 32))
      >>> method = lro.adapters.PiSSA(rank=8, nf4_rounds=5)
      >>> params = method.init(jax.random.key(1), weights)
      >>> start = params.base + method.deltas(params, params.base)
      >>> print(lro.adapters.reduction_ratio(weights, start).round())
      [57.]

    Reference:
      Meng, Wang and Zhang, PiSSA, 2024, https://arxiv.org/abs/2404.02948, section 4.
    """
    if weights.shape != approximation.shape:
        raise ValueError(
            f"approximation of shape {approximation.shape} must have weights' {weights.shape}."
        )
    exact = weights.astype(jnp.float32)
    norm = lambda difference: jnp.sum(singular_values(difference), axis=-1)
    left = norm(exact - approximation.astype(jnp.float32))
    return 100 * (1 - left / norm(exact - nf4_round(exact, block_size)))
