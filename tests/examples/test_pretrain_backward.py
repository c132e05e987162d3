"""Runs that keep less for the backward pass: the same first loss, and resumed to the last bit."""

from collections.abc import Callable
import functools
from pathlib import Path
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pretrain
import pytest

from tests.examples.interruptions import forget_end
from tests.examples.logs import read_losses

SKETCH = ["--sketch", "0.25"]
GAUSSIAN = [*SKETCH, "--sketch-kind", "gaussian", "--remat"]


@pytest.fixture(scope="module")
def runs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a run of AdamW with the given options, once."""

    @functools.cache
    def run(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        arguments = [*options, "--optimizer", "adamw", "--output", str(folder)]
        assert pretrain.main([*flags, *arguments]) == 0
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--activation-bits", "4"], pytest.param(SKETCH, marks=pytest.mark.full), GAUSSIAN],
    ids=lambda options: options[0][2:] + str(len(options)),
)
def test_first_loss_is_the_same_and_the_run_learns(
    options: list[str], finished: Path, runs: Callable[..., Path]
) -> None:
    losses = read_losses(runs(*options) / "adamw" / "log.jsonl")
    plain = read_losses(finished / "adamw" / "log.jsonl")
    assert losses[0] == pytest.approx(plain[0], rel=1e-5)  # the forward pass is exact
    assert losses[1]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-4)
    assert losses[-1]["held_out_loss"] == pytest.approx(plain[-1]["held_out_loss"], rel=0.1)


@pytest.mark.slow
def test_without_logits_and_with_the_update_in_backward_steps_are_the_same(
    flags: list[str], finished: Path, tmp_path: Path
) -> None:
    options = ["--loss", "chunked", "--update-in-backward", "--accumulate", "2"]
    options += ["--optimizer", "galore", "--set", "rank=4", "refresh_every=2"]
    assert pretrain.main([*flags, *options, "--output", str(tmp_path / "run")]) == 0
    keys = ("step", "loss", "held_out_loss")
    found, plain = (
        [{k: r[k] for k in keys if k in r} for r in read_losses(folder / "galore" / "log.jsonl")]
        for folder in (tmp_path / "run", finished)
    )
    assert len(found) == len(plain)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.bitwise  # the same program, which is lowered once more
@pytest.mark.parametrize("options", [pytest.param(SKETCH, marks=pytest.mark.full), GAUSSIAN])
def test_killed_run_goes_on_with_the_keys_of_later_steps(
    options: list[str], runs: Callable[..., Path], tmp_path: Path
) -> None:
    finished, folder = runs(*options), tmp_path / "killed"
    shutil.copytree(finished, folder)
    forget_end(folder, "adamw")
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    log = Path("adamw", "log.jsonl")
    assert read_losses(folder / log) == read_losses(finished / log)


@pytest.mark.slow
def test_every_step_and_every_micro_batch_has_a_sketch_of_its_own(
    flags: list[str], text: Path
) -> None:
    settings = pretrain.Settings(**pretrain.parse([*flags, *SKETCH])[0])
    corpus = pretrain.load_corpus(str(text), None, settings.sequence_length)
    graphdef, params = nnx.split(pretrain.make_model(settings, corpus.vocab_size))
    tokens = corpus.train[: 2 * 17].reshape(1, 2, 17).astype(np.int32)
    twice = np.concatenate([tokens, tokens])  # the same micro-batch: what differs is the sketch
    sketch = pretrain.make_sketch(settings)

    @jax.jit
    def gradient(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, found, noise = pretrain.loss_and_gradient(params, graphdef, twice, sketch, key)
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(found)]), noise.variance

    keys = [pretrain.step_key(settings, step) for step in range(2)]
    (first, variance), (second, _) = (jax.device_get(gradient(key)) for key in keys)
    assert np.linalg.norm(first - second) > 0.01 * np.linalg.norm(first)
    np.testing.assert_array_equal(gradient(keys[0])[0], first)
    assert variance > 0.01 * np.sum(first**2)
