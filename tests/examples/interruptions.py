"""Runs that were stopped by Ctrl-C or killed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
import shutil
import signal
from typing import Any
from unittest import mock

from _report import Meter


@contextmanager
def interrupted(name: str, step: int) -> Iterator[None]:
    """Within it, a run gets a Ctrl-C in the given step of what is called `name`."""
    update = Meter.update

    def interrupt(self: Meter, done: float, log: Any) -> None:
        update(self, done, log)
        if (self.name, done) == (name, step - 1):
            signal.raise_signal(signal.SIGINT)

    with mock.patch.object(Meter, "update", interrupt):
        yield


def forget_end(folder: Path, name: str) -> None:
    """Puts the part `name` of a run in the state it had before its last checkpoint."""
    for file in ("results.json", "curves.png", f"{name}/result.json"):
        (folder / file).unlink(missing_ok=True)
    shutil.rmtree(folder / name / "checkpoints" / str(max(checkpoints_of(folder / name))))


def tear_log(log: Path, lines: int) -> None:
    """Leaves that many lines of a log, and a part of the next."""
    kept = log.read_text().splitlines(keepends=True)[:lines]
    log.write_text("".join(kept) + '{"step": 5, "lo')


def checkpoints_of(part: Path) -> set[int]:
    """The steps of which there are checkpoints."""
    return {int(path.name) for path in (part / "checkpoints").iterdir()}
