"""Self-guided training in `pretrain.py`: the guides' weight by step, and the end of their phase."""

from collections.abc import Callable
from typing import Any

from _settings import Settings
from flax import nnx
import jax
import optax

import lowrank_optax as lro


def guide_weight(settings: Settings, step: int) -> jax.Array | None:
    """The guides' weight at a step; None without guides, or when they are gone."""
    if settings.self_guided is None or step >= settings.guided_steps:
        return None
    return lro.layers.self_guided_schedule(settings.guided_steps)(step)


def without_guides(
    graphdef: nnx.GraphDef,
    params: optax.Params,
    opt_state: optax.OptState,
    make_tx: Callable[[nnx.GraphDef, optax.Params], optax.GradientTransformation],
) -> tuple[nnx.GraphDef, optax.Params, optax.OptState]:
    """The model and the optimizer's state without the guides; its step must be compiled again."""
    graphdef, params = nnx.split(lro.layers.drop_guides(nnx.merge(graphdef, params)))
    new_state: Any = jax.eval_shape(make_tx(graphdef, params).init, params)
    return graphdef, params, lro.adapters.carry_state(new_state, opt_state)
