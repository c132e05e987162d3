"""A transformation works inside optax's wrappers as optax's own do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness.row import Row, make_step, run
from harness.trees import (
    GRADIENTS,
    PARAMS,
    STEPS,
    Tree,
    assert_equal,
    assert_same_types,
    at,
    cast,
    is_finite,
    is_zero,
    poison,
    scale,
)


def is_kernel(path: tuple[Any, ...]) -> bool:
    return "kernel" in jax.tree_util.keystr(path)


def kernels(tree: Tree) -> Tree:
    """The tree without its biases."""
    return {layer: {"kernel": leaves["kernel"]} for layer, leaves in tree.items()}


def kernels_mask(tree: Tree) -> Tree:
    return jax.tree.map_with_path(lambda path, _: is_kernel(path), tree)


def labels(tree: Tree) -> Tree:
    return jax.tree.map_with_path(lambda path, _: "train" if is_kernel(path) else "hold", tree)


def check_masked(row: Row) -> None:
    """The chosen leaves as if alone, the others untouched."""
    updates = run(optax.masked(row.tx, kernels_mask), PARAMS, GRADIENTS)
    row.assert_close(kernels(updates), row.run(kernels(PARAMS), kernels(GRADIENTS)))
    assert_equal(updates["first"]["bias"], GRADIENTS["first"]["bias"])


def check_partition(row: Row) -> None:
    """The chosen leaves as if alone, the others frozen."""
    tx = optax.partition({"train": row.tx, "hold": optax.set_to_zero()}, labels)
    updates = run(tx, PARAMS, GRADIENTS)
    row.assert_close(kernels(updates), row.run(kernels(PARAMS), kernels(GRADIENTS)))
    assert is_zero(updates["first"]["bias"])


def check_dimension_numbers_as_tree_or_function(row: Row) -> None:
    """A tree with None, and a function under `partition`, choose the same matrices."""
    spec = optax.contrib.MuonDimensionNumbers(0, 1)
    prefix = {"first": {"bias": None, "kernel": spec}, "second": spec}
    by_prefix = row.make(weight_dimension_numbers=prefix)
    row.assert_close(run(by_prefix, PARAMS, GRADIENTS), row.trajectory)

    def function(params: Tree) -> Tree:
        is_hole = lambda x: isinstance(x, optax.MaskedNode)
        return jax.tree.map(lambda x: x if is_hole(x) else spec, params, is_leaf=is_hole)

    by_function = row.make(weight_dimension_numbers=function)
    tx = optax.partition({"train": by_function, "hold": optax.set_to_zero()}, labels)
    updates = run(tx, PARAMS, GRADIENTS)
    row.assert_close(kernels(updates), row.run(kernels(PARAMS), kernels(GRADIENTS)))


def check_inject_hyperparams(row: Row) -> None:
    tx = optax.inject_hyperparams(row.factory, row.static_args)(**row.kwargs)
    row.assert_close(run(tx, PARAMS, GRADIENTS), row.trajectory)


def check_inject_hyperparams_in_bfloat16(row: Row) -> None:
    """With float32 hyper-parameters nothing changes its dtype and nothing overflows."""
    inject = optax.inject_hyperparams(row.factory, row.static_args, jnp.float32)
    tx = inject(**row.kwargs)
    params, gradients = cast(PARAMS, jnp.bfloat16), cast(GRADIENTS, jnp.bfloat16)
    state = tx.init(params)
    after = jax.eval_shape(make_step(tx), params, state, at(gradients, 0))
    assert_same_types(after[1], state)
    updates = run(tx, params, gradients)
    assert_same_types(updates, gradients)
    assert is_finite(updates)


def check_multi_steps(row: Row) -> None:
    """Nothing for an accumulated gradient, then the update for the average."""
    tx = optax.MultiSteps(row.tx, 2).gradient_transformation()
    micro = scale(at(GRADIENTS, np.arange(STEPS).repeat(2)), [0.5, 1.5] * STEPS)
    updates = run(tx, PARAMS, micro)
    assert is_zero(at(updates, slice(0, None, 2)))
    row.assert_close(at(updates, slice(1, None, 2)), row.trajectory)
    for dtype in (jnp.bfloat16, jnp.float16):
        params = cast(PARAMS, dtype)
        args = params, tx.init(params), cast(at(GRADIENTS, 0), dtype)
        assert_same_types(jax.eval_shape(make_step(tx), *args), args)


def check_chain_and_named_chain(row: Row) -> None:
    """Between others that together change nothing; the state is found under its name."""
    halve = optax.chain(optax.clip_by_global_norm(1e6), optax.scale(0.5))
    tx = optax.named_chain(("inner", optax.chain(row.tx, halve)), ("double", optax.scale(2.0)))
    assert_same_types(tx.init(PARAMS)["inner"][0], row.tx.init(PARAMS))
    row.assert_close(run(tx, PARAMS, GRADIENTS), row.trajectory)


def check_apply_if_finite(row: Row) -> None:
    """After a step with a NaN: as if there had been no such step."""
    tx = optax.apply_if_finite(row.tx, 3)
    order = np.array([0, 1, 1, *range(2, STEPS)])
    gradients = poison(at(GRADIENTS, order), jnp.nan, (1, 0, 0))
    updates = run(tx, PARAMS, gradients)
    assert is_zero(at(updates, 1))
    row.assert_close(at(updates, np.arange(len(order)) != 1), row.trajectory)


def check_wrappers_in_each_other(row: Row) -> None:
    """All of the wrappers above around one step, with accumulation and a NaN on the way."""
    inner = optax.inject_hyperparams(row.factory, row.static_args)(**row.kwargs)
    halve = optax.chain(optax.clip_by_global_norm(1e6), optax.scale(0.5))
    tx = optax.named_chain(("inner", optax.chain(inner, halve)), ("double", optax.scale(2.0)))
    tx = optax.partition({"train": tx, "hold": optax.set_to_zero()}, labels)
    tx = optax.apply_if_finite(optax.MultiSteps(tx, 2).gradient_transformation(), 3)
    order = np.array([0, 1, *range(1, 2 * STEPS)])  # the second micro-batch comes poisoned first
    micro = scale(at(GRADIENTS, order // 2), np.where(order % 2, 1.5, 0.5))
    micro = poison(micro, jnp.nan, (1, 0, 0))
    updates = run(tx, PARAMS, micro)
    is_last = (order % 2 == 1) & (np.arange(len(order)) != 1)
    expected = row.run(kernels(PARAMS), kernels(GRADIENTS))
    row.assert_close(kernels(at(updates, is_last)), expected)
    assert is_zero(at(updates, ~is_last))
    assert is_zero(updates["first"]["bias"])


def check_map_params(row: Row) -> None:
    """Also proves that `init` takes a tree without leaves."""
    for tx in (row.tx, optax.masked(row.tx, kernels_mask)):
        state = tx.init(PARAMS)
        is_leaf = lambda x: isinstance(x, optax.MaskedNode)
        assert_equal(optax.tree.map_params(tx, lambda x: x, state, is_leaf=is_leaf), state)


def check_learning_rate_schedule(row: Row) -> None:
    """A schedule follows the constant rate as long as it is constant, and not after."""
    held = 2
    schedule = optax.piecewise_constant_schedule(row.kwargs["learning_rate"], {held: 0.5})
    updates = run(row.make(learning_rate=schedule), PARAMS, GRADIENTS)
    row.assert_close(at(updates, slice(held)), at(row.trajectory, slice(held)))
    for after, constant in zip(
        *(jax.tree.leaves(at(x, held)) for x in (updates, row.trajectory)), strict=True
    ):
        assert not np.allclose(after, constant, rtol=1e-2)
