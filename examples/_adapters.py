"""Adapters on a model: attached, of equal size if asked for, and what is trained of the model."""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from _options import one_line
from _recipes import Chosen
from _settings import InputError
from flax import nnx

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.models import Decoder


class Parts(NamedTuple):
    """A model taken apart by what a step does with its arrays."""

    training: nnx.GraphDef  # its structure, with dropout
    evaluation: nnx.GraphDef  # and without
    trained: Any  # what the optimizer moves
    counts: Any  # of the dropout's random numbers, which every call moves
    rest: Any  # what stays as it is


def attach(model: Decoder, chosen: Chosen, where: str | None, seed: int) -> Decoder:
    """Attaches the adapter, or nothing where all weights are trained.

    Raises:
      InputError: if it cannot be attached to this model.
    """
    method = chosen.method()
    if method is None:
        return model
    try:
        lro.adapters.attach(model, method, where, rngs=nnx.Rngs(seed))
    except (TypeError, ValueError) as error:
        raise InputError(f"{chosen.name}: {one_line(error)}") from None
    return model


def take_apart(model: Decoder, chosen: Chosen) -> Parts:
    """Separates what is trained from the rest."""
    wanted = trained_filter(chosen)
    model.eval()
    evaluation = nnx.split(model, wanted, nnx.RngCount, ...)[0]
    model.train()
    training, *states = nnx.split(model, wanted, nnx.RngCount, ...)
    return Parts(training, evaluation, *map(nnx.as_pure, states))


def trained_filter(chosen: Chosen) -> nnx.filterlib.Filter:
    """The filter of what is trained: of the adapter, or, where there is none, all weights."""
    return nnx.Param if chosen.recipe.method is None else lro.adapters.trainable


def put_together(parts: Parts) -> Decoder:
    """The model as it is evaluated."""
    return nnx.merge(parts.evaluation, parts.trained, parts.counts, parts.rest)


def equal_parameters(
    several: list[Chosen], make: Callable[[], Decoder], where: str | None, seed: int
) -> list[Chosen]:
    """The adapters at the ranks at which each trains about as many numbers as the first.

    Those without a rank, and full fine-tuning, stay as they are.

    Args:
      several: the adapters, of which the first has the rank that counts.
      make: makes the model's shapes.
      where: the layers.
      seed: of the initial values.
    """

    def count(chosen: Chosen, rank: int) -> float:
        chosen = with_rank(chosen, rank)
        try:
            shapes = nnx.eval_shape(lambda: attach(make(), chosen, where, seed))
        except InputError:
            if rank == 1:
                raise
            return math.inf  # a rank above what the weights have
        return parameter_count(nnx.state(shapes, lro.adapters.trainable))

    first = several[0]
    if "rank" not in first.options:
        raise InputError(f"--equal-parameters: {first.name} has no rank to compare others with")
    target = count(first, first.options["rank"])
    return [first] + [
        with_rank(
            each,
            _nearest(
                functools.cache(functools.partial(count, each)),
                target,
                each.options.get("active", 1),
            ),
        )
        if "rank" in each.options
        else each
        for each in several[1:]
    ]


def with_rank(chosen: Chosen, rank: int) -> Chosen:
    """The same adapter at another rank."""
    return chosen._replace(options=chosen.options | {"rank": rank})


def _nearest(count: Callable[[int], float], target: float, least: int = 1) -> int:
    """The rank whose count is nearest: counts rise, or fall, up to what the weights have."""
    sign = 1 if count(least + 1) > count(least) else -1
    low, high = least, 2 * least
    while sign * count(high) < sign * target and sign * count(high) > sign * count(high // 2):
        low, high = high, 2 * high
    if sign > 0:
        target = min(target, count(high))
    while high - low > 1:
        middle = (low + high) // 2
        reached = sign * count(middle) >= sign * target
        low, high = (low, middle) if reached else (middle, high)
    return min((low, high), key=lambda rank: abs(count(rank) - target))
