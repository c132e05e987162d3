"""What recipes share: the subspace rule from `rank` or `subspace`, and the optimizer around it."""

from collections.abc import Callable
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
    adam: tuple[Any, Any, Any, Any],
    decay: tuple[Any, Any, Any],
    state_bits: Any,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam (or ``inner``) in a subspace, weight decay and the learning rate, for a recipe.

    ``adam`` is ``b1, b2, eps, eps_placement``, which are refused beside ``inner``; ``decay`` is
    ``weight_decay, weight_decay_mask, decay_placement``; ``options`` go to `scale_by_projection`.
    """
    if inner is None:
        inner = scale_by_adam(*adam)
    else:
        names = ("b1", "b2", "eps", "eps_placement")
        refuse_unused(recipe, "inner", **dict(zip(names, adam, strict=True)))
    weight_decay, mask, placement = decay
    return optimizer(
        scale_by_projection(inner, subspace, **options),
        learning_rate,
        weight_decay,
        mask,
        accumulate_steps=options.get("accumulate_steps"),
        state_bits=state_bits,
        decay_placement=placement,
    )
