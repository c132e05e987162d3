"""Programs for a TPU, compiled on a machine without one: `libtpu`, the extra `tpu-check`."""

from collections.abc import Callable
import multiprocessing
import os
from pathlib import Path
import re
import tempfile
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks the network where it is
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def device_of(chip: str) -> Any:
    """One device of a chip, to compile for."""
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[0]


def lowered_for(
    device: Any, fn: Callable[..., Any], *arguments: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Lowered:
    """The function for arguments of these shapes, all on one device."""
    sharding = SingleDeviceSharding(device)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.jit(fn, donate_argnums=donate_argnums).lower(*jax.tree.map(place, arguments))


def allocated_bytes(make_lowered: Callable[..., jax.stages.Lowered], *arguments: Any) -> int | None:
    """Return the bytes of device memory that the compiler assigns to a program, arguments included.

    This is the number that the compiler compares with the memory of the chip. `memory_analysis`
    does not have it on a TPU: its temporaries can be more than what is allocated. The compiler
    reports it before it generates code, which takes most of the time, so the compilation runs in a
    process of its own and stops there.

    Args:
      make_lowered: Function at the top level of a module, which returns the lowered program.
      *arguments: Its arguments, which can be pickled.

    Returns:
      The bytes, also where the chip has fewer; None if the compiler refuses without a report.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(
            target=_compile, args=(folder, make_lowered, *arguments), daemon=True
        )
        process.start()
        total = None
        while total is None:
            running = process.is_alive()  # before the report is looked for
            for report in Path(folder).glob("*after_optimizations-memory-usage-report.txt"):
                total = re.search(r"^Total bytes: (\d+)", report.read_text(), re.MULTILINE)
            if not running:
                break
            time.sleep(0.2)
        process.kill()
        process.join()
        if total is None and process.exitcode != REFUSED:
            raise RuntimeError(
                f"the compilation ended with exit code {process.exitcode}: see above."
            )
    return None if total is None else int(total[1])


REFUSED = 77
"""Exit code of a compilation that needs more memory than the chip has."""


def _compile(folder: str, make_lowered: Callable[..., jax.stages.Lowered], *arguments: Any) -> None:
    try:
        make_lowered(*arguments).compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        os._exit(REFUSED)
