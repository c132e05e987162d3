"""Modules whose methods are wrapped, in place: subclasses of their class, made when first needed.

Whoever wraps has a name of their own, so that wrappers are put on and taken off in any order.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, TypeAlias

Wrapper: TypeAlias = Callable[[type], Mapping[str, Callable[..., Any]]]
"""From a class to the methods that its subclass gets. Hashable: equal ones give the same class."""


def set_wrapper(module: Any, name: str, wrapper: Wrapper | None) -> None:
    """Wraps the methods of one module, or, with None, takes that wrapper off.

    Args:
      module: Of Flax NNX. Its class changes; a module without wrappers has its own class again.
      name: Whose wrapper it is: there is one of a name. The last in the alphabet is the outermost,
        whatever came first, so that the same wrappers make the same class.
      wrapper: What makes the methods.
    """
    cls = type(module)
    wrappers = {**vars(cls).get("_wrappers", {})}
    wrappers.pop(name, None)
    if wrapper is not None:
        wrappers[name] = wrapper
    made = _wrapped(vars(cls).get("_class_without_wrappers", cls), tuple(sorted(wrappers.items())))
    # NNX's own setattr would take note of the class as of an attribute.
    object.__setattr__(module, "__class__", made)


def wrapper_of(module: Any, name: str) -> Wrapper | None:
    """The wrapper of that name, if the module has it."""
    return vars(type(module)).get("_wrappers", {}).get(name)


@functools.cache
def _wrapped(cls: type, wrappers: tuple[tuple[str, Wrapper], ...]) -> type:
    own = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"_class_without_wrappers": cls}
    made = cls
    for count, (_, wrapper) in enumerate(wrappers, 1):
        body = {**wrapper(made), **own, "_wrappers": dict(wrappers[:count])}
        made = type(cls)(cls.__name__, (made,), body)
    return made
