"""Trees and gradients at the edge of what is allowed."""

import jax
import jax.numpy as jnp
import optax

from harness.row import Row, make_step, run
from harness.trees import (
    GRADIENTS,
    PARAMS,
    STEPS,
    assert_close,
    assert_same_types,
    at,
    is_finite,
    is_zero,
    normal,
    normal_like,
    poison,
    scale,
)


def check_non_finite_gradient_stays_in_its_leaf(row: Row) -> None:
    """It is seen in that leaf's update, as in optax, and in no other."""
    for value in (jnp.nan, jnp.inf):
        params, state, _ = row.step(PARAMS, row.tx.init(PARAMS), at(GRADIENTS, 0))
        _, _, updates = row.step(params, state, poison(at(GRADIENTS, 1), value))
        expected = at(row.trajectory, 1)
        assert not is_finite(updates["first"]["kernel"])
        assert_close(updates["first"]["bias"], expected["first"]["bias"])
        assert_close(updates["second"], expected["second"])


def check_non_finite_gradient_never_enters_a_basis(row: Row) -> None:
    """From the first step on, and for longer than a basis is kept."""
    for value in (jnp.nan, jnp.inf):
        for start in (0, 1):
            params, state = PARAMS, row.tx.init(PARAMS)
            for i in range(STEPS + start):
                gradients = at(GRADIENTS, i % STEPS)
                gradients = gradients if i < start else poison(gradients, value)
                _, state, _ = row.step(params, state, gradients)
                bases = [x for _, x in optax.tree.get_all_with_path(state, row.basis)]
                assert jax.tree.leaves(bases), f"no field {row.basis!r} in the state"
                assert is_finite(bases)


def check_zero_gradients(row: Row) -> None:
    """Finite updates, from the first step on and between others."""
    assert is_finite(row.run(PARAMS, scale(GRADIENTS, [0, 1, 1, 0, 1])))


def check_empty_tree(row: Row) -> None:
    for params in ({}, (), {"none": None}, {"masked": optax.MaskedNode()}):
        state = row.tx.init(params)
        updates, after = row.tx.update(params, state, params)
        assert updates == params
        assert_same_types(after, state)


def check_leaves_of_any_size(row: Row) -> None:
    """Scalars, empty leaves, holes, three axes, and matrices smaller than the rank."""
    shapes = {"scalar": (), "none": (0,), "no_rows": (0, 3), "no_columns": (3, 0), "vector": (2,)}
    shapes |= {"kernel": (2, 3), "row": (1, 3), "column": (3, 1), "cube": (2, 5, 2)}
    params = {name: normal(shape, 40) for name, shape in shapes.items()}
    params |= {"hole": None, "masked": optax.MaskedNode()}
    gradients = normal_like(params, 41, STEPS)
    tx = row.tx
    if "subspace" in row.kwargs:  # then it has the rank
        tx = row.make(subspace=row.kwargs["subspace"]._replace(rank=8))
    elif row.takes("rank"):
        tx = row.make(rank=8)
    updates = run(tx, params, gradients)
    assert_same_types(updates, gradients)
    assert is_finite(updates)
    for name in ("scalar", "vector", "kernel", "row", "column", "cube"):
        assert not is_zero(updates[name]), name


def check_tuple_and_list_parameters(row: Row) -> None:
    """Containers that could be taken for a leaf."""
    params, gradients = (
        (tree["first"]["bias"], [tree["first"]["kernel"], (tree["second"]["kernel"],)])
        for tree in (PARAMS, at(GRADIENTS, 0))
    )
    state = row.tx.init(params)
    after = jax.eval_shape(make_step(row.tx), params, state, gradients)
    assert_same_types(after, (params, state, gradients))
