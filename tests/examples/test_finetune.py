"""Whole fine-tunings of a few steps: what they leave, and that they go on to the last bit."""

import functools
import json
import logging
from pathlib import Path
import random
import shlex
import shutil
import sys
from unittest import mock

import _base_model
import _finished
from _recipes import RECIPES
import finetune
from flax import nnx
import jax
import jax.numpy as jnp
import pretrain
import pytest
import tokenizers

from lowrank_optax.models import load_huggingface
from tests.examples.interruptions import checkpoints_of, forget_end, interrupted, tear_log
from tests.examples.logs import read_losses

pytestmark = pytest.mark.slow

TRAINED = {"lora": 992, "full": 12_656}  # of the conftest's model, at rank 2


@pytest.fixture(scope="session")
def new_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words that the old text does not have."""
    path = tmp_path_factory.mktemp("new") / "text.txt"
    words = random.Random(1).choices(["LOREM", "IPSUM", "DOLOR", "SIT", "AMET"], k=2000)
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def adapting(finished: Path, new_text: Path) -> list[str]:
    """Flags of six steps on the new text, from a model of the pre-training example."""
    numbers = "--steps 6 --batch-size 8 --sequence-length 16 --eval-every 3 --eval-sequences 8"
    more = "--checkpoint-every 2 --devices 1 --rank 2"
    texts = ["--from", str(finished / "adamw"), "--data", str(new_text)]
    return [*texts, *numbers.split(), *more.split()]


@pytest.fixture(scope="module")
def adapted(adapting: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an adapter with dropout, and of all weights."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    compare = ["--compare", "lora,full", "--set", "lora.dropout=0.1"]
    assert finetune.main([*adapting, *compare, "--output", str(folder)]) == 0
    return folder


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_run_leaves_logs_results_picture_and_checkpoints(adapted: Path) -> None:
    for name in TRAINED:
        losses = read_losses(adapted / name / "log.jsonl")
        assert [r["step"] for r in losses if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in losses if "held_out_loss" in r] == [0, 3, 6]
        assert losses[-1]["held_out_loss"] < losses[0]["held_out_loss"]
        assert checkpoints_of(adapted / name) == {4, 6}
    assert (adapted / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_counts_bytes_and_losses(adapted: Path) -> None:
    results = _results(adapted)
    before = results.pop("before")
    for name, result in results.items():
        assert result["trained"] == TRAINED[name]
        # Adam's two moments, and a count or two.
        assert 0 <= result["optimizer_state_bytes"] - 8 * TRAINED[name] <= 16
        assert result["compiled_peak_bytes"] > result["optimizer_state_bytes"]
        assert result["old_text_loss"] > 0
        log = read_losses(adapted / name / "log.jsonl")
        assert log[0]["held_out_loss"] == pytest.approx(before["held_out_loss"], rel=1e-5)
        assert log[-1]["held_out_loss"] == result["held_out_loss"]


def test_every_adapter_starts_from_the_same_model_on_the_same_batch(adapted: Path) -> None:
    """With any dropout, for LoRA begins with a change of zero."""
    lora, full = (read_losses(adapted / name / "log.jsonl") for name in ("lora", "full"))
    for a, b in zip(lora[:2], full[:2], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_run_ends_with_table_paths_and_samples(
    adapted: Path, capsys: pytest.CaptureFixture
) -> None:
    assert finetune.main(["--output", str(adapted), "--resume"]) == 0  # nothing left to train
    out = capsys.readouterr().out
    for part in ("trained", "optimizer", "peak of", "held-out", "old text", "merged", "before"):
        assert part in out
    assert str(adapted / "curves.png") in out
    assert "continues the held-out text" in out


def test_saved_model_and_files_give_the_numbers_of_the_trained_one(
    adapted: Path, adapting: list[str]
) -> None:
    results = _results(adapted)
    for name in TRAINED:
        assert 0 <= results[name]["merged_difference"] < 1e-4
    assert 0 <= results["lora"]["peft_difference"] < 1e-4
    assert results["full"]["peft_difference"] is None
    # The merged model, as one to adapt in turn, has the loss that the table says.
    merged = _settings(["--hf", str(adapted / "lora" / "merged"), *adapting[2:]])
    base = finetune.find_base(merged)
    assert base.before is None
    graphdef, params = nnx.split(base.load())
    windows = jnp.asarray(pretrain.held_out_windows(base.text, merged.loop()))
    loss = jax.jit(functools.partial(pretrain.held_out_loss, graphdef=graphdef))(params, windows)
    assert float(loss) == pytest.approx(results["lora"]["held_out_loss"], rel=1e-5)


def _settings(flags: list[str]) -> finetune.FinetuneSettings:
    return finetune.FinetuneSettings(**finetune.parse(flags, tuple(RECIPES))[0])


def test_a_run_s_own_way_of_a_backward_pass_is_not_the_adapted_model_s(
    finished: Path, new_text: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run", ignore=lambda _, names: {"log.jsonl"} & {*names})
    run = json.loads((finished / "run.json").read_text())
    run["settings"] |= {"update_in_backward": True, "activation_bits": 4}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    source = ["--from", str(tmp_path / "run" / "adamw"), "--data", str(new_text)]
    numbers = ["--sequence-length", "16", "--devices", "1"]
    base = finetune.find_base(_settings([*source, *numbers, "--remat", "mlp_up=save"]))
    model = nnx.eval_shape(base.make)
    assert model.remat.table == {"mlp_up": "save"}
    assert model.blocks.mlp.activation_bits is None
    every = _settings([*source, *numbers, "--remat", "--remat-every", "2"])
    assert nnx.eval_shape(finetune.find_base(every).make).remat_every == 2


def test_saved_model_that_differs_beyond_rounding_is_an_error(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_huggingface(adapted / "full" / "merged")
    (chosen,) = finetune.choose(["full"], [], None, 2, None)
    load = _finished.load_huggingface

    def damaged(*args: object, **kwargs: object) -> nnx.Module:
        model = load(*args, **kwargs)
        model.norm.scale[...] *= 1.01
        return model

    monkeypatch.setattr(_finished, "load_huggingface", damaged)
    parts, tokens = finetune.take_apart(model, chosen), jnp.zeros((1, 16), jnp.int32)
    with pytest.raises(finetune.CheckError, match="the merged model differs from the trained one"):
        finetune.save_merged(parts, tmp_path / "merged", {}, tokens, adapted=False)


def test_failed_check_is_a_line_and_exit_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "prepare", mock.Mock(side_effect=finetune.CheckError("Damaged")))
    assert finetune.main(["--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "finetune.py: error: Damaged\n"


@pytest.mark.bitwise  # the same program, which is lowered once more
def test_killed_and_stopped_run_goes_on_to_the_last_bit(
    adapted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """LoRA was killed within step 5, while it wrote the log; the run of all weights before its
    first checkpoint, and then by Ctrl-C in step 3.
    """
    folder = tmp_path / "stopped"
    shutil.copytree(adapted, folder)
    forget_end(folder, "lora")
    (folder / "before.json").unlink()
    log = folder / "lora" / "log.jsonl"
    tear_log(log, 7)
    shutil.rmtree(folder / "full")
    (folder / "full").mkdir()
    (folder / "full" / "log.jsonl").write_text('{"step": 0, "held_out_loss": 9.0}\n')
    with interrupted("full", 3):
        assert finetune.main(["--output", str(folder), "--resume"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert "full  compiling a step" in lines
    command = shlex.split(lines[-1].partition("stopped and saved; to go on: ")[2])
    assert command == [sys.executable, sys.argv[0], "--output", str(folder), "--resume"]
    assert checkpoints_of(folder / "full") == {2, 3}
    assert not (folder / "results.json").exists()
    assert finetune.main(["--output", str(folder), "--resume"]) == 0
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    for name in TRAINED:
        log = Path(name, "log.jsonl")
        assert read_losses(folder / log) == read_losses(adapted / log)
    assert _figures(folder) == _figures(adapted)


def _figures(folder: Path) -> dict:
    """Results that are not times."""
    return {
        name: {k: v for k, v in result.items() if "second" not in k}
        for name, result in _results(folder).items()
    }


@pytest.mark.full  # loaded and looked at above
def test_merged_model_can_be_adapted_in_turn(
    adapted: Path, adapting: list[str], tmp_path: Path
) -> None:
    merged = ["--hf", str(adapted / "lora" / "merged"), *adapting[2:]]
    run = tmp_path / "run"
    assert finetune.main([*merged, "--adapter", "lora", "--output", str(run)]) == 0
    first, second = _results(adapted), _results(run)
    assert second["before"]["held_out_loss"] == pytest.approx(
        first["lora"]["held_out_loss"], rel=1e-5
    )
    assert second["before"]["old_text_loss"] is None
    config = json.loads((run / "lora" / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((adapted / "lora" / "merged").resolve())


def test_a_model_in_files_comes_with_its_name_and_tokenizer(
    config: Path, new_text: Path, tmp_path: Path
) -> None:
    content = json.loads(config.read_text()) | {"vocab_size": 300}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train([str(new_text)], tokenizers.trainers.BpeTrainer(show_progress=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    flags = ["--hf", str(tmp_path), "--data", str(new_text), "--sequence-length", "16"]
    base = finetune.find_base(_settings(flags))
    assert base.folder == tmp_path.resolve()
    expected = {path.name: path for path in tmp_path.iterdir() if path.name != "config.json"}
    assert base.tokenizer == expected
    other = tmp_path / "other.json"
    shutil.copy(tmp_path / "tokenizer.json", other)
    named = finetune.find_base(_settings([*flags, "--tokenizer", str(other)]))
    assert named.tokenizer == {"tokenizer.json": other}


def test_several_adapters_are_named_either_way() -> None:
    named = [["--compare", "lora,dora", "full"], ["--compare", "lora", "dora,full"]]
    for arguments in named:
        assert _settings(arguments).adapters == ("lora", "dora", "full")


@pytest.mark.full  # all recipes; a run refuses what does not fit
def test_every_recipe_fits_the_model_by_shapes_alone(adapting: list[str]) -> None:
    jobs = finetune.prepare(_settings([*adapting, "--compare", "all", "--set", "svfit.rank=4"]))
    assert [job.adapter.name for job in jobs] == list(RECIPES)


@pytest.mark.full  # two are trained above, the others fit by shapes
@pytest.mark.bitwise  # the same program, which is lowered once more
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


@pytest.mark.full  # the pre-training example does both in the standard tier
def test_without_logits_and_with_the_update_in_backward_steps_are_the_same(
    adapting: list[str], tmp_path: Path
) -> None:
    names = ("full", "lora", "lotr")
    adapting = [*adapting, "--compare", *names]
    options = {"plain": [], "in backward": ["--loss", "chunked", "--update-in-backward"]}
    for folder, more in options.items():
        assert finetune.main([*adapting, *more, "--output", str(tmp_path / folder)]) == 0
    for name in names:
        plain, found = (read_losses(tmp_path / x / name / "log.jsonl") for x in options)
        assert len(found) == len(plain)
        for ours, theirs in zip(found, plain, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.full
@pytest.mark.bitwise  # the same program, which is lowered once more
def test_dropout_in_backward_goes_on_with_the_keys_of_later_steps(
    adapting: list[str], tmp_path: Path
) -> None:
    options = ["--adapter", "lora", "--set", "dropout=0.5", "--update-in-backward"]
    for folder in ("whole", "stopped"):
        flags = [*adapting, *options, "--output", str(tmp_path / folder)]
        if folder == "stopped":
            with interrupted("lora", 3):
                assert finetune.main(flags) == 130
            flags = ["--output", str(tmp_path / folder), "--resume"]
        assert finetune.main(flags) == 0
    whole, stopped = (
        read_losses(tmp_path / folder / "lora" / "log.jsonl") for folder in ("whole", "stopped")
    )
    assert whole == stopped
    assert len({row["loss"] for row in whole if "loss" in row}) == 6


def test_equal_parameters_brings_counts_together(
    adapting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["--compare", "lora", "lotr", "lora_fa", "--equal-parameters"]
    monkeypatch.setattr(finetune, "check", lambda job: None)  # of steps
    counts = {}
    for job in finetune.prepare(_settings([*adapting, *names])):
        attached = lambda job=job: finetune.attach(job.base.make(), job.adapter, None, 0)
        parts = finetune.take_apart(nnx.eval_shape(attached), job.adapter)
        counts[job.adapter.name] = job.adapter.rank, finetune.parameter_count(parts.trained)
    assert counts["lora"] == (2, TRAINED["lora"])
    assert counts["lora_fa"][0] > 2
    for name in ("lotr", "lora_fa"):
        assert counts[name][1] == pytest.approx(TRAINED["lora"], rel=0.25)


def test_model_is_made_first_where_none_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come while it is made."""
    words = random.Random(2)
    sources = [
        (f"{i}.py", f'"""{words.choices("abc", k=99)}"""\nx = {words.choices("xyz", k=99)}\n')
        for i in range(8)
    ]
    monkeypatch.setattr(_base_model, "standard_library", lambda: sources)
    numbers = "--base-steps 4 --steps 2 --sequence-length 16 --eval-sequences 8 --devices 1"
    run = tmp_path / "run"
    flags = ["--model", str(config), *numbers.split(), "--adapter", "lora", "--output", str(run)]
    with interrupted("adamw", 2):
        assert finetune.main(flags) == 130
    assert checkpoints_of(run / "base") == {2}
    assert finetune.main(["--output", str(run), "--resume"]) == 0
    losses = [r for r in read_losses(run / "base" / "log.jsonl") if "loss" in r]
    assert [r["step"] for r in losses] == [1, 2, 3, 4]
    results = _results(run)
    assert results["before"]["old_text_loss"] < results["before"]["held_out_loss"]


@pytest.mark.full  # the pre-training example makes its steps on eight
def test_eight_devices_make_the_same_steps_as_one(
    adapted: Path, adapting: list[str], tmp_path: Path
) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices, which tests/conftest.py asks for")
    arguments = ["--devices", "8", "--adapter", "full", "--output", str(tmp_path / "run")]
    assert finetune.main([*adapting, *arguments]) == 0
    one, eight = (
        read_losses(folder / "full" / "log.jsonl") for folder in (adapted, tmp_path / "run")
    )
    for a, b in zip(one, eight, strict=True):  # sums in another order differ in the last bits
        assert a == pytest.approx(b, rel=2e-4)
