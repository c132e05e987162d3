"""From one phase of training to the next: frozen parameters leave the optimizer.

Freezing inside an optimizer saves updates; the gradient of a frozen parameter is still computed,
and its moments still take memory. Both go when it is no longer among the trained parameters, which
changes the compiled step.
"""

from typing import Any

import jax

from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.modules.carrying import carry


def carry_state(new_state: Any, old_state: Any) -> Any:
    """The state of an optimizer for fewer parameters, with the values of the old state.

    Arrays are matched by their paths, so both states must be of the same transformation; arrays
    that the new one lacks are dropped. For the next phase of a run, with some parameters frozen:

    .. code-block:: python

      opt_state = lro.adapters.carry_state(tx.init(fewer_params), opt_state)

    and for ``nnx.Optimizer``

    .. code-block:: python

      new = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable)
      nnx.update(new, lro.adapters.carry_state(nnx.state(new), nnx.state(optimizer)))

    Args:
      new_state: A state for the parameters that are still trained; shapes
        (``jax.eval_shape(tx.init, params)``) are enough.
      old_state: The state so far.

    Returns:
      ``old_state``'s arrays in the structure of ``new_state``.

    Raises:
      ValueError: If an array of the new state is not in the old one, or has another shape or dtype.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx, params = optax.adam(0.1), {"S": jnp.ones(2), "B": jnp.ones(3)}
      >>> _, state = tx.update(params, tx.init(params))
      >>> state = lro.adapters.carry_state(tx.init({"S": params["S"]}), state)
      >>> print(state[0].count, {name: f"{x[0]:.1f}" for name, x in state[0].mu.items()})
      1 {'S': '0.1'}

    Reference:
      Liu et al., AFLoRA, 2024, https://arxiv.org/abs/2403.13269, and Azizi et al., LaMDA, 2024,
      https://arxiv.org/abs/2406.12832: what these freeze on the way.
    """

    def fit(path: Any, names: tuple[str, ...], leaf: Any, found: Any) -> Any:
        del path
        if found is None:
            raise ValueError(
                f"{'/'.join(names)} of the new state is not in the old one: make both with the "
                "same transformation, for parameters that were trained before."
            )
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{'/'.join(names)} is {leaf.dtype}{leaf.shape} in the new state and "
                f"{found.dtype}{found.shape} in the old one."
            )
        return found

    return carry(new_state, old_state, fit)


def frozen_leaves(opt_state: Any) -> tuple[str, ...]:
    """The parameters that `aflora_freezing` has frozen whole, with all layers of their stacks.

    Args:
      opt_state: The state of an optimizer with `aflora_freezing` anywhere in it, read on the host.

    Returns:
      Their paths, as ``blocks/up/adapters/default/arrays/A``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.adapters.aflora_freezing(optax.sgd(0.1), 100, warmup_steps=10, final_steps=60)
      >>> state = tx.init({"up": {"A": jnp.ones((2, 1))}})
      >>> state = state._replace(frozen={"up": {"A": jnp.asarray(True)}})
      >>> print(lro.adapters.frozen_leaves((state, optax.EmptyState())))
      ('up/A',)

    Reference:
      Liu et al., AFLoRA, 2024, https://arxiv.org/abs/2403.13269.
    """
    found = []
    for path, flags in jax.tree_util.tree_leaves_with_path(opt_state):
        # Of an ``nnx.State`` the fields of a state are keys.
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if "frozen" in names and flags.dtype == bool and bool(flags.all()):
            found.append("/".join(normalised_path(path[names.index("frozen") + 1 :])))
    return tuple(found)
