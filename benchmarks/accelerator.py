"""Every kernel and step of the library on the device at hand, against its floor and its peer.

    python benchmarks/accelerator.py                      # in under eight minutes; sizes by memory
    python benchmarks/accelerator.py --size tiny --only adapters
    python benchmarks/accelerator.py --resume             # what the results file does not have yet

What a copy moves in a second and what products of matrices multiply is measured first. The floor of
a row is the larger of two times at these rates: of its bytes (what is given read once, what is
replaced read and written once) and of its multiplications and additions, where products are counted
that no form of the step can do without. The peer is the first row of a group; a row and its peer
take turns, each called several times in a row where one call is short. Programs are compiled some
at a time, and nothing else runs while one is timed.

The rows run in a process of their own, `accelerator_run.py`. One that fails is reported in a line;
if it takes the process or the device with it, the rest go on in another. The results file is
written after each row.
"""

import argparse
import contextlib
import json
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from family_table import Column, print_columns

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).with_name("accelerator_run.py")
GRACE = 15  # seconds in which a row may end after its time
WAITING = "not reached in the time given"


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is printed."""
    start = [row["name"], row["shapes"]]
    if "error" in row:
        return [*start, row["error"], *[""] * 6]
    number = lambda key, scale=1.0: f"{row[key] * scale:.3g}" if row.get(key) else ""
    scaled = [("median", 1e3), ("lower_quartile", 1e3), ("bytes", 1e-6), ("flops", 1e-9)]
    rest = [("share_of_floor", 1.0), ("over_peer", 1.0), ("temporary_bytes", 1e-6)]
    return [*start, *(number(*each) for each in scaled + rest)]


HEADINGS = ["", "shapes", "ms", "lower quartile", "MB", "GFLOP", "of floor", "over peer", "temp MB"]


def print_tables(content: dict[str, Any]) -> None:
    """Prints a table for each section, in Markdown."""
    print(f"{content['device']}, jax {content['jax']}, size {content['size']}")
    pick = lambda i: lambda row: cells(row)[i]
    columns = [Column(heading, pick(i)) for i, heading in enumerate(HEADINGS)]
    for section in dict.fromkeys(row["section"] for row in content["rows"]):
        print(f"\n**{section}**\n")
        rows = [row for row in content["rows"] if row["section"] == section]
        print_columns(section, rows, columns, markdown=True)


def waiting(rows: list[dict[str, Any]]) -> int:
    """Number of rows that have not run."""
    return sum(row.get("error") == WAITING for row in rows)


def supervise(command: list[str], output: Path, until: float) -> None:
    """Runs the command until nothing waits, its time is used up, or it gets nowhere."""
    left = -1
    while True:
        # What ends a process is not tried again: its row says that it was running.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=max(1.0, until + GRACE - time.time()), check=False)
        if not output.exists():
            raise SystemExit("Nothing was measured: see the error above.")
        before, left = left, waiting(json.loads(output.read_text())["rows"])
        if left in (0, before) or time.time() > until:
            return
        command = command if "--resume" in command else [*command, "--resume"]


def main() -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", choices=["tiny", "small", "large"], help="by default what fits the memory"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="sections or cases of such a name")
    parser.add_argument("--seconds", type=float, default=440, help="time for all rows")
    parser.add_argument("--rounds", type=int, default=25, help="in which all take turns, at most")
    parser.add_argument("--output", type=Path, default=RESULTS / "accelerator.json")
    parser.add_argument("--resume", action="store_true", help="run what the file does not have")
    args = parser.parse_args()
    if not args.resume:
        args.output.unlink(missing_ok=True)
    until = time.time() + args.seconds
    options = {"--output": args.output, "--until": until, "--rounds": args.rounds}
    options |= {"--size": args.size} if args.size else {}
    command = [sys.executable, WORKER, "--only", *args.only, *["--resume"] * args.resume]
    command += [str(x) for pair in options.items() for x in pair]
    supervise(command, args.output, until)
    content = json.loads(args.output.read_text())
    print_tables(content)
    with args.output.with_suffix(".md").open("w") as file, contextlib.redirect_stdout(file):
        print_tables(content)


if __name__ == "__main__":
    main()
