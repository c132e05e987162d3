"""The state is parallel trees of plain arrays whose types never change."""

import jax
import jax.numpy as jnp
import numpy as np

from harness.row import Row, make_step
from harness.trees import GRADIENTS, PARAMS, assert_same_types, at, cast, is_finite

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def check_state_is_arrays(row: Row) -> None:
    """No Python number, which would change its type at the first update."""
    for path, leaf in jax.tree.leaves_with_path(row.tx.init(PARAMS)):
        name = jax.tree_util.keystr(path)
        assert isinstance(leaf, jax.Array), f"{name} is a {type(leaf).__name__}"
        assert not leaf.weak_type, f"{name} has a weak type"


def check_state_is_parallel_trees(row: Row) -> None:
    """No container in the place of a parameter: `nnx.Optimizer` would lose its class."""
    state = jax.eval_shape(row.tx.init, PARAMS)
    for param_path, _ in jax.tree.leaves_with_path(PARAMS):
        for path, _ in jax.tree.leaves_with_path(state):
            starts = [i for i in range(len(path)) if path[i : i + len(param_path)] == param_path]
            for start in starts:
                assert len(path) == start + len(param_path), (
                    f"state{jax.tree_util.keystr(path)} lies inside the place of a parameter"
                )


def check_state_types_constant(row: Row) -> None:
    """In every dtype, and with float64 enabled."""
    for dtype in DTYPES:
        with jax.enable_x64(dtype == jnp.float64):
            _, state, (_, after, _) = row.types(dtype)
            assert_same_types(after, state)


def check_updates_keep_dtype(row: Row) -> None:
    """In every dtype, and with float64 enabled."""
    for dtype in DTYPES:
        with jax.enable_x64(dtype == jnp.float64):
            params, _, (_, _, updates) = row.types(dtype)
            assert_same_types(updates, params)


def check_mixed_dtypes_in_one_tree(row: Row) -> None:
    """Each leaf keeps its own dtype, and half precision stays finite."""
    names = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
    params, gradients = (
        {name: cast(tree["first"]["kernel"], dtype) for name, dtype in names.items()}
        for tree in (PARAMS, GRADIENTS)
    )
    updates = row.run(params, gradients)
    assert_same_types(updates, gradients)
    assert is_finite(updates)


def check_cond_between_old_and_new_state(row: Row) -> None:
    """A step left out by `lax.cond` inside `lax.scan` leaves no trace."""
    step = make_step(row.tx)
    state = row.tx.init(PARAMS)
    assert_same_types(jax.eval_shape(step, PARAMS, state, at(GRADIENTS, 0))[1], state)

    def body(carry: tuple, x: tuple) -> tuple:
        flag, gradients = x
        params, state = carry
        params, state, updates = jax.lax.cond(
            flag,
            lambda: step(params, state, gradients),
            lambda: (params, state, gradients),
        )
        return (params, state), updates

    flags = np.array([True, False, True, True])
    gradients = at(GRADIENTS, np.array([0, 1, 1, 2]))
    scan = jax.jit(lambda *args: jax.lax.scan(body, *args)[1])
    updates = scan((PARAMS, state), (flags, gradients))
    row.assert_close(at(updates, flags), at(row.trajectory, slice(3)))
