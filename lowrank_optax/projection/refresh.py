"""When a basis is refreshed: every few steps, lazily, upon convergence, or never again."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.projection.view import View, zeros_per_matrix

__all__ = [
    "ConvergenceStatistics",
    "Energies",
    "LazyStatistics",
    "RefreshRule",
    "every",
    "lazily",
    "never",
    "refresh_rule",
    "when_converged",
]

_NEVER = jnp.iinfo(jnp.int32).max


class Energies(NamedTuple):
    """What a step captured of its gradient.

    Attributes:
      captured: ``‖R‖²``, ``[*batch]`` float32, or float64 of float64 gradients.
      total: ``‖G‖²``, likewise.
    """

    captured: jax.Array
    total: jax.Array


class RefreshRule(NamedTuple):
    """When bases are due, as pure functions; statistics are kept for each matrix.

    Attributes:
      init: ``init(view) -> statistics``: a NamedTuple of arrays ``[*batch, ...]``, or ``()``.
      schedule: ``schedule(statistics, count, due, overlap) -> (next_refresh, statistics)`` after a
        refresh at ``count`` that was due from ``due`` on: the count of the next, ``[*batch]``
        int32. ``overlap [*batch]`` is the mean squared cosine of the principal angles between the
        last basis and the new one (None unless asked for).
      observe: ``observe(statistics, count, next_refresh, energies) -> (next_refresh, statistics)``
        after every step; None for rules that do not look.
      first_refresh: ``first_refresh(phase)``: count of the first refresh, zero or less;
        what is less is for ``schedule`` to reckon from. ``phase`` in [0, 1) is the leaf's place
        among all.
      compares: Whether ``schedule`` wants ``overlap``.
      always: Whether a basis is due at every step, known when the step is traced.

    Example:
      >>> import lowrank_optax as lro
      >>> next_refresh, _ = lro.refresh.every(200).schedule((), 200, 200, None)
      >>> int(next_refresh)
      400

    Reference:
      Zhang et al., Q-GaLore, 2024, https://arxiv.org/abs/2407.08296, section 3.2.
    """

    init: Callable[[View], Any]
    schedule: Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    observe: Callable[[Any, jax.Array, jax.Array, Energies], tuple[jax.Array, Any]] | None = None
    first_refresh: Callable[[float], int] = lambda phase: 0
    compares: bool = False
    always: bool = False


def refresh_rule(refresh_every: int | RefreshRule | None) -> RefreshRule:
    """The rule meant by the argument of `scale_by_projection`: steps, a rule, or None for never."""
    if isinstance(refresh_every, RefreshRule):
        return refresh_every
    return never() if refresh_every is None else every(refresh_every)


def every(steps: int, stagger: bool = False) -> RefreshRule:
    """Every ``steps`` steps; the first refresh is at the first step.

    Args:
      steps: Steps from one refresh to the next.
      stagger: Spread the leaves evenly over the interval, so that no step refreshes them all: leaf
        ``i`` of ``k`` is refreshed where ``count mod steps`` is ``i·steps/k``. The first refresh is
        at the first step all the same.

    Raises:
      ValueError: If ``steps`` is below 1.

    Example:
      >>> import lowrank_optax as lro
      >>> rule = lro.refresh.every(10, stagger=True)
      >>> due = [rule.first_refresh(0.5)]
      >>> for count in (0, 5, 15):
      ...     due.append(rule.schedule((), count, due[-1], None)[0])
      >>> due
      [-5, 5, 15, 25]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 2.
    """
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"refresh_every={steps} must be at least 1 step, or None for never.")

    def schedule(statistics: Any, count: Any, due: Any, overlap: Any) -> tuple[Any, Any]:
        return _after(count, due, steps), statistics

    first_refresh = functools.partial(_first_refresh, steps, stagger)
    always = isinstance(steps, int) and steps == 1
    return RefreshRule(lambda view: (), schedule, first_refresh=first_refresh, always=always)


def _first_refresh(steps: int, stagger: bool, phase: float) -> int:
    # More by a hair: i/k · steps may fall short of a whole number by its last bit.
    offset = int(phase * steps + 1e-6) if stagger else 0
    return offset - steps if offset else 0


def _after(count: Any, due: Any, interval: Any) -> Any:
    """The first count after this one that is a whole number of intervals from ``due``."""
    return due + ((count - due) // interval + 1) * interval


def never() -> RefreshRule:
    """Never again after the first refresh.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.refresh.never().schedule((), 0, 0, None)[0].item() > 2e9
      True

    Reference:
      Liang et al., Online Subspace Descent, 2024, https://arxiv.org/abs/2408.12857.
    """
    schedule = lambda statistics, count, due, overlap: (jnp.int32(_NEVER), statistics)
    return RefreshRule(lambda view: (), schedule)


class LazyStatistics(NamedTuple):
    """What `lazily` keeps of each matrix: its interval, and the last overlaps of its bases."""

    interval: jax.Array
    overlaps: jax.Array


def lazily(
    steps: int = 200, threshold: float = 0.4, patience: int = 5, stagger: bool = False
) -> RefreshRule:
    """Every ``steps`` steps at first, and half as often whenever the subspace has stopped moving.

    The interval of a matrix doubles at each refresh at which the mean of its last ``patience``
    overlaps (of the basis before and after a refresh) is at least ``threshold``. The overlap is the
    mean squared cosine of the principal angles, in which signs and rotations play no part.

    Args:
      steps: The first interval.
      threshold: Overlap from which the subspace counts as still; 0.4 in the paper, which takes the
        signed cosine of the first singular vectors.
      patience: How many refreshes are looked back upon.
      stagger: As for `every`, of the first interval.

    Raises:
      ValueError: If ``steps`` or ``patience`` is below 1.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.refresh.lazily(10, patience=2)
      >>> statistics = rule.init(lro.View.of(jnp.zeros((4, 8)), axis=-2, rank=2))
      >>> for count in (0, 10, 20):
      ...     due, statistics = rule.schedule(statistics, count, count, jnp.array(0.9))
      >>> int(due)
      60

    Reference:
      Zhang et al., Q-GaLore, 2024, https://arxiv.org/abs/2407.08296, section 3.2.
    """
    if patience < 1:
        raise ValueError(f"patience={patience!r} must be at least 1.")
    regular = every(steps, stagger)

    def init(view: View) -> LazyStatistics:
        interval = zeros_per_matrix(view, jnp.int32) + steps
        overlaps = jnp.stack([zeros_per_matrix(view, view.dtype)] * patience, axis=-1)
        return LazyStatistics(interval, overlaps - jnp.inf)  # until there are enough of them

    def schedule(
        statistics: LazyStatistics, count: Any, due: Any, overlap: jax.Array
    ) -> tuple[jax.Array, LazyStatistics]:
        overlaps = jnp.concatenate([statistics.overlaps[..., 1:], overlap[..., None]], axis=-1)
        still = jnp.mean(overlaps, axis=-1) >= threshold
        interval = jnp.where(still, 2 * statistics.interval, statistics.interval)
        return _after(count, due, interval), LazyStatistics(interval, overlaps)

    return RefreshRule(init, schedule, first_refresh=regular.first_refresh, compares=True)


class ConvergenceStatistics(NamedTuple):
    """What `when_converged` keeps of each matrix, in the dtype of the arithmetic but for the count.

    Attributes:
      opened: Norm of the projected gradient when the subspace was opened.
      captured: Moving average of that norm.
      total: Moving average of the gradient's norm.
      since: Count at which the subspace was opened.
    """

    opened: jax.Array
    captured: jax.Array
    total: jax.Array
    since: jax.Array


def when_converged(
    fall: float = 0.5,
    energy: float = 0.5,
    shortest: int = 50,
    longest: int = 200,
    decay: float = 0.9,
) -> RefreshRule:
    """When the work in the subspace is done: its gradient has become small, or lies elsewhere.

    A matrix is due if the norm of its projected gradient fell to ``fall`` of what it was when the
    subspace was opened, if the projected gradient holds less than ``energy`` of the squared norm of
    the whole, or after ``longest`` steps; never before ``shortest``. The norms are moving averages.

    Args:
      fall: Share of the first projected norm at which the subspace is left.
      energy: Share of the gradient's energy below which it is left.
      shortest: Least number of steps in a subspace.
      longest: Largest number of steps.
      decay: Decay of the moving averages.

    Raises:
      ValueError: If ``shortest`` is below 1 or above ``longest``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.refresh.when_converged(shortest=2, decay=0.0)
      >>> statistics = rule.init(lro.View.of(jnp.zeros((4, 8)), axis=-2, rank=2))
      >>> due, statistics = rule.schedule(statistics, 0, 0, None)
      >>> for count, norm in enumerate((1.0, 0.9, 0.4)):
      ...     energies = lro.refresh.Energies(jnp.array(norm**2), jnp.array(norm**2))
      ...     due, statistics = rule.observe(statistics, count, due, energies)
      >>> int(due)
      3

    Reference:
      Refael et al., AdaRankGrad, 2024, https://arxiv.org/abs/2410.17881, Algorithm 2, whose
      threshold on the projected norm is made relative here.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest={shortest!r} must be between 1 and longest={longest!r}.")

    def init(view: View) -> ConvergenceStatistics:
        zeros = lambda: zeros_per_matrix(view, view.dtype)  # no buffer twice, for donation
        return ConvergenceStatistics(zeros(), zeros(), zeros(), zeros_per_matrix(view, jnp.int32))

    def schedule(
        statistics: ConvergenceStatistics, count: Any, due: Any, overlap: Any
    ) -> tuple[jax.Array, ConvergenceStatistics]:
        del due, overlap
        since = jnp.zeros_like(statistics.since) + count
        return since + longest, statistics._replace(since=since)

    def observe(
        statistics: ConvergenceStatistics, count: Any, next_refresh: jax.Array, energies: Energies
    ) -> tuple[jax.Array, ConvergenceStatistics]:
        seen, whole = jnp.sqrt(energies.captured), jnp.sqrt(energies.total)
        usable, age = jnp.isfinite(whole), count - statistics.since
        fresh = (age == 0) | (statistics.total == 0)
        mix = lambda old, new: jnp.where(fresh, new, decay * old + (1 - decay) * new)
        captured, total = mix(statistics.captured, seen), mix(statistics.total, whole)
        opened = jnp.where(fresh, seen, statistics.opened)
        done = (captured <= fall * opened) | (captured**2 < energy * total**2)
        due = jnp.where(usable & done & (age + 1 >= shortest), count + 1, next_refresh)
        new = ConvergenceStatistics(opened, captured, total, statistics.since)
        kept = jax.tree.map(lambda x, y: jnp.where(usable, x, y).astype(y.dtype), new, statistics)
        return jnp.minimum(due, next_refresh).astype(next_refresh.dtype), kept

    return RefreshRule(init, schedule, observe)
