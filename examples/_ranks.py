"""Layers that find their own ranks in `pretrain.py --linear maestro`.

Ranks are counted anew in every step, so that the weights are all there is to save.
"""

import dataclasses
from typing import Any

from _settings import Settings
from flax import nnx
import jax

from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.layers import maestro
from lowrank_optax.models import Decoder


def without_ranks(model: Decoder) -> Decoder:
    """The model whose state is its weights alone; each step gives it ranks."""
    nnx.pop(model, maestro.Rank)
    return model


def model_ranks(
    graphdef: nnx.GraphDef, params: Any, threshold: float | None, key: jax.Array | None = None
) -> dict[str, jax.Array] | None:
    """The ranks of a model's layers, with a key as drawn for a step; None without a threshold."""
    if threshold is None:
        return None
    ranks = maestro.important_ranks(nnx.merge(graphdef, params), threshold)
    return ranks if key is None else maestro.sample_ranks(key, ranks)


def make_smaller(model: Decoder, settings: Settings) -> str | None:
    """Cuts a trained model to its ranks, in place, and says what is left; None without ranks."""
    if settings.rank_threshold is None:
        return None
    maestro.shrink(model, settings.rank_threshold)
    table, before = maestro.summary(model), parameter_count(nnx.state(model, nnx.Param))
    maestro.compact(model)
    after = parameter_count(nnx.state(model, nnx.Param))
    return f"{table}\ncut to these ranks: {before:,} -> {after:,} parameters"


def dense_settings(settings: Settings) -> Settings:
    """The settings of the model that `make_dense` makes."""
    return dataclasses.replace(settings, linear=None, rank_penalty=None, rank_threshold=None)


def make_dense(model: Decoder, settings: Settings) -> Decoder:
    """Makes the layers of a trained model dense, in place."""
    if settings.rank_threshold is not None:
        maestro.shrink(model, settings.rank_threshold)
        maestro.merge(model)
    return model
