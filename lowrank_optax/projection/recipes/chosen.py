"""What recipes share: the subspace rule from ``rank`` or ``subspace``, and the inner optimizer."""

from collections.abc import Callable
from typing import Any

import optax

from lowrank_optax.projection.rank import RankSpec
from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.states.adam import EpsPlacement, scale_by_adam
from lowrank_optax.states.arguments import refuse_unused


def chosen_subspace(
    subspace: Subspace | None,
    rank: RankSpec | None,
    default: RankSpec,
    rule: Callable[[RankSpec], Subspace],
) -> Subspace:
    """The subspace rule given, or the recipe's own of the rank given, or of its default.

    Raises:
      ValueError: If both are given, and do not agree.
    """
    if subspace is None:
        return rule(default if rank is None else rank)
    own = getattr(subspace, "rank", rank)  # what is no rule is refused elsewhere
    if rank is not None and rank != own:
        raise ValueError(
            f"rank={rank!r} has no effect with subspace, which has a rank of its own"
            + ("" if callable(own) else f", {own!r}")
            + ": leave it out."
        )
    return subspace


def chosen_inner(
    recipe: Callable[..., Any],
    inner: optax.GradientTransformation | None,
    b1: Any,
    b2: Any,
    eps: Any,
    eps_placement: EpsPlacement,
) -> optax.GradientTransformation:
    """The inner optimizer given, or Adam.

    Raises:
      ValueError: If an inner optimizer is given, and Adam's options too.
    """
    if inner is None:
        return scale_by_adam(b1, b2, eps, eps_placement)
    refuse_unused(recipe, "inner", b1=b1, b2=b2, eps=eps, eps_placement=eps_placement)
    return inner
