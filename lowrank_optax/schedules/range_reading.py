"""What to read off the curve of a range test: a learning rate, a weight decay, the next to try."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

Mode = Literal["exponential", "linear"]
BEGUN = 0.05  # share of the fall after which the loss counts as falling


class Suggestion(NamedTuple):
    """A maximal learning rate, and why.

    Attributes:
      learning_rate: NaN where the loss never fell, or was not finite.
      reason: A sentence.
    """

    learning_rate: float
    reason: str


class Suggestions(NamedTuple):
    """Three readings of one curve, smoothed by a centred mean, which does not lag.

    Attributes:
      minimum: A tenth of where the loss was lowest: the cautious one, also for a constant rate.
      steepest: Where the loss fell fastest, on the axis of the learning rates.
      valley: The middle of the fall, on that axis.
    """

    minimum: Suggestion
    steepest: Suggestion
    valley: Suggestion


def centred_mean(losses: np.ndarray) -> np.ndarray:
    """The finite losses up to the first that is not, each the mean of a tenth of them around it.

    Losses above all of the first tenth count as the highest of those, or a blow-up would reach back
    through the mean.
    """
    broken = np.flatnonzero(~np.isfinite(losses))
    losses = np.asarray(losses, np.float64)[: broken[0] if broken.size else None]
    if losses.size == 0:
        return losses
    clipped = np.minimum(losses, losses[: _window(losses.size).size].max())
    return _mean(clipped)


def _window(size: int) -> np.ndarray:
    return np.ones(2 * (size // 20) + 1)


def _mean(x: np.ndarray) -> np.ndarray:
    mean = lambda x: np.convolve(x, _window(x.size), mode="same")
    return mean(x) / mean(np.ones_like(x))


def read_curve(rates: np.ndarray, losses: np.ndarray, mode: Mode) -> Suggestions:
    """The suggestions for losses ``[steps]`` at learning rates ``[steps]``, NaN past the stop."""
    curve = centred_mean(losses)
    lowest = int(np.argmin(curve)) if curve.size else 0
    if lowest == 0:
        fell = "the loss never fell: lower the learning rates"
        never = Suggestion(np.nan, fell if curve.size else "no loss was finite")
        return Suggestions(never, never, never)
    rates = np.asarray(rates, np.float64)
    axis = np.log10(rates[: lowest + 1]) if mode == "exponential" else rates[: lowest + 1]
    fall = curve[0] - curve[lowest]
    begun = int(np.flatnonzero(curve[:lowest] >= curve[0] - BEGUN * fall)[-1])
    middle = int(np.searchsorted(axis, (axis[begun] + axis[lowest]) / 2))
    slope = _mean(np.gradient(curve[: lowest + 1], axis))  # a mean again: noise has slopes too
    steepest = begun + int(np.argmin(slope[begun:]))
    still = ""
    if lowest == len(rates) - 1:
        still = "; it was still falling at the last learning rate: raise max_learning_rate"
    fell = f"from {curve[0]:.3g} to {curve[lowest]:.3g}"
    per = "decade of the learning rate" if mode == "exponential" else "learning rate"
    return Suggestions(
        Suggestion(
            float(rates[lowest] / 10),
            f"a tenth of {rates[lowest]:.2g}, where the loss was lowest (it fell {fell}){still}",
        ),
        Suggestion(float(rates[steepest]), f"the loss fell fastest here, per {per}{still}"),
        Suggestion(
            float(rates[middle]),
            f"the middle of the fall, which went {fell} between learning rates "
            f"{rates[begun]:.2g} and {rates[lowest]:.2g}{still}",
        ),
    )


def choose(lowest: Mapping[float, float], fall: float) -> tuple[float, str]:
    """A weight decay and the reason, from the lowest loss of each.

    Args:
      lowest: The lowest loss of each weight decay, one of them finite.
      fall: How far losses fell in the best run; differences of a hundredth of it are none.
    """
    finite = {decay: loss for decay, loss in lowest.items() if np.isfinite(loss)}
    best = min(finite, key=lambda decay: finite[decay])
    equal = [decay for decay in finite if finite[decay] <= finite[best] + 0.01 * fall]
    chosen = max(equal)
    reason = f"its lowest loss, {finite[chosen]:.3g}, is the lowest of all"
    if chosen != best:
        reason = (
            f"the largest of the weight decays whose lowest losses ({finite[chosen]:.3g}) equal "
            f"the best, {finite[best]:.3g}, within a hundredth of the fall"
        )
    return chosen, reason


def refine_weight_decay(losses: Mapping[float, float]) -> tuple[float, ...]:
    r"""The weight decays to try next: between the best one and its neighbours, halving exponents.

    Between neighbours :math:`a < b` that is :math:`\sqrt{a b}`: between 1e-4 and 1e-3 it is
    3.16e-4. Beyond the largest one tried, it is ten times that, and below the smallest above zero a
    tenth.

    Args:
      losses: The loss of each weight decay tried: early held-out losses, or the
        ``lowest_losses`` of a range test.

    Returns:
      One or two weight decays, ascending.

    Raises:
      ValueError: If none was tried, one is negative, no loss is finite, or 0 alone was tried.

    Example:
      >>> import lowrank_optax as lro
      >>> losses = {1e-3: 0.42, 1e-4: 0.40, 1e-5: 0.45, 0.0: 0.46}
      >>> print(*(f"{decay:.2e}" for decay in lro.schedules.refine_weight_decay(losses)))
      3.16e-05 3.16e-04

    Reference:
      Smith, 2018, https://arxiv.org/abs/1803.09820, section 4.4.
    """
    finite = {decay: loss for decay, loss in losses.items() if np.isfinite(loss)}
    positive = sorted(decay for decay in losses if decay > 0)
    if not finite or not positive or min(losses) < 0:
        raise ValueError(
            f"losses={dict(losses)} must give a finite loss to some weight decay; none may be "
            "negative, and not all zero."
        )
    best = min(finite, key=lambda decay: finite[decay])
    if best == 0:
        return (positive[0] / 10,)
    place = positive.index(best)
    below = positive[place - 1] if place else best / 100
    above = positive[place + 1] if place + 1 < len(positive) else best * 100
    return float(np.sqrt(below * best)), float(np.sqrt(best * above))
