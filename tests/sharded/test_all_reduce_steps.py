"""Steps with a real all-reduce on eight CPU devices end, whatever rule finds the subspaces."""

import os
from pathlib import Path
import subprocess
import sys

import pytest
from sharded.all_reduce_steps import RULES

import lowrank_optax as lro

PROGRAM = Path(__file__).with_name("all_reduce_steps.py")
SECONDS = 300  # it takes 20 on a busy machine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leaves", "optimized"), [(1, False), pytest.param(3, True, marks=pytest.mark.full)]
)
def test_steps_of_every_rule_end(
    leaves: int, optimized: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rules = {name for name in lro.subspaces.__all__ if name.islower()} - {"from_basis"}
    assert {name.split(",")[0] for name in RULES} == rules
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "jax_compilations"),
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    if optimized:
        del environment["JAX_DISABLE_MOST_OPTIMIZATIONS"], environment["XLA_FLAGS"]
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(leaves)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.stdout.split("\n")[-2:] == ["done", ""], ran.stdout + ran.stderr
