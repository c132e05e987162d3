"""Runs that keep less for the backward pass: the same losses at first, and resumed to the bit."""

from pathlib import Path
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pretrain
import pytest

from tests.examples.logs import read_losses

SKETCH = ["--sketch", "0.25"]


@pytest.fixture(scope="module")
def plain(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What a run with everything kept logs."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    assert pretrain.main([*flags, "--optimizer", "adamw", "--output", str(folder)]) == 0
    return read_losses(folder / "adamw" / "log.jsonl")


@pytest.mark.parametrize(
    "options",
    [["--activation-bits", "4"], SKETCH, [*SKETCH, "--sketch-kind", "gaussian", "--remat"]],
    ids=lambda options: options[0][2:] + str(len(options)),
)
def test_first_loss_is_the_same_to_the_bit_and_the_run_learns_and_resumes(
    options: list[str], plain: list[dict], flags: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*options, "--optimizer", "adamw", "--output", str(folder)]
    assert pretrain.main([*flags, *arguments]) == 0
    log = folder / "adamw" / "log.jsonl"
    losses = read_losses(log)
    assert losses[0] == plain[0]  # the forward pass is exact
    assert losses[1]["loss"] != plain[1]["loss"]
    assert losses[-1]["held_out_loss"] == pytest.approx(plain[-1]["held_out_loss"], rel=0.1)
    # A process killed after step 4 goes on with the keys of steps 5 and 6.
    for name in ("results.json", "curves.png", "adamw/result.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adamw" / "checkpoints" / "6")
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    assert read_losses(log) == losses


def test_every_step_and_every_micro_batch_has_a_sketch_of_its_own(
    flags: list[str], text: Path
) -> None:
    settings = pretrain.Settings(**pretrain.parse([*flags, *SKETCH])[0])
    corpus = pretrain.load_corpus(str(text), None, settings.sequence_length)
    graphdef, params = nnx.split(pretrain.make_model(settings, corpus.vocab_size))
    tokens = jnp.asarray(corpus.train[: 2 * 17].reshape(1, 2, 17), jnp.int32)
    sketch = pretrain.make_sketch(settings)

    @jax.jit
    def gradient(key: jax.Array | None, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        _, found, noise = pretrain.loss_and_gradient(params, graphdef, tokens, sketch, key)
        vector = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(found)])
        return vector, None if noise is None else noise.variance

    keys = [pretrain.sketch_key(settings, step) for step in range(2)]
    first, second = (gradient(key, tokens)[0] for key in keys)
    assert bool((first != second).any())
    np.testing.assert_array_equal(gradient(keys[0], tokens)[0], first)
    # The same micro-batch twice: what differs is the sketch.
    twice = jnp.concatenate([tokens, tokens])
    assert gradient(keys[0], twice)[1] > 0.01 * jnp.sum(first**2)
    assert gradient(None, twice)[1] < 1e-6 * jnp.sum(first**2)
