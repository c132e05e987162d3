"""Few-bit nonlinearities in a Flax NNX model, in place."""

from collections.abc import Callable, Mapping, Sequence
import contextvars
import dataclasses
import functools
import re
from typing import Any
import weakref

from flax import nnx
import jax

from lowrank_optax.activations.calls import Replacement, report_of, run_few_bit
from lowrank_optax.activations.calls_report import CallsReport
from lowrank_optax.activations.density import DensityName
from lowrank_optax.activations.known import DEFAULT_NAMES, Functions
from lowrank_optax.activations.quantize_report import QuantizedRow, QuantizeReport
from lowrank_optax.matrices.module_classes import set_wrapper, wrapper_of
from lowrank_optax.matrices.selection import Path, Where, matching, path_string
from lowrank_optax.quantization.packing import PackingName

_WRAPPER, _COUNTER = "few_bit", "few_bit_model"

_found: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("found", default=None)
"""How many nonlinearities were found in each module that has been traced in a call of a model."""

_found_before: set[int] = set()  # of models that are alive, by their id


def quantize_model(
    model: nnx.Module,
    bits: int = 3,
    where: Where = None,
    *,
    functions: Functions = DEFAULT_NAMES,
    methods: str | Sequence[str] = "__call__",
    density: DensityName = "uniform",
    packing: PackingName = "auto",
    inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    wrt: Any = nnx.Param,
) -> QuantizeReport:
    """Makes the nonlinearities of a model few-bit, in place, wherever its code calls them.

    A chosen module stays the object it is, with its parameters and their paths; its class becomes a
    subclass whose methods run as `few_bit_calls` of what they were. So nonlinearities are found in
    the module's own lines (``nnx.silu(self.gate(x))``), in modules inside, in functions held as
    attributes, and in layers run by a scan. The results of a call come of the same operations, and
    so does what it writes: statistics of batches, counts of random numbers, sown values. Adapters
    may be attached before or after. `restore_model` gives everything back.

    Where only one module is chosen, a call in which nothing is found raises a ValueError. Where
    several are, those without nonlinearities run as they are, and a first call of the model in
    which nothing is found in any of them raises.

    A method runs on a copy of the module: plain Python attributes that it sets are lost. It is
    traced at each call, so call the model inside ``nnx.jit`` or ``jax.jit``.

    Args:
      model: Any NNX model. In one that is quantised already, what is chosen again gets the new
        options; a module inside another keeps its own.
      bits: 1 to 8; see `few_bit_calls`.
      where: Which modules: a regular expression found in a path such as ``blocks/mlp`` (or a list),
        a class, any filter of ``flax.nnx`` or function of path and module; of modules inside each
        other the outermost. None for the model itself.
      functions: Those to look for: see `few_bit_calls`.
      methods: Their methods that are to be few-bit; a module needs to have one of them.
      density: See `few_bit_calls`.
      packing: See `few_bit`.
      inputs: Of a call of the model: a tuple of arguments, or a mapping of keyword arguments;
        arrays or ``jax.ShapeDtypeStruct``. With them the report lists the calls, what each keeps,
        and whether few bits pay there. Nothing is computed.
      wrt: What of the model is trained, for the report: a filter, as of ``nnx.Optimizer``.

    Returns:
      A report: print it, or read its ``rows`` and ``calls``.

    Raises:
      ValueError: If ``where`` matches no module with one of the methods (the message lists near
        ones), or an option is none; with ``inputs``, if nothing is found to replace.
      TypeError: If ``model`` is not an NNX module.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.silu, nnx.Linear(8, 2, rngs=rngs))
      >>> x = jnp.ones((16, 4))
      >>> before = model(x)
      >>> report = lro.activations.quantize_model(model, bits=4, inputs=(x,))
      >>> print(bool((model(x) == before).all()))
      True
      >>> row = report.calls.rows[0]
      >>> print(row.function, row.shape, row.bytes_now, row.bytes_then, row.kept_for)
      silu (16, 8) 1536 64 ('product',)
      >>> model = lro.activations.restore_model(model)

    Reference:
      Novikov et al., Few-Bit Backward, 2023, https://arxiv.org/abs/2202.00441.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model={model!r} must be a module of flax.nnx.")
    replacement = Replacement.of(bits, functions, None, density, packing)
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    chosen = _chosen(model, where, names)
    calls = None if inputs is None else _calls(model, chosen, names, replacement, inputs, wrt)
    rows = []
    for path, module in chosen.items():
        own = _methods(module, names)
        set_wrapper(module, _WRAPPER, _FewBit(replacement, own, len(chosen) == 1))
        rows.append(QuantizedRow(path_string(path), type(module).__name__, bits, own))
    if len(chosen) > 1 and (own := _methods(model, tuple(dict.fromkeys((*names, "__call__"))))):
        paths = tuple(map(path_string, chosen))
        set_wrapper(model, _COUNTER, _Counted(replacement, own, paths))
        _found_before.discard(id(model))
    return QuantizeReport(rows, calls)


def restore_model(model: nnx.Module) -> nnx.Module:
    """Gives the modules of a model their own methods back, in place: see `quantize_model`.

    Args:
      model: The model, or a part of it.

    Returns:
      The model itself.

    Raises:
      ValueError: If nothing in it is few-bit.
    """
    wrapped = [
        (module, name)
        for _, module in nnx.iter_modules(model)
        for name in (_WRAPPER, _COUNTER)
        if wrapper_of(module, name) is not None
    ]
    if not wrapped:
        raise ValueError("the model has no few-bit modules: see quantize_model.")
    for module, name in wrapped:
        set_wrapper(module, name, None)
    return model


@dataclasses.dataclass(frozen=True)
class _FewBit:
    """What wraps methods so that they run with few-bit nonlinearities."""

    replacement: Replacement
    methods: tuple[str, ...]
    required: bool  # whether a call in which nothing is found is an error

    def __call__(self, cls: type) -> dict[str, Callable[..., Any]]:
        """The methods of a subclass."""
        return {name: self._few_bit(getattr(cls, name)) for name in self.methods}

    def _few_bit(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            pure, state = _pure(method, module, args, kwargs)
            result, count = run_few_bit(
                self.replacement, pure, (state,), {}, required=self.required
            )
            if (found := _found.get()) is not None:
                found.append(count)
            output, changed = result
            _write(changed, (module, args, kwargs))
            return output

        return call


@dataclasses.dataclass(frozen=True)
class _Counted:
    """What wraps methods of a model so that a call in which nothing is few-bit is an error.

    Only until something is found: what has been traced before need not be traced again. Models with
    the same options have the same class, so what was found is known of the object.
    """

    replacement: Replacement
    methods: tuple[str, ...]
    paths: tuple[str, ...]  # of the modules that are to be few-bit

    def __call__(self, cls: type) -> dict[str, Callable[..., Any]]:
        """The methods of a subclass."""
        return {name: self._counted(getattr(cls, name)) for name in self.methods}

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if id(module) in _found_before:
                return method(module, *args, **kwargs)
            found: list[int] = []
            outer = _found.get()
            token = _found.set(found)
            try:
                output = method(module, *args, **kwargs)
            finally:
                _found.reset(token)
            if outer is not None:
                outer.extend(found)
            if any(found):
                _found_before.add(id(module))
                weakref.finalize(module, _found_before.discard, id(module))
            elif found:
                raise self.replacement.nothing(f"each of the modules {', '.join(self.paths)}")
            return output

        return call


@dataclasses.dataclass(frozen=True)
class _Named:
    """What wraps methods so that a program says which module its equations come from."""

    path: str
    methods: tuple[str, ...]

    def __call__(self, cls: type) -> dict[str, Callable[..., Any]]:
        """The methods of a subclass."""
        named = jax.named_scope(self.path)
        return {name: named(getattr(cls, name)) for name in self.methods}


def _pure(
    method: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[nnx.State], tuple[Any, dict[Path, Any]]], nnx.State]:
    """A call as a function of state, which returns its output and the state it changes.

    Arguments may hold NNX objects (``nnx.Rngs``), so they are part of the state.
    """
    graphdef, state = nnx.split((module, args, kwargs))

    def pure(state: nnx.State) -> tuple[Any, dict[Path, Any]]:
        before = {path: jax.tree.flatten(x) for path, x in nnx.to_flat_state(state)}
        whole = module, args, kwargs = nnx.merge(graphdef, state)
        set_wrapper(module, _WRAPPER, None)  # its methods call each other
        output = method(module, *args, **kwargs)
        after = dict(nnx.to_flat_state(nnx.state(whole)))
        changed: dict[Any, Any] = {
            path: x for path, x in after.items() if not _has(x, *before.get(path, ([], 0)))
        }
        changed |= dict.fromkeys(before.keys() - after.keys())  # what it has taken away
        return output, changed

    pure.__name__ = f"{type(module).__name__}.{method.__name__}"
    return pure, state


def _has(x: Any, leaves: list[Any], tree: Any) -> bool:
    """Whether a variable has these very arrays."""
    own, own_tree = jax.tree.flatten(x)
    return own_tree == tree and all(a is b for a, b in zip(own, leaves, strict=True))


def _write(changed: dict[Path, Any], whole: tuple[Any, ...]) -> None:
    """Puts the state that a call has changed into the objects that it was called with."""
    # Only that: weights that a call only reads may be constants of a transformation around.
    objects = dict(nnx.iter_graph(whole)) if changed else {}
    for path, new in changed.items():
        old, owner = objects.get(path), objects.get(path[:-1])
        if new is None:
            delattr(owner, str(path[-1]))
        elif isinstance(old, nnx.Variable):
            old.set_raw_value(new.get_raw_value())
        else:
            setattr(owner, str(path[-1]), new)


def _chosen(model: nnx.Module, where: Where, methods: tuple[str, ...]) -> dict[Path, nnx.Module]:
    """The modules that are meant; of those inside each other the outermost."""
    kind = f"module with a method {' or '.join(methods)}"
    modules = {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if _methods(module, methods)
    }
    if where is None:
        if () not in modules:
            raise ValueError(f"methods={methods}: {type(model).__name__} is no {kind}.")
        return {(): model}
    found = matching("where", modules, where, kind)
    inside = lambda path: any(path[:n] in found for n in range(len(path)))
    return {path: modules[path] for path in found if not inside(path)}


def _methods(module: nnx.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that its class has."""
    # Not hasattr: every class has a __call__, that of its own class.
    has = lambda name: any(name in vars(cls) for cls in type(module).__mro__)
    return tuple(name for name in names if has(name))


def _calls(
    model: nnx.Module,
    chosen: dict[Path, nnx.Module],
    methods: tuple[str, ...],
    replacement: Replacement,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    wrt: Any,
) -> CallsReport:
    """The calls in the chosen modules, in one call of the model."""
    if not isinstance(inputs, tuple | list | Mapping):
        raise TypeError(f"inputs={inputs!r} must be a tuple of arguments or a mapping of keywords.")
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    before = [(module, wrapper_of(module, _WRAPPER)) for module in chosen.values()]
    paths = [path_string(path) for path in chosen]
    where = None if paths == [""] else tuple(f"(^|/){re.escape(path)}(/| |$)" for path in paths)
    try:
        for path, (module, _) in zip(paths, before, strict=True):
            named = _Named(path, _methods(module, methods)) if path else None
            set_wrapper(module, _WRAPPER, named)
        graphdef, state = nnx.split(model)

        def call(state: nnx.State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            pure, whole = _pure(type(model).__call__, nnx.merge(graphdef, state), args, kwargs)
            return pure(whole)

        call.__name__ = type(model).__name__
        trained = nnx.filterlib.to_predicate(wrt)
        mark = lambda path, x: jax.tree.map(lambda _: trained(path, x), x)
        fixed = jax.tree.map(lambda _: False, (args, kwargs))
        found = dataclasses.replace(replacement, where=where, each=False)
        marks = (nnx.map_state(mark, state), *fixed), {}
        return report_of(found, call, (state, args, kwargs), {}, marks)
    finally:
        for module, wrapper in before:
            set_wrapper(module, _WRAPPER, wrapper)
