"""A transformation is a pure function to `jit`, `scan` and `vmap`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness.row import Row, make_step, run
from harness.trees import (
    GRADIENTS,
    PARAMS,
    STEPS,
    assert_same_types,
    at,
    normal,
    normal_like,
    stack,
)


def check_jit_equals_eager(row: Row) -> None:
    """Over two steps: eagerly every branch of a refresh is compiled anew each time."""
    first = at(GRADIENTS, slice(2))
    eager = run(row.tx, PARAMS, first, step=make_step(row.tx))
    row.assert_close(eager, at(row.trajectory, slice(2)))


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the names of JAX's compilation events."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def check_no_recompilation_at_the_second_call(row: Row) -> None:
    gradients = at(GRADIENTS, 0)
    params, state, _ = row.step(PARAMS, row.tx.init(PARAMS), gradients)
    with compilations() as events:
        row.step(params, state, gradients)
    assert not events, f"the second call compiled {len(events)} times"


def check_extra_arguments_accepted(row: Row) -> None:
    """Whatever another part of a chain may need, of whatever dtype."""
    step = make_step(row.tx)
    args = PARAMS, row.tx.init(PARAMS), at(GRADIENTS, 0)
    plain = jax.eval_shape(step, *args)
    extra = jax.eval_shape(step, *args, value=jnp.float16(1.0), unexpected=jnp.int8(1))
    assert_same_types(extra, plain)


def check_donated_buffers(row: Row) -> None:
    """Parameters and state can be given away, whether `init` ran eagerly or jitted."""
    step = jax.jit(make_step(row.tx), donate_argnums=(0, 1))
    for init in (row.tx.init, jax.jit(row.tx.init)):
        params = jax.tree.map(jnp.copy, PARAMS)
        state = init(params)
        held = jax.tree.leaves((params, state))
        pointers = [x.unsafe_buffer_pointer() for x in held if x.dtype == jnp.float32 and x.size]
        assert len(set(pointers)) == len(pointers), "two leaves share one buffer"
        results = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i in range(3):
                params, state, updates = step(params, state, at(GRADIENTS, i))
                results.append(updates)
        row.assert_close(stack(results), at(row.trajectory, slice(3)))
        assert all(x.is_deleted() for x in held)


def check_vmap_equals_a_loop(row: Row) -> None:
    """An ensemble trained by `jax.vmap` over `init` and `update`."""
    tx = optax.GradientTransformation(jax.vmap(row.tx.init), jax.vmap(row.tx.update))
    members = [(PARAMS, GRADIENTS), (normal_like(PARAMS, 50), normal_like(PARAMS, 60, STEPS))]
    params, gradients = zip(*members, strict=True)
    updates = run(tx, stack(list(params)), stack(list(gradients), axis=1))
    for i, member in enumerate(members):
        row.assert_close(at(updates, np.s_[:, i]), row.run(*member))


def check_stacked_leaves_equal_separate_leaves(row: Row) -> None:
    """Batch axes: layers stacked in front, or anywhere; axes of a matrix split in two."""
    shape, layers = (6, 4), 3
    params = [normal(shape, 20 + i) for i in range(layers)]
    gradients = [normal((STEPS, *shape), 30 + i) for i in range(layers)]
    separate = [row.run(*leaves) for leaves in zip(params, gradients, strict=True)]

    def view(leaves: list[jax.Array]) -> dict[str, jax.Array]:
        views = {
            "leading": np.stack(leaves, -3),
            "middle": np.stack(leaves, -2),
            "split": np.reshape(leaves[0], (*leaves[0].shape[:-1], 2, 2)),
        }
        return jax.tree.map(jnp.asarray, views)

    overrides = {}
    if row.takes("weight_dimension_numbers"):
        spec = optax.contrib.MuonDimensionNumbers
        axes = {"leading": spec(1, 2), "middle": spec(0, 2), "split": spec(0, (1, 2))}
        overrides = {"weight_dimension_numbers": axes}
    stacked = run(row.make(**overrides), view(params), view(gradients))
    row.assert_close(stacked, view(separate))
