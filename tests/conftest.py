"""Eight CPU devices for every test, and compiled programs kept between runs."""

from collections.abc import Iterator
import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LAPACK's own threads fight with XLA's for the cores: a small QR takes up to 500 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

# Costs the tests on one device nothing, and spares a process of their own to those on eight.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs under `.pytest_cache`: a second run compiles next to nothing."""
    cache = getattr(config, "cache", None)
    if cache is None:  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax_compilations")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def few_programs_in_memory() -> Iterator[None]:
    """Drops compiled programs before there are too many.

    Each takes several memory maps, of which Linux allows a process 65,530; without one more the
    compiler crashes. What is needed again comes from the cache on disk.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
