"""PRILoRA's pruning: entries of the first factor with the smallest scores are set to zero."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.matrices.explicit_sharding import constrain, in_whole_runs, partition_of
from lowrank_optax.matrices.paths import is_whole, normalised_path
from lowrank_optax.states.arguments import transformation

PruningGroup: TypeAlias = Literal["per_rank", "per_matrix"] | tuple[int, int]


class PriloraPruningState(NamedTuple):
    """State of `prilora_pruning`.

    Attributes:
      count: Number of updates so far, int32.
      input_norms: Exponential averages of the inputs' root mean squares, float32 in the shapes of
        the leaves ``input_squares``; ``MaskedNode`` for other leaves.
      masks: What is held at zero, bool in the shapes of the leaves ``A``; ``MaskedNode`` for other
        leaves, and everywhere without ``hold_mask``.
      inner_state: State of the inner transformation.
    """

    count: Any
    input_norms: Any
    masks: Any
    inner_state: Any


def prilora_pruning(
    inner: optax.GradientTransformation,
    every: int = 40,
    fraction: float | None = None,
    *,
    beta: float = 0.9,
    group: PruningGroup = "per_rank",
    hold_mask: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""``inner``, and every so many steps the least important entries of ``A`` are set to zero.

    For the leaves named ``A`` and ``input_squares`` of `PRILoRA`. With the root mean square
    :math:`q_i` of input feature :math:`i` in a step, and :math:`\bar x = q` in the first step,

    .. math::
      \bar x_i \leftarrow \beta \bar x_i + (1 - \beta) q_i, \qquad S_{ic} = |A_{ic}| \, \bar x_i .

    After update :math:`t = 1, 2, \dots` with :math:`t` a multiple of ``every``, the entries of the
    lowest :math:`S` are set to zero. Of equal ones the lower index goes first: that of the input
    feature, then that of the rank. They are trained on from zero, and may be cut again at the next
    event. Moments of ``inner`` stay as they are.

    ``inner`` does not see the leaves ``input_squares``, which stay as they are. Put gradient
    clipping inside of it: statistics arrive as gradients. A step without statistics for a matrix
    leaves its average as it was, and a matrix that has had none is not pruned.

    The paper's constants could not be verified, since its text and code are not public: an
    interval of 40, half of the entries, ``beta`` 0.9, groups per rank, and gradients that go on in
    pruned entries are what seemed most likely. `q` is the root of a mean over tokens instead of the
    norm, so that batches of any size count alike; in one step the order of scores is the same.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      every: Number of steps from one event to the next.
      fraction: Fraction :math:`\rho` of entries to set to zero, rounded down to a number of
        entries; None for 0.5.
      beta: Decay of the average.
      group: Entries that compete: ``"per_rank"``, a column of ``A``; ``"per_matrix"``, all of it;
        ``(N, M)``, runs of ``M`` consecutive input features in a column, of which the best ``N``
        stay. Features beyond the last whole run are not pruned.
      hold_mask: Whether entries stay zero from the first event on.

    Returns:
      A transformation with the state `PriloraPruningState`.

    Raises:
      TypeError: If ``inner`` is not an optax transformation.
      ValueError: If an option is out of its range, or ``fraction`` is given beside runs ``(N, M)``;
        in ``init``, if no leaf ``A`` has ``input_squares`` beside it; in ``update``, if it is not
        given the parameters.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> a = jnp.array([[0.1, 0.3], [-0.5, 0.02], [0.2, -0.1], [0.05, 0.4]])
      >>> params = {"A": a, "input_squares": jnp.zeros((4, 1))}
      >>> tx = lro.adapters.prilora_pruning(optax.sgd(0.1), every=1)
      >>> squares = jnp.array([[1.0], [0.01], [4.0], [16.0]])  # what the backward pass delivers
      >>> gradient = {"A": jnp.zeros_like(a), "input_squares": squares}
      >>> updates, state = tx.update(gradient, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["A"].T)
      [[0.   0.   0.2  0.05]
       [0.3  0.   0.   0.4 ]]

    References:
      Benedek and Wolf, PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, 2024,
      https://arxiv.org/abs/2401.11316. The score is that of Sun et al., Wanda, 2023,
      https://arxiv.org/abs/2306.11695.
    """
    inner = transformation("inner", inner)
    _check(every, fraction, beta, group)
    share = 0.5 if fraction is None else fraction

    def init_fn(params: optax.Params) -> PriloraPruningState:
        pairs = _pairs(params)
        if is_whole(params) and not pairs:
            raise ValueError(
                "no parameter A has input_squares beside it: attach lro.adapters.PRILoRA, and "
                "train both."
            )
        of_a = {a for a, _ in pairs} if hold_mask else set()
        norms = _kept(params, _slots(params), lambda x: jnp.zeros_like(x, jnp.float32))
        masks = _kept(params, of_a, lambda x: jnp.zeros_like(x, bool))
        shown = _hidden(params)
        return PriloraPruningState(jnp.zeros([], jnp.int32), norms, masks, inner.init(shown))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PriloraPruningState]:
        if params is None:
            raise ValueError("prilora_pruning needs the parameters: update(u, state, params).")
        count: Any = optax.safe_increment(state.count)
        norms = jax.tree.map(
            lambda square, norm: _averaged(square, norm, beta),
            _kept(updates, _slots(updates), lambda x: x),
            state.input_norms,
        )
        new, inner_state = inner.update(
            _hidden(updates), state.inner_state, _hidden(params), **extra_args
        )
        steps, old, averages = _by_path(new), _by_path(params), _by_path(norms)
        masks, pairs = _by_path(state.masks), _pairs(updates)
        factors = {a: (old[a], steps[a]) for a, _ in pairs}
        if hold_mask:
            factors = {a: (x, _cut(x, u, masks[a])) for a, (x, u) in factors.items()}

        def find(_: Any) -> dict[Any, jax.Array]:
            found = {}
            for path, slot in pairs:
                a, u = factors[path]
                after = (a + u).astype(a.dtype)
                second = old.get((*path[:-1], "B"))
                found[path] = _lowest(after, second, averages[slot], share, group)
            return found

        due = count % every == 0
        if hold_mask:
            masks = jax.lax.cond(due, find, lambda _: masks, None)
            cut = {path: _cut(*factors[path], masks[path]) for path in factors}
        else:
            prune = lambda us: {p: _cut(old[p], us[p], mask) for p, mask in find(None).items()}
            us = {p: u.astype(jnp.result_type(u, a)) for p, (a, u) in factors.items()}
            cut = jax.lax.cond(due, prune, lambda us: us, us)
        new = _filled(updates, new, cut)
        held = _filled(state.masks, state.masks, masks) if hold_mask else state.masks
        return new, PriloraPruningState(count, norms, held, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaged(square: jax.Array, norm: jax.Array, beta: ArrayLike) -> jax.Array:
    """The average of root mean squares with those of this step, if there are any."""
    q = jnp.sqrt(jnp.maximum(square.astype(jnp.float32), 0))
    of_matrix = lambda found: jnp.any(found, axis=-2, keepdims=True)
    seen = of_matrix(q > 0) & ~of_matrix(~jnp.isfinite(q))
    average = jnp.where(of_matrix(norm > 0), norm + (1 - beta) * (q - norm), q)
    return jnp.where(seen, average, norm)


def _lowest(
    a: jax.Array,
    b: jax.Array | None,
    norm: jax.Array,
    fraction: ArrayLike,
    group: PruningGroup,
) -> jax.Array:
    """Which entries of ``a [..., n, r]`` are to be zero, with ``norm [..., n, 1]``."""
    score, (n, r) = jnp.abs(a.astype(jnp.float32)) * norm, a.shape[-2:]
    score = in_whole_runs(score, a.ndim - 2, group[1] if isinstance(group, tuple) else n)
    if group == "per_rank":
        mask = _order(score, -2) < _whole(fraction, n)
    elif group == "per_matrix":
        # What pads a stack to its largest rank is zero in both factors, and does not count.
        live = jnp.any(a != 0, axis=-2)
        live = live if b is None else live | jnp.any(b != 0, axis=-1)
        score = jnp.where(live[..., None, :], score, jnp.inf).reshape(*a.shape[:-2], n * r)
        counts = jnp.asarray(_whole(fraction, n * np.arange(r + 1)))[jnp.sum(live, axis=-1)]
        mask = (_order(score, -1) < counts[..., None]).reshape(a.shape)
    else:
        best, run = group
        whole = n // run * run
        runs = score[..., :whole, :].reshape(*a.shape[:-2], n // run, run, r)
        mask = (_order(runs, -2) < run - best).reshape(*a.shape[:-2], whole, r)
        mask = jnp.pad(mask, [*[(0, 0)] * (a.ndim - 2), (0, n - whole), (0, 0)])
    return constrain(mask, partition_of(a)) & jnp.any(norm > 0, axis=-2, keepdims=True)


def _order(score: jax.Array, axis: int) -> jax.Array:
    """The place of each element in ascending order; of equal ones the first comes first."""
    return jnp.argsort(jnp.argsort(score, axis=axis), axis=axis)


def _whole(fraction: ArrayLike, sizes: Any) -> Any:
    """A fraction of these sizes, rounded down; a whole number but for its rounding is that one."""
    if isinstance(fraction, float | int):
        return np.floor(fraction * sizes + 1e-6).astype(np.int32)
    return jnp.floor(fraction * sizes * (1 + 5e-7)).astype(jnp.int32)


def _cut(a: jax.Array, update: jax.Array, mask: jax.Array) -> jax.Array:
    """The update that sets ``a`` to zero where the mask is set; exactly, in the wider dtype."""
    return jnp.where(mask, -a, update).astype(jnp.result_type(update, a))


def _by_path(tree: Any) -> dict[tuple[str, ...], jax.Array]:
    return {normalised_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _slots(tree: Any) -> set[tuple[str, ...]]:
    """The paths of the statistics."""
    return {path for path in _by_path(tree) if path[-1:] == ("input_squares",)}


def _pairs(tree: Any) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The paths of first factors with those of their statistics."""
    slots = _slots(tree)
    firsts = [path for path in _by_path(tree) if path[-1:] == ("A",)]
    pairs = [(path, (*path[:-1], "input_squares")) for path in firsts]
    return [(a, slot) for a, slot in pairs if slot in slots]


def _kept(tree: Any, paths: set[tuple[str, ...]], make: Callable[[jax.Array], jax.Array]) -> Any:
    """What ``make`` makes of the leaves at these paths; ``MaskedNode`` for others."""
    one = lambda path, x: make(x) if normalised_path(path) in paths else optax.MaskedNode()
    return jax.tree_util.tree_map_with_path(one, tree)


def _hidden(tree: Any) -> Any:
    """The tree as ``inner`` sees it, without the statistics."""
    return _kept(tree, _by_path(tree).keys() - _slots(tree), lambda x: x)


def _filled(updates: Any, new: Any, cut: Mapping[tuple[str, ...], jax.Array]) -> Any:
    """The new updates with those that were cut, and zeros where ``inner`` saw nothing."""

    def one(path: Any, update: jax.Array, found: Any) -> jax.Array:
        own = jnp.zeros_like(update) if isinstance(found, optax.MaskedNode) else found
        return cut.get(normalised_path(path), own)

    return jax.tree_util.tree_map_with_path(one, updates, new)


def _check(every: Any, fraction: Any, beta: Any, group: Any) -> None:
    """Raises ValueError for an option out of its range."""
    if isinstance(every, int | float) and (every < 1 or every != int(every)):
        raise ValueError(f"every={every!r} must be a number of steps, at least 1.")
    for name, value in (("fraction", fraction), ("beta", beta)):
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be at least 0 and below 1.")
    if isinstance(group, str) and group in ("per_rank", "per_matrix"):
        return
    numbers = isinstance(group, tuple) and [x for x in group if isinstance(x, int)]
    if not numbers or len(group) != 2 or len(numbers) != 2 or not 1 <= group[0] <= group[1]:
        raise ValueError(
            f"group={group!r} must be 'per_rank', 'per_matrix' or (N, M), to keep N of M entries."
        )
    if fraction is not None:
        raise ValueError(f"fraction={fraction!r} has no effect with group={group}: leave it out.")
