"""Mirror Sinkhorn: gradient steps and half-scalings of a coupling, in one loop.

A coupling of two distributions is a matrix of given row and column sums. To minimise a convex
function of it, each step multiplies it by the exponential of a gradient and makes the sums of its
rows or of its columns right, in turn. Sinkhorn's algorithm makes both right, many times over,
between two gradients, and needs a temperature; here the step size is the only choice, and known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.optimizers.mirror_sinkhorn.iterates import (
    Average,
    First,
    check_average,
    check_steps,
    columns_next,
    next_average,
    rate_at,
    read_average,
    scaled,
    start_average,
)
from lowrank_optax.optimizers.mirror_sinkhorn.polytope import (
    largest_finite,
    polytope,
    round_to_polytope,
)


class MirrorSinkhornState(NamedTuple):
    """State of `mirror_sinkhorn`: 2·n·m numbers (3·n·m for "suffix", n·m for "last").

    Attributes:
      count: Number of steps so far, int32.
      log_coupling: Logarithm of the current iterate, of unit mass, ``[n, m]``; -inf where no mass
        may be.
      average: Average of the iterates, of unit mass, ``[n, m]``; ``()`` for "last".
      earlier: Average of the window before, ``[n, m]``, for "suffix"; otherwise ``()``.
      bound: The largest ``|gradient|`` so far, or the one that was given, ``[]``.
      rates: The sum of all step sizes, ``[]``: the inverse of the temperature at which Sinkhorn
        would give the current iterate, were it to converge there.
    """

    count: jax.Array
    log_coupling: jax.Array
    average: Any
    earlier: Any
    bound: jax.Array
    rates: jax.Array


class MirrorSinkhorn(NamedTuple):
    """What `mirror_sinkhorn` returns: an online solver, of pure functions.

    Attributes:
      init: ``init() -> state``, or ``init(coupling)`` from a coupling other than the independent
        one: one that is positive wherever mass may be.
      update: ``update(gradient, state) -> state``, one step; ``gradient`` is that of the current
        loss by the coupling, ``[n, m]``, at ``coupling(state)``.
      coupling: ``coupling(state)``, the current iterate ``[n, m]``. Either its rows or its columns
        have their sums, not both.
      plan: ``plan(state, rounded=True)``, the average ``[n, m]``, rounded by `round_to_polytope`:
        the answer.
    """

    init: Callable[..., MirrorSinkhornState]
    update: Callable[[ArrayLike, MirrorSinkhornState], MirrorSinkhornState]
    coupling: Callable[[MirrorSinkhornState], jax.Array]
    plan: Callable[..., jax.Array]


def mirror_sinkhorn(
    row_marginal: ArrayLike,
    column_marginal: ArrayLike,
    *,
    bound: ArrayLike | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    average: Average = "uniform",
    first: First = "columns",
    mask: ArrayLike | None = None,
) -> MirrorSinkhorn:
    r"""Mirror Sinkhorn: online minimisation of convex losses of a coupling, one step at a time.

    From :math:`P_1 = \mu \nu^\top`, with the gradient :math:`G_t` at :math:`P_t` of a loss that may
    be another at every step, or of which only noisy gradients are known,

    .. math::
      P' = P_t \odot \exp(-\eta_t G_t), \qquad
      P_{t+1} = P' \, \mathrm{diag}\Big(\frac{\nu}{P'^\top \mathbf 1}\Big)
      \text{ or } \mathrm{diag}\Big(\frac{\mu}{P' \mathbf 1}\Big) P' \text{, in turn},

    and the answer is the average of the iterates, rounded to the polytope. The step size needs no
    tuning:

    .. math::
      \eta_t = \frac1B \sqrt{\frac\delta t}, \qquad B \ge \max |G_t|, \qquad
      \delta = \lVert \log \mu \rVert_\infty + \lVert \log \nu \rVert_\infty.

    All is done in logarithms, in float32 (float64 if a marginal is): gradients of any dtype, and
    temperatures at which kernels would underflow, are fine. A gradient with a NaN or an infinity in
    an allowed cell leaves the state as it was, ``count`` too, which shows it.

    The functions work under ``jit``, ``scan``, ``vmap`` (also over marginals), donation and with
    arrays sharded by rows or columns.

    Args:
      row_marginal: Row sums :math:`\mu`, ``[n]``. Rows without mass stay empty, so that shorter
        problems can be padded.
      column_marginal: Column sums :math:`\nu`, ``[m]``, of the same total, which need not be 1.
      bound: :math:`B`, the largest gradient entry to expect; a gradient beyond it is not clipped.
        None takes the largest so far, which never falls.
      learning_rate: :math:`\eta`, a float or a schedule of the number of steps before, instead of
        the rule above: a constant of size :math:`1/\sqrt T` if the number of steps is known.
      average: Average of the iterates that is the answer: "uniform"; "weighted" by
        :math:`\eta_t`, as in the bound; "suffix", that of the last half to three quarters (from the
        last power of two below half); "last", the last iterate.
      first: Which sums the first step makes right.
      mask: Where mass may be, ``[n, m]`` of bools; None for everywhere. Every row and column with
        mass needs an allowed cell. If no coupling fits the mask, the sums of ``plan`` stay wrong.

    Returns:
      The solver, a `MirrorSinkhorn`.

    Raises:
      ValueError: If marginals are not vectors, negative, not finite or of different totals, a mask
        leaves a row or column with mass no cell, both ``bound`` and ``learning_rate`` are given,
        or an option is unknown. Traced values are not looked at: there, ``column_marginal`` is
        scaled to the total of ``row_marginal``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> target = jnp.array([[0.5, 0.1], [0.0, 0.4]])
      >>> solver = lro.mirror_sinkhorn(jnp.array([0.6, 0.4]), jnp.array([0.5, 0.5]))
      >>> loss = lambda plan: jnp.sum((plan - target) ** 2)
      >>> @jax.jit
      ... def step(state, _):
      ...     return solver.update(jax.grad(loss)(solver.coupling(state)), state), None
      >>> state, _ = jax.lax.scan(step, solver.init(), length=1000)
      >>> print((100 * solver.plan(state)).round())
      [[50. 10.]
       [ 0. 40.]]

    Reference:
      Ballu and Berthet, Mirror Sinkhorn: Fast Online Optimization on Transport Polytopes, 2023,
      https://arxiv.org/abs/2211.10420, Algorithm 1 and Theorem 3.1.
    """
    check_steps(learning_rate, bound, first)
    check_average(average)
    problem = polytope(row_marginal, column_marginal, mask)
    dtype, shape = problem.total.dtype, (problem.rows.size, problem.columns.size)

    def init(coupling: ArrayLike | None = None) -> MirrorSinkhornState:
        start = problem.start
        if coupling is not None:
            given = jnp.log(_matrix(coupling, "coupling", shape, dtype) / problem.total)
            start = jnp.where(jnp.isneginf(start), start, given)
        largest = jnp.zeros([], dtype) if bound is None else jnp.array(bound, dtype)
        averages = start_average(average, jnp.exp(start))
        return MirrorSinkhornState(
            jnp.zeros([], jnp.int32), start, *averages, largest, jnp.zeros([], dtype)
        )

    def update(gradient: ArrayLike, state: MirrorSinkhornState) -> MirrorSinkhornState:
        old = state.log_coupling
        raw = _matrix(gradient, "gradient", shape, dtype)
        g = jnp.where(jnp.isneginf(old), 0, raw)  # whatever it is where no mass may be
        largest = state.bound if bound is not None else jnp.maximum(state.bound, largest_finite(g))
        rate = rate_at(state.count, learning_rate, largest, problem.delta)

        def move(log_marginal: jax.Array, axis: int) -> MirrorSinkhornState:
            new = scaled(old - rate * g, log_marginal, axis)
            count = jnp.asarray(optax.safe_increment(state.count))
            rates = state.rates + rate
            couplings = jnp.exp(old), jnp.exp(new)
            averages = next_average(
                average, (state.average, state.earlier), couplings, count, rate, rates
            )
            return MirrorSinkhornState(count, new, *averages, largest, rates)

        stay = lambda: state
        scale_columns = lambda: move(problem.log_columns, 0)
        scale_rows = lambda: move(problem.log_rows, 1)
        next_scaled = jnp.where(columns_next(state.count, first), 1, 2)
        choice = jnp.where(jnp.isfinite(g).all(), next_scaled, 0)
        return jax.lax.switch(choice, (stay, scale_columns, scale_rows))

    def coupling(state: MirrorSinkhornState) -> jax.Array:
        return problem.total * jnp.exp(state.log_coupling)

    def plan(state: MirrorSinkhornState, rounded: bool = True) -> jax.Array:
        averages, last = (state.average, state.earlier), jnp.exp(state.log_coupling)
        mean = problem.total * read_average(average, averages, last, state.count)
        if not rounded:
            return mean
        return round_to_polytope(mean, problem.rows, problem.columns, problem.mask)

    return MirrorSinkhorn(init, update, coupling, plan)


def minimize_over_couplings(
    solver: MirrorSinkhorn,
    gradient: Callable[..., ArrayLike],
    steps: int,
    *,
    key: jax.Array | None = None,
    state: MirrorSinkhornState | None = None,
) -> MirrorSinkhornState:
    """Minimises a convex function of a coupling, given its gradient: steps of a solver in a scan.

    Args:
      solver: What `mirror_sinkhorn` returns.
      gradient: ``gradient(coupling) -> [n, m]``; with a ``key``, ``gradient(coupling, key)``, an
        unbiased estimate of it, with a new key at every step.
      steps: Number of steps, a Python int.
      key: PRNG key for ``gradient``; None if it needs none. The number of steps before is folded
        in: a run that goes on sees other numbers than the steps before it.
      state: State to go on from; None for ``solver.init()``.

    Returns:
      The state; ``solver.plan(state)`` is the minimiser.

    Raises:
      ValueError: If ``steps`` is negative.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> cost = 1 - jnp.eye(3)
      >>> noisy = lambda plan, key: cost + jax.random.rademacher(key, (3, 3)) / 2
      >>> solver = lro.mirror_sinkhorn(jnp.ones(3) / 3, jnp.ones(3) / 3, bound=1.5)
      >>> run = jax.jit(lambda key: lro.optimizers.minimize_over_couplings(
      ...     solver, noisy, 5000, key=key))
      >>> print(f"{jnp.sum(cost * solver.plan(run(jax.random.key(0)))):.2f}")
      0.00
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative.")
    state = solver.init() if state is None else state
    before = state.count

    def step(state: MirrorSinkhornState, i: jax.Array) -> tuple[MirrorSinkhornState, None]:
        keys = () if key is None else (jax.random.fold_in(key, before + i),)
        return solver.update(gradient(solver.coupling(state), *keys), state), None

    return jax.lax.scan(step, state, jnp.arange(steps))[0]


def _matrix(x: ArrayLike, name: str, shape: tuple[int, int], dtype: Any) -> jax.Array:
    if np.shape(x) != shape:
        raise ValueError(f"{name} must have shape {shape}, as the marginals, not {np.shape(x)}.")
    return jnp.asarray(x, dtype)
