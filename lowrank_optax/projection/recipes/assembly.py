"""What recipes share: the subspace rule from `rank` or `subspace`, and the optimizer around it."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.transform import scale_by_projection
from lowrank_optax.projection.view import RankSpec
from lowrank_optax.states.arguments import refuse_unused
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
    recipe: Callable[..., Any],
    learning_rate: optax.ScalarOrSchedule,
    subspace: Subspace,
    inner: optax.GradientTransformation | None,
    adam: Mapping[str, Any],
    decay: Mapping[str, Any],
    state_bits: Any,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam (or ``inner``) in a subspace, weight decay and the learning rate, for a recipe.

    ``adam`` has arguments of `scale_by_adam`, which are refused beside ``inner``; ``decay`` has
    those of `optimizer`; ``options`` go to `scale_by_projection`.
    """
    if inner is None:
        inner = scale_by_adam(**adam)
    else:
        refuse_unused(recipe, "inner", **adam)
    return optimizer(
        scale_by_projection(inner, subspace, **options),
        learning_rate,
        accumulate_steps=options.get("accumulate_steps"),
        state_bits=state_bits,
        **decay,
    )
