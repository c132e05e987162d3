"""What a loss saves between its forward and its backward pass, by name and size."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.compat.jax import is_on_host
from lowrank_optax.matrices.flax_layers import is_nnx_module
from lowrank_optax.matrices.paths import path_string
from lowrank_optax.modules.report import Report, Table
from lowrank_optax.planning.origins import origins


class SavedResidualsRow(NamedTuple):
    """One array that is saved for the backward pass, or several that are alike.

    Attributes:
      name: That of ``checkpoint_name``, such as ``few_bit_codes``; else what computes the array, as
        ``silu/logistic in MLP.__call__``: the primitive, within jitted functions, and the function
        of the program that calls these. Of an input its path.
      source: Linen's modules and the line of the program.
      shape: Shape of one array.
      dtype: Dtype of one array.
      count: Number of arrays.
      bytes: Bytes of all of them; ``uint4`` is half a byte.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class SavedResidualsReport(Report):
    """What the backward pass of a loss needs from the forward pass; prints as a table.

    Attributes:
      arrays: One row per array, in the order in which ``jax.vjp`` saves them.
      inputs: One row per input that the backward pass reads. They are in memory anyway: weights,
        data and arrays that the loss is closed over.
      temporary_bytes: What the compiled loss and gradient need beside arguments and results at
        their peak; None where that was not asked for, or the compiler does not say.
      offloaded: One row per array that a policy of ``jax.checkpoint`` moves to the host's memory.
        They are not counted in ``total_bytes``.
    """

    arrays: tuple[SavedResidualsRow, ...]
    inputs: tuple[SavedResidualsRow, ...]
    temporary_bytes: int | None = None
    offloaded: tuple[SavedResidualsRow, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of ``arrays``."""
        return sum(row.bytes for row in self.arrays)

    @property
    def rows(self) -> list[SavedResidualsRow]:
        """The arrays, with equal ones in one row; most bytes first."""
        groups: dict[SavedResidualsRow, SavedResidualsRow] = {}
        for row in self.arrays:
            count, size = groups[row][-2:] if row in groups else (0, 0)
            groups[row] = row._replace(count=count + 1, bytes=size + row.bytes)
        return sorted(groups.values(), key=lambda row: -row.bytes)

    def bytes_by_name(self) -> dict[str, int]:
        """Bytes of all arrays of a name; most first."""
        total: dict[str, int] = {}
        for row in self.arrays:
            total[row.name] = total.get(row.name, 0) + row.bytes
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def table(self) -> Table:
        """Columns, rows and footer."""
        read = sum(row.bytes for row in self.inputs)
        footer: list[Any] = [("total", "", "", "", len(self.arrays), self.total_bytes)]
        if self.temporary_bytes is not None:
            footer.append(("compiled temporaries", "", "", "", "", self.temporary_bytes))
        others = [("(inputs, not counted)", "", "", "", len(self.inputs), read)]
        if self.offloaded:
            host = sum(row.bytes for row in self.offloaded)
            others.append(("(on the host, not counted)", "", "", "", len(self.offloaded), host))
        columns = ("saved", "source", "shape", "dtype", ">count", ">bytes")
        return Table(columns, (*self.rows, *others), footer)


class SavedResidualsComparison(Report):
    """Reports beside each other: bytes by name. See `compare_saved_residuals`.

    Attributes:
      reports: `SavedResidualsReport` by the names that were given.
    """

    def __init__(self, reports: Mapping[str, SavedResidualsReport]) -> None:
        self.reports = dict(reports)

    def table(self) -> Table:
        """Columns, rows and footer."""
        reports = self.reports.values()
        named = [report.bytes_by_name() for report in reports]
        names = dict.fromkeys(name for one in named for name in one)
        most = lambda name: max(one.get(name, 0) for one in named)
        rows = [
            (name, *(one.get(name) for one in named))
            for name in sorted(names, key=most, reverse=True)
        ]
        footer: list[Any] = [("total", *(report.total_bytes for report in reports))]
        peaks = [report.temporary_bytes for report in reports]
        if any(peak is not None for peak in peaks):
            footer.append(("compiled temporaries", *peaks))
        return Table(("saved", *(f">{name}" for name in self.reports)), rows, footer)


def saved_residuals(
    loss: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    wrt: Any = None,
    compiled: bool = True,
    device: Any = None,
) -> SavedResidualsReport:
    """The arrays that a loss saves for its backward pass, and the compiled gradient's temporaries.

    The function that ``jax.vjp`` returns is a pytree, whose leaves are what is saved. Their names
    are read from the program that makes them: that of ``checkpoint_name``, or the primitive and the
    line of the program, also within scans, ``jax.checkpoint`` and jitted functions. Nothing is
    computed.

    A compiled step may need less than what is counted (the compiler merges equal arrays) or more
    (it pads, and holds what the backward pass itself makes): see ``temporary_bytes``.

    Args:
      loss: Function that returns a float scalar, or with ``has_aux`` a pair of it and anything.
      *args: Arguments of the loss, as for ``jax.grad``: pytrees of arrays or of
        ``jax.ShapeDtypeStruct``, and NNX models, concrete or abstract, which are split as
        ``nnx.grad`` does.
      argnums: Which arguments are differentiated.
      has_aux: As in ``jax.grad``.
      wrt: Filter of ``flax.nnx`` for the variables of an NNX model that are differentiated;
        ``nnx.Param`` for None.
      compiled: Whether to compile ``jax.value_and_grad`` of the loss for ``temporary_bytes``.
      device: Device to compile for; it need not be there (``jax.experimental.topologies``). None
        compiles for where the arguments are, or the default device.

    Returns:
      A report: print it, or read its ``arrays``, ``total_bytes`` and ``temporary_bytes``. With
      arguments sharded over several devices, bytes are those of whole arrays, and temporaries those
      of one device.

    Raises:
      TypeError: If the loss is not a function.
      ValueError: If it does not return a scalar, or ``argnums`` are not positions of arguments.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> def loss(params, x):
      ...     hidden = jnp.sin(x @ params["in"])
      ...     return jnp.sum(hidden @ params["out"])
      >>> params = {"in": jnp.zeros((4, 16)), "out": jnp.zeros((16, 2))}
      >>> report = lro.planning.saved_residuals(loss, params, jnp.zeros((8, 4)), compiled=False)
      >>> [(row.name, row.shape, row.bytes) for row in report.arrays]
      [('cos in loss', (8, 16), 512), ('sin in loss', (8, 16), 512)]
      >>> [row.name for row in report.inputs]
      ['params/out', 'x']
    """
    if not callable(loss):
        raise TypeError(f"loss={loss!r} must be a function.")
    asked = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not asked or any(not -len(args) <= i < len(args) for i in asked):
        raise ValueError(f"argnums={argnums!r} must be positions of the {len(args)} arguments.")
    chosen = {i % len(args) for i in asked}
    parts = [_argument(x, i in chosen, wrt) for i, x in enumerate(args)]
    trained, fixed = [part.trained for part in parts], [part.fixed for part in parts]

    def pure(trained: list[Any], fixed: list[Any]) -> Any:
        return loss(*(p.make(t, f) for p, t, f in zip(parts, trained, fixed, strict=True)))

    def forward(trained: Any, fixed: Any) -> Any:
        value, pull, *_ = jax.vjp(lambda t: pure(t, fixed), trained, has_aux=has_aux)
        return value, pull

    jaxpr, (value, _) = jax.make_jaxpr(forward, return_shape=True)(trained, fixed)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.shape != ():
        shown = getattr(value, "shape", value)
        raise ValueError(f"loss must return a scalar (or with has_aux a pair), got {shown}.")
    made: list[SavedResidualsRow] = []
    inputs: list[SavedResidualsRow] = []
    offloaded: list[SavedResidualsRow] = []
    saved = zip(jaxpr.jaxpr.outvars, origins(jaxpr, _names(loss, trained, fixed)), strict=True)
    # The first result is the value; an array that is saved twice counts once.
    for x, origin in {id(x): (x, origin) for x, origin in list(saved)[1:]}.values():
        shape, dtype = tuple(x.aval.shape), x.aval.dtype
        size = _bytes(shape, dtype)
        row = SavedResidualsRow(origin.name, origin.source, shape, str(dtype), 1, size)
        (inputs if origin.is_input else offloaded if is_on_host(x) else made).append(row)
    temporary = None
    if compiled:
        if device is not None:
            there = jax.sharding.SingleDeviceSharding(device)
            struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
            shapes = jax.eval_shape(lambda *x: x, trained, fixed)
            trained, fixed = jax.tree.map(struct, shapes)
        step = jax.jit(jax.value_and_grad(pure, has_aux=has_aux))
        analysis = step.lower(trained, fixed).compile().memory_analysis()
        temporary = None if analysis is None else analysis.temp_size_in_bytes
    return SavedResidualsReport(tuple(made), tuple(inputs), temporary, tuple(offloaded))


def compare_saved_residuals(
    variants: Mapping[str, Any], *args: Any, loss: Callable[..., Any] | None = None, **options: Any
) -> SavedResidualsComparison:
    """What several losses, or one loss with several models, save for the backward pass.

    Args:
      variants: From names to losses, each called with ``args``; or, where ``loss`` is given, to its
        first arguments, such as a model and its copy with few-bit activations.
      *args: Arguments of the losses; see `saved_residuals`.
      loss: The loss, if ``variants`` are not losses.
      **options: Further arguments of `saved_residuals`.

    Returns:
      A table: print it, or read its ``reports``.

    Raises:
      ValueError: If there are no variants; and as `saved_residuals`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> def plain(x):
      ...     return jnp.sum(jnp.exp(jnp.sin(x)))
      >>> x = jax.ShapeDtypeStruct((1024,), jnp.float32)
      >>> losses = {"plain": plain, "remat": jax.checkpoint(plain)}
      >>> print(lro.planning.compare_saved_residuals(losses, x, compiled=False))
      saved         plain  remat
      cos in plain  4,096      –
      exp in plain  4,096      –
      total         8,192      0
    """
    if not variants:
        raise ValueError("variants must name at least one loss or model.")
    calls = {name: (x, *args) if loss is None else (loss, x, *args) for name, x in variants.items()}
    return SavedResidualsComparison({k: saved_residuals(*v, **options) for k, v in calls.items()})


class _Argument(NamedTuple):
    """One argument: what of it is differentiated, what is not, and how to make it of both."""

    trained: Any
    fixed: Any
    make: Callable[[Any, Any], Any]


def _argument(x: Any, differentiated: bool, wrt: Any) -> _Argument:
    if is_nnx_module(x):
        from flax import nnx

        wrt = nnx.Param if wrt is None else wrt
        graphdef, trained, fixed = nnx.split(x, wrt if differentiated else nnx.Nothing(), ...)
        # Merged from pure arrays, the model's variables belong to the trace that calls it.
        trained, fixed = nnx.as_pure(trained), nnx.as_pure(fixed)
        return _Argument(trained, fixed, lambda t, f: nnx.merge(graphdef, t, f))
    if differentiated:
        return _Argument(x, None, lambda t, _: t)
    return _Argument(None, x, lambda _, f: f)


def _names(loss: Callable[..., Any], *trees: list[Any]) -> list[str]:
    """The path of each leaf, from the name of the loss's parameter on."""
    try:
        parameters = list(inspect.signature(loss).parameters)
    except (TypeError, ValueError):
        parameters = []
    names = []
    for tree in trees:
        for (position, *path), _ in jax.tree_util.tree_leaves_with_path(tree):
            index = position.idx
            first = parameters[index] if index < len(parameters) else f"argument {index}"
            names.append("/".join(filter(None, (first, path_string(tuple(path))))))
    return names


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    extended = jnp.issubdtype(dtype, jax.dtypes.extended)
    bits = 8 * dtype.itemsize if extended else jax.dtypes.itemsize_bits(dtype)
    return -(-math.prod(shape) * bits // 8)
