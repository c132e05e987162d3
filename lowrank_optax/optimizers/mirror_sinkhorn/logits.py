"""Mirror Sinkhorn as an optax transformation, of parameters that are logarithms of couplings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.optimizers.mirror_sinkhorn.iterates import (
    First,
    check_steps,
    columns_next,
    rate_at,
    scaled,
)
from lowrank_optax.optimizers.mirror_sinkhorn.polytope import (
    check_marginals,
    in_float,
    largest_finite,
    nonzero,
)
from lowrank_optax.states.precision import scalar_dtype


class MirrorSinkhornUpdatesState(NamedTuple):
    """State of `mirror_sinkhorn_updates`.

    Attributes:
      count: Number of steps so far, int32.
      bound: The largest ``|gradient|`` so far of each matrix, float32 in the shape of its batch
        axes; ``()`` if ``bound`` or ``learning_rate`` was given.
    """

    count: jax.Array
    bound: Any


@jax.custom_jvp
def coupling_from_logits(logits: jax.Array) -> jax.Array:
    """``exp(logits)``, through which gradients by the coupling arrive at the logits as they are.

    `mirror_sinkhorn_updates` needs them so: the true gradient by the logits is smaller by a factor
    of the coupling, which cannot be divided out where that underflows.

    Args:
      logits: Logarithm of a coupling, ``[..., n, m]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax.optimizers import coupling_from_logits
      >>> cost = jnp.array([[0.0, 1.0], [2.0, 0.5]])
      >>> loss = lambda logits: jnp.sum(cost * coupling_from_logits(logits))
      >>> print(jax.grad(loss)(jnp.log(jnp.full((2, 2), 0.25))))
      [[0.  1. ]
       [2.  0.5]]
    """
    return jnp.exp(logits)


@coupling_from_logits.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return coupling_from_logits(*primals), tangents[0]


def mirror_sinkhorn_updates(
    row_marginal: ArrayLike | None = None,
    column_marginal: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    first: First = "columns",
) -> optax.GradientTransformationExtraArgs:
    r"""`mirror_sinkhorn` as an optax transformation: couplings trained beside other parameters.

    Every parameter is the logarithm :math:`L` of a coupling of unit mass, ``[..., n, m]``, and its
    gradient is taken by the coupling, :math:`G = \partial \ell / \partial e^L`, which is what
    `coupling_from_logits` ensures. The update is

    .. math:: -\eta_t G + \log \nu - \operatorname{logsumexp}_i (L - \eta_t G),

    and the same with :math:`\mu` and rows in the next step. It contains the step size, and must be
    the last transformation of a chain. Use no weight decay.

    Logits may start anywhere, at best at ``log(row_marginal)[:, None] + log(column_marginal)``.
    Cells at -inf stay there. With noisy gradients, average couplings:
    ``optax.incremental_update(exp(logits), average, 1 / (step + 1))``; and see
    `round_to_polytope`.

    Arithmetic is in float32, updates have the gradients' dtype; store logits in float32. Updates of
    gradients that are not finite are not finite, as in optax, but the state stays finite.

    Args:
      row_marginal: :math:`\mu`, ``[n]``, for all matrices; scaled to unit mass. None is uniform,
        whatever the number of rows.
      column_marginal: :math:`\nu`, ``[m]``, in the same way.
      bound: As in `mirror_sinkhorn`.
      learning_rate: As in `mirror_sinkhorn`.
      first: As in `mirror_sinkhorn`.

    Returns:
      A transformation that needs ``params``, with the state `MirrorSinkhornUpdatesState`. Use
      ``optax.partition`` for parameters that are not couplings, or have other marginals.

    Raises:
      ValueError: As `mirror_sinkhorn`; in ``init``, if a parameter has less than two axes or does
        not fit the marginals; in ``update``, without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> from lowrank_optax.optimizers import coupling_from_logits, mirror_sinkhorn_updates
      >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> loss = lambda params: jnp.sum(cost * coupling_from_logits(params["match"]))
      >>> tx = mirror_sinkhorn_updates()
      >>> params = {"match": jnp.log(jnp.full((2, 2), 0.25))}
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(jnp.exp(params["match"]).round(3))
      [[0.499 0.001]
       [0.001 0.499]]

    Reference:
      Ballu and Berthet, Mirror Sinkhorn: Fast Online Optimization on Transport Polytopes, 2023,
      https://arxiv.org/abs/2211.10420, Algorithm 1.
    """
    check_steps(learning_rate, bound, first)
    for x in (row_marginal, column_marginal):
        if x is not None:
            check_marginals(x, x)
    given = bound is not None or learning_rate is not None

    def init_fn(params: optax.Params) -> MirrorSinkhornUpdatesState:
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            _check_leaf(jax.tree_util.keystr(path), x.shape, row_marginal, column_marginal)
        start = lambda x: jnp.zeros(x.shape[:-2], scalar_dtype(x))
        bounds = () if given else jax.tree.map(start, params)
        return MirrorSinkhornUpdatesState(jnp.zeros([], jnp.int32), bounds)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, MirrorSinkhornUpdatesState]:
        del extra_args
        if params is None:
            raise ValueError("mirror_sinkhorn_updates needs params: update(grads, state, params).")

        def one(gradient: jax.Array, logits: jax.Array, largest: ArrayLike) -> jax.Array:
            g, old = _allowed(gradient, logits)
            log_rows = _log_marginal(row_marginal, g.shape[-2])
            log_columns = _log_marginal(column_marginal, g.shape[-1])
            delta = jnp.asarray(largest_finite(log_rows) + largest_finite(log_columns), g.dtype)
            rate = rate_at(state.count, learning_rate, jnp.asarray(largest, g.dtype), delta)
            moved = old - rate[..., None, None] * g
            new = jax.lax.cond(
                columns_next(state.count, first),
                lambda: scaled(moved, log_columns, -2),
                lambda: scaled(moved, log_rows, -1),
            )
            return jnp.where(jnp.isneginf(old), 0, new - old).astype(gradient.dtype)

        bounds = state.bound
        if given:
            known = 0.0 if bound is None else bound
            new = jax.tree.map(lambda g, x: one(g, x, known), updates, params)
        else:
            bounds = jax.tree.map(_larger, updates, params, bounds)
            new = jax.tree.map(one, updates, params, bounds)
        count = jnp.asarray(optax.safe_increment(state.count))
        return new, MirrorSinkhornUpdatesState(count, bounds)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _allowed(gradient: jax.Array, logits: jax.Array) -> list[jax.Array]:
    """Both in float32; no gradient where no mass may be."""
    g, old = in_float(gradient, logits)
    return [jnp.where(jnp.isneginf(old), 0, g), old]


def _larger(gradient: jax.Array, logits: jax.Array, bound: jax.Array) -> jax.Array:
    g, _ = _allowed(gradient, logits)
    sizes = jnp.where(jnp.isfinite(g), jnp.abs(g), 0)
    return jnp.maximum(bound, sizes.max(axis=(-2, -1), initial=0).astype(bound.dtype))


def _log_marginal(marginal: ArrayLike | None, size: int) -> jax.Array:
    if marginal is None:
        return jnp.full(size, -jnp.log(float(max(size, 1))))
    (values,) = in_float(marginal)
    return jnp.log(values / nonzero(values.sum()))


def _check_leaf(name: str, shape: tuple[int, ...], *marginals: ArrayLike | None) -> None:
    if len(shape) < 2:
        raise ValueError(
            f"mirror_sinkhorn_updates: {name} has shape {shape}, but a coupling has two axes at "
            "least: choose the couplings by optax.partition or optax.masked."
        )
    names = ("row_marginal", "column_marginal")
    for which, x, size in zip(names, marginals, shape[-2:], strict=True):
        if x is not None and np.size(x) != size:
            raise ValueError(f"{which} has {np.size(x)} entries, but {name} has shape {shape}.")
