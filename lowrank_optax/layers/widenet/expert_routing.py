"""Which experts compute each token: router, gates, load-balance loss, capacity."""

import dataclasses
from fractions import Fraction
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.layers.counts import check_count


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts, as options of a layer.

    Attributes:
      num_experts: Number ``E`` of experts.
      top_k: Number ``K`` of experts that compute each token.
      capacity_factor: Room of an expert in training, as a multiple of its share ``T K / E`` of the
        tokens' choices; None for room for all.
      expert_axis: Name of a mesh axis over which the experts are distributed; None for one device.
        On several, each would then compute the experts of all tokens: for copies of the experts,
        each with its own device's tokens, add an axis of size 1.

    Raises:
      ValueError: If a number is not a positive integer, ``top_k`` is above ``num_experts``, or the
        capacity factor is not positive and finite.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.layers.Experts(8).top_k
      2

    Reference:
      Xue et al., 2021, https://arxiv.org/abs/2107.11817.
    """

    num_experts: int = 4
    top_k: int = 2
    capacity_factor: float | None = 1.2
    expert_axis: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k"):
            check_count(name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is above num_experts={self.num_experts}: a token cannot have "
                "an expert twice."
            )
        factor = self.capacity_factor
        is_number = isinstance(factor, numbers.Real) and not isinstance(factor, bool)
        if factor is not None and not (is_number and 0 < factor < math.inf):
            raise ValueError(
                f"capacity_factor must be a positive, finite number, or None, got {factor!r}."
            )


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
      experts: Numbers of the experts, int32 ``[T, K]``, the one with the largest gate first.
      gates: Their weights, float32 ``[T, K]``: probabilities over all experts, so that their sum
        is below 1; 0 for tokens that are masked.
      balance_loss: Load-balance loss, float32 ``[]``: ``E`` times the product of ``load`` and the
        mean probabilities. It is 1 if either is uniform, and ``E / K`` if all tokens choose the
        same experts.
      load: Part of the choices that fall on each expert, float32 ``[E]``, without a gradient.
    """

    experts: jax.Array
    gates: jax.Array
    balance_loss: jax.Array
    load: jax.Array


def route_to_experts(
    x: jax.Array,
    router: jax.Array,
    top_k: int = 2,
    *,
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> Routing:
    r"""Choose the ``K`` most probable experts of each token.

    The probabilities :math:`p = \mathrm{softmax}(x W)` and all that follows are computed in
    float32. Of equal probabilities the expert with the lower number is chosen.

    Args:
      x: Tokens ``[T, d]``.
      router: Router ``W``, ``[d, E]``.
      top_k: Number ``K`` of experts of each token.
      key: PRNG key of the normal noise, of standard deviation ``1 / E``, that is added to the
        logits in training; None for no noise.
      mask: Booleans ``[T]``: False for padding, which has no gate and counts nowhere.

    Returns:
      The experts, their gates, and how evenly the tokens are distributed.

    Raises:
      ValueError: If shapes do not fit, or ``top_k`` is not from 1 to ``E``.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> x, router = jax.random.normal(jax.random.key(0), (6, 8)), jax.numpy.eye(8, 4)
      >>> routing = lro.layers.route_to_experts(x, router, top_k=2)
      >>> routing.experts.shape, bool(routing.gates.sum(1).max() < 1)
      ((6, 2), True)

    Reference:
      Xue et al., 2021, https://arxiv.org/abs/2107.11817, section 3.1.
    """
    check_router(x, router, top_k, mask)
    count = router.shape[1]
    if mask is not None:  # what padding holds, NaN perhaps, is not to reach a gradient
        x = jnp.where(mask[:, None], x, 0)
    precise = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
    logits = jnp.matmul(precise(x), precise(router), precision=jax.lax.Precision.HIGHEST)
    if key is not None:
        logits += jax.random.normal(key, logits.shape, logits.dtype) / count
    probabilities = jax.nn.softmax(logits, axis=-1)
    gates, experts = jax.lax.top_k(probabilities, top_k)
    chosen = (experts[..., None] == jnp.arange(count)).any(axis=1)
    visible = jnp.ones(len(x), bool) if mask is None else mask
    chosen, weight = chosen & visible[:, None], visible.astype(logits.dtype)
    tokens = jnp.maximum(weight.sum(), 1)
    load = chosen.sum(axis=0) / (tokens * top_k)
    mean = jnp.sum(weight[:, None] * probabilities, axis=0) / tokens
    balance = count * jnp.sum(load * mean)
    gates *= weight[:, None]
    return Routing(experts.astype(jnp.int32), gates, balance, load)


def expert_capacity(tokens: int, options: Experts) -> int:
    """Return the number of tokens for which an expert has room: ``floor(T C K / E)``.

    Args:
      tokens: Number ``T`` of tokens.
      options: The mixture of experts.

    Returns:
      The capacity; with ``capacity_factor=None`` it is ``T``.

    Raises:
      ValueError: If it would be 0 although there are tokens.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.layers.expert_capacity(90, lro.layers.Experts(4, top_k=2, capacity_factor=1.4))
      63
    """
    if options.capacity_factor is None:
        return tokens
    # The number as it is written: 1.4 in binary is below 1.4, and would lose a token here.
    room = tokens * Fraction(str(options.capacity_factor)) * options.top_k
    capacity = min(room // options.num_experts, tokens)
    if tokens and not capacity:
        raise ValueError(
            f"capacity_factor={options.capacity_factor} leaves no room: floor({tokens} tokens × "
            f"{options.capacity_factor} × top_k={options.top_k} / num_experts="
            f"{options.num_experts}) is 0. Give more tokens at once, a larger capacity_factor, or "
            "None."
        )
    return capacity


def check_router(x: jax.Array, router: jax.Array, top_k: int, mask: jax.Array | None) -> None:
    """Raises ValueError unless the shapes and the number of experts fit."""
    if x.ndim != 2 or router.ndim != 2 or x.shape[1] != router.shape[0]:
        raise ValueError(
            f"x must be [T, d] and router [d, E], got shapes {x.shape} and {router.shape}."
        )
    if not 1 <= top_k <= router.shape[1]:
        raise ValueError(
            f"top_k must be from 1 to the number of experts, {router.shape[1]}, got {top_k}."
        )
    if mask is not None and (mask.shape != x.shape[:1] or mask.dtype != bool):
        raise ValueError(
            f"mask must be booleans of shape {x.shape[:1]}, got {mask.dtype} of shape {mask.shape}."
        )


def dropless(options: Experts, tokens: int) -> Experts:
    """The same mixture with room for all choices.

    Tokens that do not divide over the devices, such as those of one position of a text, are
    computed by the copies that the compiler makes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = options.expert_axis in mesh.axis_names and tokens % mesh.size == 0
    axis = options.expert_axis if divides else None
    return dataclasses.replace(options, capacity_factor=None, expert_axis=axis)
