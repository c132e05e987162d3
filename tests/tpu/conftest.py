"""Compile-only TPU devices: the real compiler, no TPU. Needs the extra `tpu-check`."""

from collections.abc import Callable, Iterator
import itertools
import os
from pathlib import Path
import re
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


@pytest.fixture
def allocated_for(compile_for: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """As `compile_for`, with the bytes that the program has beside its arguments and results.

    By the compiler's own report: temporaries of `memory_analysis` can be more than that.
    """
    folders = (tmp_path / f"program_{i}" for i in itertools.count())

    def allocated_for(*arguments: Any, **options: Any) -> tuple[Any, int]:
        folder = next(folders)
        dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        program = compile_for(*arguments, compiler_options=dump, **options)
        (report,) = folder.glob("*after_optimizations-memory-usage-report.txt")
        total = re.findall(r"^Total bytes: (\d+)", report.read_text(), re.MULTILINE)[0]
        memory = program.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return program, int(total) - memory.argument_size_in_bytes - results

    return allocated_for
