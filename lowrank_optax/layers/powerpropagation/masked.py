"""Optimizers that leave pruned weights as they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.layers.powerpropagation.pruning import apply_masks
from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.states.arguments import transformation


class MaskUpdatesState(NamedTuple):
    """State of `mask_updates`.

    Attributes:
      mask: A tree like the parameters of bool arrays, ``MaskedNode`` where there is no mask.
      inner_state: The inner optimizer's.
    """

    mask: Any
    inner_state: optax.OptState


def mask_updates(
    inner: optax.GradientTransformation, masks: Any | Callable[[optax.Params], Any]
) -> optax.GradientTransformationExtraArgs:
    """``inner`` with no updates where a mask is False: pruned weights stay as they are.

    Both the gradients it sees and the updates it returns are masked, so neither momentum nor weight
    decay moves a pruned weight.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      masks: A tree like the parameters of bool arrays, or a function of the parameters that gives
        one, called in ``init``. ``MaskedNode``, None, or nothing at all for a leaf that is not
        masked. It is kept in the state.

    Returns:
      A transformation with the state `MaskUpdatesState`.

    Raises:
      ValueError: In ``init``, if a mask has another shape than its parameter, or none.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"kernel": jnp.array([[0.0, -3.0]])}
      >>> tx = lro.layers.mask_updates(optax.sgd(0.5), {"kernel": params["kernel"] != 0})
      >>> updates, _ = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
      >>> print(updates["kernel"])
      [[ 0.  -0.5]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296: masked training.
    """
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> MaskUpdatesState:
        given = masks(params) if callable(masks) else masks
        return MaskUpdatesState(_parallel(given, params), inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MaskUpdatesState]:
        masked = apply_masks(updates, state.mask)
        new, inner_state = inner.update(masked, state.inner_state, params, **extra_args)
        return apply_masks(new, state.mask), MaskUpdatesState(state.mask, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _parallel(masks: Any, params: Any) -> Any:
    """The masks as a tree like the parameters, matched by paths."""
    given = {normalised_path(p): m for p, m in jax.tree_util.tree_leaves_with_path(masks)}

    def mask_of(path: Any, leaf: Any) -> Any:
        mask = given.pop(normalised_path(path), None)
        if mask is None:
            return optax.MaskedNode()
        if mask.shape != leaf.shape:
            raise ValueError(
                f"the mask of {path_string(path)!r} has the shape {mask.shape}, its parameter "
                f"{leaf.shape}."
            )
        return jnp.array(mask, bool)  # a copy, which a step may donate

    parallel = jax.tree_util.tree_map_with_path(mask_of, params)
    if given:
        raise ValueError(f"masks has {'/'.join(next(iter(given)))!r}, which is no parameter.")
    return parallel
