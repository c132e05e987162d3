"""PRILoRA's pruning: entries of the first factor with the smallest scores are set to zero."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.adapters.training.leaf_names import all_but, are_named, check_any_named
from lowrank_optax.matrices.explicit_sharding import constrain, in_whole_runs, partition_of
from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.states.arguments import transformation

PruningGroup: TypeAlias = Literal["per_rank", "per_matrix"] | tuple[int, int]
Path: TypeAlias = tuple[str, ...]

_SLOTS = ("input_squares", "token_share")


class PriloraPruningState(NamedTuple):
    """State of `prilora_pruning`.

    Attributes:
      count: Number of updates so far, int32.
      input_norms: Exponential averages of the inputs' root mean squares, float32 in the shapes of
        the leaves ``input_squares``; ``MaskedNode`` for other leaves.
      masks: What is held at zero, bool in the shapes of the leaves ``A``; ``MaskedNode`` for other
        leaves, and everywhere without ``hold_mask``.
      inner_state: State of ``optax.masked(inner, ...)``.
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

    For the leaves named ``A``, ``input_squares`` and ``token_share`` of `PRILoRA`. With the root
    mean square :math:`q_i` of input feature :math:`i` over the tokens of a step that the loss
    depends on, and :math:`\bar x = q` in the first step,

    .. math::
      \bar x_i \leftarrow \beta \bar x_i + (1 - \beta) q_i, \qquad S_{ic} = |A_{ic}| \, \bar x_i .

    After update :math:`t = 1, 2, \dots` with :math:`t` a multiple of ``every``, the entries of the
    lowest :math:`S` are set to zero. Of equal ones the lower index goes first: that of the input
    feature, then that of the rank. They are trained on from zero, and may be cut again at the next
    event. Moments of ``inner`` stay as they are.

    :math:`q^2` is the gradient of ``input_squares`` divided by that of ``token_share``, so it does
    not depend on how gradients are summed or scaled: by ``jax.vmap`` over examples, micro-batches,
    devices or a loss scale.

    ``inner`` does not see ``input_squares`` and ``token_share``, which stay as they are. Put
    gradient clipping inside of it: statistics arrive as gradients. A step without statistics for a
    matrix leaves its average as it was, and a matrix that has had none is not pruned.

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
        in ``init``, if a leaf ``A`` does not have ``input_squares`` and ``token_share`` beside it,
        or there is no leaf ``A`` (unless the tree is a part, as of ``optax.partition``); in
        ``update``, if it is not given the parameters.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> a = jnp.array([[0.1, 0.3], [-0.5, 0.02], [0.2, -0.1], [0.05, 0.4]])
      >>> params = {"A": a, "input_squares": jnp.zeros((4, 1)), "token_share": jnp.zeros(1)}
      >>> tx = lro.adapters.prilora_pruning(optax.sgd(0.1), every=1)
      >>> squares = jnp.array([[1.0], [0.01], [4.0], [16.0]])  # what the backward pass delivers
      >>> gradient = {"A": jnp.zeros_like(a), "input_squares": squares, "token_share": jnp.ones(1)}
      >>> updates, state = tx.update(gradient, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["A"].T)
      [[0.   0.   0.2  0.05]
       [0.3  0.   0.   0.4 ]]

    References:
      Benedek and Wolf, PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, 2024,
      https://arxiv.org/abs/2401.11316. The score is that of Sun et al., Wanda, 2023,
      https://arxiv.org/abs/2306.11695.
    """
    inner = optax.masked(transformation("inner", inner), all_but(_SLOTS))
    _check(every, fraction, beta, group)
    rho = 0.5 if fraction is None else fraction

    def init_fn(params: optax.Params) -> PriloraPruningState:
        leaves, adapters = _by_path(params), _adapters(params)
        check_any_named(params, ("A",), "attach lro.adapters.PRILoRA, and train all its arrays.")
        norms, masks = {}, {}
        for adapter in adapters:
            a, squares, _ = _paths(adapter)
            norms[squares] = jnp.zeros_like(leaves[squares], jnp.float32)
            if hold_mask:
                masks[a] = jnp.zeros_like(leaves[a], bool)
        count, tree_of = jnp.zeros([], jnp.int32), lambda x: _with_leaves(params, x, _nothing)
        return PriloraPruningState(count, tree_of(norms), tree_of(masks), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PriloraPruningState]:
        if params is None:
            raise ValueError("prilora_pruning needs the parameters: update(u, state, params).")
        count: Any = optax.safe_increment(state.count)
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        given, old, steps = _by_path(updates), _by_path(params), _by_path(new)
        norms, masks = _by_path(state.input_norms), _by_path(state.masks)
        adapters = _adapters(updates)
        for adapter in adapters:
            a, squares, share = _paths(adapter)
            norms[squares] = _averaged(given[squares], given[share], norms[squares], beta)
            masks.setdefault(a, jnp.zeros_like(old[a], bool))

        def find(_: Any) -> dict[Any, jax.Array]:
            found = {}
            for adapter in adapters:
                a, squares, _ = _paths(adapter)
                after = jnp.where(masks[a], 0, (old[a] + steps[a]).astype(old[a].dtype))
                found[a] = _lowest(after, old.get((*adapter, "B")), norms[squares], rho, group)
            return found

        masks = jax.lax.cond(count % every == 0, find, lambda _: masks, None)
        cut = {path: _cut(old[path], steps[path], mask) for path, mask in masks.items()}
        still = lambda is_slot, u: jnp.zeros_like(u) if is_slot else u
        new = jax.tree.map(still, are_named(new, _SLOTS), new)
        return _with_leaves(new, cut, lambda u: u), PriloraPruningState(
            count,
            _with_leaves(updates, norms, _nothing),
            _with_leaves(updates, masks if hold_mask else {}, _nothing),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaged(squares: jax.Array, share: jax.Array, norm: jax.Array, beta: ArrayLike) -> jax.Array:
    """The average of root mean squares with those of this step, if there are any.

    Args:
      squares: Gradient of ``input_squares [..., n, 1]``.
      share: Gradient of ``token_share [..., 1]``.
      norm: The average before ``[..., n, 1]``.
      beta: Its decay.
    """
    share = share.astype(jnp.float32)[..., None]
    mean = squares.astype(jnp.float32) / jnp.where(share == 0, 1, share)
    q = jnp.sqrt(jnp.maximum(mean, 0))
    of_matrix = lambda found: jnp.any(found, axis=-2, keepdims=True)
    seen = (share != 0) & ~of_matrix(~jnp.isfinite(q))
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


def _whole(fraction: ArrayLike, sizes: ArrayLike) -> jax.Array:
    """A fraction of these sizes, rounded down; a whole number but for its rounding is that one."""
    rounding = 1 + 2 * jnp.finfo(jnp.float32).eps  # of the fraction and of two products
    return jnp.floor(jnp.float32(fraction) * sizes * rounding).astype(jnp.int32)


def _cut(a: jax.Array, update: jax.Array, mask: jax.Array) -> jax.Array:
    """The update that sets ``a`` to zero where the mask is set; exactly, in the wider dtype."""
    return jnp.where(mask, -a, update).astype(jnp.result_type(update, a))


def _by_path(tree: Any) -> dict[Path, jax.Array]:
    return {normalised_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _paths(adapter: Path) -> tuple[Path, Path, Path]:
    """The paths of an adapter's first factor, mean squares and share of tokens."""
    squares, share = _SLOTS
    return (*adapter, "A"), (*adapter, squares), (*adapter, share)


def _adapters(tree: Any) -> list[Path]:
    """The paths of the adapters in a tree.

    Raises:
      ValueError: If a first factor has no statistics beside it.
    """
    paths = _by_path(tree).keys()
    firsts = [path[:-1] for path in paths if path[-1:] == ("A",)]
    found = [adapter for adapter in firsts if paths >= set(_paths(adapter))]
    others = ["/".join((*adapter, "A")) for adapter in firsts if adapter not in found]
    if others:
        raise ValueError(
            f"{', '.join(others)} would never be pruned: input_squares or token_share is missing "
            "beside it. Attach lro.adapters.PRILoRA and train all three; leave out the factors of "
            "other adapters by optax.partition."
        )
    return found


def _nothing(_: jax.Array) -> optax.MaskedNode:
    return optax.MaskedNode()


def _with_leaves(
    tree: Any, found: Mapping[Path, jax.Array], other: Callable[[jax.Array], Any]
) -> Any:
    """The tree with these leaves at their paths, and what ``other`` makes of all others."""

    def one(path: Any, x: jax.Array) -> Any:
        name = normalised_path(path)
        return found[name] if name in found else other(x)

    return jax.tree_util.tree_map_with_path(one, tree)


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
