"""What the table says is what the log says."""

from contextlib import closing
import json
import math
from pathlib import Path

from _curves import plot
from _report import Meter, _printable, summarize, table
from _run_folder import StepLog, read_log
from _settings import Settings
import jax.numpy as jnp
import pytest
from rich.console import Console

SETTINGS = Settings(steps=5, batch_size=2, sequence_length=10)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    records = [{"step": i, "loss": 1.0 / i, "seconds": 3.0 if i % 2 else 1.0} for i in range(1, 6)]
    records += [{"step": 3, "held_out_loss": 2.0}, {"step": 5, "held_out_loss": 0.5}]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_summary_tells_refresh_steps_from_the_others(log: Path) -> None:
    result = summarize(log, SETTINGS, refresh_every=2)  # refreshes at steps 1, 3 and 5
    assert result["step_seconds"] == 1.0
    assert result["refresh_step_seconds"] == 3.0
    assert result["held_out_loss"] == 0.5
    assert result["perplexity"] == math.exp(0.5)
    assert result["tokens_per_second"] == 4 * 20 / 8.0  # all but the first step
    for regular in (None, 1):  # no refreshes, or nothing else
        result = summarize(log, SETTINGS, refresh_every=regular)
        assert result["refresh_step_seconds"] is None
        assert result["step_seconds"] == 2.0


def _result(loss: float, size: int) -> dict:
    names = ("perplexity", "compiled_peak_bytes", "tokens_per_second", "step_seconds")
    result = dict.fromkeys((*names, "compile_seconds"), 1.0)
    result |= dict.fromkeys(("refresh_step_seconds", "first_optimizer_state_bytes"))
    return result | {"held_out_loss": loss, "optimizer_state_bytes": size}


def test_table_compares_with_the_first_optimizer() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table({"adamw": _result(2.0, 2**21), "galore": _result(2.05, 2**20)}))
    text = captured.get()
    assert "2.0500 (+2.5%)" in text
    assert "1.00 MiB (50.0%)" in text
    assert "refresh" not in text  # nobody has one


def test_picture_is_written_whole(log: Path, tmp_path: Path) -> None:
    results = {"adamw": _result(2.0, 2**21), "galore": _result(2.05, 2**20)}
    plot(tmp_path / "curves.png", {"adamw": log, "galore": log}, results)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))


def test_log_keeps_every_bit_of_a_loss(tmp_path: Path) -> None:
    loss = jnp.float32(0.1) / 3
    with closing(StepLog(tmp_path / "log.jsonl", 0)) as log:
        log.add(1, loss)
        log.add_held_out(1, loss)
    first, second = read_log(tmp_path / "log.jsonl")
    assert jnp.float32(first["loss"]) == loss
    assert second["held_out_loss"] == float(loss)
    assert first["seconds"] > 0


def test_reopened_log_drops_later_steps_and_a_torn_line(log: Path) -> None:
    log.write_text(log.read_text() + '{"step": 6, "lo')
    with closing(StepLog(log, 3)) as reopened:
        assert reopened.loss == 1 / 3
        assert reopened.held_out_loss == 2.0
    assert [r["step"] for r in read_log(log)] == [1, 2, 3, 3]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_losses_and_speed_on_a_terminal_or_not(log: Path, terminal: bool) -> None:
    console = Console(width=120, force_terminal=terminal, color_system=None, record=True)
    meter = Meter(console, "adamw", SETTINGS)
    with console.capture() as captured, meter.running(0), closing(StepLog(log, 5)) as opened:
        meter.update(5, opened)
        meter.line(5, opened)
    for part in ("adamw", "5/5", "loss 0.200", "held-out 0.500", "9 tokens/s", "0:00", "left"):
        assert part in captured.get()


def test_sample_cannot_move_the_cursor() -> None:
    assert _printable("a\x1b[2J\tb\n\x07é") == "a\ufffd[2J\tb\n\ufffdé"
