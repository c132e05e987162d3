"""Which of a model's adapters are applied, and how strongly."""

from collections.abc import Iterator, Mapping
import contextlib
from typing import Any

from lowrank_optax.adapters.adapted_layers import LayerAdapter, adapted_layers, check_names
from lowrank_optax.adapters.own_values import active_names, check_one_owner, settle
from lowrank_optax.matrices.selection import path_string


def activate(model: Any, *names: str, strengths: Mapping[str, float] | None = None) -> None:
    r"""Applies these adapters and no others, in place.

    With several, a layer's output is :math:`y + \sum_i s_i (y_i - y)`, where :math:`y_i` is the
    output with adapter :math:`i` alone. Parameters that `also_train` trains have the values of the
    adapter that they were trained with, or else the base's. What is active, and how strongly, is in
    the graph definition: compiled functions of the model are compiled again.

    Args:
      model: A model with adapters.
      names: Names of the adapters; without any, all.
      strengths: By name, what the change of an adapter is multiplied by; 1 for the others. Values
        of parameters that `also_train` trains are taken as they are.

    Raises:
      ValueError: If the model has no adapter of a name, one is merged, a strength is given for an
        adapter that is not activated, or two of them have own values for one parameter.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones(2)
      >>> for name in "ab":
      ...     method = lro.adapters.LoRA(rank=1, initial="random")
      ...     _ = lro.adapters.attach(model, method, where=".*", rngs=len(name), name=name)
      >>> with lro.adapters.disabled(model):
      ...     y = model(x)
      >>> lro.adapters.activate(model, "a")
      >>> once = model(x) - y
      >>> lro.adapters.activate(model, "a", "b", strengths={"a": 2.0, "b": 0.0})
      >>> print(bool(jnp.allclose(model(x) - y, 2 * once, atol=1e-6)))
      True
    """
    wanted = check_names(model, names)
    strengths = strengths or {}
    for name in strengths:
        if name not in wanted:
            raise ValueError(f"strengths has {name!r}, which is not among {wanted}.")
    adapters = _unmerged(model)
    check_one_owner(model, wanted)
    for adapter in adapters:
        adapter.active = adapter.name in wanted
        adapter.strength = float(strengths.get(adapter.name, 1.0))
    settle(model, wanted)


def deactivate(model: Any, *names: str) -> None:
    """Applies these adapters no more, in place; `activate` brings them back.

    Args:
      model: A model with adapters.
      names: Names of the adapters; without any, all: the model is then as before `attach`.

    Raises:
      ValueError: If the model has no adapter of a name, or one is merged.
    """
    unwanted = check_names(model, names)
    for adapter in _unmerged(model):
        adapter.active = adapter.active and adapter.name not in unwanted
    settle(model, active_names(model))


@contextlib.contextmanager
def disabled(model: Any, *names: str) -> Iterator[Any]:
    """While open, these adapters (or all) are not applied: the model is as before `attach`.

    Args:
      model: A model with adapters.
      names: Names of the adapters; without any, all.

    Yields:
      The model.

    Raises:
      ValueError: If the model has no adapter of a name, or one is merged.
    """
    before = [(adapter, adapter.active) for adapter in _unmerged(model)]
    deactivate(model, *names)
    try:
        yield model
    finally:
        for adapter, active in before:
            adapter.active = active
        settle(model, active_names(model))


def _unmerged(model: Any) -> list[LayerAdapter]:
    found = []
    for path, layer in adapted_layers(model).items():
        for adapter in layer.adapters.values():
            if adapter.merged:
                raise ValueError(
                    f"the adapter {adapter.name!r} of {path_string(path)} is merged into the "
                    "weight: unmerge the model first."
                )
            found.append(adapter)
    return found
