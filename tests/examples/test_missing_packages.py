"""A missing package is one sentence on standard error, which names the extra."""

from pathlib import Path
import runpy
import sys

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("pretrain.py", "grain"),
        ("pretrain.py", "matplotlib"),
        ("finetune.py", "grain"),
        ("finetune.py", "safetensors"),
    ],
)
def test_missing_package_is_one_sentence_which_names_the_extra(
    program: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Runs the program as `python` does, where nothing of it is imported yet."""
    own = {path.stem for path in EXAMPLES.glob("*.py")}
    for module in list(sys.modules):
        if module in own or module.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", [program, "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / program), run_name="__main__")
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"{program}: error: {package} is missing")
    assert "lowrank-optax[examples]" in captured.err
    assert not (tmp_path / "run").exists()
