"""Other layers in the main job: it trains, goes on where it was stopped to the last bit, writes."""

import functools
import json
from pathlib import Path
import re
import shutil

from _base_model import find_base
from _finetune_settings import FinetuneSettings
from _settings import InputError
from flax import nnx
import jax
import pretrain
import pytest

from tests.examples.logs import read_losses

pytestmark = pytest.mark.slow


MAESTRO = ["--linear", "maestro", "--rank-penalty", "20"]
WIDENET = ["--share-blocks", "--experts", "4"]
LINEAR_TIME = ["--attention", "random-features", "--position", "comrope"]
LAYERS = [["--fixed-point", "8"], MAESTRO, [*WIDENET, *LINEAR_TIME]]


@pytest.mark.bitwise  # the same program, which is lowered once more
@pytest.mark.parametrize("layers", LAYERS, ids=lambda x: x[0])
def test_run_trains_and_goes_on_to_the_last_bit(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, layers: list[str]
) -> None:
    arguments = [*flags, *layers, "--optimizer", "adamw"]
    folder = tmp_path / "run"
    assert pretrain.main([*arguments, "--output", str(folder)]) == 0
    whole = json.loads((folder / "adamw" / "result.json").read_text())
    losses = read_losses(folder / "adamw" / "log.jsonl")
    assert losses[-2]["loss"] < losses[0]["loss"]
    said = re.findall(
        r"cut to these ranks: ([\d,]+) -> ([\d,]+) parameters", capsys.readouterr().out
    )
    assert len(said) == (layers is MAESTRO)
    for before, after in said:
        assert int(after.replace(",", "")) < 0.75 * int(before.replace(",", ""))
    # As if it had been killed after the checkpoint of step 4.
    (folder / "adamw" / "result.json").unlink()
    shutil.rmtree(folder / "adamw" / "checkpoints" / "6")
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    again = json.loads((folder / "adamw" / "result.json").read_text())
    assert read_losses(folder / "adamw" / "log.jsonl") == losses
    assert again["sample"] == whole["sample"]
    assert len(whole["sample"][1]) > 0
    if layers[:3] == WIDENET:
        looks = [record for record in losses if "held_out_loss" in record]
        assert all(0 < record["largest_load"] <= 0.5 for record in looks)
        assert whole["routing"]["dropped_choices"] == looks[-1]["dropped_choices"] < 0.5
    if layers is MAESTRO:
        check_that_finetune_finds_it(folder, flags[flags.index("--data") + 1], losses[-1])
    if layers[:3] == WIDENET:
        with pytest.raises(InputError, match="its model has --attention, and what is fine-tuned"):
            find_base(FinetuneSettings(source=str(folder)))


def check_that_finetune_finds_it(folder: Path, text: str, last: dict) -> None:
    """The model to adapt has the shapes that flags are checked with, and the run's last loss."""
    sizes = {"sequence_length": 16, "batch_size": 8, "eval_sequences": 8}
    settings = FinetuneSettings(source=str(folder), data=text, **sizes)
    base = find_base(settings)
    graphdef, params = nnx.split(base.load())
    assert graphdef == nnx.split(nnx.eval_shape(base.make))[0]
    windows = pretrain.held_out_windows(base.text, settings.loop())
    loss = jax.jit(functools.partial(pretrain.held_out_loss, graphdef=graphdef))(params, windows)
    assert float(loss) == pytest.approx(last["held_out_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fixed-point", "1"], "--fixed-point must be 2 to 24 in float32, not 1"),
        (
            ["--fixed-point", "10", "--dtype", "bfloat16"],
            "--fixed-point must be 2 to 9 in bfloat16, not 10",
        ),
        (["--fixed-point", "8", "--sketch", "0.5"], "--sketch: leave one out"),
        (["--fixed-point", "8", "--feed-forward", "lowrank"], "--feed-forward out"),
        (["--rank-threshold", "1e-3"], "--rank-threshold needs --linear maestro"),
        ([*MAESTRO, "--rank-threshold", "-1"], "--rank-threshold must be finite"),
        ([*MAESTRO, "--update-in-backward"], "--update-in-backward computes blocks without"),
        ([*MAESTRO, "--fixed-point", "8"], "leave it or --linear out"),
        (["--experts", "0"], "--experts must be at least 1, not 0"),
        ([*WIDENET, "--feed-forward", "lowrank"], "leave it or --share-blocks out"),
        (["--experts", "4", "--sketch", "0.5"], "leave it or --experts out"),
        (
            [*MAESTRO, "--optimizer", "adafactor", "--set", "learning_rate=None"],
            "--rank-penalty needs --learning-rate",
        ),
    ],
)
def test_flags_that_are_refused(
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    more: list[str],
    message: str,
) -> None:
    assert pretrain.main([*flags, *more, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
