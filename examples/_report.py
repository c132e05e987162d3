"""What the user sees of a run: progress, the table and the picture."""

from collections.abc import Iterator
from contextlib import contextmanager
import io
import math
from pathlib import Path
import statistics
from typing import Any

from _run_folder import StepLog, read_log, write_atomically
from _settings import Settings
import matplotlib
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt

COLORS = ("#1f5fa8", "#d1495b", "#2a9d5c", "#8d5fb0", "#d98a29", "#5b6770")


class Meter:
    """Shows how far an optimizer is: live on a terminal, a line per evaluation elsewhere."""

    def __init__(self, console: Console, name: str, settings: Settings) -> None:
        self.console, self.name, self.steps = console, name, settings.steps
        self.tokens_per_step = settings.batch_size * settings.sequence_length
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
    def running(self, done: int) -> Iterator["Meter"]:
        """Starts the clock; `done` steps were made by an earlier process."""
        self.task = self.progress.add_task(
            self.name, total=self.steps, completed=done, loss=math.nan, held_out=math.nan, speed=0
        )
        with self.progress:
            yield self

    def update(self, step: int, log: StepLog) -> None:
        self.progress.update(
            self.task,
            completed=step,
            loss=log.loss,
            held_out=log.held_out_loss,
            speed=self._speed(log),
        )

    def _speed(self, log: StepLog) -> float:
        return self.tokens_per_step / statistics.mean(log.recent) if log.recent else 0.0

    def line(self, step: int, log: StepLog) -> None:
        """Says on a line of its own how far it is, where nothing can be redrawn."""
        if self.console.is_terminal:
            return
        task = self.progress.tasks[0]
        self.console.print(
            f"{self.name}  step {step}/{self.steps}  loss {log.loss:.3f}  "
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
    timed = [(r["step"], r["seconds"]) for r in records if "seconds" in r and r["step"] > 1]
    refresh = [s for step, s in timed if refresh_every and (step - 1) % refresh_every == 0]
    hold = [s for step, s in timed if not refresh_every or (step - 1) % refresh_every]
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    seconds = sum(s for _, s in timed)
    tokens = len(timed) * settings.batch_size * settings.sequence_length
    return {
        "held_out_loss": held_out[-1],
        "perplexity": math.exp(min(held_out[-1], 700.0)),
        "tokens_per_second": tokens / seconds if seconds else None,
        "step_seconds": statistics.median(hold) if hold else None,
        "refresh_step_seconds": statistics.median(refresh) if refresh else None,
    }


def report(console: Console, results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Prints the table, where everything lies, and a sample of each model's text."""
    console.print(table(results))
    console.print(f"curves: {folder / 'curves.png'}", soft_wrap=True)
    for name in results:
        console.print(f"{name}: log and checkpoints in {folder / name}", soft_wrap=True)
    for name, result in results.items():
        prompt, text = result["sample"]
        console.print()
        console.rule(f"{name} continues the held-out text", align="left")
        console.print(
            Text(_printable(prompt), style="dim").append(_printable(text), style="not dim")
        )


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
        if all(result[key] is None for result in results.values()):
            continue
        cells = []
        for result in results.values():
            cell = "-" if result[key] is None else spell(result[key])
            if relative and result is not first and result[key] is not None and first[key]:
                cell += f" ({relative(result[key] / first[key])})"
            cells.append(cell)
        made.add_row(label, *cells)
    return made


def _percent_more(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def _percent_of(ratio: float) -> str:
    return f"{100 * ratio:.1f}%"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.2f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


_ROWS = (
    ("held-out loss", "held_out_loss", "{:.4f}".format, _percent_more),
    ("held-out perplexity", "perplexity", "{:,.3f}".format, None),
    ("optimizer state", "optimizer_state_bytes", _mebibytes, _percent_of),
    ("optimizer state at first", "first_optimizer_state_bytes", _mebibytes, None),
    ("compiled peak of a step", "compiled_peak_bytes", _mebibytes, _percent_of),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format, None),
    ("step", "step_seconds", _milliseconds, None),
    ("step with a refresh", "refresh_step_seconds", _milliseconds, None),
    ("compile time", "compile_seconds", "{:.1f} s".format, None),
)


def plot(path: Path, logs: dict[str, Path], results: dict[str, dict[str, Any]]) -> None:
    """Draws the losses of all optimizers, and beside them the bytes of their states."""
    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(10, 4.5), width_ratios=(3, 1), layout="constrained"
    )
    for color, (name, log) in zip(_cycle(len(logs)), logs.items(), strict=True):
        records = read_log(log)
        train = [(r["step"], r["loss"]) for r in records if "loss" in r]
        held_out = [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]
        steps, losses = zip(*train, strict=True)
        curves.plot(steps, _smooth(losses), color=color, alpha=0.45, linewidth=1)
        curves.plot(
            *zip(*held_out, strict=True), "o-", color=color, linewidth=1.8, markersize=4, label=name
        )
    _limit_losses(curves, logs)
    curves.set(xlabel="step", ylabel="loss (nats per token)")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set_title("held-out loss (dots), training loss (thin, smoothed)", fontsize=10)
    curves.legend(frameon=False)
    sizes = [r["optimizer_state_bytes"] / 2**20 for r in results.values()]
    drawn = bars.bar(list(results), sizes, color=_cycle(len(results)), width=0.6)
    bars.bar_label(drawn, fmt="%.2f", padding=2)
    bars.set_ylabel("MiB")
    bars.set_title("optimizer state", fontsize=10)
    if len(results) > 2:
        bars.tick_params(axis="x", rotation=45)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    curves.grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, picture.getvalue())


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _limit_losses(axes: plt.Axes, logs: dict[str, Path]) -> None:
    """Cuts the steep first steps off the picture, for the differences are at the end."""
    records = [r for log in logs.values() for r in read_log(log)]
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    finite = [x for x in held_out if math.isfinite(x)]
    if len(finite) > 2 and max(finite) > min(finite):
        margin = max(finite) - min(finite)
        axes.set_ylim(min(finite) - 0.15 * margin, max(finite) + 0.35 * margin)


def _smooth(values: tuple[float, ...], span: int = 20) -> list[float]:
    """Exponential moving average, which starts as a plain mean."""
    smoothed, mean = [], 0.0
    for index, value in enumerate(values):
        mean += (value - mean) * max(1 / (index + 1), 1 / span)
        smoothed.append(mean)
    return smoothed
