"""Modules whose methods are wrapped, in place: subclasses of their class, made when first needed.

Whoever wraps has a name of their own, so that wrappers are put on and taken off in any order.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple, TypeAlias

from lowrank_optax.compat.flax import set_class

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
    set_class(module, made)


def wrapper_of(module: Any, name: str) -> Wrapper | None:
    """The wrapper of that name, if the module has it."""
    return vars(type(module)).get("_wrappers", {}).get(name)


class _Recipe(NamedTuple):
    """A class as the call that makes it: pickle looks classes up by name and would find another."""

    make: Callable[..., type]
    args: tuple[Any, ...]

    def __deepcopy__(self, memo: Any) -> "_Recipe":
        return self


def made_by(make: Callable[..., type], *args: Any) -> dict[str, Any]:
    """What a class that is made when needed has in its body, so that its instances can be pickled.

    Args:
      make: The function that makes it; one that remembers what it has made.
      args: Arguments of that call: classes, and what else can be pickled.
    """
    return {"_recipe": _Recipe(make, args), "__reduce_ex__": _reduce_ex}


def _reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
    _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
    return (_new, (_recipe(type(self)),), *state)  # type: ignore[return-value]


def _recipe(x: Any) -> Any:
    """The recipe of a class that is made when needed; everything else as it is."""
    recipe = vars(x).get("_recipe") if isinstance(x, type) else None
    return x if recipe is None else _Recipe(recipe.make, tuple(map(_recipe, recipe.args)))


def _class(x: Any) -> Any:
    return x.make(*map(_class, x.args)) if isinstance(x, _Recipe) else x


def _new(recipe: Any) -> Any:
    cls = _class(recipe)
    return cls.__new__(cls)


@functools.cache
def _wrapped(cls: type, wrappers: tuple[tuple[str, Wrapper], ...]) -> type:
    own = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"_class_without_wrappers": cls}
    if wrappers:
        own |= made_by(_wrapped, cls, wrappers)
    made = cls
    for count, (_, wrapper) in enumerate(wrappers, 1):
        body = {**wrapper(made), **own, "_wrappers": dict(wrappers[:count])}
        made = type(cls)(cls.__name__, (made,), body)
    return made
