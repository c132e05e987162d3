"""Powerpropagation: a weight is a power of a trained parameter, w = θ·|θ|^(α - 1).

The smaller a weight, the smaller its gradient steps: large weights learn fast, many weights end
near zero, and pruning by magnitude costs less.
"""

from collections.abc import Callable
from functools import partial
import re
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices import (
    DimensionNumbersRule,
    WeightDimensionNumbers,
    resolve_dimension_numbers,
)
from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.paths import is_whole, normalised_path, path_string
from lowrank_optax.matrices.rules import default_rule
from lowrank_optax.matrices.selection import check_patterns

Alpha: TypeAlias = float | jax.Array
"""A Python number, or a scalar array, which may be traced (a schedule)."""

Where: TypeAlias = str | Callable[[str, tuple[int, ...]], bool] | None
"""Leaves by a regular expression found in their path (``re.search``), by a function of path and
shape, or (None) all matrices and convolutions, output layers included."""


def powerprop(params: Any, alpha: Alpha, where: Where = None) -> Any:
    r"""Compute the weights of a model from its trained parameters, inside the loss.

    Elementwise, for the selected leaves,

    .. math::
      w = \theta \, |\theta|^{\alpha - 1}, \qquad
      \frac{\partial L}{\partial \theta} = \alpha |\theta|^{\alpha - 1}
      \frac{\partial L}{\partial w}.

    The derivative is finite everywhere (written out naively it is NaN at zero for
    :math:`\alpha < 2`): 0 at zero, and 1 for :math:`\alpha = 1`. The derivative with respect to a
    traced ``alpha`` is :math:`w \log |\theta|`, 0 at zero; use ``stop_gradient`` if ``alpha`` comes
    from a schedule that you differentiate through. Only ``params`` are saved for the backward pass.
    To export a model, call this once and drop the reparameterisation.

    Args:
      params: Tree of arrays :math:`\theta`, from `powerprop_inverse`.
      alpha: Exponent, at least 1. The Python number 1 returns ``params`` unchanged.
      where: Leaves to reparameterise: a regular expression found in their path, a function of path
        and shape, or None for all matrices and convolutions, output layers included: no biases,
        norms or embeddings.

    Returns:
      A tree like ``params``, with the same dtypes; powers are computed in float32 (float64 for
      float64).

    Raises:
      ValueError: If ``alpha`` is below 1 (unless traced), or ``where`` selects nothing.
      TypeError: If ``alpha`` is not a scalar, or ``where`` has another type.

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
    r"""Compute the trained parameters from initial or pretrained weights: inverts `powerprop`.

    .. math:: \theta = \mathrm{sign}(w) \, |w|^{1 / \alpha}

    The model starts as the same function as without Powerpropagation. Arguments other than
    ``weights``, a tree of arrays, and dtypes are as for `powerprop`.

    Raises:
      ValueError: If a selected leaf is all zero and ``alpha`` is above 1, neither of them traced:
        its gradient would always be zero. Other errors as for `powerprop`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> weights = {"kernel": jnp.array([[0.01, -0.25]]), "bias": jnp.zeros(2)}
      >>> theta = lro.layers.powerprop_inverse(weights, 2.0)
      >>> print([f"{x:.2f}" for x in theta["kernel"].ravel()])
      ['0.10', '-0.50']

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, section 2.
    """
    check_alpha(alpha)
    refuse_zeros(weights, alpha, where)
    return map_selected(lambda w: root(w, alpha), where, weights)


def change_alpha(params: Any, old: Alpha, new: Alpha, where: Where = None) -> Any:
    r"""Convert the trained parameters to another exponent; the weights stay the same.

    .. math::
      \theta \leftarrow \mathrm{sign}(\theta) \, |\theta|^{\alpha_\mathrm{old} /
      \alpha_\mathrm{new}}

    The optimizer's moments belong to the old exponent: initialise them again. (With
    `powerprop_updates` the parameters are the weights, so nothing has to be converted.)

    Args:
      params: Tree of arrays, trained with the exponent ``old``.
      old: Exponent so far, at least 1.
      new: Exponent from now on, at least 1.
      where: Leaves, as for `powerprop`, as are the dtypes and errors.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> theta = {"kernel": jnp.array([[0.3, -0.5]])}
      >>> switched = lro.layers.change_alpha(theta, 2.0, 3.0)
      >>> print([f"{x:.2f}" for x in lro.layers.powerprop(switched, 3.0)["kernel"].ravel()])
      ['0.09', '-0.25']

    Reference:
      The modifier of https://github.com/neuralmagic/sparseml, which is NaN at zero before a repair.
    """
    check_alpha(old, "old")
    check_alpha(new, "new")
    return map_selected(lambda theta: root(theta, new / old), where, params)


def check_alpha(alpha: Any, name: str = "alpha") -> None:
    """Refuse exponents below 1, unless traced."""
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
    """Raise for selected leaves that are all zero, which would never train."""
    if isinstance(alpha, jax.core.Tracer) or alpha == 1:
        return

    def is_zero(w: Any) -> bool:
        known = isinstance(w, jax.Array | np.ndarray) and not isinstance(w, jax.core.Tracer)
        return known and w.size > 0 and not bool(jnp.any(w != 0))

    leaves = jax.tree_util.tree_leaves_with_path(weights)
    pairs = zip(leaves, selected(weights, where), strict=True)
    zero = [path_string(path) for (path, leaf), chosen in pairs if chosen and is_zero(leaf)]
    if zero:
        raise ValueError(
            f"{', '.join(zero)}: all weights are zero, where Powerpropagation with alpha="
            f"{float(alpha):g} has no gradient; initialise them otherwise, or leave them out by "
            "`where`."
        )


def selected(params: Any, where: Where, rule: DimensionNumbersRule = None) -> list[bool]:
    """Whether each leaf is selected, in the order of ``jax.tree.leaves``; only real numbers are.

    Raises:
      ValueError: If ``where`` is not a regular expression, or selects no leaf of a whole tree.
      TypeError: If ``where`` has another type.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    must_find = is_whole(params)
    if where is None:
        chosen = [spec is not None for spec in layer_matrices(params, rule)]
    elif isinstance(where, str):
        if must_find:
            check_patterns("where", [where], [normalised_path(path) for path, _ in leaves], "leaf")
        chosen = [bool(re.search(where, path_string(path))) for path, _ in leaves]
    elif callable(where):
        chosen = [bool(where(path_string(path), tuple(leaf.shape))) for path, leaf in leaves]
    else:
        raise TypeError(
            f"where={where!r} must be a regular expression, a function of path and shape, or None."
        )
    is_real = [jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in leaves]
    both = [a and b for a, b in zip(chosen, is_real, strict=True)]
    if must_find and not any(both):
        names = ", ".join(path_string(path) for path, _ in leaves[:5])
        raise ValueError(
            f"where={where!r} selects none of the {len(leaves)} leaves ({names}): give a pattern "
            "or a function that selects some of real numbers."
        )
    return both


def layer_matrices(
    params: Any, rule: DimensionNumbersRule = None
) -> list[WeightDimensionNumbers | None]:
    """How each leaf is a batch of matrices, None for other leaves; by default, by names."""
    if rule is None:
        # Output layers are layers here; other methods leave them out.
        rule = lambda tree: default_rule(tree, lambda path: named_kind(path) in (None, "head"))
    return resolve_dimension_numbers(rule, params)


def map_selected(function: Callable[..., Any], where: Where, params: Any, *trees: Any) -> Any:
    """``params`` with ``function`` of each selected leaf and of the same leaves of the trees."""
    leaves, treedef = jax.tree.flatten(params)
    matching = [treedef.flatten_up_to(tree) for tree in trees]
    parts = zip(selected(params, where), leaves, *matching, strict=True)
    return treedef.unflatten(
        [function(leaf, *more) if chosen else leaf for chosen, leaf, *more in parts]
    )


def power(theta: jax.Array, alpha: Alpha) -> jax.Array:
    """The weights ``θ·|θ|^(α - 1)`` of one array, in its dtype."""
    if isinstance(alpha, int | float) and alpha == 1:
        return theta
    return _power_saving_theta(theta, jnp.asarray(alpha))


def root(w: jax.Array, alpha: Alpha) -> jax.Array:
    """The inverse of `power`; its derivative at 0 is 0 instead of infinite."""
    if isinstance(alpha, int | float) and alpha == 1:
        return w
    w32, alpha = _to_float32(w, jnp.asarray(alpha))
    return (w32 * _nonzero(w32) ** (1 / alpha - 1)).astype(w.dtype)


def slope(theta: jax.Array, alpha: Alpha) -> jax.Array:
    """The derivative ``α·|θ|^(α - 1)``, float32 or wider; its own derivative is finite too."""
    theta32, alpha = _to_float32(theta, jnp.asarray(alpha))
    at_zero = jnp.where(alpha == 1, 1.0, 0.0).astype(theta32.dtype)
    return jnp.where(theta32 == 0, at_zero, alpha * _nonzero(theta32) ** (alpha - 1))


@jax.custom_jvp
def _power(theta: jax.Array, alpha: jax.Array) -> jax.Array:
    theta32, alpha = _to_float32(theta, alpha)
    # Unlike sign·|θ|^α, this is exactly θ for a traced alpha of 1.
    return (theta32 * jnp.abs(theta32) ** (alpha - 1)).astype(theta.dtype)


@partial(_power.defjvp, symbolic_zeros=True)
def _power_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    theta, alpha = primals
    w = _power(theta, alpha)
    theta32, exponent = _to_float32(theta, alpha)
    total = jnp.zeros_like(theta32)
    theta_tangent, alpha_tangent = tangents
    if not isinstance(theta_tangent, jax.custom_derivatives.SymbolicZero):
        total += slope(theta, alpha) * theta_tangent
    if not isinstance(alpha_tangent, jax.custom_derivatives.SymbolicZero):
        size = _nonzero(theta32)
        total += theta32 * size ** (exponent - 1) * jnp.log(size) * alpha_tangent
    return w, total.astype(w.dtype)


# The backward pass computes the slope again, and so saves theta alone.
_power_saving_theta = jax.checkpoint(
    _power, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable
)


def _nonzero(x: jax.Array) -> jax.Array:
    """Absolute values, with 1 for 0: their powers have finite derivatives."""
    return jnp.where(x == 0, 1, jnp.abs(x))


def _to_float32(theta: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(theta.dtype, jnp.float32)
    return theta.astype(dtype), alpha.astype(dtype)
