"""Eight CPU devices, quick compilation and a cache of programs for all tests; tiers and options."""

from collections import Counter
from collections.abc import Iterator
import gc
import itertools
import os
from pathlib import Path, PurePath
import time

import pytest
from xla_flags import quick_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LAPACK's own threads fight with XLA's for the cores: a small QR takes up to 500 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests ask what a program computes, not how fast: poor code takes half as long to compile. What it
# allocates, exchanges and counts is decided before, and is as users have it. Set in the
# environment, so that the processes that tests start do the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Programs without the lines of Python they come from: a twentieth of the time to make one.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] = " ".join([*quick_flags(), os.environ.get("XLA_FLAGS", "")])

import jax
from lowering_context import share_contexts

share_contexts()
# Costs the tests on one device nothing, and spares a process of their own to those on eight.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`")
    parser.addoption("--quick", action="store_true", help="run one case of each that is not `slow`")
    parser.addoption("--budget", type=float, metavar="SECONDS", help="skip what starts later")
    parser.addoption("--perturb", type=int, metavar="SEED", help="put noise into products")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs under `.pytest_cache`: a second run compiles next to nothing."""
    config.stash[START] = time.monotonic()
    gc.disable()  # what collection imports and collects is kept to the end
    if config.getoption("perturb") is not None:
        from perturbation import perturb_products

        perturb_products()
    cache = getattr(config, "cache", None)
    if cache is None:  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax_compilations")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


START = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks for `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is of another tier: see CONTRIBUTING.md."""
    for cases in by_function(items).values():
        if (marker := cases[0].get_closest_marker("combinations")) is not None:
            for item in beyond_combinations(cases, *marker.args):
                item.add_marker("full")
    named = [argument.split("[")[0] for argument in config.args if "::" in argument]
    free = [item for item in items if not is_named(item, named)]
    out = set()
    if config.getoption("perturb") is not None:
        # Examples print products of small integers, which are exact without noise.
        out = {item for item in items if isinstance(item, pytest.DoctestItem)}
    if not (config.getoption("full") or config.getoption("markexpr") == "full"):
        out |= {item for item in free if item.get_closest_marker("full")}
    if config.getoption("quick"):
        if config.getoption("full"):
            raise pytest.UsageError("--quick is a part of the standard tier: give it, or --full.")
        out |= {item for item in free if item.get_closest_marker("slow")}
        for cases in by_function([item for item in free if item not in out]).values():
            out |= set() if cases[0].get_closest_marker("distinct") else set(cases[1:])
    if out:
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=list(out))


def pytest_collection_finish() -> None:
    """Spares the garbage collector the half million objects that exist before the first test."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


def name_of(item: pytest.Item) -> str:
    """The file, the class and the function of a case."""
    return item.nodeid.split("[")[0]


def is_named(item: pytest.Item, named: list[str]) -> bool:
    """Whether one of the arguments is its function or its class."""
    paths = itertools.accumulate(name_of(item).split("::"), "{}::{}".format)
    return any(argument.endswith(path) for path in list(paths)[1:] for argument in named)


def by_function(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The parametrized cases of each test function, but for those marked `full` by themselves."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("full") is None:
            cases.setdefault(name_of(item), []).append(item)
    return cases


def beyond_combinations(cases: list[pytest.Item], strength: int) -> list[pytest.Item]:
    """The cases that are not needed for every combination of `strength` values to occur."""
    parts = {}
    for case in cases:
        if len(case.callspec.params) < strength:
            raise pytest.UsageError(f"combinations({strength}): {case.nodeid} has fewer parameters")
        values = sorted((name, id(value)) for name, value in case.callspec.params.items())
        parts[case] = set(itertools.combinations(values, strength))
    missing = set().union(*parts.values())
    chosen = set()
    while missing:
        best = max(cases, key=lambda case: len(parts[case] & missing))
        chosen.add(best)
        missing -= parts[best]
    return [case for case in cases if case not in chosen]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what the options leave out."""
    budget = item.config.getoption("budget")
    if budget is not None and time.monotonic() - item.config.stash[START] > budget:
        pytest.skip(f"cut off after {budget:.0f} s: {item.path.relative_to(item.config.rootpath)}")
    if item.config.getoption("perturb") is not None and item.get_closest_marker("bitwise"):
        pytest.skip("bitwise: noise in products is meant to change it")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints where the time went: the five slowest folders, in seconds of tests."""
    seconds = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                path = PurePath(report.nodeid.split("::")[0])
                is_folder = path.parts[0] == "tests" and len(path.parts) > 2
                seconds[path.parts[1] if is_folder else path.name] += report.duration
    slowest = ", ".join(f"{name} {total:.0f}" for name, total in seconds.most_common(5))
    terminalreporter.write_line(f"seconds of tests: {slowest}; all {seconds.total():.0f}")


@pytest.fixture(autouse=True)
def noise(request: pytest.FixtureRequest) -> None:
    """With `--perturb`: the same noise in a test, whichever ran before it."""
    if (seed := request.config.getoption("perturb")) is not None:
        from perturbation import start_noise

        start_noise(f"{seed} {request.node.nodeid}")


finished_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs_in_memory() -> Iterator[None]:
    """Drops compiled programs before there are too many.

    Each takes several memory maps, of which Linux allows a process 65,530; without one more the
    compiler crashes. What is needed again comes from the cache on disk.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(finished_tests) % 25 or not maps.exists():  # to count them takes 20 ms
        return
    if maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
