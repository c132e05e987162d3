"""Flax's unstable interfaces: the class of an object, and what Linen and NNX keep to themselves.

Nothing here imports Flax: the optax side of the library works where Flax is not installed.
"""

from collections.abc import Callable, Iterator, Mapping
import itertools
from typing import Any


def set_class(x: Any, cls: type) -> None:
    """Changes the class of an NNX module or variable in place.

    The ``setattr`` of NNX would take note of the class as of an attribute, and refuse it inside a
    transformation that closes over the object.
    """
    object.__setattr__(x, "__class__", cls)


def is_nnx_state(tree: Any) -> bool:
    """Whether this is what ``nnx.state`` returns."""
    return type(tree).__module__ == "flax.nnx.statelib"


def is_lifted_call(cls: type) -> bool:
    """Whether a Linen class is the outside of a lifted layer, as ``nn.vmap(nn.Dense)`` is."""
    defines = next(t for t in cls.__mro__ if "__call__" in vars(t))
    return defines.__module__ == "flax.linen.transforms"


def linen_children(module: Any) -> Iterator[Any]:
    """The bound submodules of a bound Linen module, those that ``setup`` defines included."""
    from flax import linen
    import jax

    getattr(module, "a name that no module has", None)  # Linen runs setup at the first such miss
    fields = {name: x for name, x in vars(module).items() if name not in ("parent", "_parent_ref")}
    is_module = lambda x: isinstance(x, linen.Module)
    for child in jax.tree.leaves(fields, is_leaf=is_module):
        if is_module(child) and child.scope is not None:
            yield child


def in_interceptor() -> bool:
    """Whether this runs within a ``flax.linen.intercept_methods``."""
    from flax.linen import module

    return len(module._global_interceptor_stack) > 0


class _TracedApart:
    """A flag with another hash each time: ``nn.jit`` finds a trace by a hash of flags and more."""

    _hashes = itertools.count()

    def __hash__(self) -> int:
        return next(self._hashes)


def run_traced_apart(
    module: Any,
    variables: Mapping[str, Any] | None,
    rngs: Any,
    /,
    *args: Any,
    method: str | Callable[..., Any] | None = None,
    mutable: Any = None,
    capture_intermediates: Any = None,
    **kwargs: Any,
) -> Any:
    """Calls a Linen module such that each call under ``nn.jit`` in it gets a trace of its own.

    Each such trace leaves an entry in a cache of Flax (counts of random keys drawn) that is never
    emptied, so this is for calls that are rare, as to find layers.

    Args:
      module: Unbound Linen module.
      variables: Variables of the module; None to initialize them.
      rngs: Random keys, as for ``module.init`` and ``module.apply``.
      args: Positional arguments of the module.
      method: Method to call, as for ``module.init``.
      mutable: Without effect: no variables are returned.
      capture_intermediates: Likewise.
      kwargs: Keyword arguments of the module.

    Returns:
      The output.
    """
    from flax import core

    if method is None or isinstance(method, str):
        method = getattr(module, method or "__call__")
    method = getattr(method, "__func__", method)  # of a bound method
    run = lambda scope, *args, **kwargs: method(
        module.clone(parent=scope, _deep_clone=True), *args, **kwargs
    )
    flags: dict[str, Any] = {"lowrank_optax_traced_apart": _TracedApart()}
    if variables is None:
        flags["initializing"] = True
    every = core.DenyList("intermediates")
    return core.apply(run, every, flags)(variables or {}, *args, rngs=rngs, **kwargs)[0]
