"""Batch sizes that follow the noise of the gradient: on the same text, also in a resumed run."""

import json
from pathlib import Path
import shutil
from typing import Any

from _batch_size import Feed, make_controller
from _settings import InputError, Settings
import jax.numpy as jnp
import numpy as np
import pretrain
import pytest

from lowrank_optax.training import GradientNoise
from tests.examples.interruptions import forget_end
from tests.examples.logs import read_losses

pytestmark = pytest.mark.slow

ADAPTIVE = ["--batch-size", "adaptive", "--initial-batch-size", "4", "--max-batch-size", "6"]
STEPS = 21


def losses_of(folder: Path) -> list[dict]:
    return [r for r in read_losses(folder / "adamw" / "log.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], str]:
    """A finished run that grew, the sizes it compiled a step for, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    compiled, lines, compile_step = [], [], pretrain.compile_step

    def counted(job: Any, graphdef: Any, params: Any, opt_state: Any, tokens: Any, *rest: Any):
        compiled.append(tokens.shape[0] * tokens.shape[1])
        return compile_step(job, graphdef, params, opt_state, tokens, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "compile_step", counted)
        patch.setattr(
            pretrain.Console, "print", lambda self, *parts, **_: lines.append(str(parts[:1]))
        )
        arguments = ["--optimizer", "adamw", "--steps", str(STEPS), "--eta", "0.2"]
        assert pretrain.main([*flags, *ADAPTIVE, *arguments, "--output", str(folder)]) == 0
    return folder, compiled, "\n".join(lines)


def test_batch_grows_within_its_bounds_and_the_budget_of_text_is_kept(run: Any) -> None:
    records = losses_of(run[0])
    sizes = [r["batch_size"] for r in records]
    assert sizes[0] == 4
    assert set(sizes[:-1]) <= {4, 6}
    assert max(sizes) == 6
    assert sizes[:-1] == sorted(sizes[:-1])  # the last step takes what is left
    assert sum(sizes) == STEPS * 4
    assert len(sizes) < STEPS
    assert all(r["noise_scale"] is None or r["noise_scale"] > 0 for r in records)
    assert any(r["noise_scale"] for r in records)


def test_each_size_is_compiled_once(run: Any) -> None:
    assert run[1] == sorted(set(run[1][:-1])) + run[1][-1:]
    assert set(run[1]) == {r["batch_size"] for r in losses_of(run[0])}


def test_looks_and_checkpoints_are_due_by_the_text_that_was_read(run: Any) -> None:
    ends = np.cumsum([r["batch_size"] for r in losses_of(run[0])])
    due = [
        i for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False), 1) if a // 12 < b // 12
    ]
    looks = [r["step"] for r in read_losses(run[0] / "adamw" / "log.jsonl") if len(r) == 2]
    assert looks == sorted({*due, len(ends)})


def test_report_has_steps_sizes_and_noise(run: Any) -> None:
    result = json.loads((run[0] / "results.json").read_text())["adamw"]
    records = losses_of(run[0])
    assert result["steps"] == len(records)
    assert result["batch_size"] == records[-1]["batch_size"]
    assert result["noise_scale"] == records[-1]["noise_scale"]
    assert result["tokens_per_second"] > 0
    assert "batch 6" in run[2]
    assert (run[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.bitwise  # the same program, which is lowered once more
def test_killed_run_goes_on_to_the_last_bit(run: Any, tmp_path: Path) -> None:
    finished, folder = run[0], tmp_path / "killed"
    shutil.copytree(finished, folder)
    forget_end(folder, "adamw")
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    log = Path("adamw", "log.jsonl")
    assert read_losses(folder / log) == read_losses(finished / log)
    was, now = (json.loads((f / "results.json").read_text())["adamw"] for f in (finished, folder))
    assert now["sample"] == was["sample"]


def test_learning_rate_falls_with_the_text_that_was_read(flags: list[str], tmp_path: Path) -> None:
    """Steps of SGD are as long as the schedule says at the place in the text."""
    settings = Settings(**pretrain.parse([*flags, *ADAPTIVE, "--warmup", "0"])[0])
    corpus = pretrain.load_corpus(settings.data, None, settings.sequence_length)
    chosen = pretrain.choose(["sgd"], [], 0.5)[0]
    job = pretrain.prepare(chosen, corpus, settings, pretrain.make_mesh(settings))
    graphdef, params = pretrain.nnx.split(pretrain.make_model(settings, corpus.vocab_size))
    feed = Feed(corpus, settings)
    tokens = jnp.asarray(feed.next())
    lengths, step = [], None
    before = [np.array(x) for x in pretrain.jax.tree.leaves(params)]
    for done in (0.0, 3.0, 6.0):
        copied = pretrain.jax.tree.map(jnp.copy, params)
        state = job.make_tx(job.schedule, graphdef, copied).init(copied)
        arguments = copied, state, tokens, None, None, jnp.float32(done)  # no key, no guides
        step = step or pretrain.compile_step(job, graphdef, *arguments)[0]
        after = pretrain.jax.tree.leaves(step(*arguments)[0])
        moved = [np.sum((a - b) ** 2) for a, b in zip(after, before, strict=True)]
        lengths.append(np.sum(moved) ** 0.5)
    rates = [job.schedule(done) for done in (0.0, 3.0, 6.0)]
    np.testing.assert_allclose(
        np.array(lengths) / lengths[0], np.array(rates) / rates[0], rtol=1e-3
    )
    assert rates[2] < 0.2 * rates[0]


def test_feed_reads_the_same_text_whatever_the_sizes(text: Path) -> None:
    """And goes on from a position with the same sizes and text."""
    settings = Settings(
        data=str(text),
        batch_size="adaptive",
        sequence_length=16,
        steps=40,
        max_batch_size=32,
        eta=0.5,
    )
    corpus = pretrain.load_corpus(str(text), None, 16)

    def read(feed: Feed, noises: list[float]) -> list[np.ndarray]:
        parts = []
        for variance in noises:
            if feed.finished:
                break
            parts.append(feed.next())
            numbers = [jnp.float32(x) for x in (1.0, variance, feed.size)]
            feed.take(GradientNoise(*numbers))
        return parts

    fixed, growing = Feed(corpus, settings), Feed(corpus, settings)
    calm = read(fixed, [0.0] * 50)
    first = read(growing, [0.0] * 9 + [30.0] * 6)
    position = json.loads(json.dumps(growing.position()))
    rest = read(growing, [90.0] * 40)
    assert len(calm) == 40
    assert len(first[0]) < len(first[-1]) < len(rest[-2])
    assert growing.done == fixed.done == 40
    flat = lambda parts: np.concatenate([p.reshape(-1, 17) for p in parts])
    np.testing.assert_array_equal(flat(calm), flat([*first, *rest]))
    again = Feed(corpus, settings)
    again.go_to(position)
    for a, b in zip(read(again, [90.0] * 40), rest, strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.figures() == growing.figures()


def test_one_micro_batch_has_no_controller_and_several_have() -> None:
    assert make_controller(Settings()) is None
    fixed = make_controller(Settings(accumulate=2))
    assert fixed is not None
    assert fixed.sizes == (8,)
    assert make_controller(Settings(batch_size="adaptive")).sizes == (8, 16, 32, 64, 128)


def test_impossible_batch_sizes_are_refused(flags: list[str], capsys: Any, tmp_path: Path) -> None:
    for wrong, said in {
        ("--batch-size", "many"): "--batch-size: invalid number or 'adaptive' value: 'many'",
        ("--batch-size", "0"): "--batch-size must be at least 1, not 0",
        ("--eta", "1"): "--eta must be between 0 and 1, not 1.0",
        ("--initial-batch-size", "256"): "--max-batch-size 128 is below --initial-batch-size 256",
        ("--batch-size", "adaptive", "--initial-batch-size", "3"): "make it a multiple of 2",
    }.items():
        assert pretrain.main([*flags, *wrong, "--output", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--initial-batch-size must be at least 1"):
        Settings(initial_batch_size=0)
