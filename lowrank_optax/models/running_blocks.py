"""The pass through a decoder's blocks: by a scan, one after the other, or one block many times."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.models.attention import Cache
from lowrank_optax.models.decoder_block import NORMS
from lowrank_optax.models.remat import in_turn, scanned


def run_blocks(
    model: Any,
    x: jax.Array,
    rotary: Any,
    cache: Cache | None,
    position: jax.Array | int,
    training: bool,
    keys: jax.Array | None,
) -> tuple[jax.Array, Any, Any]:
    """The output of a decoder's blocks, the extended cache, and what experts say of the tokens.

    Args:
        model: the decoder, or anything with its `blocks`, `first_block`, `share_blocks`, `remat`
            and `remat_every`.
        x: as for a block; so are `rotary`, `position` and `training`.
        rotary: the rotary positions.
        cache: of all layers, stacked in front.
        position: where the tokens start.
        training: whether experts have a limited capacity.
        keys: a PRNG key for each layer, for the noise of its router.
    """
    shared: tuple[nnx.State, ...] = ()

    def call(
        graphdef: nnx.GraphDef, carry: Any, state: nnx.State, cache: Any, key: Any
    ) -> tuple[Any, tuple[Any, nnx.State, Any]]:
        x, counts = carry
        block = nnx.merge(graphdef, state, *counts, *shared)
        x, cache, routing = block(x, rotary, cache, position, training, key)
        # All that a call may change; the weights are only read.
        changed = nnx.state(block, nnx.RngCount)
        if counts:  # of layers that all blocks share
            return (x, (changed,)), (cache, nnx.State({}), routing)
        return (x, ()), (cache, changed, routing)

    if isinstance(model.blocks, nnx.List):
        apart, every = list(model.blocks), model.remat_every
    else:
        apart, every = [] if model.first_block is None else [model.first_block], 1
    run, done = in_turn(call, model.remat, every), []
    for start in range(0, len(apart), every):
        blocks = apart[start : start + every]
        graphdefs, states = zip(*map(nnx.split, blocks), strict=True)
        number = range(start, start + len(blocks))
        own = [jax.tree.map(lambda c: c[i], (cache, keys)) for i in number]  # noqa: B023
        layers = [(state, *given) for state, given in zip(states, own, strict=True)]
        (x, _), outputs = run(graphdefs, (x, ()), layers)
        for block, (layer_cache, counts, routing) in zip(blocks, outputs, strict=True):
            nnx.update(block, counts)
            done.append((layer_cache, routing))
    first = jax.tree.map(lambda *layers: jnp.stack(layers), *done) if done else (None, None)
    if isinstance(model.blocks, nnx.List):
        return x, first[0], first[1]
    # Not nnx.scan: it writes the weights back, which fails where the model is a constant of
    # an enclosing jit or grad.
    counts: tuple[nnx.State, ...] = ()
    if model.share_blocks:
        is_norm = lambda path, _: path[0] in NORMS
        graphdef, state, count, weights = nnx.split(model.blocks, is_norm, nnx.RngCount, ...)
        counts, shared = (count,), (weights,)
    else:
        graphdef, state = nnx.split(model.blocks)
    rest = jax.tree.map(lambda x: x[len(apart) :], (cache, keys))
    layers = state, *rest
    run = scanned(call, graphdef, (x, counts), layers, model.remat, model.remat_every)
    (x, counts), (cache, changed, routing) = run
    for after in (*counts, changed):
        nnx.update(model.blocks, after)
    if apart:
        join = lambda *parts: jnp.concatenate(parts)
        cache, routing = jax.tree.map(join, first, (cache, routing))
    return x, cache, routing
