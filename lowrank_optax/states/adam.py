"""Adam with its epsilon and bias correction where official codes have them."""

import numbers
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax

EpsPlacement = Literal["before_bias_correction", "after_bias_correction"]


def scale_by_adam(
    b1: float,
    b2: float,
    eps: float,
    eps_placement: EpsPlacement = "after_bias_correction",
    bias_correction: bool = True,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Adam's scaling as in optax, or with ``eps`` added before bias correction.

    The first is ``optax.scale_by_adam``. The second is
    :math:`m \sqrt{1 - b_2^t} / (1 - b_1^t) / (\sqrt v + \epsilon)`, as in Hugging Face's AdamW and
    the official codes that follow it. ``bias_correction=False`` leaves out the factors of
    :math:`b_1^t` and :math:`b_2^t`. The state is that of optax.

    Raises:
      ValueError: If ``eps_placement`` is unknown, or ``b1`` or ``b2`` not in [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adam(0.9, 0.999, 1e-3, "before_bias_correction")
      >>> one = jnp.ones(1)
      >>> print(tx.update(one, tx.init(one))[0].round(4))  # eps acts as 0.0316 would after it
      [0.9693]
    """
    if eps_placement not in get_args(EpsPlacement):
        raise ValueError(
            f"eps_placement={eps_placement!r} must be 'before_bias_correction' or "
            "'after_bias_correction'."
        )
    for name, decay in {"b1": b1, "b2": b2}.items():
        if isinstance(decay, numbers.Real) and not 0 <= decay < 1:
            raise ValueError(f"{name}={decay!r} must be at least 0 and below 1.")
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    if bias_correction and eps_placement == "after_bias_correction":
        return adam

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        count = optax.safe_increment(state.count)
        # A float: outside of a jit each power to a whole number would be compiled.
        steps = jnp.asarray(count, jnp.result_type(float))
        root = jnp.sqrt(1 - b2**steps)
        # sqrt(v) + eps, over the root, is the corrected second moment's root plus this eps.
        step = optax.scale_by_adam(b1, b2, eps / root, mu_dtype=mu_dtype)
        new, state = step.update(updates, state, params)
        if not bias_correction:
            new = optax.tree.scale((1 - b1**steps) / root, new)
        return new, state

    return optax.GradientTransformation(adam.init, update_fn)
