"""The devices which share each batch, their memory, and Ctrl-C."""

from collections.abc import Iterator
from contextlib import contextmanager
import signal
import threading
from typing import Any

from _settings import InputError, Settings
import jax
from jax.sharding import AxisType


def make_mesh(settings: Settings) -> jax.sharding.Mesh:
    """Lines up the devices which share each batch; with experts, each has all of them.

    Experts want an axis of the mesh, or every device would compute those of all tokens.

    Raises:
      InputError: if there are fewer, or they cannot share the batch evenly.
    """
    count = settings.devices or jax.device_count()
    if not 1 <= count <= jax.device_count():
        raise InputError(f"--devices {count}: this machine has {jax.device_count()}")
    parts = count * settings.first_accumulate
    if settings.first_batch_size % parts:
        name = "--initial-batch-size" if settings.batch_size == "adaptive" else "--batch-size"
        raise InputError(
            f"{name} {settings.first_batch_size} does not divide into "
            f"{settings.first_accumulate} micro-batch(es) on {count} device(s): make it a multiple "
            f"of {parts}"
        )
    devices = jax.devices()[:count]
    axes = {"data": count} if settings.experts is None else {"data": count, "expert": 1}
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def peak_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Reads off a compiled function how much memory it needs; None where the backend is silent."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes  # alias: donated


@contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """Gives an event which the first Ctrl-C sets; the second stops the program as usual."""
    event = threading.Event()

    def handle(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    usual = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, usual)
