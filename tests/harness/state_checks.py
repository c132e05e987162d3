"""The state is parallel trees of plain arrays whose types never change."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core
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


def check_float64_is_kept(row: Row) -> None:
    """A step of float64 gradients rounds nothing to fewer bits on its way."""
    with jax.enable_x64(True):
        params, gradients = cast(PARAMS, jnp.float64), cast(at(GRADIENTS, 0), jnp.float64)
        program = jax.make_jaxpr(make_step(row.tx))(params, row.tx.init(params), gradients)
    narrow = set(_narrower_floats(program.jaxpr))
    assert not narrow, f"results in fewer bits: {', '.join(sorted(narrow))}"


def check_float32_is_kept_where_float64_is_enabled(row: Row) -> None:
    """Neither the state nor the updates of float32 gradients become float64."""
    params, state, _ = row.types(jnp.float32)
    with jax.enable_x64(True):
        step = make_step(row.tx)
        _, after, updates = jax.eval_shape(step, params, state, at(GRADIENTS, 0))
        assert_same_types(after, state)
        assert_same_types(updates, params)


def _narrower_floats(jaxpr: core.Jaxpr) -> Iterator[str]:
    """The operations with a result that is a float of less than 64 bits."""
    for equation in jaxpr.eqns:
        for x in equation.outvars:
            if jnp.issubdtype(x.aval.dtype, jnp.floating) and x.aval.dtype != jnp.float64:
                yield f"{equation.primitive.name} {x.aval.str_short()}"
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _narrower_floats(getattr(inner, "jaxpr", inner))


def _is_program(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


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
