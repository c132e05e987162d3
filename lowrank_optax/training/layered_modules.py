"""An NNX model with blocks, as the functions that `update_in_backward` runs."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import nnx
from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp

from lowrank_optax.compat.jax import interpret
from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.training.layered_models import METHODS, LayeredModel, joined

HOW_TO_SPLIT = "nnx.as_pure(nnx.split(model, wrt, ...)[2])"


def model_of_module(model: Any, loss: Callable[..., Any] | None, wrt: Any) -> LayeredModel:
    """The functions of an ``nnx.Module`` with blocks, of which ``wrt`` says what is trained."""
    missing = [name for name in ("blocks", *METHODS) if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} has no {missing[0]!r}: an nnx.Module for update_in_backward "
            f"has an attribute blocks and the methods {', '.join(METHODS)}."
        )
    if getattr(model, "remat_every", 1) > 1:
        raise ValueError(
            f"the model has remat_every={model.remat_every}, and update_in_backward saves the "
            "input of every block: leave remat_every out."
        )
    if not callable(loss):
        raise TypeError(f"loss={loss!r} must be a function loss(model, hidden, targets).")
    wrt = nnx.Param if wrt is None else wrt
    graph, streams, variables = nnx.split(model, nnx.RngState, ...)
    # Stand for the blocks within the model, where their weights are not read.
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    shapes = jax.tree.map(shape, nnx.as_pure(variables)).get("blocks", {})
    is_list = isinstance(model.blocks, nnx.List)
    blocks = dict(enumerate(model.blocks)) if is_list else {0: model.blocks}
    parts = {i: nnx.split(each, nnx.RngState, ...) for i, each in blocks.items()}
    paths = {path for path, _ in nnx.to_flat_state(variables)}
    for i, (_, _, own) in parts.items():
        name = ("blocks", i) if is_list else ("blocks",)
        if any((*name, *path) not in paths for path, _ in nnx.to_flat_state(own)):
            raise ValueError(
                f"{'/'.join(map(str, name))} has parameters that are another part's too: blocks "
                "cannot share any."
            )

    def outside(params: Any, key: Any, first: int = 0) -> Any:
        return nnx.merge(graph, {**params, "blocks": shapes}, _drawn(streams, key, first=first))

    def embed(params: Any, batch: Any, key: Any) -> jax.Array:
        call = lambda module: module.before_blocks(batch[0])
        return _checked(call, key, outside(params, key))

    def block(number: int, layer: Any, params: Any, x: Any, batch: Any, key: Any) -> jax.Array:
        del batch
        block_graph, own_streams, _ = parts[number]
        module = nnx.merge(block_graph, layer, _drawn(own_streams, key, stacked=not is_list))
        around = outside(params, key, len(jax.tree.leaves(own_streams)))
        return _checked(lambda module, around: around.through_block(module, x), key, module, around)

    def head(params: Any, x: jax.Array, batch: Any, key: Any) -> Any:
        call = lambda module, loss: loss(module, module.after_blocks(x), batch[1])
        return _checked(functools.partial(call, loss=loss), key, outside(params, key))

    empty = {"blocks": {i: {} for i in parts}} if is_list else {}
    find_frozen = _frozen_of(model, wrt)
    frozen = lambda given: joined(empty, find_frozen(given))
    return LayeredModel(embed, block, head, frozen, reads_outside=True)


def _frozen_of(model: Any, wrt: Any) -> Callable[[Any], Mapping[str, Any]]:
    """Finds what is not trained in what a step is given, or, if it is not weights, in the model."""
    trained = nnx.to_flat_state(nnx.state(model, wrt))
    if not trained:
        raise ValueError(f"wrt={wrt!r} selects no variable of {type(model).__name__}.")
    rest = dict(nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(wrt, nnx.RngState)))))
    is_weight = lambda path, x: isinstance(x, nnx.Param) or path[0] == "blocks"
    weights = [path for path, x in rest.items() if is_weight(path, x)]
    spelled = lambda path: "/".join(map(str, path))

    def frozen(given: Any) -> Mapping[str, Any]:
        if given is None:
            if weights:
                raise ValueError(
                    f"{spelled(weights[0])!r} is not trained: give the step what is not, "
                    f"frozen={HOW_TO_SPLIT}, so that it is an argument of the compiled step and "
                    "not a constant in it."
                )
            return unflatten_dict({path: x.get_raw_value() for path, x in rest.items()})
        pure = jax.tree.leaves_with_path(nnx.as_pure(given))
        found = {normalised_path(path): x for path, x in pure}
        if missing := [path for path in rest if tuple(map(str, path)) not in found]:
            raise ValueError(f"frozen has no {spelled(missing[0])!r}: it is {HOW_TO_SPLIT}.")
        return unflatten_dict({path: found[tuple(map(str, path))] for path in rest})

    return frozen


def _checked(call: Callable[..., Any], key: Any, *modules: Any) -> Any:
    """What a call gives; ValueError if it changes what is not kept, or draws without a key."""
    kept = lambda: dict(nnx.to_flat_state(nnx.state(modules, nnx.Not(nnx.Param))))
    before = {path: x.get_raw_value() for path, x in kept().items()}
    graph, state = nnx.split(modules)
    state = {path: x.get_raw_value() for path, x in nnx.to_flat_state(state)}
    result = call(*modules)
    after = kept()
    if any(x.get_raw_value() is not before.get(path) for path, x in after.items()):
        for path in _changed(call, graph, state):
            name = "/".join(map(str, path[1:]))
            if not isinstance(after[path], nnx.RngState):
                raise ValueError(
                    f"{name!r} changes in a call, as statistics do, which update_in_backward does "
                    "not keep: set the model to use them as they are, as model.eval() does."
                )
            if key is None:
                raise ValueError(
                    f"the model draws random numbers from {name!r}, as dropout does, and key is "
                    "None: give the step a key, or set the model to draw none, as model.eval() "
                    "does."
                )
    return result


def _changed(call: Callable[..., Any], graph: Any, state: Mapping[Any, Any]) -> list[Any]:
    """The paths of what a call changes, but for parameters.

    Flax's transformations, such as nnx.remat, also put back in new arrays what they do not change.
    """
    kept: list[Any] = []

    def run(values: list[Any]) -> list[Any]:
        modules = nnx.merge(graph, unflatten_dict(dict(zip(state, values, strict=True))))
        call(*modules)
        after = dict(nnx.to_flat_state(nnx.state(modules, nnx.Not(nnx.Param))))
        kept.extend(path for path in after if path in state)
        return [after[path].get_raw_value() for path in kept]

    program = jax.make_jaxpr(run)(list(state.values()))
    passed_on = interpret(
        program,
        list(state),
        rule=lambda equation, operands: [None] * len(equation.outvars),
        constant=lambda x: None,
        join=lambda index, results: results[0] if len({*results}) == 1 else None,
    )
    return [path for path, origin in zip(kept, passed_on, strict=True) if origin != path]


def _drawn(streams: Any, key: Any, *, first: int = 0, stacked: bool = False) -> Any:
    """The variables of random streams, which start again, from this key.

    Args:
      streams: What they are: their values are not read.
      key: PRNG key; None where nothing is drawn.
      first: Number of the first stream.
      stacked: Whether they are those of all layers, and those of one layer are made.
    """
    key = jax.random.key(0) if key is None else key
    leaves, structure = jax.tree.flatten(streams)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    new = [
        jax.random.fold_in(key, first + i) if is_key(x) else jnp.zeros(x.shape[stacked:], x.dtype)
        for i, x in enumerate(leaves)
    ]
    return structure.unflatten(new)
