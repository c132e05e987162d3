"""A mixture of experts: each token is computed by the few experts that its router chooses."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lowrank_optax.layers.widenet.expert_routing import (
    Experts,
    expert_capacity,
    route_to_experts,
)
from lowrank_optax.layers.widenet.expert_slots import transport

Dispatch = Literal["slots", "ragged"]

ExpertFunction: TypeAlias = Callable[[jax.Array, jax.Array | None], jax.Array]
"""All experts: ``(rows [E, slots, d], None)``, or, dropless, ``(rows [n, d], sizes [E])``, the
first ``sizes[0]`` rows for the first expert, and so on; `grouped_linear` multiplies both."""


class RoutingStatistics(NamedTuple):
    """How a mixture of experts distributed its tokens.

    Attributes:
      balance_loss: See `Routing`, float32 ``[]``; ``[L]`` for ``L`` layers.
      load: Part of the choices that fell on each expert, ``[E]`` or ``[L, E]``.
      dropped: Part of the choices for which an expert had no room, ``[]`` or ``[L]``.
    """

    balance_loss: jax.Array
    load: jax.Array
    dropped: jax.Array


def mixture_of_experts(
    x: jax.Array,
    router: jax.Array,
    experts: ExpertFunction,
    options: Experts,
    *,
    dispatch: Dispatch = "slots",
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, RoutingStatistics]:
    r"""Sum the outputs of each token's experts, with the router's probabilities as weights.

    An expert has room for `expert_capacity` tokens; of those that choose it, the first in their
    order get a slot, and a choice without one contributes 0. Without a capacity factor no choice is
    dropped, and the output of a token does not depend on the others.

    With ``expert_axis``, each device routes its own tokens, with a capacity of its own, and two
    all-to-alls bring them to the devices of their experts and back. Call it under ``jax.set_mesh``
    with a mesh of automatic axes, or, if its axes are explicit, in ``jax.sharding.auto_axes``; the
    load-balance loss is that of all tokens together.

    Args:
      x: Tokens ``[T, d]``.
      router: Router ``[d, E]``.
      experts: Function that computes all experts, each its own rows.
      options: Numbers of experts and of choices, and the capacity.
      dispatch: ``"slots"``, a batched product for all experts; or ``"ragged"``, grouped products
        by ``jax.lax.ragged_dot`` of exactly the tokens of each, for no capacity factor. JAX has no
        second derivatives of these, and no ``vmap`` over rows alone.
      key: PRNG key of the router's noise in training; None for no noise.
      mask: Booleans ``[T]``, False for padding: its output is 0.

    Returns:
      The outputs ``[T, d_out]`` in the tokens' dtype, and how the tokens were distributed.

    Raises:
      ValueError: If shapes do not fit, the capacity is 0, ``dispatch`` is unknown or ``"ragged"``
        comes with a capacity factor or an expert axis, experts or tokens do not divide over the
        mesh, or tokens are sharded over explicit axes.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> x, router, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in
      ...                      enumerate([(32, 8), (8, 4), (4, 8, 8)]))
      >>> experts = lambda rows, sizes: lro.layers.grouped_linear(rows, kernel, sizes=sizes)
      >>> y, statistics = lro.layers.mixture_of_experts(x, router, experts, lro.layers.Experts(4))
      >>> y.shape, statistics.load.shape
      ((32, 8), (4,))

    Reference:
      Xue et al., 2021, https://arxiv.org/abs/2107.11817, section 3.1; Shazeer et al., 2017,
      https://arxiv.org/abs/1701.06538.
    """
    x, router, count = jnp.asarray(x), jnp.asarray(router), options.num_experts
    if router.shape[-1] != count:
        raise ValueError(f"router has shape {router.shape}, and num_experts={count}.")
    if dispatch not in ("slots", "ragged"):
        raise ValueError(f"dispatch must be 'slots' or 'ragged', got {dispatch!r}.")
    if dispatch == "ragged" and not (options.capacity_factor is None is options.expert_axis):
        raise ValueError(
            "dispatch='ragged' drops no choice and has no slots to exchange: give "
            "capacity_factor=None and expert_axis=None."
        )
    path = transport(options.expert_axis, count, x)
    routing = route_to_experts(x, router, options.top_k, key=key, mask=mask)
    visible = jnp.ones(len(x), bool) if mask is None else mask
    if dispatch == "ragged":
        if mask is not None:  # padding is computed, too, with gates of 0
            x = jnp.where(mask[:, None], x, 0)
        y, dropped = _ragged(x, routing.experts, routing.gates, experts, count), 0.0
    else:
        capacity = expert_capacity(len(x) // path.groups, options)
        slotted, slots = path.send(x, routing.experts, visible, count, capacity)
        out = experts(slotted, None)
        _check_rows(out, slotted.shape[:-1])
        y = path.receive(out, slots, routing.gates)
        choices = jnp.maximum(visible.sum() * options.top_k, 1)
        dropped = jnp.sum((slots == count * capacity) & visible[:, None]) / choices
    statistics = RoutingStatistics(routing.balance_loss, routing.load, jnp.float32(dropped))
    return y.astype(x.dtype), statistics


def _check_rows(out: jax.Array, shape: tuple[int, ...]) -> None:
    if out.ndim != len(shape) + 1 or out.shape[:-1] != shape:
        raise ValueError(
            f"experts must return one row for each of theirs, {list(shape)} and a width, got shape "
            f"{out.shape}."
        )


def _ragged(
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    experts: ExpertFunction,
    count: int,
) -> jax.Array:
    top_k = chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=count).astype(jnp.int32)
    out = experts(x[order // top_k], sizes)
    _check_rows(out, order.shape)
    place = jnp.argsort(order).reshape(chosen.shape)
    parts = [gates[:, k, None] * out[place[:, k]] for k in range(top_k)]
    return sum(parts[1:], parts[0])


def grouped_linear(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Multiply the rows of each expert by its own matrix.

    Args:
      x: Rows in slots ``[E, n, d]``; or, with ``sizes``, ``[n, d]``, ordered by experts.
      kernel: One matrix for each expert, ``[E, d, f]``.
      bias: One bias for each, ``[E, f]``, or None.
      sizes: Number of rows of each expert, integers ``[E]`` with sum ``n``.

    Returns:
      ``[E, n, f]``, or ``[n, f]``.

    Raises:
      ValueError: If the numbers of experts differ.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> kernel = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
      >>> print(lro.layers.grouped_linear(jnp.ones((3, 2)), kernel, sizes=jnp.array([1, 2])))
      [[ 1.  1.]
       [10. 10.]
       [10. 10.]]
    """
    counts = {len(a) for a in (x if sizes is None else sizes, kernel, bias) if a is not None}
    if len(counts) > 1:  # an einsum would repeat a single matrix
        shapes = jax.tree.map(jnp.shape, {"x": x, "kernel": kernel, "bias": bias, "sizes": sizes})
        raise ValueError(f"one matrix, bias and size for each expert are needed, got {shapes}.")
    if sizes is None:
        y = jnp.einsum("end,edf->enf", x, kernel)
        return y if bias is None else y + bias[:, None]
    y = jax.lax.ragged_dot(x, kernel, sizes)
    if bias is None:
        return y
    return y + jnp.repeat(bias, sizes, axis=0, total_repeat_length=len(x))
