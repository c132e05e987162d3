"""What importing the package costs, and what its optax side needs."""

from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).resolve().parents[1]


def _python(program: str) -> str:
    """Output of a program in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_nothing_that_jax_and_optax_do_not() -> None:
    program = """
import sys, jax, optax
before = set(sys.modules)
import lowrank_optax
import jax._src.xla_bridge as bridge
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
own = {name for name in loaded if name not in sys.stdlib_module_names} - {"jax"}
print(sorted(own), bridge.backends_are_initialized())
"""
    assert _python(program) == "['lowrank_optax'] False"


def test_the_optax_side_works_where_flax_cannot_be_imported() -> None:
    program = """
import sys
sys.modules["flax"] = None
import jax, jax.numpy as jnp, optax
import lowrank_optax as lro
params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
tx = lro.galore(0.1, rank=2)
updates, state = jax.jit(tx.update)(params, tx.init(params), params)
table = lro.selection_table(params, transformation=tx)
print([row.rank for row in table.rows], lro.weight_dimension_numbers(params)["bias"])
"""
    assert _python(program) == "[None, 2] None"


def test_every_public_name_is_listed_once() -> None:
    program = """
import lowrank_optax as lro
assert len(set(lro.__all__)) == len(lro.__all__)
packages = {"kernels", "matrices", "optimizers", "projection", "quantization", "states"}
public = {n for n in vars(lro) if not n.startswith("_")} - packages
print(sorted(public - set(lro.__all__)), sorted(set(lro.__all__) - public))
"""
    assert _python(program) == "[] []"
