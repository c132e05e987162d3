"""Wrapping the calls of Flax NNX modules, in place.

A wrapped module stays the object it is, with its attributes and their paths; its class becomes a
subclass made for these wraps. Each wrap has a name, so wraps are put on and taken off in any order,
and a module without wraps has its own class again.
"""

from collections.abc import Callable, Sequence
import functools
import types
from typing import Any, NamedTuple, TypeAlias

from lowrank_optax.compat.flax import set_class
from lowrank_optax.matrices.selection import Path
from lowrank_optax.modules.select import modules_by_path

Around: TypeAlias = Callable[..., Any]
"""``around(call, module, *args, **kwargs)`` runs instead of ``module(*args, **kwargs)``.

``call`` is the bound method that it replaces, with the wraps inside; ``call.__name__`` tells which
of several methods it is, and ``call.__func__`` takes another module. It is hashable and pickles (a
function, a frozen dataclass): equal ones give the same class."""


class _Wrap(NamedTuple):
    name: str
    around: Around
    methods: tuple[str, ...]
    innermost: bool

    @property
    def order(self) -> tuple[bool, str]:
        return not self.innermost, self.name


def wrap(
    module: Any,
    name: str,
    around: Around | None,
    methods: Sequence[str] = ("__call__",),
    *,
    innermost: bool = False,
) -> None:
    """Wraps methods of one module, or, with ``around=None``, takes that wrap off.

    What a wrap does is part of the module's class, and so of its graph definition: a jitted
    function is compiled again when a wrap comes or goes. Whatever may change without recompiling
    belongs into the module's variables, which ``around`` reads.

    Args:
      module: A ``flax.nnx.Module``. A wrap of the same name is replaced.
      name: Name of the wrap. The last name in the alphabet is the outermost wrap, whatever came
        first, so that the same wraps make the same class.
      around: What runs instead of the methods.
      methods: Names of methods of the module's class.
      innermost: Whether the wrap is inside all others: it computes the layer's own product.
    """
    wraps = {each.name: each for each in _wraps(module)}
    wraps.pop(name, None)
    if around is not None:
        wraps[name] = _Wrap(name, around, tuple(methods), innermost)
    ordered = tuple(sorted(wraps.values(), key=lambda each: each.order))
    set_class(module, _wrapped(own_class(module), ordered))


def own_class(module: Any) -> type:
    """The class of a module without its wraps."""
    return vars(type(module)).get("_class_without_wraps", type(module))


def set_own_class(module: Any, cls: type) -> None:
    """Changes the class of a module below its wraps, which stay on the methods that it has."""
    has = lambda each: tuple(name for name in each.methods if hasattr(cls, name))
    set_class(module, _wrapped(cls, tuple(w._replace(methods=has(w)) for w in _wraps(module))))


def become(module: Any, new: Any) -> None:
    """Makes a module another one, in place: whoever holds it holds ``new`` from then on."""
    vars(module).clear()
    vars(module).update(vars(new))
    set_class(module, type(new))


def unwrap(model: Any, name: str) -> list[Path]:
    """Takes the wraps of a name off every module of a model; returns the modules' paths."""
    found = wrapped(model, name)
    for module in found.values():
        wrap(module, name, None)
    return list(found)


def wrapped(model: Any, name: str) -> dict[Path, Any]:
    """The modules of a model that have a wrap of this name, by path; shared ones once."""
    return modules_by_path(model, lambda module: around_of(module, name) is not None)


def around_of(module: Any, name: str) -> Around | None:
    """What a module is wrapped in under this name; None if it is not."""
    return next((each.around for each in _wraps(module) if each.name == name), None)


def _wraps(module: Any) -> tuple[_Wrap, ...]:
    return vars(type(module)).get("_wraps", ())


@functools.cache
def _wrapped(cls: type, wraps: tuple[_Wrap, ...]) -> type:
    made = cls
    for count, each in enumerate(wraps, 1):
        body: dict[str, Any] = {n: _method(getattr(made, n), each.around) for n in each.methods}
        body |= {n: getattr(cls, n) for n in ("__module__", "__qualname__", "__doc__")}
        body |= {"_class_without_wraps": cls, "_wraps": wraps[:count]}
        body |= made_by(_wrapped, cls, wraps[:count])
        made = type(cls)(cls.__name__, (made,), body)
    return made


def _method(inner: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @functools.wraps(inner)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(types.MethodType(inner, self), self, *args, **kwargs)

    return method


class _Recipe(NamedTuple):
    """A class as the call that makes it: pickle looks classes up by name and would find another."""

    make: Callable[..., type]
    args: tuple[Any, ...]

    def __deepcopy__(self, memo: Any) -> "_Recipe":
        return self


def made_by(make: Callable[..., type], *args: Any) -> dict[str, Any]:
    """The class attributes with which instances of a class that is made on demand pickle.

    Args:
      make: The function that makes the class; it returns the same class for the same arguments.
      args: Arguments of that call: classes, and what else can be pickled.
    """
    return {"_recipe": _Recipe(make, args), "__reduce_ex__": _reduce_ex}


def _reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
    _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
    return (_new, (_recipe(type(self)),), *state)  # type: ignore[return-value]


def _recipe(x: Any) -> Any:
    """The recipe of a class that is made on demand; everything else as it is."""
    recipe = vars(x).get("_recipe") if isinstance(x, type) else None
    return x if recipe is None else _Recipe(recipe.make, tuple(map(_recipe, recipe.args)))


def _class(x: Any) -> Any:
    return x.make(*map(_class, x.args)) if isinstance(x, _Recipe) else x


def _new(recipe: Any) -> Any:
    cls = _class(recipe)
    return cls.__new__(cls)
