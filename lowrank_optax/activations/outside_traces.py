"""Numbers that are computed while a program is being traced, but are no part of it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


def outside_of_traces(work: Callable[[], Any]) -> Any:
    """What ``work()`` computes, on the CPU if JAX has it, while a program is being traced or not.

    In a thread of its own: there, no trace is under way, and the precision is nobody else's.
    """

    def run() -> Any:
        with jax.default_device(_cpu()), jax.debug_nans(False):
            return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _cpu() -> jax.Device | None:
    """A TPU has no float64 proper. None where JAX is told to do without a CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
