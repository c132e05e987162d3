"""Attaching adapters to a Flax NNX model, and taking them away again."""

from collections.abc import Hashable, Mapping
import math
from typing import Any, NamedTuple

from flax import nnx
import jax

from lowrank_optax.adapters.adapted_layers import (
    LayerAdapter,
    adapted_layers,
    check_names,
    check_weights,
    chosen_layers,
    remove_adapter,
    set_weight_matrix,
    set_wraps,
    sharing,
    spec_of,
    weight_matrix,
    weight_variable,
)
from lowrank_optax.adapters.base import Adapter, Weights
from lowrank_optax.adapters.folding import needs_weight
from lowrank_optax.adapters.groups import (
    check_method,
    check_patterns,
    group_name,
    init_group,
    method_at,
)
from lowrank_optax.adapters.own_values import check_base_values, check_can_release, release
from lowrank_optax.adapters.partitions import check_arrays, matrix_sharding, variables
from lowrank_optax.adapters.tied_tables import check_not_tied, moved
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.matrices.selection import Where, path_string
from lowrank_optax.matrices.views import matrix_shape


class _Target(NamedTuple):
    """A layer that is being adapted.

    Attributes:
      path: Its path in the model.
      layer: The layer.
      method: The adapter with this layer's rank and alpha.
      shape: ``(*batch, d_in, d_out)`` of its weight.
      stack: Sizes of the leading axes, along which scans cut it.
    """

    path: tuple[str, ...]
    layer: Any
    method: Adapter
    shape: tuple[int, ...]
    stack: tuple[int, ...]

    def weights(self, values: bool) -> Weights:
        """``[L, d_in, d_out]``, with its values only if the method reads them."""
        shape = (math.prod(self.shape[:-2]), *self.shape[-2:])
        if values and self.method.reads_weights:
            return weight_matrix(self.layer).reshape(shape)
        return jax.ShapeDtypeStruct(shape, weight_variable(self.layer).dtype)


@explains_names
def attach(
    model: nnx.Module,
    method: Adapter,
    where: Where = None,
    *,
    rngs: nnx.Rngs | int,
    name: str = "default",
    rank_pattern: Mapping[str, int | tuple[int, ...]] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> nnx.Module:
    """Attaches an adapter to the layers of a model, in place.

    An adapted layer stays the object it is, with the paths and names of its own weights; its class
    becomes a subclass whose calls apply the adapter. Layers stacked by ``nnx.vmap`` get stacked
    adapters. Train the result with ``nnx.Optimizer(model, tx, wrt=lro.adapters.trainable)`` and
    gradients of ``nnx.DiffState(0, lro.adapters.trainable)``.

    Args:
      model: Any NNX model.
      method: What to attach, for example ``lro.adapters.LoRA(rank=8)``.
      where: Which layers: a regular expression found in a path such as
        ``blocks/attention/query``, a class of layers, any filter of ``flax.nnx`` or function of
        path and module; None for all linear layers except embeddings and output heads.
      rngs: Source of the initial values and of dropout.
      name: The adapter's name: a model may have several.
      rank_pattern: Other ranks for layers by regular expressions found in their paths, the first
        that is found counting; a tuple has one for each layer of a stack.
      alpha_pattern: Likewise other values of ``alpha``.

    Returns:
      The model itself.

    Raises:
      ValueError: If ``where`` matches no layer (the message lists near ones), a pattern matches
        none of the layers chosen, a layer has an adapter of this name already or would share its
        arrays with layers that have (VeRA), or ``method`` is
        computed from a weight that has values of its own in an adapter (`also_train`); if it is
        DoRA, and the weight is merged or changed by a method such as PiSSA, or the other way round;
        or if a method that changes the weight (PiSSA) is given an embedding that the model's config
        says is tied to its head.
      TypeError: If ``method`` is not an adapter, or ``model`` not an NNX model; or if ``method``
        reads or changes the weight (PiSSA, DoRA), and a layer may multiply by another than its
        parameter: one of Powerpropagation, or of a subclass of a Flax layer with its own call.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 3, 8))
      >>> before = model(x)
      >>> method = lro.adapters.LoRA(rank=2, alpha=4)
      >>> _ = lro.adapters.attach(model, method, where="query|value", rngs=nnx.Rngs(1))
      >>> print(bool((model(x) == before).all()))
      True
      >>> list(nnx.state(model, lro.adapters.trainable)["query"]["adapters"]["default"]["arrays"])
      ['A', 'B']
    """
    check_method(method)
    _check_name(name)
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, and must be an NNX model; a Linen module is "
            "adapted by lro.adapters.linen.Adapted, a tree of parameters by lro.adapters.pytree."
        )
    rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    targets = _targets(model, method, where, name, rank_pattern or {}, alpha_pattern or {})
    groups: dict[Hashable, list[_Target]] = {}
    for target in targets:
        d_in, d_out = target.shape[-2:]
        group = target.method.group(path_string(target.path), (d_in, d_out))
        groups.setdefault(group, []).append(target)
    shared = getattr(model, "adapter_groups", {}).get(name, {})
    for group, members in groups.items():  # what cannot be is refused before anything is changed
        if group_name(group) in shared:
            raise ValueError(
                f"{path_string(members[0].path)} would share arrays with layers that have the "
                f"adapter {name!r} already: give another name, or attach it to all of them at once."
            )
        check_arrays(*_of_group(members, values=False))
    for group, members in groups.items():
        _attach_group(model, name, group_name(group), members, rngs)
    return model


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or "/" in name or hasattr(nnx.Dict, name):
        raise ValueError(f"name={name!r} must be a name that is no method of nnx.Dict, without /.")


def _targets(
    model: nnx.Module,
    method: Adapter,
    where: Where,
    name: str,
    rank_pattern: Mapping[str, Any],
    alpha_pattern: Mapping[str, Any],
) -> list[_Target]:
    targets = []
    for path, layer in chosen_layers(model, where).items():
        string = path_string(path)
        if name in getattr(layer, "adapters", {}):
            raise ValueError(f"{string} has an adapter named {name!r} already: give another name.")
        spec = spec_of(layer, string)
        whole = getattr(layer, spec.weight).shape
        shape, stack = matrix_shape(whole, spec.axes), spec.stack(whole)
        own = method_at(method, string, rank_pattern, alpha_pattern)
        if own.reads_weights:
            check_base_values(string, layer)
        _check_weight_stays(string, layer, own)
        if own.changes_base:
            check_not_tied(model, string, layer, moved(own, name))
        targets.append(_Target(path, layer, own, shape, stack))
    check_patterns([path_string(t.path) for t in targets], rank_pattern, alpha_pattern)
    if needs_weight(method):
        read = {target.path: target.layer for target in targets}
        check_weights(model, read, f"{type(method).__name__} reads")
    return targets


def _check_weight_stays(path: str, layer: Any, method: Adapter) -> None:
    """Raises ValueError where a method that depends on the weight would not see the base's.

    What others add to the weight they can take away again, whatever is added in between.
    """
    kind = type(method).__name__
    for adapter in getattr(layer, "adapters", {}).values():
        other = f"{path}: the adapter {adapter.name!r}"
        named = f"{other} ({type(adapter.method).__name__})"
        if method.depends_on_weight and adapter.merged:
            raise ValueError(
                f"{other} is merged into its weight, and {kind} depends on the base's: unmerge "
                f"{adapter.name!r} first."
            )
        if method.depends_on_weight and adapter.method.changes_base:
            raise ValueError(
                f"{named} has changed the weight, and {kind} depends on the base's: detach "
                f"{adapter.name!r} first."
            )
        if method.changes_base and adapter.method.depends_on_weight:
            raise ValueError(
                f"{named} depends on the base's weight, which {kind} would change: detach "
                f"{adapter.name!r} first."
            )


def _attach_group(
    model: Any, name: str, group: str, members: list[_Target], rngs: nnx.Rngs
) -> None:
    shared, own = init_group(rngs.params(), *_of_group(members))
    if shared.trainable or shared.frozen:
        axes, sharding = members[0].method.axes, matrix_sharding(members[0].layer)
        _put_shared(model, name, group, variables(shared, axes, sharding))
    for target, params in zip(members, own, strict=True):
        layer, batch = target.layer, target.shape[:-2]
        params = jax.tree.map(lambda x, b=batch: x.reshape(*b, *x.shape[1:]), params)
        if params.base is not None:
            set_weight_matrix(layer, params.base)
        arrays = variables(params, target.method.axes, matrix_sharding(layer), len(batch))
        of_group = group if shared.trainable or shared.frozen else None
        adapter = LayerAdapter(target.method, name, of_group, arrays, _dropout_stream(target, rngs))
        if not hasattr(layer, "adapters"):
            layer.adapters = nnx.Dict()
        layer.adapters[name] = adapter
        set_wraps(layer)


def _of_group(
    members: list[_Target], values: bool = True
) -> tuple[list[Adapter], list[Weights], list[bool]]:
    """Methods, weights (or their shapes alone), and which layers are embeddings."""
    weights = [target.weights(values) for target in members]
    embeddings = [isinstance(target.layer, nnx.Embed) for target in members]
    return [target.method for target in members], weights, embeddings


def _put_shared(model: Any, name: str, group: str, arrays: dict[str, nnx.Variable]) -> None:
    if not hasattr(model, "adapter_groups"):
        model.adapter_groups = nnx.Dict()
        set_wraps(model)
    if name not in model.adapter_groups:
        model.adapter_groups[name] = nnx.Dict()
    model.adapter_groups[name][group] = nnx.Dict(arrays)


def _dropout_stream(target: _Target, rngs: nnx.Rngs) -> nnx.RngStream | None:
    if not getattr(target.method, "dropout", 0):
        return None
    # Layers of a stack draw from streams of their own.
    return rngs.dropout.split(target.stack) if target.stack else rngs.dropout.fork()


def detach(model: Any, name: str | None = None) -> nnx.Module:
    """Takes adapters away, in place: what is left has the model's own structure and classes.

    What is merged stays in the weights. A method that changed them when it was attached (PiSSA)
    gives the original ones back, to the rounding of their dtype, unless it is merged. Parameters
    of `also_train` get the base's values and their own types back; where the adapter is merged,
    the trained values stay.

    Args:
      model: The model that `attach` was given.
      name: Name of the adapter; None for all.

    Returns:
      The model itself.

    Raises:
      ValueError: If there is no adapter of that name, or another is merged into a weight that has
        values of this one.
      TypeError: If a weight that the method has changed has become the parameter of another
        (Powerpropagation's).
    """
    names = check_names(model, [name] if name else [])
    check_can_release(model, names)
    by_path = adapted_layers(model)
    restored = {
        path: layer
        for path, layer in by_path.items()
        if any(_moved_weight(a) for key, a in layer.adapters.items() if key in names)
    }
    check_weights(model, restored, "detaching restores")
    layers = list(by_path.values())
    merged = {a.name for layer in layers for a in layer.adapters.values() if a.merged}
    for key in names:
        release(model, key, keep=key in merged)
    with sharing(model):
        for layer in layers:
            for key in [k for k in layer.adapters if k in names]:
                _restore(layer, layer.adapters[key])
                remove_adapter(layer, key)
    if hasattr(model, "adapter_groups"):
        for key in [k for k in model.adapter_groups if k in names]:
            del model.adapter_groups[key]
        if not model.adapter_groups:
            del model.adapter_groups
        set_wraps(model)
    if not adapted_layers(model):
        release(model, None, keep=False)  # of parameters that were trained before any adapter
    return model


def _moved_weight(adapter: LayerAdapter) -> bool:
    return adapter.method.changes_base and not adapter.merged


def _restore(layer: Any, adapter: LayerAdapter) -> None:
    if _moved_weight(adapter):
        set_weight_matrix(layer, adapter.method.original(adapter.p(), weight_matrix(layer)))
