"""Where the moments are in the state of an optax transformation: by the names of its fields."""

from typing import Any, Literal

import jax

# Names of moments in the states of optax and its kin.
FIRST_MOMENTS = ("mu", "m", "m1", "m2", "trace", "ema", "exp_avg", "momentum")
SECOND_MOMENTS = ("nu", "v", "exp_avg_sq", "sum_of_squares")
# Further averages of squares, which no basis may rotate.
SQUARES = ("nu_max", "v_row", "v_col", "accumulator")

Kind = Literal["signed", "unsigned"]


def field(path: Any) -> str:
    """The name of the last key of a path; empty if it has none."""
    last = path[-1] if path else None
    return getattr(last, "name", None) or str(getattr(last, "key", ""))


def moment_kinds(state: Any) -> list[Kind | None]:
    """For each leaf of a state: whether it is a signed moment, an unsigned one of squares, or None.

    Goes by the outermost field of a NamedTuple or dataclass that has a moment's name: what lies
    below it are names of parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from lowrank_optax.states.moment_names import moment_kinds
      >>> moment_kinds(optax.adam(1e-3).init({"v": jnp.ones(2)}))
      [None, 'signed', 'unsigned']
    """
    is_field = lambda key: isinstance(key, jax.tree_util.GetAttrKey)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    fields = {path[: i + 1] for path in paths for i, key in enumerate(path) if is_field(key)}

    def kind(path: Any) -> Kind | None:
        for i, key in enumerate(path):
            name = key.name if is_field(key) else None
            has_field = lambda other, i=i: (*path[:i], jax.tree_util.GetAttrKey(other)) in fields
            # Adan's v is a difference of gradients, and its n the average of squares.
            if name == "v" and has_field("n"):
                return "signed"
            if name in SECOND_MOMENTS + SQUARES or (name == "n" and has_field("v")):
                return "unsigned"
            if name in FIRST_MOMENTS:
                return "signed"
        return None

    return list(map(kind, paths))
