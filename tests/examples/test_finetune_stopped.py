"""Ctrl-C and kill -9 of a real process, and a missing package."""

from collections.abc import Callable
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from tests.examples.logs import read_losses

PROGRAM = Path(__file__).parents[2] / "examples" / "finetune.py"
Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts the program in a process of its own, on one device."""
    cache = tmp_path_factory.getbasetemp() / "jax_compilations"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(PROGRAM.parents[1]),
        "PYTHONUNBUFFERED": "1",
    }

    def start(*command: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)

    return start


def _wait_for_step(log: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().count('"loss"') >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the program logged no step in four minutes"
        time.sleep(0.01)


@pytest.mark.slow
def test_run_stopped_by_ctrl_c_or_killed_continues_identically(
    begin: Start, text: Path, config: Path, tmp_path: Path
) -> None:
    """The model is made first, so that Ctrl-C may come there too."""
    numbers = "--base-steps 300 --steps 60 --sequence-length 16 --eval-sequences 8 --rank 2"
    more = "--checkpoint-every 25 --adapter lora --set dropout=0.1 --batch-size 8 --devices 1"
    flags = ["--model", str(config), "--data", str(text), *numbers.split(), *more.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = begin(str(PROGRAM), *flags, "--output", str(whole))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err

    for log, resume in (("base/log.jsonl", []), ("lora/log.jsonl", ["--resume"])):
        process = begin(str(PROGRAM), *flags, "--output", str(parts), *resume)
        _wait_for_step(parts / log, 5, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 130, err
        assert f"--output {parts} --resume" in out.splitlines()[-1]
    stopped = max(int(p.name) for p in (parts / "lora" / "checkpoints").iterdir())
    assert 5 <= stopped < 60

    process = begin(str(PROGRAM), "--output", str(parts), "--resume")
    _wait_for_step(parts / "lora" / "log.jsonl", min(stopped + 30, 58), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (parts / "results.json").exists()

    process = begin(str(PROGRAM), "--output", str(parts), "--resume")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    for log in ("base/log.jsonl", "lora/log.jsonl"):
        assert read_losses(parts / log) == read_losses(whole / log)


@pytest.mark.parametrize("package", ["grain", "safetensors"])
def test_missing_package_is_one_sentence_which_names_the_extra(
    begin: Start, package: str, tmp_path: Path
) -> None:
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); "
        f"sys.modules[{package!r}] = None; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    )
    process = begin("-c", code, "--output", str(tmp_path / "run"))
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"finetune.py: error: {package} is missing")
    assert "lowrank-optax[examples]" in err
    assert not (tmp_path / "run").exists()
