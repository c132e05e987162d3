"""Programs for a TPU, compiled on a machine without one: `libtpu`, the extra `tpu-check`."""

from collections.abc import Callable
import os
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
