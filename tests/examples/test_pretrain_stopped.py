"""Ctrl-C and kill -9 of a real process."""

from collections.abc import Callable
from pathlib import Path
import signal
import subprocess
import time

import pytest

from tests.examples.logs import read_losses

Start = Callable[..., subprocess.Popen]


def _wait_for_step(log: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"loss"') >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the program logged no step in two minutes"
        time.sleep(0.01)


ADAPTIVE = ["--batch-size", "adaptive", "--initial-batch-size", "2", "--max-batch-size", "8"]
ADAPTIVE += ["--eta", "0.6"]
STEPS = 300  # more than a process makes between a look at its log and a signal


@pytest.fixture(params=[[], ADAPTIVE], ids=["fixed", "adaptive"])
def long_run(request: pytest.FixtureRequest, flags: list[str]) -> list[str]:
    steps = ["--steps", str(STEPS), "--checkpoint-every", "25"]
    return [*flags, "--optimizer", "adamw", *steps, *request.param]


@pytest.mark.full  # test_pretrain.py has both within one process
def test_run_stopped_by_ctrl_c_or_killed_continues_identically(
    start: Start, long_run: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start("pretrain.py", *long_run, "--output", str(whole))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err

    process = start("pretrain.py", *long_run, "--output", str(parts))
    log = parts / "adamw" / "log.jsonl"
    _wait_for_step(log, 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"--output {parts} --resume" in out.splitlines()[-1]
    stopped = max(int(p.name) for p in (parts / "adamw" / "checkpoints").iterdir())
    assert 5 <= stopped < STEPS

    process = start("pretrain.py", "--output", str(parts), "--resume")
    _wait_for_step(log, min(stopped + 30, STEPS - 2), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (parts / "results.json").exists()

    process = start("pretrain.py", "--output", str(parts), "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert read_losses(log) == read_losses(whole / "adamw" / "log.jsonl")
