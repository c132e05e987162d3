"""Flax's unstable interfaces: the class of an object, and what Linen and NNX keep to themselves.

Nothing here imports Flax: the optax side of the library works where Flax is not installed.
"""

from collections.abc import Iterator
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
