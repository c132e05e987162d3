"""Whole fine-tunings of a few steps: what they leave, and that they go on to the last bit."""

import json
from pathlib import Path
import random
import shutil

import _finished
from _recipes import RECIPES
import finetune
from flax import nnx
import jax
import jax.numpy as jnp
import pretrain
import pytest

from lowrank_optax.models import load_huggingface
from tests.examples.logs import read_losses

TRAINED = {"lora": 992, "lotr": 280, "full": 12_656}  # of the conftest's model, at rank 2


@pytest.fixture(scope="session")
def old_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the main job, of which there is a model to adapt."""
    folder = tmp_path_factory.mktemp("old") / "run"
    assert pretrain.main([*flags, "--optimizer", "adamw", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def new_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words that the old text does not have."""
    path = tmp_path_factory.mktemp("new") / "text.txt"
    words = random.Random(1).choices(["LOREM", "IPSUM", "DOLOR", "SIT", "AMET"], k=2000)
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def adapting(old_run: Path, new_text: Path) -> list[str]:
    """Flags of six steps on the new text."""
    numbers = "--steps 6 --batch-size 8 --sequence-length 16 --eval-every 3 --eval-sequences 8"
    more = "--checkpoint-every 2 --devices 1 --rank 2"
    return ["--from", str(old_run), "--data", str(new_text), *numbers.split(), *more.split()]


@pytest.fixture(scope="module")
def finished(adapting: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two adapters, one of them with dropout, and of all weights."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    compare = ["--compare", "lora,lotr", "full", "--set", "lora.dropout=0.1"]
    assert finetune.main([*adapting, *compare, "--output", str(folder)]) == 0
    return folder


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_run_leaves_logs_results_picture_and_checkpoints(finished: Path) -> None:
    for name in TRAINED:
        losses = read_losses(finished / name / "log.jsonl")
        assert [r["step"] for r in losses if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in losses if "held_out_loss" in r] == [0, 3, 6]
        assert losses[-1]["held_out_loss"] < losses[0]["held_out_loss"]
        steps = {int(p.name) for p in (finished / name / "checkpoints").iterdir()}
        assert steps == {4, 6}
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_counts_bytes_and_losses(finished: Path) -> None:
    results = _results(finished)
    before = results.pop("before")
    for name, result in results.items():
        assert result["trained"] == TRAINED[name]
        # Adam's two moments, and a count or two.
        assert 0 <= result["optimizer_state_bytes"] - 8 * TRAINED[name] <= 16
        assert result["compiled_peak_bytes"] > result["optimizer_state_bytes"]
        assert result["old_text_loss"] > 0
        log = read_losses(finished / name / "log.jsonl")
        assert log[0]["held_out_loss"] == pytest.approx(before["held_out_loss"], rel=1e-6)
        assert log[-1]["held_out_loss"] == result["held_out_loss"]


def test_every_adapter_starts_from_the_same_model_on_the_same_batch(finished: Path) -> None:
    lotr, full = (read_losses(finished / name / "log.jsonl") for name in ("lotr", "full"))
    assert lotr[0] == full[0]
    assert lotr[1]["loss"] == pytest.approx(full[1]["loss"], rel=1e-6)


def test_run_ends_with_table_paths_and_samples(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    assert finetune.main(["--output", str(finished), "--resume"]) == 0  # nothing left to train
    out = capsys.readouterr().out
    for part in ("trained", "optimizer", "peak of", "held-out", "old text", "merged", "before"):
        assert part in out
    assert str(finished / "curves.png") in out
    assert "continues the held-out text" in out


def test_saved_model_and_files_give_the_numbers_of_the_trained_one(
    finished: Path, old_run: Path, adapting: list[str]
) -> None:
    results = _results(finished)
    for name in TRAINED:
        assert 0 <= results[name]["merged_difference"] < 1e-4
    assert 0 <= results["lora"]["peft_difference"] < 1e-4
    assert results["full"]["peft_difference"] is None
    # The merged model has the loss that the table says.
    model = load_huggingface(finished / "lotr" / "merged")
    graphdef, params = nnx.split(model)
    settings = finetune.FinetuneSettings(**finetune.parse(adapting, tuple(RECIPES))[0])
    text = finetune.find_base(settings).text
    windows = jnp.asarray(pretrain.held_out_windows(text, settings.loop()))
    loss = pretrain.held_out_loss(params, windows, graphdef=graphdef)
    assert float(loss) == pytest.approx(results["lotr"]["held_out_loss"], rel=1e-5)


def test_difference_beyond_rounding_is_an_error(
    finished: Path,
    adapting: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = _finished.load_huggingface

    def damaged(*args: object, **kwargs: object) -> nnx.Module:
        model = load(*args, **kwargs)
        model.norm.scale[...] *= 1.01
        return model

    monkeypatch.setattr(_finished, "load_huggingface", damaged)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "lotr" / "result.json").unlink()
    assert finetune.main(["--output", str(folder), "--resume"]) == 1
    assert "the merged model differs from the trained one by" in capsys.readouterr().err


def test_killed_run_goes_on_to_the_last_bit(finished: Path, tmp_path: Path) -> None:
    """Puts the folder in the state of a process killed within step 5, while it wrote the log."""
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    for name in ("results.json", "curves.png", "lora/result.json", "before.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "lora" / "checkpoints" / "6")
    log = folder / "lora" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:7]) + '{"step": 5, "lo')
    assert finetune.main(["--output", str(folder), "--resume"]) == 0
    assert read_losses(log) == read_losses(finished / "lora" / "log.jsonl")
    assert _figures(folder) == _figures(finished)


def test_run_killed_before_its_first_checkpoint_starts_again(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "lotr")
    (folder / "lotr").mkdir()
    (folder / "lotr" / "log.jsonl").write_text('{"step": 0, "held_out_loss": 9.0}\n')
    assert finetune.main(["--output", str(folder), "--resume"]) == 0
    expected = read_losses(finished / "lotr" / "log.jsonl")
    assert read_losses(folder / "lotr" / "log.jsonl") == expected


def _figures(folder: Path) -> dict:
    """Results that are not times."""
    return {
        name: {k: v for k, v in result.items() if "second" not in k}
        for name, result in _results(folder).items()
    }


@pytest.mark.slow
def test_merged_model_can_be_adapted_in_turn(
    finished: Path, adapting: list[str], tmp_path: Path
) -> None:
    merged = ["--hf", str(finished / "lora" / "merged"), *adapting[2:]]
    run = tmp_path / "run"
    assert finetune.main([*merged, "--adapter", "lora", "--output", str(run)]) == 0
    first, second = _results(finished), _results(run)
    assert second["before"]["held_out_loss"] == pytest.approx(
        first["lora"]["held_out_loss"], rel=1e-5
    )
    assert second["before"]["old_text_loss"] is None


@pytest.mark.slow
def test_every_recipe_trains_saves_and_goes_on_to_the_last_bit(
    adapting: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    names = ["--compare", "all", "--set", "svfit.rank=4"]
    assert finetune.main([*adapting, *names, "--output", str(whole)]) == 0
    shutil.copytree(whole, parts)
    (parts / "results.json").unlink()
    for name in RECIPES:
        (parts / name / "result.json").unlink()
        shutil.rmtree(parts / name / "checkpoints" / "6")
    assert finetune.main(["--output", str(parts), "--resume"]) == 0
    assert _figures(parts) == _figures(whole)
    for name in RECIPES:
        losses = read_losses(whole / name / "log.jsonl")
        assert read_losses(parts / name / "log.jsonl") == losses
        assert losses[-1]["held_out_loss"] < losses[0]["held_out_loss"]


@pytest.mark.slow
def test_equal_parameters_brings_counts_together(adapting: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    names = ["--compare", "lora", "lotr", "lora_fa", "--equal-parameters", "--steps", "1"]
    assert finetune.main([*adapting, *names, "--output", str(run)]) == 0
    results = _results(run)
    assert results["lora"]["rank"] == 2
    assert results["lora_fa"]["rank"] > 2
    for name in ("lotr", "lora_fa"):
        assert results[name]["trained"] == pytest.approx(results["lora"]["trained"], rel=0.25)


@pytest.mark.slow
def test_model_is_made_first_where_none_is_named(config: Path, tmp_path: Path) -> None:
    numbers = "--base-steps 4 --steps 2 --sequence-length 16 --eval-sequences 8 --rank 2"
    run = tmp_path / "run"
    flags = ["--model", str(config), *numbers.split(), "--adapter", "lora", "--output", str(run)]
    assert finetune.main(flags) == 0
    assert len([r for r in read_losses(run / "base" / "log.jsonl") if "loss" in r]) == 4
    results = _results(run)
    assert results["before"]["old_text_loss"] > 0
    base = (run / "base" / "log.jsonl").read_text()
    assert finetune.main(["--output", str(run), "--resume"]) == 0
    assert (run / "base" / "log.jsonl").read_text() == base  # not made again


@pytest.mark.slow
def test_eight_devices_make_the_same_steps_as_one(
    finished: Path, adapting: list[str], tmp_path: Path
) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices, which tests/conftest.py asks for")
    arguments = ["--devices", "8", "--adapter", "lotr", "--output", str(tmp_path / "run")]
    assert finetune.main([*adapting, *arguments]) == 0
    one, eight = (
        read_losses(folder / "lotr" / "log.jsonl") for folder in (finished, tmp_path / "run")
    )
    for a, b in zip(one, eight, strict=True):  # sums in another order differ in the last bits
        assert a == pytest.approx(b, rel=2e-4)
