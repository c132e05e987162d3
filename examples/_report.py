"""What the user sees of a run: progress and the table."""

from collections.abc import Iterator
from contextlib import contextmanager
import math
from pathlib import Path
import statistics
from typing import Any

from _run_folder import StepLog, read_log
from _settings import Settings
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Meter:
    """Shows how far an optimizer is: live on a terminal, a line per evaluation elsewhere."""

    def __init__(self, console: Console, name: str, settings: Settings) -> None:
        self.console, self.name, self.steps = console, name, settings.steps
        self.batch_size, self.length = settings.first_batch_size, settings.sequence_length
        self.adaptive = settings.batch_size == "adaptive"
        bar = [BarColumn(bar_width=None)] if console.width >= 100 else []  # figures come first
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            *bar,
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("held-out {task.fields[held_out]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )

    @contextmanager
    def running(self, done: float) -> Iterator["Meter"]:
        """Starts the clock; `done` steps were made by an earlier process."""
        self.task = self.progress.add_task(
            self.name,
            total=self.steps,
            completed=int(done),
            loss=math.nan,
            held_out=math.nan,
            speed=0,
        )
        with self.progress:
            yield self

    def compiling(self) -> None:
        """Says what is waited for: of a large model, or on many devices, it takes minutes."""
        self.console.print(f"{self.name}  compiling a step", soft_wrap=True)

    def update(self, done: float, log: StepLog) -> None:
        """Shows how far it is, in steps of the first batch size."""
        self.progress.update(
            self.task,
            completed=done,
            loss=log.loss,
            held_out=log.held_out_loss,
            speed=self._speed(log),
        )

    def _speed(self, log: StepLog) -> float:
        sequences = sum(size or self.batch_size for _, size in log.recent)
        seconds = sum(seconds for seconds, _ in log.recent)
        return sequences * self.length / seconds if seconds else 0.0

    def line(self, done: float, log: StepLog) -> None:
        """Says on a line of its own how far it is, where nothing can be redrawn."""
        if self.console.is_terminal:
            return
        task = self.progress.tasks[0]
        batch = f"batch {log.batch_size}  " if self.adaptive else ""
        self.console.print(
            f"{self.name}  step {done:.0f}/{self.steps}  {batch}loss {log.loss:.3f}  "
            f"held-out {log.held_out_loss:.3f}  "
            f"{self._speed(log):,.0f} tokens/s  elapsed {_clock(task.elapsed)}  "
            f"left {_clock(task.time_remaining)}",
            soft_wrap=True,
        )


def _clock(seconds: float | None) -> str:
    return "-:--" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def summarize(log_path: Path, settings: Settings, refresh_every: int | None) -> dict[str, Any]:
    """Condenses a log: final held-out loss, speed, and the time of steps with a refresh.

    The first step is not timed: its caches are cold. Where every step has a refresh, none stands
    out.
    """
    refresh_every = None if refresh_every == 1 else refresh_every
    records = read_log(log_path)
    made = [r for r in records if "seconds" in r]
    timed = [(r["step"], r["seconds"]) for r in made if r["step"] > 1]
    refresh = [s for step, s in timed if refresh_every and (step - 1) % refresh_every == 0]
    hold = [s for step, s in timed if not refresh_every or (step - 1) % refresh_every]
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    seconds = sum(s for _, s in timed)
    first = settings.first_batch_size
    sequences = sum(r.get("batch_size", first) for r in made if r["step"] > 1)
    tokens = sequences * settings.sequence_length
    return {
        "held_out_loss": held_out[-1],
        "perplexity": math.exp(min(held_out[-1], 700.0)),
        "tokens_per_second": tokens / seconds if seconds else None,
        "step_seconds": statistics.median(hold) if hold else None,
        "refresh_step_seconds": statistics.median(refresh) if refresh else None,
        "steps": len(made) if settings.batch_size == "adaptive" else None,
        "batch_size": made[-1].get("batch_size"),
        "noise_scale": made[-1].get("noise_scale"),
    }


def report(console: Console, results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Prints the table, where everything lies, and a sample of each model's text."""
    console.print(table(results))
    console.print(f"curves: {folder / 'curves.png'}", soft_wrap=True)
    for name in results:
        console.print(f"{name}: log and checkpoints in {folder / name}", soft_wrap=True)
    for name, result in results.items():
        print_sample(console, f"{name} continues the held-out text", *result["sample"])


def print_sample(console: Console, title: str, prompt: str, text: str) -> None:
    """Prints what a model wrote, after a dimmed prompt."""
    console.print()
    console.rule(title, align="left")
    console.print(Text(_printable(prompt), style="dim").append(_printable(text), style="not dim"))


def _printable(text: str) -> str:
    """Replaces what would move the cursor: a model may write any byte."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Makes the final table: a row per figure, a column per optimizer.

    Losses and bytes are also given relative to the first optimizer.
    """
    first = next(iter(results.values()))
    made = Table(title="after training", title_justify="left")
    made.add_column("")
    for name in results:
        made.add_column(name, justify="right")
    for label, key, spell, relative in _ROWS:
        if all(result.get(key) is None for result in results.values()):
            continue
        cells = []
        for result in results.values():
            cell = "-" if result.get(key) is None else spell(result[key])
            if relative and result is not first and result[key] is not None and first[key]:
                cell += f" ({relative(result[key] / first[key])})"
            cells.append(cell)
        made.add_row(label, *cells)
    return made


def _percent_more(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def _percent_of(ratio: float) -> str:
    return f"{100 * ratio:.1f}%"


def mebibytes(count: float) -> str:
    """Spells a number of bytes."""
    return f"{count / 2**20:,.2f} MiB"


def milliseconds(seconds: float) -> str:
    """Spells a time."""
    return f"{1000 * seconds:,.1f} ms"


_ROWS = (
    ("held-out loss", "held_out_loss", "{:.4f}".format, _percent_more),
    ("held-out perplexity", "perplexity", "{:,.3f}".format, None),
    ("optimizer state", "optimizer_state_bytes", mebibytes, _percent_of),
    ("optimizer state at first", "first_optimizer_state_bytes", mebibytes, None),
    ("compiled peak of a step", "compiled_peak_bytes", mebibytes, _percent_of),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format, None),
    ("step", "step_seconds", milliseconds, None),
    ("step with a refresh", "refresh_step_seconds", milliseconds, None),
    ("compile time", "compile_seconds", "{:.1f} s".format, None),
    ("steps", "steps", "{:,}".format, None),
    ("batch size at the end", "batch_size", "{:,}".format, None),
    ("gradient noise scale", "noise_scale", "{:,.1f} sequences".format, None),
)
