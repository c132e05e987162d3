"""Bad input: one line on standard error, exit status 2, and nothing written."""

import json
from pathlib import Path

import pretrain
import pytest

REFUSED = {
    "no such file": (["--data", "no/such/folder"], "no such file"),
    "empty corpus": (["--data", "EMPTY"], "without files"),
    "text shorter than a sequence": (["--sequence-length", "100000"], "too few for one sequence"),
    "unknown optimizer": (["--optimizer", "adamww"], "did you mean adamw"),
    "unknown optimizer among several": (["--compare", "sgd,adamww"], "did you mean adamw"),
    "no optimizer": (["--compare", ","], "name an optimizer"),
    "unknown option": (["--optimizer", "galore", "--set", "rnak=3"], "did you mean rank"),
    "option with a bad value": (["--optimizer", "galore", "--set", "rank=0"], "rank"),
    "optimizer that needs more": (["--optimizer", "dpsgd"], "dpsgd"),
    "same optimizer twice": (["--compare", "sgd", "sgd"], "different optimizers"),
    "both ways to choose": (["--optimizer", "sgd", "--compare", "adam"], "not allowed"),
    "unknown model": (["--model", "llama-huge"], "llama-tiny"),
    "model that is no config": (["--model", "BROKEN"], "not valid JSON"),
    "no such tokenizer": (["--tokenizer", "no/tokenizer.json"], "no such file"),
    "tokenizer that is none": (["--tokenizer", "BROKEN"], "not a tokenizers JSON file"),
    "batch that does not fit the mesh": (["--batch-size", "7", "--accumulate", "2"], "multiple"),
    "too many devices": (["--devices", "4096"], "--devices 4096"),
    "unknown flag": (["--rank", "3"], "--help"),
    "unknown schedule": (["--schedule", "sine"], "sine"),
    "unknown dtype": (["--dtype", "float8"], "float8"),
    "unknown remat policy": (["--remat", "some"], "remat"),
    "unknown intermediate": (["--remat", "mlp=save"], "remat names 'mlp'"),
    "intermediate named twice": (["--remat", "mlp_up=save,mlp_up=offload"], "mlp_up=offload names"),
    "every second without remat": (["--remat-every", "2"], "--remat-every needs --remat"),
    "every third of too few": (["--remat", "--remat-every", "9"], "remat_every=9 must divide"),
    "no number": (["--steps", "many"], "many"),
    "zero steps": (["--steps", "0"], "--steps must be at least 1"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "negative learning rate": (["--learning-rate", "-1"], "--learning-rate"),
    "learning rate that is no number": (["--learning-rate", "nan"], "--learning-rate"),
    "weights that are all zero": (["--initializer-range", "0"], "--initializer-range"),
    "too many bits of activations": (["--activation-bits", "9"], "--activation-bits must be 1 to"),
    "sketch of nothing": (["--sketch", "0"], "--sketch must be above 0"),
    "kind without sketch": (["--sketch-kind", "rows"], "--sketch-kind needs --sketch"),
    "unknown kind of sketch": (["--sketch", "0.5", "--sketch-kind", "random"], "stratified"),
    "unknown loss": (["--loss", "logits"], "chunked"),
    "recomputed twice": (["--update-in-backward", "--remat"], "leave --remat out"),
    "all inputs, and a sketch of them": (
        ["--update-in-backward", "--sketch", "0.5"],
        "leave --sketch out",
    ),
    "noise of gradients that never exist": (
        ["--update-in-backward", "--batch-size", "adaptive"],
        "give a number",
    ),
    "update of all leaves in backward": (
        ["--update-in-backward", "--optimizer", "lamb"],
        "scale_by_trust_ratio",
    ),
    "warm-up beyond the end": (["--warmup", "7"], "--warmup"),
    "nothing to resume": (["--resume"], "no run in"),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Paths that stand for the words in capitals."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    return {"EMPTY": str(tmp_path / "empty"), "BROKEN": str(tmp_path / "broken.json")}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    case: str,
    flags: list[str],
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    arguments, message = REFUSED[case]
    arguments = [places.get(a, a) for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert pretrain.main([*flags, *arguments, "--output", str(tmp_path / "run")]) == 2
    _assert_one_line(capsys, message)
    assert sorted(tmp_path.rglob("*")) == before


def _assert_one_line(capsys: pytest.CaptureFixture, message: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert captured.err.startswith("pretrain.py: error: ")


def test_folder_that_is_not_ours_is_left_alone(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for extra in ([], ["--resume"]):
        assert pretrain.main([*flags, *extra, "--output", str(tmp_path)]) == 2
        _assert_one_line(capsys, "not a run of this program")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_output_that_is_a_file_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        assert pretrain.main([*flags, "--output", str(tmp_path / place)]) == 2
        _assert_one_line(capsys, str(tmp_path / place))


@pytest.fixture
def begun(flags: list[str], tmp_path: Path) -> Path:
    """The folder of a run of SGD that has not made a step yet."""
    given, _, _ = pretrain.parse([*flags, "--optimizer", "sgd"])
    settings = pretrain.Settings(**given)
    text = pretrain.load_corpus(settings.data, None, settings.sequence_length).fingerprint
    pretrain.open_folder(tmp_path / "begun", settings, text)
    return tmp_path / "begun"


def test_run_is_not_overwritten(
    begun: Path, flags: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert pretrain.main([*flags, "--output", str(begun)]) == 2
    _assert_one_line(capsys, "--resume")


def test_settings_cannot_change_on_resume(begun: Path, capsys: pytest.CaptureFixture) -> None:
    for new, old in (
        ("--steps 7", "--steps 6"),
        ("--compare adam", "--compare sgd"),
        ("--remat full", "no --remat"),
    ):
        assert pretrain.main([*new.split(), "--output", str(begun), "--resume"]) == 2
        _assert_one_line(capsys, f"{new} contradicts the run in {begun}, which has {old}:")


def test_text_cannot_change_on_resume(begun: Path, capsys: pytest.CaptureFixture) -> None:
    run = json.loads((begun / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps(run | {"text": "another"}))
    assert pretrain.main(["--output", str(begun), "--resume"]) == 2
    _assert_one_line(capsys, "the text has changed")
