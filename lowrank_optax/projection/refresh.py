"""When a basis is refreshed: every few steps, lazily, upon convergence, or only once."""

from collections.abc import Callable
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
    """Squared norms ``[*batch]`` of the projected gradient and of the whole one."""

    captured: jax.Array
    total: jax.Array


class RefreshRule(NamedTuple):
    """When bases need a refresh: pure functions, with statistics of each matrix.

    Attributes:
      init: ``init(view) -> statistics``: a NamedTuple of arrays ``[*batch, ...]``, or ``()``.
      schedule: ``schedule(statistics, count, planned, overlap) -> (next_refresh, statistics)``
        after a refresh at ``count`` that was planned for ``planned``: the count of the next,
        ``[*batch]`` int32. ``overlap [*batch]`` is the mean squared cosine of the principal angles
        between the last basis and the new one (None unless the rule compares).
      observe: ``observe(statistics, count, next_refresh, energies) -> (next_refresh, statistics)``
        after every step; None for rules that do not observe gradients.
      first_refresh: ``first_refresh(phase)``: count of the first refresh, zero or less, from which
        ``schedule`` counts on. ``phase`` in [0, 1) is the leaf's position among all.
      compares: Whether ``schedule`` needs ``overlap``.
      always: Whether every step refreshes, known when the step is traced.

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
    """The rule for the argument of `scale_by_projection`: steps, a rule, or None for `never`."""
    if isinstance(refresh_every, RefreshRule):
        return refresh_every
    return never() if refresh_every is None else every(refresh_every)


def every(steps: int, stagger: bool = False) -> RefreshRule:
    """Every ``steps`` steps; the first refresh is at the first step.

    Args:
      steps: Steps from one refresh to the next.
      stagger: Whether to spread the leaves over the interval, so that no step but the first
        refreshes them all: leaf ``i`` of ``k`` is refreshed where ``count mod steps`` is
        ``i·steps/k``.

    Raises:
      ValueError: If `steps` is below 1.

    Example:
      >>> import lowrank_optax as lro
      >>> rule = lro.refresh.every(10, stagger=True)
      >>> planned = [rule.first_refresh(0.5)]
      >>> for count in (0, 5, 15):
      ...     planned.append(rule.schedule((), count, planned[-1], None)[0])
      >>> planned
      [-5, 5, 15, 25]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 2.
    """
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"refresh_every={steps} must be at least 1 step, or None for never.")

    def schedule(statistics: Any, count: Any, planned: Any, overlap: Any) -> tuple[Any, Any]:
        return _after(count, planned, steps), statistics

    def first_refresh(phase: float) -> int:
        # More by a hair: i/k · steps may fall short of a whole number by its last bit.
        offset = int(phase * steps + 1e-6) if stagger else 0
        return offset - steps if offset else 0

    always = isinstance(steps, int) and steps == 1
    return RefreshRule(lambda view: (), schedule, first_refresh=first_refresh, always=always)


def _after(count: Any, planned: Any, interval: Any) -> Any:
    """The first count after this one that is a whole number of intervals from ``planned``."""
    return planned + ((count - planned) // interval + 1) * interval


def never() -> RefreshRule:
    """Only at the first step.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.refresh.never().schedule((), 0, 0, None)[0].item() > 2e9
      True

    Reference:
      Liang et al., Online Subspace Descent, 2024, https://arxiv.org/abs/2408.12857.
    """
    schedule = lambda statistics, count, planned, overlap: (jnp.int32(_NEVER), statistics)
    return RefreshRule(lambda view: (), schedule)


class LazyStatistics(NamedTuple):
    """Statistics of `lazily`: the interval of each matrix, and the last overlaps of its bases."""

    interval: jax.Array
    overlaps: jax.Array


def lazily(
    steps: int = 200, threshold: float = 0.4, patience: int = 5, stagger: bool = False
) -> RefreshRule:
    """Every ``steps`` steps at first, and half as often whenever the subspace has stopped moving.

    The interval of a matrix doubles at each refresh at which the mean of its last ``patience``
    overlaps is at least ``threshold``. The overlap of the bases before and after a refresh is the
    mean squared cosine of the principal angles, which signs and rotations do not change.

    Args:
      steps: First interval.
      threshold: Overlap from which the interval doubles; 0.4 in the paper, which takes the signed
        cosine of the first singular vectors.
      patience: Number of overlaps that are averaged.
      stagger: See `every`, for the first interval.

    Raises:
      ValueError: If `steps` or `patience` is below 1.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.refresh.lazily(10, patience=2)
      >>> statistics = rule.init(lro.View.of(jnp.zeros((4, 8)), axis=-2, rank=2))
      >>> for count in (0, 10, 20):
      ...     planned, statistics = rule.schedule(statistics, count, count, jnp.array(0.9))
      >>> int(planned)
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
        statistics: LazyStatistics, count: Any, planned: Any, overlap: jax.Array
    ) -> tuple[jax.Array, LazyStatistics]:
        overlaps = jnp.concatenate([statistics.overlaps[..., 1:], overlap[..., None]], axis=-1)
        still = jnp.mean(overlaps, axis=-1) >= threshold
        interval = jnp.where(still, 2 * statistics.interval, statistics.interval)
        return _after(count, planned, interval), LazyStatistics(interval, overlaps)

    return RefreshRule(init, schedule, first_refresh=regular.first_refresh, compares=True)


class ConvergenceStatistics(NamedTuple):
    """Statistics of `when_converged` for each matrix.

    Attributes:
      opened: Norm of the projected gradient at the step of the refresh.
      captured: Moving average of that norm.
      total: Moving average of the gradient's norm.
      since: Count of the last refresh, int32.
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
    """When the gradient in the subspace has become small, or lies mostly outside of it.

    A refresh follows if the norm of the projected gradient fell to ``fall`` of what it was at the
    last refresh, if it has less than ``energy`` of the squared norm of the whole gradient, or after
    ``longest`` steps; never before ``shortest``. The norms are moving averages.

    Args:
      fall: Share of the first projected norm.
      energy: Share of the gradient's squared norm.
      shortest: Least number of steps between refreshes.
      longest: Largest number of steps between refreshes.
      decay: Decay of the moving averages.

    Raises:
      ValueError: If `shortest` is below 1 or above `longest`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.refresh.when_converged(shortest=2, decay=0.0)
      >>> statistics = rule.init(lro.View.of(jnp.zeros((4, 8)), axis=-2, rank=2))
      >>> planned, statistics = rule.schedule(statistics, 0, 0, None)
      >>> for count, norm in enumerate((1.0, 0.9, 0.4)):
      ...     energies = lro.refresh.Energies(jnp.array(norm**2), jnp.array(norm**2))
      ...     planned, statistics = rule.observe(statistics, count, planned, energies)
      >>> int(planned)
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
        statistics: ConvergenceStatistics, count: Any, planned: Any, overlap: Any
    ) -> tuple[jax.Array, ConvergenceStatistics]:
        del planned, overlap
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
        planned = jnp.where(usable & done & (age + 1 >= shortest), count + 1, next_refresh)
        new = ConvergenceStatistics(opened, captured, total, statistics.since)
        new = jax.tree.map(lambda x, y: jnp.where(usable, x, y).astype(y.dtype), new, statistics)
        return jnp.minimum(planned, next_refresh).astype(next_refresh.dtype), new

    return RefreshRule(init, schedule, observe)
