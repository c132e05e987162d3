"""Puts each fault of `faults.py` into a copy of the repository and asks whether a test notices.

    python tests/mutants/run.py                  all of them, two at a time
    python tests/mutants/run.py --only "core of LoTR transposed"
    python tests/mutants/run.py --check          only whether they can be put in

The repository itself is not touched: each worker has a copy, into which it writes one fault, runs
the tests that should fail, and writes the line back. A fault is noticed if a test fails that passes
without the fault. It survives if all tests pass; anything else is an error of the table.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
import contextlib
import importlib.util
import os
from pathlib import Path
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # a script's own folder is on the path, and not the tests'

from mutants.faults import FAULTS, Fault  # noqa: E402

LEAST_NOTICED = 59  # of all
TIMEOUT = 600.0  # seconds for one fault


class Result(NamedTuple):
    """What pytest said of one fault.

    Attributes:
        noticed: whether a test failed; None if pytest could not run what the table names.
        by: the test that failed first, or what happened instead.
        seconds: time it took.
    """

    noticed: bool | None
    by: str
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(argv)
    faults = _selected(options.only)
    if options.list:
        for fault in faults:
            print(f"{fault.name}\n    {fault.path}: {fault.new}\n    {' '.join(fault.tests)}")
        return 0
    _check_all_apply(ROOT)
    if options.check:
        print(f"all {len(FAULTS)} faults apply")
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        results = _run_all(faults, Path(folder), options.jobs, options.full)
    seconds = time.monotonic() - started
    return _report(results, seconds, LEAST_NOTICED if options.only is None else len(faults))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Asks of each fault whether a test notices it.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these faults alone")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--full", action="store_true", help="with the tests marked `full`")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument("--check", action="store_true", help="only check that all faults apply")
    return parser


def _selected(names: Sequence[str] | None) -> tuple[Fault, ...]:
    if names is None:
        return FAULTS
    known = {fault.name: fault for fault in FAULTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"there is no fault {unknown[0]!r}; --list prints their names.")
    return tuple(known[name] for name in names)


def _check_all_apply(root: Path) -> None:
    """Exits with the first fault whose line is not in its file exactly once."""
    for fault in FAULTS:
        file = root / fault.path
        count = file.read_text(encoding="utf-8").count(fault.old) if file.is_file() else 0
        if count != 1:
            sys.exit(
                f"the fault {fault.name!r} does not apply: its line occurs {count} times in "
                f"{fault.path}, and must occur once. Change its row in tests/mutants/faults.py."
            )


def _run_all(
    faults: Sequence[Fault], folder: Path, jobs: int, full: bool
) -> list[tuple[Fault, Result]]:
    """The results in the order in which they are found, each printed as it is."""
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for number in range(max(1, min(jobs, len(faults)))):
        copies.put(_copied(folder / f"copy{number}"))
    results = []
    with ThreadPoolExecutor(copies.qsize()) as pool:
        futures = {pool.submit(_run, x, copies, folder / "cache", full): x for x in faults}
        try:
            for future in as_completed(futures):
                fault, result = futures[future], future.result()
                word = {True: "noticed", False: "SURVIVED", None: "ERROR"}[result.noticed]
                print(f"{word:8} {result.seconds:6.1f} s  {fault.name}: {result.by}", flush=True)
                results.append((fault, result))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _report(results: Sequence[tuple[Fault, Result]], seconds: float, least: int) -> int:
    noticed = sum(result.noticed is True for _, result in results)
    print(f"noticed {noticed} of {len(results)} in {seconds:.0f} seconds")
    for fault, result in results:
        if result.noticed is not True:
            print(f"    {'survived' if result.noticed is False else 'error'}: {fault.name}")
    errors = any(result.noticed is None for _, result in results)
    return 1 if errors or noticed < least else 0


def _copied(target: Path) -> Path:
    """A copy of the working tree, without what git ignores; `lowrank_optax` is found in it."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # and not deleted since
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    # -P: the current folder would hide what PYTHONPATH does.
    command = "import importlib.util; print(importlib.util.find_spec('lowrank_optax').origin)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", command],
        env=_environment(target),
        cwd=target,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    if not Path(found).resolve().is_relative_to(target.resolve()):
        sys.exit(f"lowrank_optax would be imported from {found}, and not from the copy {target}.")
    return target


def _environment(copy: Path) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(copy), before)))}


def _run(fault: Fault, copies: "queue.SimpleQueue[Path]", cache: Path, full: bool) -> Result:
    """What the tests of a fault say of it, in a copy that no other worker uses meanwhile."""
    copy = copies.get()
    try:
        with _applied(fault, copy):
            result = _tested(fault.tests, copy, cache, full)
        if result.noticed:
            right = _tested([result.by], copy, cache, full)
            if right.noticed is not False:
                return Result(None, f"without the fault too: {right.by}", result.seconds)
        return result
    finally:
        copies.put(copy)


@contextlib.contextmanager
def _applied(fault: Fault, copy: Path) -> Iterator[None]:
    file = copy / fault.path
    right = file.read_text(encoding="utf-8")
    _write(file, right.replace(fault.old, fault.new))
    try:
        yield
    finally:
        _write(file, right)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    # Python takes its bytecode for that of the new text, if size and second are the same.
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


def _tested(tests: Sequence[str], copy: Path, cache: Path, full: bool) -> Result:
    """What pytest says of these tests in this copy, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:randomly"]
    # One folder for all: programs that a fault does not change are compiled once.
    command += ["-o", f"cache_dir={cache}", *(["--full"] if full else []), *tests]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            # A file, because a pipe would stay open as long as any process that a test started.
            status = subprocess.run(
                command,
                env=_environment(copy),
                cwd=copy,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return Result(None, "timed out", time.monotonic() - started)
        seconds = time.monotonic() - started
        output.seek(0)
        lines = output.read().splitlines()
    if status == 0:
        return Result(False, "all tests passed", seconds)
    if status == 1:
        return Result(True, _first_failure(lines), seconds)
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return Result(None, f"pytest ended with status {status}: {last}", seconds)


def _first_failure(lines: Sequence[str]) -> str:
    """The test, or the module that cannot be collected, named by pytest's summary."""
    for line in lines:
        word, _, rest = line.partition(" ")
        if word in ("FAILED", "ERROR") and rest.startswith(("tests", "lowrank_optax")):
            return rest.partition(" - ")[0]
    return "a failure that pytest does not name"


if __name__ == "__main__":
    sys.exit(main())
