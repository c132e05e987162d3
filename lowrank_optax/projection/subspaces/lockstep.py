"""Refreshes of many leaves in step, so that what they have in common is one program.

A QR takes a TPU's compiler seconds, whatever it is a QR of, and so does a product of thin matrices;
a model has a dozen projected leaves. So a rule's refresh is a generator: where it needs either it
yields a `Request`, and is sent the result. Requests of one kind and shape are then run by one loop
over the leaves.
"""

from collections.abc import Callable, Generator, Sequence
import functools
import inspect
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp


class Request(NamedTuple):
    """A function of thin arrays, to be run for several leaves at once.

    Attributes:
      function: A module-level function ``function(*arrays, *static)``.
      arrays: Its arrays.
      static: Its other arguments, hashable.
    """

    function: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]
    static: tuple[Any, ...] = ()


Steps: TypeAlias = Generator[Request, jax.Array, Any]


def as_steps(refresh: Callable[..., Any]) -> Callable[..., Steps]:
    """A refresh as a generator function, if it is not one."""
    if inspect.isgeneratorfunction(refresh):
        return refresh

    @functools.wraps(refresh)
    def steps(*arguments: Any) -> Steps:
        return refresh(*arguments)
        yield  # a generator that asks for nothing

    return steps


def in_lockstep(refreshes: Sequence[Steps]) -> list[Any]:
    """The results of all refreshes, in their order."""
    results: list[Any] = [None] * len(refreshes)
    pending: dict[int, Request] = {}

    def resume(i: int, answer: Any) -> None:
        try:
            pending[i] = refreshes[i].send(answer)
        except StopIteration as stop:
            results[i] = stop.value

    for i in range(len(refreshes)):
        resume(i, None)
    while pending:
        answers: dict[int, jax.Array] = {}
        for members in _alike(pending):
            answers |= _run({i: pending[i] for i in members})
        pending.clear()
        for i, answer in answers.items():
            resume(i, answer)
    return results


def _alike(pending: dict[int, Request]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, request in pending.items():
        kind = (request.function, request.static, tuple(map(jax.typeof, request.arrays)))
        groups.setdefault(kind, []).append(i)
    return list(groups.values())


def _run(requests: dict[int, Request]) -> dict[int, jax.Array]:
    function, arrays, static = next(iter(requests.values()))
    if len(requests) == 1:
        return dict.fromkeys(requests, function(*arrays, *static))
    stacked = [jnp.stack(x) for x in zip(*(r.arrays for r in requests.values()), strict=True)]
    # A loop over the leaves, not one batch: the decompositions of one leaf at a time take memory.
    answers = jax.lax.map(lambda x: function(*x, *static), stacked)
    return {i: answers[place] for place, i in enumerate(requests)}
