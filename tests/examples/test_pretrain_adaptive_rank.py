"""Optimizers whose rank falls: memory is given back between steps, also in a resumed run."""

import json
from pathlib import Path
import shutil

from _compaction import compacted, has_adaptive_rank, state_bytes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pretrain
import pytest

import lowrank_optax as lro
from tests.examples.interruptions import forget_end
from tests.examples.logs import read_losses

FALLING = ["--optimizer", "adarankgrad", "--set", "rank=16", "refresh_every=2", "threshold=0.6"]


@pytest.fixture(scope="module")
def output(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run that gave memory back at its third step, and the lines it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(
            pretrain.Console, "print", lambda self, *parts, **_: lines.append(str(parts[:1]))
        )
        arguments = [*FALLING, "--compact-every", "3", "--output", str(folder)]
        assert pretrain.main([*flags, *arguments]) == 0
    return folder, lines


@pytest.mark.slow
def test_memory_of_ranks_that_fell_is_given_back_and_said(output: tuple[Path, list[str]]) -> None:
    folder, lines = output
    result = json.loads((folder / "results.json").read_text())["adarankgrad"]
    first, last = result["first_optimizer_state_bytes"], result["optimizer_state_bytes"]
    assert last < 0.8 * first
    said = [line for line in lines if "optimizer state:" in line]
    assert f"{first:,} -> " in said[0]
    assert f"-> {last:,} bytes" in said[-1]


@pytest.mark.slow
@pytest.mark.bitwise  # the same program, which is lowered once more
def test_run_killed_after_the_ranks_fell_goes_on_to_the_last_bit(
    output: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The checkpoint of step 4 holds smaller arrays than a new optimizer state."""
    finished, folder = output[0], tmp_path / "killed"
    shutil.copytree(finished, folder)
    forget_end(folder, "adarankgrad")
    assert pretrain.main(["--output", str(folder), "--resume"]) == 0
    log = Path("adarankgrad", "log.jsonl")
    assert read_losses(folder / log) == read_losses(finished / log)
    was, now = (json.loads((f / "results.json").read_text()) for f in (finished, folder))
    for key in ("optimizer_state_bytes", "first_optimizer_state_bytes", "held_out_loss", "sample"):
        assert now["adarankgrad"][key] == was["adarankgrad"][key]


@pytest.mark.full  # that cut states make the same steps, the tests of `compact` say
def test_giving_back_leaves_the_losses_close(
    output: tuple[Path, list[str]], flags: list[str], tmp_path: Path
) -> None:
    """Until a later refresh asks for a higher rank than is left, they are the same."""
    arguments = [*FALLING, "--compact-every", "100", "--output", str(tmp_path / "run")]
    assert pretrain.main([*flags, *arguments]) == 0
    whole, cut = (
        [r["loss"] for r in read_losses(f / "adarankgrad" / "log.jsonl") if "loss" in r]
        for f in (tmp_path / "run", output[0])
    )
    assert cut[:4] == pytest.approx(whole[:4], rel=1e-5)  # cut after step 3
    assert cut[4:] == pytest.approx(whole[4:], rel=0.05)
    result = json.loads((tmp_path / "run" / "results.json").read_text())["adarankgrad"]
    assert result["optimizer_state_bytes"] == result["first_optimizer_state_bytes"]


@pytest.mark.slow
def test_nothing_is_compiled_anew_where_no_rank_fell() -> None:
    tx = lro.adarankgrad(0.1, rank=2)
    params, low = {"kernel": jnp.eye(4, 8)}, {"kernel": jnp.ones((4, 8))}
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    state = init(params)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert has_adaptive_rank(state)
    assert compacted(state, device, print) is None  # no gradient yet
    state = update(params, state)[1]
    assert compacted(state, device, print) is None  # all directions count the same
    smaller = compacted(update(low, init(params))[1], device, print)
    assert state_bytes(smaller) < state_bytes(state)
    assert not has_adaptive_rank(jax.jit(optax.adam(0.1).init)(params))


@pytest.mark.slow
def test_state_is_restored_in_the_shapes_it_was_saved_with(tmp_path: Path) -> None:
    tx = lro.adarankgrad(0.1, rank=4)
    params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    first = jax.jit(tx.init)(params)
    smaller = lro.compact(jax.jit(tx.update)(params, first)[1])
    with ocp.CheckpointManager(tmp_path) as manager:
        pretrain.save(manager, 1, params, smaller, {"at": 3})
    with ocp.CheckpointManager(tmp_path) as manager:
        _, restored, position = pretrain.restore(manager, params, first)
    assert position == {"at": 3}
    assert jax.tree.structure(restored) == jax.tree.structure(smaller)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(smaller), strict=True):
        np.testing.assert_array_equal(a, b)
