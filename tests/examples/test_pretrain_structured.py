"""Structured feed-forwards in the main job: guides that come and go, and runs that are resumed."""

import json
from pathlib import Path
import shutil

from _base_model import make_model
from _settings import InputError, Settings
from flax import nnx
import orbax.checkpoint as ocp
import pretrain
import pytest

from tests.examples.interruptions import forget_end, interrupted
from tests.examples.logs import read_losses

GUIDED = ["--feed-forward", "blockshuffle", "--self-guided", "--optimizer", "adamw"]


@pytest.fixture(scope="module")
def output(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, of which three have guides."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert pretrain.main([*flags, *GUIDED, "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_checkpoints_after_the_guided_phase_hold_no_guides(output: Path) -> None:
    losses = [r["loss"] for r in read_losses(output / "adamw" / "log.jsonl") if "loss" in r]
    assert losses[-1] < losses[0]
    handler = ocp.PyTreeCheckpointHandler()
    for item in ("4/params", "4/opt_state", "6/params"):
        assert "guide" not in str(handler.metadata(output / "adamw/checkpoints" / item).tree)
    settings = Settings(**json.loads((output / "run.json").read_text())["settings"])
    state = nnx.state(nnx.eval_shape(lambda: make_model(settings, 257)))
    assert "gate_up" in str(state["blocks"]["mlp"].keys())


@pytest.mark.full
@pytest.mark.bitwise  # the same programs, which are lowered once more
@pytest.mark.parametrize("left", [2, 4])
def test_killed_run_goes_on_in_its_phase(
    output: Path, flags: list[str], tmp_path: Path, left: int
) -> None:
    """Without guides from step 4, and with guides, whose draws are the same, from step 2."""
    folder = tmp_path / "killed"
    if left == 4:
        shutil.copytree(output, folder)
        forget_end(folder, "adamw")
    else:
        with interrupted("adamw", 3):
            assert pretrain.main([*flags, *GUIDED, "--output", str(folder)]) == 130
        saved = ocp.PyTreeCheckpointHandler().metadata(folder / "adamw/checkpoints/2/params")
        assert "guide" in str(saved.tree)
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    log = Path("adamw", "log.jsonl")
    assert read_losses(folder / log) == read_losses(output / log)


@pytest.mark.full
def test_adaptive_ranks_are_cut_after_the_guided_phase(flags: list[str], tmp_path: Path) -> None:
    """Step 2 has guides; a state that was cut there would not fit the one without them."""
    options = ["--optimizer", "adarankgrad", "--set", "rank=16", "refresh_every=2", "threshold=0.6"]
    folder = str(tmp_path / "run")
    arguments = [*flags, *GUIDED[:-2], *options, "--compact-every", "1", "--output", folder]
    assert pretrain.main(arguments) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())["adarankgrad"]
    assert result["optimizer_state_bytes"] < 0.8 * result["first_optimizer_state_bytes"]


REFUSED = [
    (["--self-guided"], "--self-guided needs --feed-forward NAME"),
    (["--feed-forward", "lowrank", "--self-guided", "0.1"], "give a step or more"),
    (["--feed-forward", "lowrank", "--self-guided", "1.5"], "at most 1"),
    (["--feed-forward", "monarch"], "invalid choice: 'monarch'"),
    ([*GUIDED, "--sketch", "0.5"], "--sketch cannot be drawn"),
    ([*GUIDED, "--update-in-backward"], "--update-in-backward computes blocks"),
    ([*GUIDED, "--batch-size", "adaptive"], "--self-guided counts steps"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**pretrain.parse(["--steps", "6", *options])[0])
