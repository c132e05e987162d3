"""The benchmarks of adapters go on from the results that are stored, and do not lose them."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("flax")
pytest.importorskip("rich")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_markdown_is_printed_from_what_has_been_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, output = script("adapter_step"), tmp_path / "a" / "step.json"
    row = {"kind": "LoRA", "trained": 1234, "milliseconds": 5.678, "over_lora": 1.0}
    times: list[Any] = []
    measure = lambda args: times.append(args) or [row | {"temporary_bytes": 3 * 2**20}]
    monkeypatch.setattr(module, "measure", measure)
    run = lambda *options: (
        monkeypatch.setattr("sys.argv", ["adapter_step.py", "--output", str(output), *options]),
        module.main(),
    )
    with pytest.raises(SystemExit, match=r"step\.json is not there yet"):
        run("--markdown")
    run("--layers", "2")
    stored = output.read_text()
    assert json.loads(stored)["layers"] == 2
    assert "2 MLPs of width 256" in capsys.readouterr().out
    run("--markdown", "--layers", "3")
    assert capsys.readouterr().out.splitlines()[2] == "| LoRA | 1,234 | 5.68 | 1.00 | 3 |"
    assert output.read_text() == stored
    assert len(times) == 1


def test_a_base_made_again_may_differ_by_rounding_alone(script: Any, tmp_path: Path) -> None:
    module, path = script("adapters"), tmp_path / "adapters.json"
    before = {"weights": "1e1cfe66bf", "old_text_loss": 1.7048, "held_out_loss": 2.0940}
    before |= {"model": "llama-tiny", "steps": 150, "rank": 8}
    again = before | {"weights": "77aa00bbcc", "held_out_loss": 2.0943}
    assert module.base_of_results({}, again, path) == again
    assert module.base_of_results(before, dict(before), path) == before
    with pytest.warns(UserWarning, match=r"77aa00bb, loss 2\.09430.*1e1cfe66, loss 2\.09400"):
        assert module.base_of_results(before, again, path) == before
    with pytest.raises(SystemExit, match=r"other settings \(rank 8 there, 4 here"):
        module.base_of_results(before, again | {"rank": 4}, path)
    with pytest.raises(SystemExit, match=r"old_text_loss 1\.7048 there, 1\.8 here"):
        module.base_of_results(before, again | {"old_text_loss": 1.8}, path)
