"""No unstable or private interface of JAX and Flax is used outside of `lowrank_optax.compat`."""

from pathlib import Path
import re

PACKAGE = Path(__file__).resolve().parents[2] / "lowrank_optax"
PRIVATE = re.compile(
    r"""
    jax\.(extend|interpreters|_src) | from\ jax\ import\ .*\b(extend|interpreters)\b
    | jax\.experimental\.(layout|xla_metadata) | set_xla_metadata
    | \.primitive\b | \b(equation|eqn)\.(params|source_info)\b | \.source_info\b
    | __setattr__\(\w+,\ "__class__" | \.__class__\ =
    | flax\.(nnx\.(statelib|graph|pytreelib|variablelib)|linen\.(transforms|module)) | _parent_ref
    | _graph_node_flatten | _pytree__flatten
    """,
    re.X,
)


def test_private_interfaces_are_used_in_compat_alone() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "compat"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert not found, "move to lowrank_optax/compat:\n" + "\n".join(found)
