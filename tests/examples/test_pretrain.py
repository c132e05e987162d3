"""Whole runs of a few steps: what they leave behind, and that they go on to the last bit."""

import json
import logging
from pathlib import Path
import shlex
import shutil
import sys

from _optimizers import TUNED, choose
from flax import nnx
import jax
import optax
import orbax.checkpoint as ocp
import pretrain
import pytest

from lowrank_optax.models import Decoder, decoder_config
from tests.examples.interruptions import checkpoints_of, forget_end, interrupted, tear_log
from tests.examples.logs import read_losses

pytestmark = pytest.mark.slow


def test_run_leaves_logs_results_picture_and_checkpoints(finished: Path) -> None:
    for name in ("adamw", "galore"):
        losses = read_losses(finished / name / "log.jsonl")
        assert [r["step"] for r in losses if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in losses if "held_out_loss" in r] == [3, 6]
        assert losses[-1]["held_out_loss"] < losses[0]["loss"]
        assert checkpoints_of(finished / name) == {4, 6}
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((finished / "results.json").read_text())
    adamw, galore = results["adamw"], results["galore"]
    assert galore["optimizer_state_bytes"] < adamw["optimizer_state_bytes"]
    assert adamw["refresh_step_seconds"] is None
    assert galore["refresh_step_seconds"] > 0
    assert all(r["compiled_peak_bytes"] > r["optimizer_state_bytes"] for r in results.values())


def test_optimizers_start_from_the_same_weights_on_the_same_batch(finished: Path) -> None:
    first = [read_losses(finished / name / "log.jsonl")[:2] for name in ("adamw", "galore")]
    assert first[0][0] == pytest.approx(first[1][0], rel=1e-5)
    assert first[0][1] != pytest.approx(first[1][1], rel=1e-5)


def test_run_ends_with_table_paths_and_a_sample(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    assert pretrain.main(["--output", str(finished), "--resume"]) == 0  # nothing left to train
    out = capsys.readouterr().out
    for part in ("held-out loss", "optimizer state", "compiled peak", "tokens/s", "refresh"):
        assert part in out
    assert str(finished / "curves.png") in out
    assert "continues the held-out text" in out


def test_several_optimizers_are_named_either_way() -> None:
    for arguments in (["--compare", "sgd,adam", "lion"], ["--compare", "sgd", "adam,lion"]):
        assert pretrain.parse(arguments)[0]["optimizers"] == ("sgd", "adam", "lion")


@pytest.mark.bitwise  # the same program, which is lowered once more
def test_killed_and_stopped_run_goes_on_to_the_last_bit(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """AdamW was killed within step 5, while it wrote the log; GaLore before its first checkpoint,
    and then by Ctrl-C in step 3.
    """
    folder = tmp_path / "stopped"
    shutil.copytree(finished, folder)
    forget_end(folder, "adamw")
    tear_log(folder / "adamw" / "log.jsonl", 6)
    shutil.rmtree(folder / "galore")
    (folder / "galore").mkdir()
    (folder / "galore" / "log.jsonl").write_text('{"step": 1, "loss": 0.0, "seconds": 1.0}\n')
    with interrupted("galore", 3):
        assert pretrain.main(["--output", str(folder), "--resume"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert "galore  compiling a step" in lines
    command = shlex.split(lines[-1].partition("stopped and saved; to go on: ")[2])
    assert command == [sys.executable, sys.argv[0], "--output", str(folder), "--resume"]
    assert checkpoints_of(folder / "galore") == {2, 3}
    assert not (folder / "results.json").exists()
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    was, now = (json.loads((f / "results.json").read_text()) for f in (finished, folder))
    for name in ("adamw", "galore"):
        log = Path(name, "log.jsonl")
        assert read_losses(folder / log) == read_losses(finished / log)
        assert now[name]["sample"] == was[name]["sample"]


def test_accumulated_micro_batches_make_the_same_steps(
    finished: Path, flags: list[str], tmp_path: Path
) -> None:
    """Also where the batch might grow, with schedules by the text that was read."""
    common = [*flags, "--optimizer", "adamw", "--accumulate", "2"]
    adaptive = ["--batch-size", "adaptive", "--initial-batch-size", "8", "--max-batch-size", "8"]
    assert pretrain.main([*common, "--output", str(tmp_path / "fixed")]) == 0
    assert pretrain.main([*common, *adaptive, "--output", str(tmp_path / "adaptive")]) == 0
    logs = [read_losses(tmp_path / run / "adamw" / "log.jsonl") for run in ("fixed", "adaptive")]
    for fixed, growing in zip(*logs, strict=True):
        assert growing.pop("batch_size", 8) == 8
        assert fixed == pytest.approx(growing, rel=2e-4)
        assert ("noise_scale" in fixed) == ("loss" in fixed)
    _assert_close(finished / "adamw", tmp_path / "fixed" / "adamw")


@pytest.mark.parametrize("name", ["adamw", pytest.param("galore", marks=pytest.mark.full)])
def test_eight_devices_make_the_same_step_as_one(
    finished: Path, flags: list[str], tmp_path: Path, name: str
) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices, which tests/conftest.py asks for")
    options = ["--devices", "8", "--optimizer", name, "--output", str(tmp_path / "run")]
    options += ["--set", "rank=4", "refresh_every=2"] if name == "galore" else []
    assert pretrain.main([*flags, *options]) == 0
    _assert_close(finished / name, tmp_path / "run" / name)


def _assert_close(one: Path, other: Path) -> None:
    """Sums in another order differ in the last bits, which Adam's first steps enlarge."""
    for a, b in zip(read_losses(one / "log.jsonl"), read_losses(other / "log.jsonl"), strict=True):
        b.pop("noise_scale", None)  # what only micro-batches tell
        assert a == pytest.approx(b, rel=2e-4)


@pytest.mark.full  # by shapes below
def test_optimizers_of_optax_train(flags: list[str], tmp_path: Path) -> None:
    names = ["muon", "lbfgs", "momo", "schedule_free_adamw", "adafactor"]
    arguments = ["--compare", *names, "--steps", "2", "--output", str(tmp_path / "run")]
    assert pretrain.main([*flags, *arguments]) == 0
    for name in names:
        losses = read_losses(tmp_path / "run" / name / "log.jsonl")
        assert losses[1]["loss"] != losses[0]["loss"]
        assert losses[1]["loss"] < 6


@pytest.mark.full  # all optimizers; a run refuses what does not fit
def test_tuned_optimizers_and_those_of_optax_fit_the_model_by_shapes_alone(
    flags: list[str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pretrain.Settings(**pretrain.parse(flags)[0])
    corpus = pretrain.load_corpus(str(text), None, settings.sequence_length)
    # The gradient has the shapes of the parameters, whatever the loss is.
    norm = lambda params, *args, **options: optax.tree.norm(params)
    monkeypatch.setattr(pretrain, "mean_loss", norm)
    for name in [*TUNED, "muon", "lbfgs", "momo", "schedule_free_adamw", "adafactor"]:
        job = pretrain.prepare(choose([name], [], None)[0], corpus, settings, None)
        assert job.optimizer.name == name


@pytest.mark.full  # one is trained above, the others fit by shapes
def test_every_projected_optimizer_trains_by_name(flags: list[str], tmp_path: Path) -> None:
    names = ["fira", "online_subspace_descent", "dct_adamw", "apollo", "apollo_mini", "ldadam"]
    arguments = ["--compare", *names, "--steps", "3", "--output", str(tmp_path / "run")]
    assert pretrain.main([*flags, *arguments, "--set", "rank=4", "refresh_every=2"]) == 0
    for name in names:
        losses = read_losses(tmp_path / "run" / name / "log.jsonl")
        assert losses[-1]["held_out_loss"] < losses[0]["loss"] < 6


def test_bfloat16_and_remat_train_what_float32_does(
    finished: Path, flags: list[str], tmp_path: Path
) -> None:
    types = ["--dtype", "bfloat16", "--param-dtype", "bfloat16", "--remat"]
    arguments = ["--optimizer", "adamw", "--output", str(tmp_path / "run")]
    assert pretrain.main([*flags, *types, *arguments]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    full = json.loads((finished / "results.json").read_text())
    losses, full_losses = (
        read_losses(folder / "adamw" / "log.jsonl") for folder in (tmp_path / "run", finished)
    )
    assert losses[0]["loss"] == pytest.approx(full_losses[0]["loss"], rel=0.01)
    # Weights of 8 bits lose the smallest updates.
    held_out = full["adamw"]["held_out_loss"]
    assert results["adamw"]["held_out_loss"] == pytest.approx(held_out, rel=0.05)
    ratio = results["adamw"]["optimizer_state_bytes"] / full["adamw"]["optimizer_state_bytes"]
    assert ratio == pytest.approx(0.5, abs=0.01)


@pytest.mark.bitwise  # the same program, which is lowered once more
@pytest.mark.parametrize("rounding", [pytest.param(None, marks=pytest.mark.full), "stochastic"])
def test_fewer_bits_train_what_float32_does(
    rounding: str | None, finished: Path, flags: list[str], tmp_path: Path
) -> None:
    bits = ["--state-bits", "8"] + ([] if rounding is None else ["--rounding", rounding])
    arguments = ["--optimizer", "adamw", "--output", str(tmp_path / "run")]
    assert pretrain.main([*flags, *bits, *arguments]) == 0
    results, full = (
        json.loads((folder / "results.json").read_text())["adamw"]
        for folder in (tmp_path / "run", finished)
    )
    assert results["held_out_loss"] == pytest.approx(full["held_out_loss"], rel=0.05)
    assert results["optimizer_state_bytes"] < 0.9 * full["optimizer_state_bytes"]
    # And it goes on from an earlier checkpoint, codes and all, to the last bit.
    folder, losses = tmp_path / "run", read_losses(tmp_path / "run" / "adamw" / "log.jsonl")
    forget_end(folder, "adamw")
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    assert read_losses(folder / "adamw" / "log.jsonl") == losses


def test_checkpoint_gives_back_the_trained_model(finished: Path, config: Path) -> None:
    corpus = pretrain.load_corpus(
        json.loads((finished / "run.json").read_text())["settings"]["data"], None, 16
    )
    model = Decoder(decoder_config(config, vocab_size=corpus.vocab_size), rngs=nnx.Rngs(7))
    graphdef, params = nnx.split(model)
    with ocp.CheckpointManager((finished / "adamw" / "checkpoints").resolve()) as manager:
        like = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        trained = manager.restore(manager.latest_step(), args=like).params
    result = json.loads((finished / "results.json").read_text())["adamw"]
    assert list(pretrain.sample(nnx.merge(graphdef, trained), corpus, 0)) == result["sample"]
