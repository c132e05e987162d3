"""Direction rules: updates of any optimizer, made to agree with the sign of the current gradient.

Momentum remembers directions that the current gradient disagrees with. Grams (Gradient descent with
adaptive momentum scaling) takes only the size of an update from the optimizer, and its sign from
the gradient; a cautious optimizer leaves out the elements that disagree with the gradient.
"""

from collections import defaultdict
from collections.abc import Callable
import functools
import math
from typing import Any, Literal, TypeAlias, get_args
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.matrices import DimensionNumbersRule, resolve_dimension_numbers
from lowrank_optax.matrices.paths import leaves_by_path, normalised_path
from lowrank_optax.matrices.sums import summed_together
from lowrank_optax.slices.call import Whole, whole_of
from lowrank_optax.states.arguments import refuse_unused, transformation

Mode = Literal["grams", "cautious"]
MaskScale = Literal["mean_clamped", "count_plus_one", "none"]

_Axes: TypeAlias = tuple[int, ...]
_LEAST_MEAN = 1e-3  # of a mask, in C-Optim and timm


def with_gradient_direction(
    inner: optax.GradientTransformation,
    mode: Mode = "grams",
    scale: MaskScale = "mean_clamped",
    *,
    along_gradient: bool = False,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``inner`` with updates that never point along the gradient, element by element.

    With the update :math:`u` that ``inner`` makes of the gradient :math:`g`, of :math:`n` elements,

    .. math::
      \text{grams:} \quad & u \leftarrow -\mathrm{sign}(g) \, |u|, \\
      \text{cautious:} \quad & u \leftarrow s \, \phi \, u, \qquad \phi = 1[u g < 0],

    where :math:`s` makes up for the elements left out: :math:`1 / \max(\mathrm{mean}(\phi),
    10^{-3})` for ``"mean_clamped"`` (the current C-Optim, and timm), :math:`n / (\sum \phi + 1)`
    for ``"count_plus_one"`` (the paper) and 1 for ``"none"``. The mean is taken over one weight:
    layers stacked in one array have a scale each. An element whose gradient is zero does not move.

    The gradient is the one that arrives: of `optax.MultiSteps`, the mean. As the ``inner`` of
    `scale_by_projection` the rule compares in the subspace, and around it, in full space, where
    what it returns is no longer of low rank. Decay that ``inner`` adds counts as a part of the
    update: put ``optax.add_decayed_weights`` after this transformation instead.

    Grams around an optimizer whose updates are all of one size, such as Lion or sign descent, is
    sign descent: their momentum is without effect, and Lion is warned of.

    Args:
      inner: Any optax transformation that answers a gradient with an update of its shape.
      mode: ``"grams"`` or ``"cautious"``.
      scale: Factor of the elements that ``"cautious"`` leaves in; Grams has none.
      along_gradient: Whether ``inner`` is a ``scale_by_...`` transformation, whose updates point
        along the gradient until ``optax.scale_by_learning_rate`` negates them. False for whole
        optimizers such as ``optax.adam(1e-3)``, whose updates are added to the parameters.
      weight_dimension_numbers: Which leaves are matrices, and how, for the means of ``"cautious"``:
        see ``lowrank_optax.matrices.resolve_dimension_numbers``. Axes it does not name are those of
        stacked layers; a leaf that is not a matrix has the leading ones that its whole subtree
        shares. In projected space, where leaves are ``[*batch, r, n]``, leave it None or give
        ``WeightDimensionNumbers(-2, -1)``.

    Returns:
      A transformation with ``inner``'s state. Updates keep the dtype they have from ``inner``.

    Raises:
      ValueError: If ``mode`` or ``scale`` is unknown; in ``update``, if ``inner``'s updates have
        other shapes than the gradients, or these are complex.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np, optax
      >>> gradients = [jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, -0.5, 0.0])]
      >>> def second_update(tx):
      ...     state = tx.init(gradients[0])
      ...     for gradient in gradients:
      ...         update, state = tx.update(gradient, state)
      ...     return np.asarray(update).round(2) + 0
      >>> momentum = optax.sgd(1.0, momentum=0.9)
      >>> print(second_update(momentum))
      [-1.9 -0.4 -0.9]
      >>> print(second_update(lro.with_gradient_direction(momentum)))
      [-1.9  0.4  0. ]
      >>> print(second_update(lro.with_gradient_direction(momentum, "cautious", "none")))
      [-1.9  0.   0. ]

    References:
      Cao et al., Grams: Gradient Descent with Adaptive Momentum Scaling, 2024,
      https://arxiv.org/abs/2412.17107. Liang et al., Cautious Optimizers: Improving Training with
      One Line of Code, 2024, https://arxiv.org/abs/2411.16085, Algorithm 1.
    """
    return direct(inner, mode, scale, along_gradient, weight_dimension_numbers)


def direct(
    inner: optax.GradientTransformation,
    mode: Mode,
    scale: MaskScale,
    along_gradient: bool,
    weight_dimension_numbers: DimensionNumbersRule,
    signs: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`with_gradient_direction` with ``signs(state)``: arrays with the signs of the updates.

    Cautious scales need a sum over a whole weight. With the signs of Adam's first moment that sum
    needs no updates, which a compiler may otherwise hold in memory until it is known.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} must be 'grams' or 'cautious'.")
    if scale not in get_args(MaskScale):
        raise ValueError(f"scale={scale!r} must be 'mean_clamped', 'count_plus_one' or 'none'.")
    rule = weight_dimension_numbers
    if mode == "grams":
        refuse_unused(with_gradient_direction, "mode='grams'", scale=scale)
        refuse_unused(with_gradient_direction, "mode='grams'", weight_dimension_numbers=rule)
    elif scale == "none":
        refuse_unused(with_gradient_direction, "scale='none'", weight_dimension_numbers=rule)
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> Any:
        state = inner.init(params)
        if mode == "grams" and _has_lion(state):
            warnings.warn(
                "Grams takes sizes alone from inner, and those of Lion are all equal: this is sign "
                "descent. Take mode='cautious'.",
                stacklevel=2,
            )
        return state

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        new, state = inner.update(updates, state, params, whole=whole, **extra_args)
        jax.tree.map(_check, updates, new)
        toward = lambda g, u: jnp.sign(g if along_gradient else -g).astype(u.dtype)
        directions = jax.tree.map(toward, updates, new)
        if mode == "grams":
            return jax.tree.map(lambda d, u: d * jnp.abs(u), directions, new), state
        new = jax.tree.map(lambda d, u: d * jnp.maximum(d * u, 0), directions, new)
        if scale == "none":
            return new, state
        tree = whole_of(whole, updates)
        known = dict(
            zip(leaves_by_path(tree), weight_axes(weight_dimension_numbers, tree), strict=True)
        )
        axes = [known[path] for path in leaves_by_path(updates)]
        # Of gradients of their own: else a compiler keeps all directions, to have them twice.
        again = jax.tree.map(toward, jax.lax.optimization_barrier(updates), new)
        factors = _mask_scales(scale, new if signs is None else signs(state), again, axes)
        return jax.tree.map(lambda u, s: (u * s).astype(u.dtype), new, factors), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def weight_axes(rule: DimensionNumbersRule, tree: Any) -> list[_Axes]:
    """The axes that make up one weight, for each leaf: all but those of stacked layers.

    A matrix has the axes its dimension numbers name. Another leaf has all axes but leading ones
    that it shares with a subtree in which they are batch axes of every matrix: the scale
    ``[layers, d]`` of a norm beside kernels ``[layers, d, d]``.

    Example:
      >>> import jax.numpy as jnp
      >>> block = {"kernel": jnp.zeros((3, 4, 5)), "norm": {"scale": jnp.zeros((3, 4))}}
      >>> weight_axes(None, {"blocks": block, "norm": {"scale": jnp.zeros(4)}})
      [(1, 2), (1,), (0,)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    specs = resolve_dimension_numbers(rule, tree)
    shapes = [leaf.shape for _, leaf in leaves]
    axes = [_axes_of(len(shape), spec) for shape, spec in zip(shapes, specs, strict=True)]
    subtrees = defaultdict(list)
    for i, (path, _) in enumerate(leaves):
        names = normalised_path(path)
        for depth in range(len(names)):
            subtrees[names[:depth]].append(i)
    leading = [0] * len(leaves)
    for members in subtrees.values():
        matrices = [axes[i] for i in members if specs[i] is not None]
        shared = _leading_batch_axes([shapes[i] for i in members], matrices)
        for i in members:
            leading[i] = max(leading[i], shared)
    return [
        one[count:] if spec is None else one
        for one, spec, count in zip(axes, specs, leading, strict=True)
    ]


def _axes_of(ndim: int, spec: Any) -> _Axes:
    if spec is None:
        return tuple(range(ndim))
    named = np.hstack((spec.reduction_axis, spec.output_axis))
    return tuple(int(axis) % ndim for axis in named)


def _leading_batch_axes(shapes: list[tuple[int, ...]], matrices: list[_Axes]) -> int:
    """How many leading axes all leaves of a subtree share, being batch axes of its matrices."""
    count = 0
    for sizes in zip(*shapes, strict=False):
        if not matrices or len(set(sizes)) > 1 or any(count in axes for axes in matrices):
            break
        count += 1
    return count


def _mask_scales(scale: MaskScale, signs: Any, directions: Any, axes: list[_Axes]) -> Any:
    """Factors that make up for the elements left out of each weight, in float32 at least."""
    leaves, treedef = jax.tree.flatten(directions)
    scales = []
    for direction, sign, own in zip(leaves, treedef.flatten_up_to(signs), axes, strict=True):
        size = math.prod(direction.shape[axis] for axis in own)
        dtype = jnp.promote_types(direction.dtype, jnp.float32)
        kept = _count(sign * direction > 0, own, dtype)
        if scale == "count_plus_one":
            factor = size / (kept + 1)
        else:
            factor = 1 / jnp.maximum(kept / max(size, 1), _LEAST_MEAN)
        scales.append(factor)
    return treedef.unflatten(scales)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)  # outside of a jit too
def _count(mask: jax.Array, axes: _Axes, dtype: Any) -> jax.Array:
    """How many elements along the axes are true, with axes of size 1."""
    total = lambda x: jnp.sum(x, axes, dtype=dtype, keepdims=True)

    def in_one_pass(mask: jax.Array) -> jax.Array:
        # XLA for CPU writes to memory what a single sum is of, but not what two are of.
        both = (mask.astype(jnp.int32), (~mask).astype(jnp.int32))
        kept, left_out = (total(jnp.expand_dims(x, last)) for x in summed_together(both, last))
        # A sum that nothing needs would be taken away: of this one nothing is left.
        return kept + jnp.minimum(left_out, 0)

    if not axes:
        return total(mask)
    last = max(axes)
    return jax.lax.platform_dependent(mask, cpu=in_one_pass, default=total)


def _check(gradient: jax.Array, update: jax.Array) -> None:
    if gradient.shape != update.shape:
        raise ValueError(
            f"inner answers a gradient of shape {gradient.shape} with an update of shape "
            f"{update.shape}, and their signs cannot be compared. Gradients that arrive projected "
            "need the rule inside: scale_by_projection(with_gradient_direction(...), ...)."
        )
    if jnp.iscomplexobj(gradient):
        raise ValueError(
            "A complex gradient has no sign; put optax.contrib.split_real_and_imaginary around "
            "with_gradient_direction."
        )


def _has_lion(state: Any) -> bool:
    is_lion = lambda x: isinstance(x, optax.ScaleByLionState)
    return any(map(is_lion, jax.tree.leaves(state, is_leaf=is_lion)))
