"""What recipes share: the subspace rule from `rank` or `subspace`, and the optimizer around it."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.transform import scale_by_projection
from lowrank_optax.projection.view import RankSpec
from lowrank_optax.states.arguments import arguments_of, refuse_unused
from lowrank_optax.states.assemble import optimizer, scale_by_adam


def chosen_subspace(
    subspace: Subspace | None,
    rank: RankSpec | None,
    default: RankSpec,
    rule: Callable[[RankSpec], Subspace],
) -> Subspace:
    """The subspace rule given, or the recipe's own with the rank given, or with its default."""
    if subspace is None:
        return rule(default if rank is None else rank)
    own = getattr(subspace, "rank", rank)  # a wrong type is refused elsewhere
    if rank is not None and rank != own:
        raise ValueError(
            f"rank={rank!r} has no effect with subspace, which has a rank of its own"
            + ("" if callable(own) else f", {own!r}")
            + ": leave it out."
        )
    return subspace


def projected_optimizer(
    recipe: Callable[..., Any], given: Mapping[str, Any], subspace: Subspace, **changed: Any
) -> optax.GradientTransformationExtraArgs:
    """Adam (or ``inner``) in a subspace, weight decay and the learning rate, for a recipe.

    Args:
      recipe: The recipe, for errors.
      given: Its arguments by name. `scale_by_adam`, `scale_by_projection` and `optimizer` get those
        that they have; the first ones are refused beside ``inner``.
      subspace: The subspace rule.
      **changed: Arguments of `scale_by_projection` instead of those given.
    """
    adam, inner = arguments_of(scale_by_adam, given), given["inner"]
    if inner is None:
        inner = scale_by_adam(**adam)
    else:
        refuse_unused(recipe, "inner", **adam)
    options = arguments_of(scale_by_projection, given) | changed
    options |= {"inner": inner, "subspace": subspace}
    return optimizer(scale_by_projection(**options), **arguments_of(optimizer, given))
