"""The backward pass through blocks: a reverse loop over a stack, or a list, one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.slices.call import Call
from lowrank_optax.slices.known_transformations import is_elementwise
from lowrank_optax.slices.loop import Cut, run_through
from lowrank_optax.slices.parts import New, update_layer
from lowrank_optax.slices.plan import SlicedLeaf
from lowrank_optax.training.layered_passes import Gradients, Passes, Through, first_of


def update_stack(
    call: Call,
    run: Passes,
    leaves: Sequence[SlicedLeaf],
    through: Through,
    inputs: jax.Array,
    clipped: Callable[[Any], Any],
) -> tuple[Through, jax.Array, New, Gradients]:
    """The backward pass through stacked blocks, with the updates of their matrices.

    Vectors, such as the scales of norms, are updated after it, whole: their gradients are small.

    Returns:
      What went through the first block, the norms of each block's gradients, what is new, and the
      gradients of vectors.
    """
    matrices = {leaf.index for leaf in leaves}
    vectors = [i for i in run.stack if i not in matrices]

    def one(through: Through, groups: Any, read: Any, row: jax.Array) -> Any:
        small, frozen, x = read
        weights = {leaf.index: w for leaf, (w, _) in zip(leaves, groups[:-1], strict=True)}
        weights |= zip(vectors, small, strict=True)
        own = [weights[i][0] for i in run.stack], first_of(frozen)
        gradients, through = run.block_gradients(own, x[0], through, row)
        norm = norm_of(gradients)
        gradients = dict(zip(run.stack, clipped(gradients), strict=True))
        # All of the block is done before any of it is written over.
        through, gradients = jax.lax.optimization_barrier((through, gradients))
        new = [
            update_layer(call, leaf, gradients[leaf.index][None], w, own_state, row)
            for leaf, (w, own_state) in zip(leaves, groups[:-1], strict=True)
        ]
        flags = [[x[None] for x in flags] for _, _, flags in new]
        last = [gradients[i][None] for i in vectors], norm[None], flags
        return through, [*((w, own_state) for w, own_state, _ in new), last]

    groups = [(call.params[x.index], [call.state[path] for path in x.own]) for x in leaves]
    small = [run.leaves[i] for i in vectors]
    flags = [[jnp.zeros(run.layers, bool) for _ in leaf.flags] for leaf in leaves]
    last = [jnp.zeros_like(x) for x in small], jnp.zeros(run.layers), flags
    cut = Cut(run.layers, 1)
    order = {"backwards": True, "fused": is_elementwise(call.tx)}
    read = small, run.frozen, inputs
    through, groups = run_through(one, through, [*groups, last], read, cut, **order)
    new = {leaf.index: param for leaf, (param, _) in zip(leaves, groups, strict=False)}
    arrays = {
        path: array
        for leaf, (_, own) in zip(leaves, groups, strict=False)
        for path, array in zip(leaf.own, own, strict=True)
    }
    gradients, norms, flags = groups[-1]
    for leaf, of_layers in zip(leaves, flags, strict=True):
        arrays |= zip(leaf.flags, map(jnp.any, of_layers), strict=True)
    return through, norms, (new, arrays), dict(zip(vectors, gradients, strict=True))


def update_list(
    run: Passes,
    through: Through,
    inputs: Sequence[jax.Array],
    update: Callable[[Gradients], New],
) -> tuple[Through, jax.Array, New]:
    """As `update_stack`, for a list of blocks: one after the other, written out."""
    norms = [jnp.float32(0)] * run.layers
    new, arrays = {}, {}
    for layer in reversed(range(run.first_layer, run.layers)):
        weights = run.of_listed(layer)
        gradients, through = run.block_gradients(weights, inputs[layer], through, layer)
        leaves, state = update(dict(zip(run.listed[layer], gradients, strict=True)))
        # All of this comes before the next block's gradients.
        values = through, norm_of(gradients), list(leaves.values()), list(state.values())
        through, norms[layer], *values = jax.lax.optimization_barrier(values)
        new |= zip(leaves, values[0], strict=True)
        arrays |= zip(state, values[1], strict=True)
    return through, jnp.stack(norms), (new, arrays)


def block_norms(run: Passes, through: Through, inputs: Any) -> tuple[Through, jax.Array]:
    """What went through the first block, and the norms of each block's gradients."""
    if run.is_written_out:
        return update_list(run, through, inputs, lambda gradients: ({}, {}))[:2]

    def one(through: Through, groups: Any, read: Any, row: jax.Array) -> Any:
        del groups
        weights, x = first_of(read)
        gradients, through = run.block_gradients(weights, x, through, row)
        return through, [norm_of(gradients)[None]]

    buffer, cut = [jnp.zeros(run.layers)], Cut(run.layers, 1)
    read = run.of_stack, inputs
    through, [norms] = run_through(one, through, buffer, read, cut, backwards=True)
    return through, norms


def norm_of(tree: Any) -> jax.Array:
    """The norm of all numbers of a tree, in float32."""
    squares = (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))
