"""What a rule selects, and what an optimizer keeps for it, as a table."""

from collections.abc import Iterator
import re
from typing import Any, NamedTuple
import warnings

import jax
import optax

from lowrank_optax.matrices.flax_layers import is_linen_module, is_nnx_module
from lowrank_optax.matrices.paths import normalised_path, owner_of, path_string
from lowrank_optax.matrices.rules import DimensionNumbersRule, resolve_dimension_numbers
from lowrank_optax.matrices.views import WeightDimensionNumbers, matrix_shape
from lowrank_optax.modules.report import Report, Table, matrices_string

_BASES = ("basis", "projector")  # ours, and that of ``optax.contrib.galore``


class SelectionRow(NamedTuple):
    """One parameter.

    Attributes:
      path: Its path, as ``blocks/mlp/up/kernel``.
      shape: Its shape.
      view: ``4 × (512 × 1376)``, a batch of matrices of rows × columns; ``–`` if it is no matrix.
      method: The transformations that keep state for it, outermost first (``projection + adam``);
        without a transformation ``matrix``, and in both cases ``–`` for nothing.
      rank: Rank of its projection; None if it has none.
      bytes: Bytes of optimizer state for it; without a transformation its own.
    """

    path: str
    shape: tuple[int, ...]
    view: str
    method: str
    rank: int | None
    bytes: int


class SelectionTable(Report):
    """A table of `SelectionRow`; see `selection_table`.

    Attributes:
      rows: One `SelectionRow` a parameter, in the order of ``jax.tree.leaves``.
      other_bytes: Bytes of state that belong to no parameter, such as step counts.
      total_bytes: Bytes of all rows and ``other_bytes``.
      compiled_peak_bytes: Bytes that one compiled update allocates, parameters and gradients
        included. None without ``compiled=True``, and where the backend does not report them.
    """

    def __init__(
        self,
        rows: list[SelectionRow],
        other_bytes: int,
        has_state: bool,
        compiled_peak_bytes: int | None = None,
    ) -> None:
        self.rows, self.other_bytes = rows, other_bytes
        self.total_bytes = sum(row.bytes for row in rows) + other_bytes
        self.compiled_peak_bytes = compiled_peak_bytes
        self._has_state = has_state

    def table(self) -> Table:
        """One row a parameter, then totals."""
        blank = ("", "", "", "")
        size = ">state bytes" if self._has_state else ">bytes"
        others = [("(no parameter's)", *blank, self.other_bytes)] if self._has_state else []
        footer = [("total", *blank, self.total_bytes)]
        if self.compiled_peak_bytes is not None:
            footer.append(("compiled peak", *blank, self.compiled_peak_bytes))
        columns = ("path", "shape", "view", "method", ">rank", size)
        return Table(columns, [*self.rows, *others], footer)


def selection_table(
    params: Any,
    weight_dimension_numbers: DimensionNumbersRule = None,
    transformation: optax.GradientTransformation | None = None,
    *,
    compiled: bool = False,
) -> SelectionTable:
    """What a rule makes of each parameter, and what a transformation keeps for it.

    The state is that of ``jax.eval_shape(transformation.init, params)``: nothing is computed. A
    leaf of it belongs to the parameter whose path ends the leaf's own path (to the longest such),
    which holds wherever state is a tree parallel to the parameters, as everywhere in optax.

    With ``compiled=True`` the last row is the peak of one update: the bytes that
    ``transformation.update`` allocates, compiled for the default backend and not run. It counts
    parameters, gradients, state and temporaries. Gradients and state are donated, so that updates
    are written over gradients, as in a jitted training step.

    Args:
      params: Any tree of arrays or ``jax.ShapeDtypeStruct``, an NNX module (its ``nnx.Param`` are
        meant) or a bound Linen module (its collection ``params``).
      weight_dimension_numbers: The rule, as the optimizers take it; for None it is the one by
        names, also for a module.
      transformation: Any optax transformation, made with that same rule.
      compiled: Whether to compile one update of the transformation and add its peak.

    Returns:
      The table: ``print`` it, or read its ``rows``.

    Raises:
      ValueError: If the rule does not fit the parameters, or ``compiled`` is True and there is no
        ``transformation``.
      TypeError: If the rule is not one of those above, or the transformation has no ``init``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.zeros((4, 16, 64)), "bias": jnp.zeros((4, 64))}}
      >>> print(selection_table(params, transformation=optax.adam(1e-3)))
      path              shape        view           method  rank  state bytes
      up/bias           4 × 64       –              adam       –        2,048
      up/kernel         4 × 16 × 64  4 × (16 × 64)  adam       –       32,768
      (no parameter's)                                                      4
      total                                                            34,820
      >>> table = selection_table(params, transformation=optax.adam(1e-3), compiled=True)
      >>> table.compiled_peak_bytes >= 2 * 17_408 + table.total_bytes  # parameters and gradients
      True

    Reference:
      States as parallel trees: https://optax.readthedocs.io
    """
    if compiled and transformation is None:
        raise ValueError(
            "compiled=True is the peak of a transformation's update, and transformation is None: "
            "give both, as selection_table(params, transformation=tx, compiled=True)."
        )
    params = _parameters(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    specs = resolve_dimension_numbers(weight_dimension_numbers, params)
    if transformation is None:
        kept = {normalised_path(path): _Kept(_bytes(leaf)) for path, leaf in leaves}
        other, peak = 0, None
    else:
        kept, other = _state_of(transformation, params)
        peak = _update_peak_bytes(transformation, params) if compiled else None
    rows = []
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        own = kept[normalised_path(path)]
        method = " + ".join(name for _, name in sorted(own.methods))
        if transformation is None and spec is not None:
            method = "matrix"
        shape = tuple(leaf.shape)
        row = (path_string(path), shape, _view(shape, spec), method or "–", own.rank, own.bytes)
        rows.append(SelectionRow(*row))
    return SelectionTable(rows, other, transformation is not None, peak)


class _Kept(NamedTuple):
    bytes: int = 0
    methods: frozenset[tuple[int, str]] = frozenset()  # with how deep each is nested
    rank: int | None = None


def _parameters(params: Any) -> Any:
    if is_nnx_module(params):
        from flax import nnx

        return nnx.state(params, nnx.Param)
    if is_linen_module(params):
        return params.variables.get("params", {})
    return params


def _state_of(
    transformation: optax.GradientTransformation, params: Any
) -> tuple[dict[tuple[str, ...], _Kept], int]:
    """What is kept for each parameter, and the bytes of what belongs to none."""
    if not callable(getattr(transformation, "init", None)):
        raise TypeError(f"transformation={transformation!r} must be an optax transformation.")
    state = jax.eval_shape(transformation.init, params)
    kept = {normalised_path(p): _Kept() for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    other = 0
    for path, leaf, method in _state_leaves((state,)):
        names = normalised_path(path)
        name = owner_of(path, kept)
        if name is None:
            other += _bytes(leaf)
        elif leaf.size:  # optax's galore keeps an empty projector for what it leaves alone
            own = kept[name]
            is_basis = any(field in _BASES for field in names[: len(names) - len(name)])
            # A rule may keep more than its basis, which then comes first.
            first = is_basis and own.rank is None and leaf.ndim
            rank = leaf.shape[-1] if first else own.rank
            kept[name] = _Kept(own.bytes + _bytes(leaf), own.methods | method, rank)
    return kept, other


def _state_leaves(
    tree: Any, prefix: tuple[Any, ...] = (), depth: int = 0
) -> Iterator[tuple[tuple[Any, ...], Any, frozenset[tuple[int, str]]]]:
    """Leaves of a state: path, leaf, and the innermost NamedTuple around it (or nothing)."""
    is_record = lambda x: x is not tree and isinstance(x, tuple) and hasattr(x, "_fields")
    around = frozenset({(depth, _short(type(tree).__name__))} if depth else ())
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_record):
        if is_record(x):
            yield from _state_leaves(x, (*prefix, *path), depth + 1)
        else:
            yield (*prefix, *path), x, around


def _short(state_name: str) -> str:
    """``ScaleByAdamState`` is ``adam``, ``TraceState`` is ``trace``."""
    return re.sub(r"^ScaleBy(?=.)|(?<=.)State$", "", state_name).lower()


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _view(shape: tuple[int, ...], spec: WeightDimensionNumbers | None) -> str:
    return "–" if spec is None else matrices_string(matrix_shape(shape, spec))


def _update_peak_bytes(transformation: optax.GradientTransformation, params: Any) -> int | None:
    """Arguments, temporaries, and the outputs that do not fit into donated arguments."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.eval_shape(transformation.init, shapes)
    # An update that does not read the parameters still has them in memory.
    update = jax.jit(transformation.update, donate_argnums=(0, 1), keep_unused=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        memory = update.lower(shapes, state, shapes).compile().memory_analysis()
    if memory is None:
        return None
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new_outputs + memory.temp_size_in_bytes
