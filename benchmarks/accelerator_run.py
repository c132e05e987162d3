"""The process in which the rows of `accelerator.py` run."""

import argparse
from concurrent.futures import ThreadPoolExecutor
import json
import math
import os
from pathlib import Path
import time
from typing import Any, NamedTuple
import warnings

from accelerator import WAITING, cells, waiting
from accelerator_cases import SIZES, Case, Group, adapters, device, low_bit_adam, optimizers
from accelerator_layers import activations, attentions, decoders, linears, losses
import jax
import numpy as np
from timing import Program

SECTIONS = {
    "device": device,
    "kernels": low_bit_adam,
    "loss": losses,
    "attention": attentions,
    "decoder": decoders,
    "adapters": adapters,
    "activations": activations,
    "optimizers": optimizers,
    "linear": linears,
}
RUNNING = "the process ended here"
SAMPLE, ROW = 0.02, 6.0  # seconds of a sample at least, and of a row at most
LEAST_ROUNDS = 3
COMPILED_TOGETHER = max(4, os.cpu_count() or 1)


class Record:
    """The results file: a row for each case from the start, written after each change."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.rows = {(row["name"], row["shapes"]): row for row in content["rows"]}
        self.write()

    def write(self) -> None:
        """Writes the file."""
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def of(self, case: Case) -> dict[str, Any]:
        """The row of a case."""
        return self.rows[case.name, case.shapes]

    def is_waiting(self, case: Case) -> bool:
        """Whether the case has not run."""
        return self.of(case).get("error") == WAITING

    def floor(self, row: dict[str, Any]) -> float | None:
        """Seconds of the bytes or of the products of a row, at the rates of this device."""
        rates = {r["name"]: r for r in self.content["rows"] if r["section"] == "device"}
        copy, product = rates["copy"], rates[f"product, {row['rate']}"]
        seconds = [0.0]
        for key, of in (("bytes", copy), ("flops", product)):
            if row[key] and "lower_quartile" not in of:
                return None
            seconds.append(row[key] * of["lower_quartile"] / of[key] if row[key] else 0.0)
        return max(seconds)


def default_size() -> str:
    """The size that fits the device's memory."""
    if jax.default_backend() == "cpu":
        return "tiny"
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return "large" if memory > 30e9 else "small"


def first_line(error: BaseException) -> str:
    """An error in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def random_key() -> jax.Array:
    """Key of a generator that is quick to compile."""
    return jax.random.key(0, impl="rbg")


class Prepared(NamedTuple):
    """The compiled programs of a case."""

    step: Any
    inputs: Any
    nbytes: int

    def start(self) -> "Started":
        """The step with its arrays, called until a call takes what the next ones will."""
        carry, arguments = jax.block_until_ready(self.inputs(random_key()))
        program = Program(self.step, carry, *arguments)
        program()  # may load the program, or refresh a basis
        return Started(program, min(100, math.ceil(SAMPLE / max(program(), 1e-6))))


class Started(NamedTuple):
    """A program and the number of its calls in a sample."""

    program: Program
    calls: int

    def __call__(self) -> float:
        """Seconds of a call."""
        return self.program(self.calls)


def prepare(cases: list[Case]) -> dict[Case, Prepared | Exception]:
    """Compiles all cases side by side; of those that cannot be compiled the error."""
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    found: dict[Case, Any] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case in cases:
            try:
                step, inputs = case.build()
                carry, arguments = jax.eval_shape(inputs, random_key())
                nbytes = size(arguments) + (2 if case.reads_carry else 1) * size(carry)
                lowered = jax.jit(step, donate_argnums=0).lower(carry, *arguments)
                programs = lowered, jax.jit(inputs).lower(random_key())
                found[case] = (*(pool.submit(each.compile) for each in programs), nbytes)
            except Exception as error:
                found[case] = error
    for case, known in found.items():
        if isinstance(known, tuple):
            error = known[0].exception() or known[1].exception()
            found[case] = error or Prepared(known[0].result(), known[1].result(), known[2])
    return found


def measure(programs: list[Started], rounds: int, seconds: float) -> np.ndarray:
    """Seconds of a call: a row for each round, in which the programs take turns."""
    samples: list[list[float]] = []
    began = time.perf_counter()
    while len(samples) < rounds:
        if len(samples) >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        samples.append([program() for program in programs])
    return np.array(samples)


class Runner:
    """Runs the cases that wait, until a time."""

    def __init__(self, record: Record, until: float, rounds: int) -> None:
        self.record, self.until, self.rounds = record, until, rounds
        self.prepared: dict[Case, Prepared | Exception] = {}
        self.first: Case | None = None
        self.peer: Started | None = None

    def run(self, groups: list[Group]) -> None:
        """Runs the cases of a section, each beside the first of its group."""
        pairs = [(c, group[0]) for group in groups for c in group if self.record.is_waiting(c)]
        for i in range(0, len(pairs), COMPILED_TOGETHER):
            batch = pairs[i : i + COMPILED_TOGETHER]
            cases = dict.fromkeys(case for pair in batch for case in pair)
            if time.time() < self.until:
                self.prepared |= prepare([case for case in cases if case not in self.prepared])
            for case, first in batch:
                if time.time() < self.until:
                    self.run_case(case, first)

    def run_case(self, case: Case, first: Case) -> None:
        """Runs a case and notes its figures or its error."""
        if first is not self.first:
            self.first, self.peer = first, None
        row = self.record.of(case)
        row["error"] = RUNNING
        self.record.write()
        try:
            if self.peer is None and "median" in self.record.of(first):
                self.peer = self.start(first)
            started = self.start(case)
            self.time(row, started)
            self.peer = started if case is first else self.peer
            del row["error"]
        except Exception as error:
            self.peer = None  # its arrays may be lost
            row["error"] = first_line(error)
        self.record.write()
        print(*cells(row), sep="  ", flush=True)
        if "error" in row:
            jax.block_until_ready(jax.numpy.zeros(8) + 1)  # or the device answers no more

    def start(self, case: Case) -> Started:
        """The program of a case with its arrays."""
        known = self.prepared[case]
        if isinstance(known, Exception):
            raise known
        self.record.of(case)["bytes"] = known.nbytes
        return known.start()

    def time(self, row: dict[str, Any], case: Started) -> None:
        """Runs a case beside its peer and notes the figures."""
        peer = [] if self.peer is None else [self.peer]
        left = (self.until - time.time()) / (2 * waiting(self.record.content["rows"]) + 2)
        samples = measure([case, *peer], self.rounds, min(ROW, left))
        seconds, *beside = np.quantile(samples, 0.25, axis=0)
        row["median"] = np.median(samples[:, 0])
        row["lower_quartile"] = seconds
        row["rounds"] = len(samples)
        row["temporary_bytes"] = case.program.compiled.memory_analysis().temp_size_in_bytes
        if beside:
            row["over_peer"] = seconds / beside[0]
        if floor := self.record.floor(row):
            row["share_of_floor"] = floor / seconds


def chosen(size: str, only: list[str]) -> dict[str, list[Group]]:
    """The groups of each section that have a case with such a name, and of them the first case."""
    found = {}
    for section, groups_of in SECTIONS.items():
        fits = lambda case: any(part in f"{section}: {case.name}" for part in only)  # noqa: B023
        groups = [[c for c in g if c is g[0] or fits(c)] for g in groups_of(SIZES[size])]
        kept = [g for g in groups if section == "device" or any(map(fits, g))]
        found[section] = kept
    return found


def work(args: argparse.Namespace) -> None:
    """Runs what waits, in this process."""
    size, device = args.size or default_size(), jax.devices()[0].device_kind
    sections = chosen(size, args.only)
    rows = [
        {"section": section, "name": case.name, "shapes": case.shapes}
        | {"flops": case.flops, "bytes": None, "rate": case.rate, "error": WAITING}
        for section, groups in sections.items()
        for group in groups
        for case in group
    ]
    content = {"device": device, "jax": jax.__version__, "size": size, "rows": rows}
    if args.resume:
        content = json.loads(args.output.read_text())
        if (content["device"], content["size"]) != (device, size):
            raise SystemExit(
                f"{args.output} is of {content['device']}, size {content['size']}; "
                f"this is {device}, size {size}: leave out --resume."
            )
        known = {(row["name"], row["shapes"]) for row in content["rows"]}
        content["rows"] += [row for row in rows if (row["name"], row["shapes"]) not in known]
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    runner = Runner(Record(args.output, content), args.until, args.rounds)
    for groups in sections.values():
        runner.run(groups)


def main() -> None:
    """Reads what `accelerator.py` asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--only", nargs="+", required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    work(parser.parse_args())


if __name__ == "__main__":
    main()
