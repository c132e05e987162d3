"""The benchmark of all kernels and steps runs, and survives what fails in it."""

import json
import os
from pathlib import Path
import subprocess
import sys
import time

import jax
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("flax")
pytest.importorskip("rich")


def test_rows_of_each_kind_have_times_floors_and_ratios(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    only = ["LoRA, no logits", "apollo_mini"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "PYTHONWARNINGS": "ignore"}
    if folder := jax.config.jax_compilation_cache_dir:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    command = [sys.executable, BENCHMARKS / "accelerator.py", "--size", "tiny", "--rounds", "1"]
    command += ["--output", output, "--only", *only]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(output.read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    for part in only:
        (row,) = (row for row in rows if part in row["name"])
        assert row["median"] > 0
        assert row["over_peer"] > 0
        assert row["share_of_floor"] > 0
        assert f"| {row['name']} |" in run.stdout
        assert f"| {row['name']} |" in output.with_suffix(".md").read_text()


ENDS_IN_ITS_SECOND_ROW = """
import json, os, pathlib, sys
path = pathlib.Path({output!r})
rows = [{{"name": name, "error": {waiting!r}}} for name in "abc"]
if "--resume" in sys.argv:
    rows = json.loads(path.read_text())["rows"]
for row in rows:
    if row["error"] == {waiting!r}:
        row["error"] = "the process ended here"
        path.write_text(json.dumps({{"rows": rows}}))
        if row["name"] == "b":
            os.abort()
        row["error"] = None
path.write_text(json.dumps({{"rows": rows}}))
"""


def test_a_row_that_ends_the_process_does_not_keep_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from accelerator import WAITING, supervise

    output = tmp_path / "found.json"
    code = ENDS_IN_ITS_SECOND_ROW.format(waiting=WAITING, output=str(output))
    supervise([sys.executable, "-c", code], output, time.time() + 300)
    errors = [row["error"] for row in json.loads(output.read_text())["rows"]]
    assert errors == [None, "the process ended here", None]


def test_what_takes_too_long_is_stopped_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import accelerator

    monkeypatch.setattr(accelerator, "GRACE", 0)
    output = tmp_path / "found.json"
    output.write_text(json.dumps({"rows": [{"name": "a", "error": accelerator.WAITING}]}))
    sleeping = [sys.executable, "-c", "import time; time.sleep(1000)"]
    accelerator.supervise(sleeping, output, time.time() + 0.1)
    assert accelerator.waiting(json.loads(output.read_text())["rows"]) == 1
