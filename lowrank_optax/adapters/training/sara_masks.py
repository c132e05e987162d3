"""SaRA over time: which entries are trained, and the one reselection that freezes grown ones."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.adapters.methods.sara import check_selection
from lowrank_optax.adapters.training.leaf_names import check_any_named
from lowrank_optax.matrices.explicit_sharding import constrain, partition_of
from lowrank_optax.matrices.paths import is_whole, normalised_path, path_string
from lowrank_optax.matrices.polar import polar_factor
from lowrank_optax.matrices.rules import DimensionNumbersRule, resolve_dimension_numbers
from lowrank_optax.matrices.views import (
    WeightDimensionNumbers,
    from_matrix,
    matrix_shape,
    to_matrix,
)
from lowrank_optax.slices.call import CannotCutError, Whole
from lowrank_optax.states.arguments import transformation

_SMALLEST_SIDE = 65  # the official code's penalty is of matrices with more than 64 rows and columns


class SaraState(NamedTuple):
    """State of `sara` and `sara_reselection`.

    Attributes:
      count: Number of updates so far, int32.
      threshold: What magnitudes of a leaf's trained entries are below at a selection, float32
        (float64 for float64): a scalar for each leaf, in `sara_reselection` one for each layer of
        a stack, ``[L, 1]``; ``MaskedNode`` for leaves that it leaves alone.
      trained: Which entries are trained, bool in the leaf's shape; likewise.
      inner_state: State of the inner transformation.
    """

    count: Any
    threshold: Any
    trained: Any
    inner_state: Any


def sara(
    inner: optax.GradientTransformation,
    *,
    fraction: float | None = None,
    threshold: float | None = None,
    reselect_after: int | None = None,
    rank_penalty: float | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``inner``, for the entries of parameters with :math:`|w| < \theta` at the start alone.

    Gradients and updates of all other entries are zero, so that they stay as they are bit for bit,
    whatever the inner transformation does (momentum, weight decay). This is the simple form of SaRA
    for any parameters: gradients and the state of ``inner`` have the size of the parameters, and
    the selection takes a byte for each. The adapter `SaRA` stores the selected entries alone.

    All parameters are selected from. Biases that are zero are trained whole and scales of one
    hardly ever; to train some leaves only, put this into ``optax.partition`` beside
    ``optax.set_to_zero()``.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      fraction: Fraction of each leaf that is selected, above 0 and at most 1: its smallest
        entries by magnitude, and all others of the same magnitude as the largest of them. List it
        in the ``static_args`` of ``optax.inject_hyperparams``.
      threshold: The threshold :math:`\theta` instead, the same for all leaves.
      reselect_after: Number of updates :math:`t_0` after which entries are frozen for good whose
        magnitude has reached :math:`\theta`, that of the leaf at the start; None for never. The
        paper takes half of the training.
      rank_penalty: The paper's :math:`\lambda_\mathrm{rank}`: at each step the gradient of one
        matrix, drawn at random among all with more than 64 rows and columns, gets
        :math:`\lambda_\mathrm{rank}` times that of the nuclear norm of its trained entries. It
        costs some 50 products with a square matrix of the shorter side; the paper takes 5e-4. None
        for no penalty.
      seed: Seed of these draws.
      weight_dimension_numbers: Which leaves are matrices for ``rank_penalty``; as for
        `lro.scale_by_projection`, None for the rule by names and shapes.

    Returns:
      A transformation with the state `SaraState`; ``update`` needs ``params`` with
      ``reselect_after`` or ``rank_penalty``.

    Raises:
      ValueError: If not exactly one of ``fraction`` and ``threshold`` is given, or a number is out
        of its range; in ``update``, if ``params`` is missing.
      TypeError: If an argument has the wrong type; in ``init``, if a parameter is not of floating
        point numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"w": jnp.array([0.5, -0.1, 0.2])}
      >>> tx = lro.adapters.sara(optax.sgd(1.0), threshold=0.3)
      >>> updates, state = tx.update({"w": -jnp.ones(3)}, tx.init(params), params)
      >>> print(updates["w"])
      [0. 1. 1.]

    Reference:
      Hu et al., SaRA, 2024, https://arxiv.org/abs/2409.06633.
    """
    if isinstance(fraction, jax.Array):
        raise TypeError(
            f"fraction={fraction} must be a number and not an array: under "
            'optax.inject_hyperparams give static_args="fraction".'
        )
    # Under optax.inject_hyperparams the threshold is an array.
    check_selection(fraction, 1.0 if isinstance(threshold, jax.Array) else threshold)
    if not isinstance(rank_penalty, jax.Array | int | float | None):
        raise TypeError(f"rank_penalty={rank_penalty!r} must be a number.")
    known = isinstance(rank_penalty, int | float)
    if known and not (math.isfinite(rank_penalty) and rank_penalty >= 0):
        raise ValueError(f"rank_penalty={rank_penalty!r} must be finite and not negative.")
    penalty = None
    if rank_penalty is not None and not (known and rank_penalty == 0):
        penalty = _Penalty(rank_penalty, seed, weight_dimension_numbers)

    def start(path: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"the parameter {path_string(path)} is {x.dtype}: sara trains floating point "
                "numbers. Leave it out by optax.masked."
            )
        limit = threshold if fraction is None else _quantile(x, fraction)
        limit = jnp.array(limit, _in_float32(x).dtype)  # each leaf's own, to be donated
        return limit, jnp.abs(_in_float32(x)) < limit

    def check(params: Any, trained: list[jax.Array]) -> None:
        known = trained and not any(isinstance(x, jax.core.Tracer) for x in trained)
        if known and not any(bool(x.any()) for x in trained):
            given = f"threshold={threshold}" if fraction is None else f"fraction={fraction}"
            message = f"sara({given}) selects no entry: nothing is trained."
            warnings.warn(message, stacklevel=4)
        if penalty is not None and is_whole(params) and not penalty.matrices(params):
            warnings.warn(
                f"rank_penalty={rank_penalty} has no effect: no parameter is a matrix of more than "
                f"{_SMALLEST_SIDE - 1} rows and columns.",
                stacklevel=4,
            )

    return _selecting(inner, start, check, reselect_after, penalty)


def sara_reselection(
    inner: optax.GradientTransformation,
    reselect_after: int,
    *,
    threshold: float | None = None,
    names: Sequence[str] = ("values",),
) -> optax.GradientTransformationExtraArgs:
    r"""``inner``, with the values of `SaRA` frozen once they have grown to the threshold.

    After :math:`t_0` updates those values :math:`p` with :math:`|p| \ge \theta` are frozen for good
    ("they have become effective"); the others are trained on, with their moments in ``inner``. A
    frozen value does not move, neither by momentum nor by decay, and its gradient counts in no
    norm. Nothing is frozen at any other time. Arrays keep their lengths.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      reselect_after: The number of updates :math:`t_0`; the paper takes half of the training.
      threshold: :math:`\theta`, that of `SaRA`; None for the least that is above all values of the
        layer in ``init``, which is the one that `SaRA` with a ``fraction`` implies.
      names: Last names of the leaves, ``[..., N]``. Other leaves are left alone.

    Returns:
      A transformation with the state `SaraState`; ``update`` needs ``params``.

    Raises:
      ValueError: If a number is out of its range; in ``init``, if no parameter has one of the
        names; in ``update``, if ``params`` is missing.
      TypeError: If an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"values": jnp.array([0.3, -0.1])}
      >>> tx = lro.adapters.sara_reselection(optax.sgd(1.0), 1, threshold=0.5)
      >>> state, gradient = tx.init(params), {"values": -jnp.array([0.3, 0.1])}
      >>> for _ in range(3):
      ...     updates, state = tx.update(gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["values"], state.trained["values"])
      [0.6 0.2] [False  True]

    Reference:
      Hu et al., SaRA, 2024, https://arxiv.org/abs/2409.06633.
    """
    if threshold is not None and not isinstance(threshold, jax.Array):
        check_selection(None, threshold)
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a sequence of names, for example ('values',).")
    if reselect_after is None:
        raise TypeError("reselect_after=None must be an int: without it, leave this out.")

    def start(path: Any, x: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        if normalised_path(path)[-1:] not in {(name,) for name in names}:
            return None
        limit: ArrayLike | None = threshold
        if limit is None:
            largest = jnp.max(jnp.abs(_in_float32(x)), axis=-1, keepdims=True, initial=0)
            limit = _just_above(largest)
        return jnp.array(limit, _in_float32(x).dtype), jnp.ones_like(x, bool)

    advice = "attach lro.adapters.SaRA, and make the optimizer for what it trains."
    check = lambda params, _: check_any_named(params, names, advice)
    return _selecting(inner, start, check, reselect_after, None)


class _Penalty(NamedTuple):
    """The nuclear norm's gradient, of one matrix at each step."""

    weight: ArrayLike
    seed: ArrayLike
    rule: DimensionNumbersRule

    def matrices(self, params: Any) -> dict[int, WeightDimensionNumbers]:
        """The dimension numbers of leaves that are large enough matrices, by number."""
        leaves = jax.tree.leaves(params)
        specs = enumerate(resolve_dimension_numbers(self.rule, params))
        known = {i: spec for i, spec in specs if spec is not None}
        sides = {i: matrix_shape(leaves[i].shape, spec)[-2:] for i, spec in known.items()}
        return {i: spec for i, spec in known.items() if min(sides[i]) >= _SMALLEST_SIDE}

    def add(self, gradients: Any, trained: list[jax.Array], params: Any, count: jax.Array) -> Any:
        """The gradients with that of the penalty of this step's matrix."""
        matrices, values = self.matrices(params), jax.tree.leaves(params)
        if not matrices:
            return gradients
        new, treedef = jax.tree.flatten(gradients)
        numbers = {i: _stack_shape(values[i], spec)[0] for i, spec in matrices.items()}
        key, left = jax.random.fold_in(jax.random.key(self.seed), count), sum(numbers.values())
        drawn = jax.random.randint(key, (), 0, left)
        for i, spec in matrices.items():
            add = functools.partial(self._added, values[i], trained[i], spec)
            here = (drawn >= 0) & (drawn < numbers[i])
            new[i] = jax.lax.cond(here, add, lambda g, _: g, new[i], drawn)
            drawn = drawn - numbers[i]
        return treedef.unflatten(new)

    def _added(
        self,
        p: jax.Array,
        trained: jax.Array,
        spec: WeightDimensionNumbers,
        g: jax.Array,
        number: jax.Array,
    ) -> jax.Array:
        flat = lambda x: to_matrix(x, spec).reshape(_stack_shape(g, spec))
        selected = flat(trained)[number]
        slope = polar_factor(jnp.where(selected, flat(p)[number], 0))
        added = jnp.where(selected, self.weight * slope, 0).astype(g.dtype)
        summed = flat(g).at[number].add(added)
        return from_matrix(summed.reshape(matrix_shape(g.shape, spec)), spec, g)


def _stack_shape(x: jax.Array, spec: WeightDimensionNumbers) -> tuple[int, int, int]:
    """The shape of a leaf as one stack of matrices."""
    *batch, rows, columns = matrix_shape(x.shape, spec)
    return math.prod(batch), rows, columns


def _selecting(
    inner: optax.GradientTransformation,
    start: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array] | None],
    check: Callable[[Any, list[jax.Array]], None],
    reselect_after: int | None,
    penalty: _Penalty | None,
) -> optax.GradientTransformationExtraArgs:
    """``inner`` on the entries that are selected.

    Args:
      inner: Any optax transformation.
      start: Function of a path and a leaf: its threshold, and what is trained at first; None for a
        leaf that is left alone.
      check: Function of the parameters and of what is trained, called in ``init``.
      reselect_after: As for `sara`.
      penalty: As for `sara`; then no leaf is left alone.
    """
    known = isinstance(reselect_after, int | np.integer | jax.Array | None)
    if not known or isinstance(reselect_after, bool):
        raise TypeError(f"reselect_after={reselect_after!r} must be an int.")
    if isinstance(reselect_after, int) and reselect_after < 1:
        raise ValueError(f"reselect_after={reselect_after!r} must be at least 1.")
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> SaraState:
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        found = [start(path, x) for path, x in paths]
        check(params, [x[1] for x in found if x is not None])
        put = lambda n: treedef.unflatten([x[n] if x else optax.MaskedNode() for x in found])
        return SaraState(jnp.zeros([], jnp.int32), put(0), put(1), inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SaraState]:
        for name, value in (("reselect_after", reselect_after), ("rank_penalty", penalty)):
            if value is not None and params is None:
                raise ValueError(f"{name} needs the parameters: tx.update(grads, state, params).")
        if penalty is not None and (extra_args.get("whole") or Whole()).tree is not None:
            raise CannotCutError("rank_penalty draws one of all matrices: it needs the whole tree.")
        trained = state.trained
        if reselect_after is not None:
            now = state.count == reselect_after
            small = lambda flags, x, limit: flags & (~now | (jnp.abs(_in_float32(x)) < limit))
            trained = _map_chosen(small, trained, params, state.threshold)
        stopped = lambda tree: _map_chosen(lambda x, flags: jnp.where(flags, x, 0), tree, trained)
        gradients = stopped(updates)
        if penalty is not None:
            gradients = penalty.add(gradients, jax.tree.leaves(trained), params, state.count)
        new, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        return stopped(new), SaraState(count, state.threshold, trained, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _map_chosen(f: Callable[..., jax.Array], first: Any, *rest: Any) -> Any:
    """``f`` of leaves; the first tree's where another has a `MaskedNode`."""
    masked = lambda x: isinstance(x, optax.MaskedNode)
    one = lambda x, *others: x if any(map(masked, (x, *others))) else f(x, *others)
    return jax.tree.map(one, first, *rest, is_leaf=masked)


def _in_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _quantile(x: jax.Array, fraction: float) -> jax.Array:
    """The least number above the ``fraction`` smallest magnitudes."""
    if x.size == 0:
        return jnp.asarray(jnp.inf, _in_float32(x).dtype)
    partition = partition_of(x)
    x = constrain(_in_float32(x), None if partition is None else PartitionSpec(*[None] * x.ndim))
    return _just_above(jnp.sort(jnp.abs(x).ravel())[max(1, round(fraction * x.size)) - 1])


def _just_above(x: jax.Array) -> jax.Array:
    """The least normal number above ``x``: XLA takes others for zero."""
    above = jnp.nextafter(x, jnp.full_like(x, jnp.inf))
    return jnp.maximum(above, jnp.finfo(x.dtype).tiny)
