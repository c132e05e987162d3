"""What importing the package costs, and what its optax side needs."""

import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _python(program: str) -> str:
    """Output of a program in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What importing the package does in a fresh interpreter."""
    program = """
import json, sys, jax, optax
before = set(sys.modules)
import lowrank_optax as lro
import jax._src.xla_bridge as bridge
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
packages = {"compat", "kernels", "matrices", "modules", "optimizers", "projection", "quantization",
            "slices", "states", "storage"}
print(json.dumps({
    "loaded": [name for name in loaded if name not in sys.stdlib_module_names and name != "jax"],
    "initialized": bridge.backends_are_initialized(),
    "listed": lro.__all__,
    "public": [name for name in vars(lro) if not name.startswith("_") and name not in packages],
}))
"""
    return json.loads(_python(program))


@pytest.mark.slow
def test_importing_loads_nothing_that_jax_and_optax_do_not(imported: dict[str, Any]) -> None:
    assert imported["loaded"] == ["lowrank_optax"]
    assert not imported["initialized"]


@pytest.mark.slow
def test_the_optax_side_works_where_flax_cannot_be_imported() -> None:
    program = """
import sys
sys.modules["flax"] = None
import jax, jax.numpy as jnp, optax
import lowrank_optax as lro
params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
tx = lro.galore(0.1, rank=2)
jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)
table = lro.selection_table(params, transformation=tx)
print([row.rank for row in table.rows], lro.weight_dimension_numbers(params)["bias"])
"""
    assert _python(program) == "[None, 2] None"


def test_every_public_name_is_listed_once(imported: dict[str, Any]) -> None:
    assert sorted(imported["listed"]) == sorted(imported["public"])
