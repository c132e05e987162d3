"""The classes of adapted layers and models: subclasses of their own, made when first needed."""

from collections.abc import Callable, Iterator
import contextlib
import functools
from typing import Any

from flax import nnx

from lowrank_optax.adapters.lending import is_lending, lend
from lowrank_optax.adapters.nnx import adapted_layers, apply_adapters


def set_class(module: Any) -> None:
    """Gives a module the class that its adapters and shared arrays, or their absence, ask for."""
    cls = getattr(type(module), "_class_without_adapters", type(module))
    adapted, lends = hasattr(module, "adapters"), hasattr(module, "adapter_groups")
    # NNX's own setattr would take note of the class as of an attribute.
    object.__setattr__(module, "__class__", _host_class(cls, adapted=adapted, lends=lends))


@contextlib.contextmanager
def lending(model: Any) -> Iterator[None]:
    """While open, the layers of this model find the arrays that they share."""
    if is_lending(model) or not hasattr(model, "adapter_groups"):
        yield
        return
    borrowers = [
        adapter
        for _, layer in adapted_layers(model)
        for adapter in layer.adapters.values()
        if adapter.group is not None
    ]
    with lend(model, borrowers):
        yield


@functools.cache
def _host_class(cls: type, *, adapted: bool, lends: bool) -> type:
    """A subclass whose calls apply adapters, or whose methods lend shared arrays, or both."""
    body: dict[str, Any] = {}
    if lends:
        body |= {name: _lending(method) for name, method in _methods(cls).items()}
    if adapted:
        call = _adapted(cls.__call__)
        body["__call__"] = _lending(call) if lends else call
    if not body:
        return cls
    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), body | {"_class_without_adapters": cls})


def _adapted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return apply_adapters(self, method(self, *args, **kwargs), args, kwargs)

    return call


def _lending(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lending(self):
            return method(self, *args, **kwargs)

    return call


def _methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The public methods of a model's class, and ``__call__``; without those of every module."""
    return {
        name: getattr(cls, name)
        for base in cls.__mro__
        if base not in nnx.Module.__mro__
        for name, x in vars(base).items()
        if callable(x)
        and not isinstance(x, type | staticmethod | classmethod)
        and (name == "__call__" or not name.startswith("_"))
    }
