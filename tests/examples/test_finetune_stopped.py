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
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().count('"loss"') >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the program logged no step in four minutes"
        time.sleep(0.01)


@pytest.mark.full  # test_finetune.py has both within one process
def test_run_stopped_by_ctrl_c_or_killed_continues_identically(
    start: Start, text: Path, config: Path, tmp_path: Path
) -> None:
    """The model is made first, so that Ctrl-C may come there too."""
    numbers = "--base-steps 300 --steps 60 --sequence-length 16 --eval-sequences 8 --rank 2"
    more = "--checkpoint-every 25 --adapter lora --set dropout=0.1 --batch-size 8 --devices 1"
    flags = ["--model", str(config), "--data", str(text), *numbers.split(), *more.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start("finetune.py", *flags, "--output", str(whole))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err

    for log, resume in (("base/log.jsonl", []), ("lora/log.jsonl", ["--resume"])):
        process = start("finetune.py", *flags, "--output", str(parts), *resume)
        _wait_for_step(parts / log, 5, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 130, err
        assert f"--output {parts} --resume" in out.splitlines()[-1]
    stopped = max(int(p.name) for p in (parts / "lora" / "checkpoints").iterdir())
    assert 5 <= stopped < 60

    process = start("finetune.py", "--output", str(parts), "--resume")
    _wait_for_step(parts / "lora" / "log.jsonl", min(stopped + 30, 58), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (parts / "results.json").exists()

    process = start("finetune.py", "--output", str(parts), "--resume")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    for log in ("base/log.jsonl", "lora/log.jsonl"):
        assert read_losses(parts / log) == read_losses(whole / log)
