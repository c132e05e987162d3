"""The ranks of an adapter that are not exactly zero, as a smaller plain LoRA."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.base import Adapter, AdapterParams, Arrays
from lowrank_optax.adapters.low_rank import LowRank
from lowrank_optax.adapters.methods.lora import LoRA


class CompactLoRA(NamedTuple):
    """What `compact_arrays` returns.

    Attributes:
      ranks: Number of live ranks of each layer; 0 where nothing is left.
      method: The `LoRA` that `params` belong to.
      params: Its arrays, ``A [L, d_in, r]`` and ``B [L, r, d_out]`` with the largest of ``ranks``
        as ``r``, at least 1. Where ranks differ, ``rank_scale [L, r]`` is 0 beyond a layer's own.
    """

    ranks: tuple[int, ...]
    method: LoRA
    params: AdapterParams


def compact_arrays(method: Adapter, p: Arrays) -> CompactLoRA:
    """A plain LoRA of the ranks of an adapter that are not exactly zero.

    For any host; `compact` does this to a Flax NNX model. A rank is dead if its column of the
    first factor or its row of the second is zero, with gates and scales multiplied in. These and
    the scale are folded into ``B``, so the LoRA has ``alpha=None``, and the same change to
    rounding. Call it outside of ``jax.jit``, since the shapes depend on the values.

    Args:
      method: Any method whose change is a product of two factors.
      p: Arrays of one stack by name, ``[L, ...]``, trained and frozen ones together; those of a
        layer that is not stacked with a leading axis of 1.

    Returns:
      A `CompactLoRA`.

    Raises:
      TypeError: If no LoRA of each layer has the same change: the method has no two factors (DoRA,
        SaRA, FlyLoRA with routing), changes the weight itself (PiSSA) or shares arrays among layers
        (LoTR, RandLoRA, VeRA). Also if arrays are traced.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> method, gate = lro.adapters.SoRA(rank=3), jnp.array([[0.0, 2.0, 0.0]])
      >>> p = {"A": jnp.eye(3)[None], "B": jnp.ones((1, 3, 2)), "gate": gate}
      >>> ranks, method, params = lro.adapters.compact_arrays(method, p)
      >>> print(ranks, method.rank, params.trainable["A"][0].T, params.trainable["B"][0])
      (1,) 1 [[0. 1. 0.]] [[2. 2.]]

    Reference:
      Ding et al., Sparse Low-rank Adaptation of Pre-trained Language Models, 2023,
      https://arxiv.org/abs/2311.11696, section 3.
    """
    kind = type(method).__name__
    if method.changes_base:
        raise TypeError(
            f"{kind} changes the weight itself, and a LoRA beside that weight would not have the "
            "same change: `merge` it instead."
        )
    if method.shared:
        raise TypeError(
            f"{kind} shares arrays among layers, which a LoRA of each layer would hold many times: "
            "leave it as it is."
        )
    a, b, live = _factors(method, dict(p))
    if isinstance(live, jax.core.Tracer):
        raise TypeError("arrays are traced, and shapes depend on their values: call it eagerly.")
    live = np.asarray(live)
    ranks = tuple(int(n) for n in live.sum(axis=-1))
    first = np.argsort(~live, axis=-1, kind="stable")[:, : max(1, *ranks)]  # live ones, in order
    dtype = method.param_dtype if isinstance(method, LowRank) else jnp.float32
    a, b = _cut(a, b, first, np.take_along_axis(live, first, axis=-1))
    trained: dict[str, jax.Array] = {"A": a.astype(dtype), "B": b.astype(dtype)}
    dropout = getattr(method, "dropout", 0.0)
    lora = LoRA(rank=rank_of(ranks), dropout=dropout, param_dtype=dtype)
    # A scale of 0 marks a layer without an adapter, for files of PEFT and for `merge_adapters`.
    scales: dict[str, jax.Array] = {
        k: x * np.minimum(ranks, 1)[:, None] for k, x in lora.rank_scales(len(ranks)).items()
    }
    return CompactLoRA(ranks, lora, AdapterParams(trained, scales))


@functools.partial(jax.jit, static_argnums=0)
def _factors(method: Adapter, p: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The factors ``[L, d_in, r]`` and ``[L, r, d_out]``, and which ranks are live ``[L, r]``."""
    a, b = method.to_lora(p)
    return a, b, jnp.any(a != 0, axis=-2) & jnp.any(b != 0, axis=-1)


@jax.jit
def _cut(
    a: jax.Array, b: jax.Array, first: jax.Array, is_live: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The factors of the ranks ``first [L, k]``, with zeros where they are not live."""
    rows = lambda x: jnp.take_along_axis(x, first[..., None], axis=-2)
    a, b = (jnp.where(is_live[..., None], rows(x), 0) for x in (a.mT, b))
    return a.mT, b


def rank_of(ranks: tuple[int, ...]) -> int | tuple[int, ...]:
    """The ``rank`` of a LoRA for these live ranks: a layer of a stack has at least 1."""
    own = tuple(max(n, 1) for n in ranks)
    return own[0] if len(set(ranks)) == 1 else own
