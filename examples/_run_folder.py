"""The folder of a run: who owns it, its settings, and one log of every step per optimizer.

Of `pretrain.py`; that of `finetune.py` has adapters in the place of optimizers, and more in each.

DIR/run.json                     settings and text of the run; marks the folder as ours
DIR/<optimizer>/log.jsonl        a line per step and per look at the held-out text
DIR/<optimizer>/checkpoints/     Orbax: model, optimizer, position in the text
DIR/<optimizer>/result.json      what the table says of a finished optimizer
DIR/results.json, DIR/curves.png
"""

from collections import deque
from collections.abc import Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
import shlex
import sys
import time
from typing import Any

from _settings import InputError, Settings, flag
import jax


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a file of `write_json`; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def load_settings(folder: Path, given: dict[str, Any], resume: bool, kind: Any = Settings) -> Any:
    """Returns the settings of a new run, or of the run to go on with.

    Args:
      folder: of the run.
      given: settings that the user gave.
      resume: whether to go on with the run.
      kind: the class of the program's settings.

    Raises:
      InputError: if the folder is not ours, holds a run and `resume` is not said, holds none and
        it is, or if a setting given contradicts the run's.
    """
    run = _read_run(folder, kind.PROGRAM)
    if not resume:
        if run is not None:
            raise InputError(
                f"--output {folder} holds a run already: go on with it by --resume, "
                "or choose another folder"
            )
        return kind(**given)
    if run is None:
        raise InputError(f"--resume: there is no run in {folder}")
    known = {field.name for field in dataclasses.fields(kind)}
    if set(run["settings"]) != known:
        raise InputError(f"{folder / 'run.json'} is of another version of this program")
    was: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in run["settings"].items()
    }
    for name, value in given.items():
        if value != was[name]:
            new, old = (_spell(flag(name, kind), x) for x in (value, was[name]))
            raise InputError(
                f"{new} contradicts the run in {folder}, which has {old}: resume with its "
                "settings, or start a new run elsewhere"
            )
    return kind(**was)


def _spell(flag: str, value: Any) -> str:
    """What a user types for a value of a setting."""
    if value in (None, False, ()):
        return f"no {flag}"
    if value is True:
        return flag
    return f"{flag} {shlex.join(map(str, value)) if isinstance(value, tuple) else value}"


def command_to_resume(folder: Path) -> str:
    """What to type to go on with the run in a folder, by the Python that runs now."""
    return shlex.join([sys.executable, sys.argv[0], "--output", str(folder), "--resume"])


def _read_run(folder: Path, program: str) -> dict[str, Any] | None:
    """Reads run.json; None where the folder is new or empty."""
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        run = json.loads((folder / "run.json").read_text())
        if run["program"] == program:
            return run
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"--output {folder} is not empty and not a run of this program")


def open_folder(folder: Path, settings: Any, fingerprint: str) -> None:
    """Makes the folder, or checks that the run in it reads the same text as now."""
    run = _read_run(folder, settings.PROGRAM)
    if run is not None:
        if run["text"] != fingerprint:
            raise InputError(f"the text has changed since the run in {folder} began")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"program": settings.PROGRAM, "settings": dataclasses.asdict(settings)}
        write_json(folder / "run.json", content | {"text": fingerprint})
    except OSError as error:
        raise InputError(f"cannot write to --output {folder}: {error.strerror}") from None


class StepLog:
    """Appends one line per step to a JSON-lines file, without making the device wait.

    A loss is read one step late, when the next step is already in the device's queue. The time
    between two losses becoming known is the time of a step.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Opens the log and drops what is later than `last_step`, or torn by a crash."""
        kept = [record for record in read_log(path) if record["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._clock = time.perf_counter()
        self.loss = self.held_out_loss = math.nan  # the latest ones
        # Seconds and batch size of the latest steps; no size where it is fixed.
        self.recent: deque[tuple[float, int | None]] = deque(maxlen=20)
        self.batch_size: int | None = None
        for record in kept:
            self._remember(record)

    def add(self, step: int, loss: jax.Array, figures: dict[str, Any] | None = None) -> None:
        """Notes a step's loss and other figures, and writes those of the step before."""
        self.flush()
        self._pending = step, {"loss": loss} | (figures or {})

    def flush(self) -> None:
        """Waits for the last loss and writes it."""
        if self._pending is None:
            return
        step, figures = self._pending
        self._pending = None
        figures = {k: x.item() if isinstance(x, jax.Array) else x for k, x in figures.items()}
        if math.isinf(figures.get("noise_scale", 0.0)):
            figures["noise_scale"] = None  # JSON knows no infinity
        now = time.perf_counter()
        self._write({"step": step, **figures, "seconds": now - self._clock})
        self._clock = now

    def add_held_out(
        self, step: int, loss: jax.Array, figures: Mapping[str, jax.Array] | None = None
    ) -> None:
        """Writes a look at the held-out text, with more figures of it."""
        self.flush()
        more = {name: float(x) for name, x in (figures or {}).items()}
        self._write({"step": step, "held_out_loss": float(loss), **more})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Call after a pause, so that the next step is not blamed for it."""
        self._clock = time.perf_counter()

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # to the system: a killed process loses nothing
        self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        self.loss = record.get("loss", self.loss)
        self.held_out_loss = record.get("held_out_loss", self.held_out_loss)
        if "seconds" in record:
            self.batch_size = record.get("batch_size")
            self.recent.append((record["seconds"], self.batch_size))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads a log; a torn last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
