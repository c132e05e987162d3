"""The classes of adapted layers and models: subclasses of their own, made when first needed."""

from collections.abc import Callable, Iterator
import contextlib
import functools
from typing import Any, NamedTuple

from flax import nnx

from lowrank_optax.adapters.nnx import adapted_layers, apply_adapters
from lowrank_optax.adapters.sharing import is_sharing, share
from lowrank_optax.adapters.tied_tables import check_can_attend
from lowrank_optax.matrices.module_classes import set_wrapper


def set_class(module: Any) -> None:
    """Gives a module the class that its adapters and shared arrays, or their absence, ask for."""
    hosting = _Hosting(hasattr(module, "adapters"), hasattr(module, "adapter_groups"))
    set_wrapper(module, "adapters", hosting if any(hosting) else None)


@contextlib.contextmanager
def sharing(model: Any) -> Iterator[None]:
    """While open, the layers of this model find the arrays that they share."""
    if is_sharing(model) or not hasattr(model, "adapter_groups"):
        yield
        return
    adapters = [
        adapter
        for _, layer in adapted_layers(model)
        for adapter in layer.adapters.values()
        if adapter.group is not None
    ]
    with share(model, adapters):
        yield


class _Hosting(NamedTuple):
    """What wraps the methods of a module: its calls apply adapters, or its methods share arrays."""

    adapted: bool
    shares: bool

    def __call__(self, cls: type) -> dict[str, Callable[..., Any]]:
        """The methods of a subclass."""
        body = {n: _sharing(method) for n, method in _methods(cls).items()} if self.shares else {}
        if self.adapted:
            call = _adapted(cls.__call__)
            body["__call__"] = _sharing(call) if self.shares else call
            if issubclass(cls, nnx.Embed):
                body["attend"] = _attend(cls.attend)
        return body


def _adapted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return apply_adapters(self, method(self, *args, **kwargs), args, kwargs)

    return call


def _attend(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_can_attend(self)
        return method(self, *args, **kwargs)

    return call


def _sharing(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sharing(self):
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
