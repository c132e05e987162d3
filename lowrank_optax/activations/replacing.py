"""Few-bit nonlinearities in a Flax NNX model, in place."""

from collections.abc import Callable, Mapping, Sequence
import contextvars
import dataclasses
import re
from typing import Any, NamedTuple
import weakref

from flax import nnx
import jax

from lowrank_optax.activations.calls import Replacement
from lowrank_optax.activations.calls_report import CallsReport
from lowrank_optax.activations.codebooks import DensityName
from lowrank_optax.activations.finding import DEFAULT_NAMES, Functions
from lowrank_optax.matrices.selection import Path, Where, path_string
from lowrank_optax.modules.report import Report, Table
from lowrank_optax.modules.select import modules_by_path, select
from lowrank_optax.modules.wrap import around_of, unwrap, wrap
from lowrank_optax.quantization.packing import PackingName

_FEW_BIT, _COUNTED = "few_bit", "few_bit_model"

_counts: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("counts", default=None)
"""How many nonlinearities were found in each module that ran in the call of a model."""

_found_in: weakref.WeakSet[nnx.Module] = weakref.WeakSet()
"""Models in which something was found before: what has been traced need not be traced again."""


class QuantizedRow(NamedTuple):
    """A module whose nonlinearities are few-bit.

    Attributes:
      path: Path in the model; "" is the model itself.
      module: Name of its class.
      bits: Bits of a code.
      methods: Methods that run with few-bit nonlinearities.
    """

    path: str
    module: str
    bits: int
    methods: tuple[str, ...]


class QuantizeReport(Report):
    """Prints as a table of the modules that were chosen, and of the calls in them.

    Attributes:
      rows: One row per module.
      calls: The calls in a call of the model, if `quantize_model` was given ``inputs``; else None.
    """

    def __init__(self, rows: Sequence[QuantizedRow], calls: CallsReport | None) -> None:
        self.rows, self.calls = tuple(rows), calls

    def table(self) -> Table:
        """Columns, rows and notes."""
        rows = [
            (r.path or "(the model)", r.module, r.bits, ", ".join(r.methods)) for r in self.rows
        ]
        hint = "Give inputs= for a table of the calls, and of whether few bits pay there."
        notes = hint if self.calls is None else str(self.calls)
        return Table(("path", "module", ">bits", "methods"), rows, notes=notes)


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
    attributes, and in layers run by a scan. The results of a call come from the same operations,
    and so does what it writes: batch statistics, counts of random numbers, sown values. Adapters
    may be attached before or after. `restore_model` undoes it. What is few-bit, and how, is part of
    the graph definition.

    If one module is chosen, a call in which nothing is found raises a ValueError. If several are,
    those without nonlinearities run as they are, and a first call of the model in which nothing is
    found in any of them raises.

    A method runs on a copy of the module: plain Python attributes that it sets are lost. It is
    traced at each call, so call the model inside ``nnx.jit`` or ``jax.jit``.

    Args:
      model: Any NNX model. If it is quantized already, modules that are chosen again get the new
        options; a module inside another keeps its own.
      bits: 1 to 8; see `few_bit_calls`.
      where: Modules to change: a regular expression found in a path such as ``blocks/mlp`` (or a
        list), a class, any filter of ``flax.nnx`` or function of path and module; of modules inside
        each other the outermost. None for the model itself.
      functions: Functions to look for; see `few_bit_calls`.
      methods: Methods that become few-bit; a module needs to have one of them.
      density: See `few_bit_calls`.
      packing: See `few_bit`.
      inputs: Arguments of a call of the model: a tuple, or a mapping of keyword arguments; arrays
        or ``jax.ShapeDtypeStruct``. With them the report lists the calls, what each saves, and
        whether few bits pay there. Nothing is computed.
      wrt: Filter for what of the model is trained, for the report, as of ``nnx.Optimizer``.

    Returns:
      A report: print it, or read its ``rows`` and ``calls``.

    Raises:
      ValueError: If ``where`` matches no module with one of the methods (the message lists similar
        names), or an option is not one of its choices; with ``inputs``, if nothing is found.
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
      >>> print(row.function, row.shape, row.bytes_now, row.bytes_then, row.saved_for)
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
        wrap(module, _FEW_BIT, _FewBit(replacement, own, len(chosen) == 1), own)
        rows.append(QuantizedRow(path_string(path), type(module).__name__, bits, own))
    if len(chosen) > 1 and (own := _methods(model, tuple(dict.fromkeys((*names, "__call__"))))):
        wrap(model, _COUNTED, _Counted(replacement, tuple(map(path_string, chosen))), own)
        _found_in.discard(model)
    return QuantizeReport(rows, calls)


def restore_model(model: nnx.Module) -> nnx.Module:
    """Undoes `quantize_model`, in place.

    Args:
      model: The model, or a part of it.

    Returns:
      The model itself.

    Raises:
      ValueError: If nothing in it is few-bit.
    """
    if not [*unwrap(model, _FEW_BIT), *unwrap(model, _COUNTED)]:
        raise ValueError("the model has no few-bit modules: see quantize_model.")
    return model


@dataclasses.dataclass(frozen=True)
class _FewBit:
    """Runs a method with few-bit nonlinearities; if they are ``required``, there must be some."""

    replacement: Replacement
    methods: tuple[str, ...]
    required: bool

    def __call__(self, call: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        pure, state = _pure(call.__func__, module, args, kwargs)
        result, count = self.replacement.run(pure, (state,), {}, required=self.required)
        if (counts := _counts.get()) is not None:
            counts.append(count)
        output, changed = result
        _write(changed, (module, args, kwargs))
        return output


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Raises if a call of a model finds nothing in the modules of these paths."""

    replacement: Replacement
    paths: tuple[str, ...]

    def __call__(self, call: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if module in _found_in:
            return call(*args, **kwargs)
        counts: list[int] = []
        outer = _counts.get()
        token = _counts.set(counts)
        try:
            output = call(*args, **kwargs)
        finally:
            _counts.reset(token)
        if outer is not None:
            outer.extend(counts)
        if any(counts):
            _found_in.add(module)
        elif counts:
            raise self.replacement.nothing(f"each of the modules {', '.join(self.paths)}")
        return output


@dataclasses.dataclass(frozen=True)
class _Named:
    """Lets the program say which module its equations come from."""

    path: str

    def __call__(self, call: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(self.path):
            return call(*args, **kwargs)


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
        wrap(module, _FEW_BIT, None)  # its methods call each other
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
    modules = modules_by_path(model, lambda module: bool(_methods(module, methods)))
    if where is None:
        if () not in modules:
            raise ValueError(f"methods={methods}: {type(model).__name__} is no {kind}.")
        return {(): model}
    found = select(modules, where, kind)
    inside = lambda path: any(path[:n] in found for n in range(len(path)))
    return {path: module for path, module in found.items() if not inside(path)}


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
    before: dict[Path, Any] = {path: around_of(module, _FEW_BIT) for path, module in chosen.items()}
    paths = [path_string(path) for path in chosen]
    where = None if paths == [""] else tuple(f"(^|/){re.escape(path)}(/| |$)" for path in paths)

    def call(state: nnx.State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pure, whole = _pure(type(model).__call__, nnx.merge(graphdef, state), args, kwargs)
        return pure(whole)

    call.__name__ = type(model).__name__
    try:
        for path, module in chosen.items():
            named = _Named(path_string(path)) if path else None
            wrap(module, _FEW_BIT, named, _methods(module, methods))
        graphdef, state = nnx.split(model)
        trained = nnx.filterlib.to_predicate(wrt)
        mark = lambda path, x: jax.tree.map(lambda _: trained(path, x), x)
        fixed = jax.tree.map(lambda _: False, (args, kwargs))
        found = dataclasses.replace(replacement, where=where, each=False)
        marks = (nnx.map_state(mark, state), *fixed), {}
        return found.report(call, (state, args, kwargs), {}, marks)
    finally:
        for path, module in chosen.items():
            wrap(module, _FEW_BIT, old := before[path], old.methods if old else ())
