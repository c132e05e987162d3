"""Bad input: one line on standard error, exit status 2, and nothing written."""

import json
from pathlib import Path

from _settings import Settings
import finetune
import pytest

REFUSED = {
    "no such run": (["--from", "no/run"], "not a run of pretrain.py"),
    "run without a checkpoint": (["--from", "RUN"], "no checkpoint yet"),
    "no such Hugging Face folder": (["--hf", "no/model"], "no config.json"),
    "Hugging Face folder of another family": (["--hf", "OTHER"], "model_type 'bert'"),
    "two models": (["--hf", "OTHER", "--from", "RUN"], "not allowed"),
    "no such text": (["--hf", "MODEL", "--data", "no/such/folder"], "no such file"),
    "no such old text": (["--hf", "MODEL", "--base-data", "no/such/folder"], "--base-data no/such"),
    "model that does not know bytes": (["--hf", "SMALL"], "the model knows 7 tokens"),
    "no tokenizer": (["--hf", "TOKENS"], "no tokenizer.json for the model's 300 tokens:"),
    "tokenizer of another form": (["--hf", "VOCABULARY"], "300 tokens, only vocab.json and merges"),
    "unknown adapter": (["--adapter", "lorra"], "did you mean"),
    "unknown adapter among several": (["--compare", "lora,lorra"], "no adapter 'lorra'"),
    "same adapter twice": (["--compare", "lora", "lora"], "different adapters"),
    "no adapter": (["--compare", ","], "name an adapter"),
    "both ways to choose": (["--adapter", "lora", "--compare", "lotr"], "not allowed"),
    "unknown option": (["--set", "rnak=3"], "did you mean rank"),
    "option of no adapter here": (["--set", "pissa.rank=3"], "no adapter 'pissa' in this run"),
    "option with a bad value": (["--set", "rank=0.5"], "rank=0.5"),
    "no layer matches": (["--hf", "MODEL", "--where", "qeury"], "query"),
    "where that is no regular expression": (["--hf", "MODEL", "--where", "("], "where"),
    "optimizer of all gradients": (
        ["--hf", "MODEL", "--adapter", "aflora", "--update-in-backward"],
        "aflora cannot adapt this model with --update-in-backward: ",
    ),
    "recomputed twice": (
        ["--adapter", "full", "--update-in-backward", "--remat"],
        "leave --remat out",
    ),
    "every second without remat": (["--remat-every", "2"], "--remat-every needs --remat"),
    "rank that is none": (["--rank", "0"], "--rank must be at least 1"),
    "negative alpha": (["--alpha", "-1"], "--alpha must be positive"),
    "zero base steps": (["--base-steps", "0"], "--base-steps"),
    "zero steps": (["--steps", "0"], "--steps must be at least 1"),
    "warm-up beyond the end": (["--steps", "6", "--warmup", "7"], "--warmup"),
    "negative learning rate": (["--learning-rate", "-1"], "--learning-rate"),
    "tokenizer beside a run": (["--from", "RUN", "--tokenizer", "x"], "--tokenizer"),
    "nothing to compare with": (
        ["--hf", "MODEL", "--compare", "full", "lora", "--equal-parameters"],
        "full has no rank",
    ),
    "unknown flag": (["--optimizer", "adamw"], "--help"),
    "nothing to resume": (["--resume"], "no run in"),
}


@pytest.fixture
def places(config: Path, tmp_path: Path) -> dict[str, str]:
    """Paths that stand for the words in capitals."""
    for name in ("run", "other", "model", "small", "tokens", "vocabulary"):
        (tmp_path / "input" / name).mkdir(parents=True)
    content = json.loads(config.read_text())
    models = {"model": {"vocab_size": 257}, "small": {"vocab_size": 7}}
    models |= {"tokens": {"vocab_size": 300}, "vocabulary": {"vocab_size": 300}}
    for name, change in (models | {"other": {"model_type": "bert"}}).items():
        (tmp_path / "input" / name / "config.json").write_text(json.dumps(content | change))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "input" / "vocabulary" / name).write_text("")
    run: dict = {"program": Settings.PROGRAM}
    run |= {"settings": {"optimizers": ["adamw"]}}
    (tmp_path / "input" / "run" / "run.json").write_text(json.dumps(run))
    return {name.upper(): str(tmp_path / "input" / name) for name in ("run", *models, "other")}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    case: str,
    places: dict[str, str],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    arguments, message = REFUSED[case]
    arguments = [places.get(a, a) for a in arguments]
    if "--data" not in arguments:
        arguments += ["--data", str(text)]
    more = ["--sequence-length", "16", "--batch-size", "8", "--devices", "1"]
    before = sorted(tmp_path.rglob("*"))
    assert finetune.main([*more, *arguments, "--output", str(tmp_path / "out")]) == 2
    _assert_one_line(capsys, message)
    assert sorted(tmp_path.rglob("*")) == before


def _assert_one_line(capsys: pytest.CaptureFixture, message: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert captured.err.startswith("finetune.py: error: ")


def test_folder_of_the_main_job_is_left_alone(
    places: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    for extra in ([], ["--resume"]):
        assert finetune.main([*extra, "--output", places["RUN"]]) == 2
        _assert_one_line(capsys, "not a run of this program")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that has not made a step yet."""
    settings = finetune.FinetuneSettings(hf="no/model", adapters=("lora",))
    finetune.open_folder(tmp_path / "begun", settings, "some text")
    return tmp_path / "begun"


def test_run_is_not_overwritten(begun: Path, capsys: pytest.CaptureFixture) -> None:
    assert finetune.main(["--output", str(begun)]) == 2
    _assert_one_line(capsys, "--resume")


def test_settings_cannot_change_on_resume(begun: Path, capsys: pytest.CaptureFixture) -> None:
    for new, old in (
        ("--steps 7", "--steps 300"),
        ("--adapter lotr", "--adapter lora"),
        ("--from another", "no --from"),
        ("--equal-parameters", "no --equal-parameters"),
    ):
        assert finetune.main([*new.split(), "--output", str(begun), "--resume"]) == 2
        _assert_one_line(capsys, f"{new} contradicts the run in {begun}, which has {old}:")


def test_files_missing_on_resume_are_named(begun: Path, capsys: pytest.CaptureFixture) -> None:
    assert finetune.main(["--output", str(begun), "--resume"]) == 2
    _assert_one_line(capsys, "--hf no/model")
