"""The memory of ranks that fell, given back between two steps of `pretrain.py`."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import lowrank_optax as lro
from lowrank_optax.projection.subspaces import AdaptiveBasis
from lowrank_optax.states import LowBitState


def has_adaptive_rank(opt_state: optax.OptState) -> bool:
    """Whether the state has ranks that may fall, and not in codes: what `compact` asks for."""
    has = lambda kind: any(
        isinstance(x, kind)
        for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    )
    return has(AdaptiveBasis) and not has(LowBitState)


def compacted(
    opt_state: optax.OptState, sharding: jax.sharding.Sharding, report: Callable[[str], Any]
) -> optax.OptState | None:
    """The state without the directions that adaptive ranks have left; None if there are none.

    Its shapes are new, so the step must be compiled anew: seldom, for sizes are rounded to a few.
    What fell is said in a sentence to `report`.
    """
    sentences: list[str] = []
    smaller = lro.compact(opt_state, report=sentences.append)
    if state_bytes(smaller) == state_bytes(opt_state):
        return None
    report(sentences[0])
    return jax.device_put(smaller, sharding)


def state_bytes(opt_state: optax.OptState) -> int:
    """Bytes of all arrays of a state."""
    return sum(x.nbytes for x in jax.tree.leaves(opt_state))
