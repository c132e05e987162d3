"""A transformation works in `nnx.Optimizer`, and Orbax saves its state."""

from pathlib import Path
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from harness.row import Row
from harness.trees import (
    GRADIENTS,
    PARAMS,
    STEPS,
    Tree,
    assert_close,
    assert_equal,
    at,
    stack,
)


class Model(nnx.Module):
    """A network whose parameters have the tree `PARAMS`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 4, rngs=rngs)
        self.second = nnx.Linear(4, 5, use_bias=False, rngs=rngs)


def make_optimizer(row: Row) -> tuple[Model, nnx.Optimizer]:
    model = Model(nnx.Rngs(0))
    nnx.update(model, PARAMS)
    return model, nnx.Optimizer(model, row.tx, wrt=nnx.Param)


def as_state(model: Model, tree: Tree) -> nnx.State:
    """The tree as `nnx.grad` would return it: arrays inside Variables."""
    state = nnx.state(model, nnx.Param)
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(tree))


def update(model: Model, optimizer: nnx.Optimizer, gradients: nnx.State) -> Tree:
    return nnx.to_pure_dict(optimizer.update(model, gradients))


def check_nnx_optimizer(row: Row) -> None:
    """Eager, and under `nnx.jit`, the same updates and parameters as on the pure tree."""
    for step, count in ((update, 2), (nnx.jit(update), STEPS)):
        model, optimizer = make_optimizer(row)
        gradients = [as_state(model, at(GRADIENTS, i)) for i in range(count)]
        updates = [step(model, optimizer, g) for g in gradients]
        row.assert_close(stack(updates), at(row.trajectory, slice(count)))
        add = lambda p, *u: jnp.asarray(np.sum([p, *u], 0))
        total = jax.tree.map(add, PARAMS, *updates)
        assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), total)


def check_orbax_round_trip(row: Row) -> None:
    """A state saved in mid-run is restored to the last bit, and training goes on the same."""
    params, state = PARAMS, row.tx.init(PARAMS)
    for i in range(2):
        params, state, _ = row.step(params, state, at(GRADIENTS, i))
    # Committed to its device, as what is restored: both then run the same compiled step.
    saved = jax.device_put({"params": params, "state": state}, jax.devices()[0])
    with tempfile.TemporaryDirectory() as folder:
        ocp.save(Path(folder) / "mid-run", saved)
        abstract = jax.tree.map(ocp_abstract, saved)
        restored = ocp.load(Path(folder) / "mid-run", abstract)
    assert_equal(restored, saved)
    for i in range(2, 4):
        assert_equal(
            row.step(restored["params"], restored["state"], at(GRADIENTS, i)),
            row.step(saved["params"], saved["state"], at(GRADIENTS, i)),
        )


def ocp_abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
