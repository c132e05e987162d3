"""Stacks whose layers are leaves of their own to the optimizer, as in an unrolled model.

A norm of a leaf, as in LAMB, or its root mean square, as in Adafactor, is then that of a layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.slices.call import Call, Path, Whole, shapes_of_state
from lowrank_optax.slices.loop import Cut
from lowrank_optax.slices.plan import SlicedLeaf
from lowrank_optax.slices.update import rebuilt


def each_layer(
    tx: optax.GradientTransformation, is_stack: Callable[[Path], bool]
) -> optax.GradientTransformationExtraArgs:
    """``tx`` that is given each layer of a stack ``[layers, ...]`` as a leaf of its own.

    The state is that of one layer, stacked; what belongs to another leaf or to none is there once.

    Args:
      tx: A transformation of independent leaves.
      is_stack: Whether the leaf of this path is a stack. All stacks have the same layers.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> Any:
        axes = jax.tree.map_with_path(lambda path, x: 0 if is_stack(path) else None, params)
        if not jax.tree.leaves(axes):
            return tx.init(params)
        others = jax.tree.map_with_path(
            lambda path, x: optax.MaskedNode() if is_stack(path) else x, params
        )
        once = leaves_by_path(shapes_of_state(tx, others))
        state = shapes_of_state(tx, shapes_of_layer(params, is_stack))
        new_axes = jax.tree.map_with_path(lambda path, x: None if path in once else 0, state)
        return jax.vmap(tx.init, (axes,), new_axes)(params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        call = Call.of(tx, updates, state, params, whole, extra_args)
        tree = shapes_of_layer(call.whole.tree, is_stack)
        call = call._replace(whole=call.whole._replace(tree=tree))  # others, too, see layers in it
        stacks = [i for i, path in enumerate(call.paths) if is_stack(path)]
        if not stacks:
            return tx.update(updates, state, params, whole=call.whole, **extra_args)
        results, arrays = call.without(set(stacks))
        own = [path for path in call.state if path not in arrays]
        rows = call.whole.rows
        if rows is None:
            rows = jnp.arange(call.gradients[stacks[0]].shape[0], dtype=jnp.int32)

        def one(gradients: Any, params: Any, states: Any, layer: jax.Array) -> Any:
            of_layer = dict(zip(stacks, params, strict=True))
            part = call._replace(params=[of_layer.get(i, x) for i, x in enumerate(call.params)])
            whole = Whole(tree, settled=True, layer=layer)
            new = dict(zip(own, states, strict=True))
            updates, new = part.update(stacks, gradients, params, new, whole)
            return updates, [new[path] for path in own]

        pick = lambda leaves: [leaves[i] for i in stacks]
        layers = pick(call.gradients), pick(call.params), [call.state[x] for x in own], rows
        if rows.shape[0] > 1:
            new, states = jax.vmap(one)(*layers)
        else:  # under vmap both branches of a conditional would be computed
            new = one(*jax.tree.map(lambda x: x[0], layers))
            new, states = jax.tree.map(lambda x: x[None], new)
        results |= zip(stacks, new, strict=True)
        arrays |= zip(own, states, strict=True)
        return call.treedef.unflatten([results[i] for i in range(len(results))]), rebuilt(
            state, arrays
        )

    return optax.GradientTransformationExtraArgs(init, update)


def shapes_of_layer(params: Any, is_stack: Callable[[Path], bool]) -> Any:
    """The shapes of parameters, of stacks those of one layer."""
    shape = lambda path, x: x.shape[1:] if is_stack(path) else x.shape
    return jax.tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(shape(path, x), x.dtype), params
    )


def layers_of_stack(call: Call, indices: Sequence[int]) -> list[SlicedLeaf]:
    """Stacks cut into layers, of a transformation that `each_layer` returned."""
    shared = call.shared()
    own = lambda i: tuple(x for x in leaves_by_path(call.state_shapes([i])) if x not in shared)
    return [SlicedLeaf(i, Cut(call.params[i].shape[0], 1), own(i), None) for i in indices]
