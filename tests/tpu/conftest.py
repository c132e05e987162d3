"""Compile-only TPU devices: the real compiler, no TPU. Needs the extra `tpu-check`."""

from collections.abc import Callable, Iterator
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
import pytest

# Without these libtpu asks the network what machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.fixture(params=["v5e", "v6e"])
def chip(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def compile_for() -> Iterator[Callable[..., Any]]:
    """`compile_for(chip, function, *abstract_arguments, donate_argnums=())`, on one device.

    With `row_major=True` arguments and results are stored in the order of their axes.
    """
    pytest.importorskip("libtpu", reason="needs the extra tpu-check")
    # A program for a chip that is not there can be stored, but not read back.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    hurried = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)

    def compile_for(
        chip: str,
        function: Callable[..., Any],
        *arguments: Any,
        donate_argnums: Any = (),
        row_major: bool = False,
        compiler_options: dict[str, Any] | None = None,
    ) -> Any:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
        sharding = SingleDeviceSharding(topology.devices[0])
        where = lambda x: Format(Layout(tuple(range(x.ndim))), sharding) if row_major else sharding
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x))
        results = jax.eval_shape(function, *arguments) if row_major else None
        out = jax.tree.map(where, results) if row_major else None
        jitted = jax.jit(function, donate_argnums=donate_argnums, out_shardings=out)
        return jitted.lower(*jax.tree.map(place, arguments)).compile(compiler_options)

    yield compile_for
    jax.config.update("jax_enable_compilation_cache", cached)
    jax.config.update("jax_disable_most_optimizations", hurried)
