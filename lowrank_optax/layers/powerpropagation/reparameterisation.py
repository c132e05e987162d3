"""Powerpropagation: a weight is a power of what is trained, w = θ·|θ|^(α - 1).

A gradient step is then the smaller the smaller a weight already is: the rich get richer, and many
weights end near zero, so that pruning by magnitude costs less.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.powerpropagation.power import Alpha, power, root
from lowrank_optax.layers.powerpropagation.where import Where, map_selected, selected
from lowrank_optax.matrices.paths import path_string


def powerprop(params: Any, alpha: Alpha, where: Where = None) -> Any:
    r"""The weights of a model from what is trained: a pure map of trees, inside the loss.

    Element by element of the selected leaves,

    .. math::
      w = \theta \, |\theta|^{\alpha - 1}, \qquad
      \frac{\partial L}{\partial \theta} = \alpha |\theta|^{\alpha - 1}
      \frac{\partial L}{\partial w}.

    The derivative is finite everywhere (written out naively it is NaN at zero for
    :math:`\alpha < 2`): 0 at zero, and 1 for :math:`\alpha = 1`. So is the one with respect to a
    traced ``alpha``, :math:`w \log |\theta|`, 0 at zero; stop it if a schedule sets ``alpha``
    and something differentiates through. Backward keeps ``params`` alone. To export a model, call
    this once and drop the reparameterisation.

    Args:
      params: Any tree of arrays: what is trained, :math:`\theta`, as `powerprop_inverse` makes it.
      alpha: The exponent, at least 1. At the Python number 1 ``params`` come back as they are.
      where: Which leaves: a regular expression found in their path, a function of path and shape,
        or None for all matrices and convolutions, output layers included: no biases, norms or
        embeddings.

    Returns:
      A tree like ``params``, dtypes too; powers are computed in float32 (float64 for float64).

    Raises:
      ValueError: If ``alpha`` is below 1 (unless traced), or ``where`` selects nothing by a regular
        expression.
      TypeError: If ``alpha`` is no scalar, or ``where`` none of its kinds.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> theta = {"kernel": jnp.array([[0.0, 0.25, -0.5, 2.0]]), "bias": jnp.ones(4)}
      >>> print(lro.layers.powerprop(theta, 2.0)["kernel"])
      [[ 0.      0.0625 -0.25    4.    ]]
      >>> total = lambda theta: lro.layers.powerprop(theta, 2.0)["kernel"].sum()
      >>> print(jax.grad(total)(theta)["kernel"])
      [[0.  0.5 1.  4. ]]

    Reference:
      Schwarz et al., Powerpropagation: A sparsity inducing weight reparameterisation, 2021,
      https://arxiv.org/abs/2110.00296, equation 1.
    """
    check_alpha(alpha)
    return map_selected(lambda theta: power(theta, alpha), where, params)


def powerprop_inverse(weights: Any, alpha: Alpha, where: Where = None) -> Any:
    r"""What is trained from weights, initial or pretrained: the inverse of `powerprop`.

    .. math:: \theta = \mathrm{sign}(w) \, |w|^{1 / \alpha}

    A model starts as the same function it is without Powerpropagation.

    Args:
      weights: Any tree of arrays.
      alpha: The exponent, at least 1.
      where: Which leaves, as for `powerprop`.

    Returns:
      A tree like ``weights``, dtypes too.

    Raises:
      ValueError: If a selected leaf is all zero and ``alpha`` is above 1, neither of them traced:
        its gradient would be zero for ever. Otherwise as `powerprop`.
      TypeError: As `powerprop`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> weights = {"kernel": jnp.array([[0.01, -0.25]]), "bias": jnp.zeros(2)}
      >>> theta = lro.layers.powerprop_inverse(weights, 2.0)
      >>> print([f"{x:.2f}" for x in theta["kernel"].ravel()])
      ['0.10', '-0.50']

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, the initialisation of section 2.
    """
    check_alpha(alpha)
    refuse_zeros(weights, alpha, where)
    return map_selected(lambda w: root(w, alpha), where, weights)


def change_alpha(params: Any, old: Alpha, new: Alpha, where: Where = None) -> Any:
    r"""What is trained, for another exponent, with the weights as they are.

    .. math::
      \theta \leftarrow \mathrm{sign}(\theta) \, |\theta|^{\alpha_\mathrm{old} /
      \alpha_\mathrm{new}}

    The optimizer's moments belong to the old exponent: start them anew. (`powerprop_updates` has
    no such trouble with the weights, which it keeps, nor in weight space with the moments.)

    Args:
      params: Any tree of arrays, trained with the exponent ``old``.
      old: The exponent so far, at least 1.
      new: The exponent from now on, at least 1.
      where: Which leaves, as for `powerprop`.

    Returns:
      A tree like ``params``, dtypes too.

    Raises:
      ValueError: If an exponent is below 1 (unless traced); otherwise as `powerprop`.
      TypeError: As `powerprop`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> theta = {"kernel": jnp.array([[0.3, -0.5]])}
      >>> switched = lro.layers.change_alpha(theta, 2.0, 3.0)
      >>> print([f"{x:.2f}" for x in lro.layers.powerprop(switched, 3.0)["kernel"].ravel()])
      ['0.09', '-0.25']

    Reference:
      The modifier of https://github.com/neuralmagic/sparseml, which multiplies by a power that is
      NaN at zero, and repairs it.
    """
    check_alpha(old, "old")
    check_alpha(new, "new")
    return map_selected(lambda theta: root(theta, new / old), where, params)


def check_alpha(alpha: Any, name: str = "alpha") -> None:
    """Refuses exponents below 1; traced ones are left alone."""
    if isinstance(alpha, jax.core.Tracer):
        return
    try:
        number = float(alpha)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={alpha!r} must be a number or a scalar array.") from None
    if not 1 <= number < float("inf"):
        raise ValueError(
            f"{name}={number:g} must be finite and at least 1, which is plain training: below, "
            "small weights would have unbounded gradients."
        )


def refuse_zeros(weights: Any, alpha: Alpha, where: Where) -> None:
    """An error for selected leaves of zeros alone, which would never train."""
    if isinstance(alpha, jax.core.Tracer) or alpha == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    dead = [
        path_string(path)
        for (path, leaf), chosen in zip(leaves, selected(weights, where), strict=True)
        if chosen and _is_zero(leaf)
    ]
    if dead:
        raise ValueError(
            f"{', '.join(dead)}: all weights are zero, where Powerpropagation with alpha="
            f"{float(alpha):g} has no gradient; initialise them otherwise, or leave them out by "
            "`where`."
        )


def _is_zero(w: Any) -> bool:
    known = isinstance(w, jax.Array | np.ndarray) and not isinstance(w, jax.core.Tracer)
    return known and w.size > 0 and not bool(jnp.any(w != 0))
