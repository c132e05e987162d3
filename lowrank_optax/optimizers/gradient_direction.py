"""Direction rules: updates of any optimizer that agree with the sign of the current gradient."""

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
from lowrank_optax.matrices.arithmetic import summed_together
from lowrank_optax.matrices.paths import leaves_by_path, normalised_path
from lowrank_optax.slices.call import Whole, whole_of
from lowrank_optax.states.arguments import refuse_unused, transformation

Mode = Literal["grams", "cautious"]
MaskScale = Literal["mean_clamped", "count_plus_one", "none"]

_Axes: TypeAlias = tuple[int, ...]


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

    where the scale :math:`s` compensates for the removed elements:
    :math:`1 / \max(\mathrm{mean}(\phi), 10^{-3})` for ``"mean_clamped"`` (C-Optim, timm),
    :math:`n / (\sum \phi + 1)` for ``"count_plus_one"`` (the paper) and 1 for ``"none"``. Each
    weight, and each of the layers stacked in one array, has its own scale. An element whose
    gradient is zero does not move.

    The rule uses the gradient that it receives, before decay is added: inside of
    `scale_by_projection` it compares in the subspace. Put ``optax.add_decayed_weights`` after it,
    since decay from ``inner`` is part of the update. Grams around an optimizer whose updates all
    have one size, such as Lion, is sign descent; it warns about Lion.

    Args:
      inner: Any optax transformation whose updates have the shapes of the gradients.
      mode: ``"grams"`` or ``"cautious"``.
      scale: Scale :math:`s` of ``"cautious"``.
      along_gradient: Whether ``inner`` is a ``scale_by_...`` transformation, whose updates point
        along the gradient. False for whole optimizers such as ``optax.adam(1e-3)``, whose updates
        are added to the parameters.
      weight_dimension_numbers: Which leaves are matrices, and how, for the scales of
        ``"cautious"``: see `scale_by_projection`. Other axes are those of stacked layers; for other
        leaves, the leading axes that all leaves of a subtree share. In projected space
        ``[*batch, r, n]`` leave it None or give ``WeightDimensionNumbers(-2, -1)``.

    Returns:
      A transformation with ``inner``'s state and the dtypes of its updates.

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
    """`with_gradient_direction`, with optional ``signs(state)``: arrays with the updates' signs.

    Cautious scales wait for a sum over a whole weight. Computed from such signs (Adam's first
    moment) instead of the updates, the sum does not keep the updates in memory.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} must be 'grams' or 'cautious'.")
    if scale not in get_args(MaskScale):
        raise ValueError(f"scale={scale!r} must be 'mean_clamped', 'count_plus_one' or 'none'.")
    unused: dict[str, Any] = {"scale": scale} if mode == "grams" else {}
    if mode == "grams" or scale == "none":
        unused["weight_dimension_numbers"] = weight_dimension_numbers
    because = "mode='grams'" if mode == "grams" else "scale='none'"
    refuse_unused(with_gradient_direction, because, **unused)
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> Any:
        state = inner.init(params)
        is_lion = lambda x: isinstance(x, optax.ScaleByLionState)
        if mode == "grams" and any(map(is_lion, jax.tree.leaves(state, is_leaf=is_lion))):
            warnings.warn(
                "Grams uses only the sizes of inner's updates, and those of Lion are all equal: "
                "this is sign descent. Use mode='cautious'.",
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
        axes = weight_axes(weight_dimension_numbers, tree)
        axes = dict(zip(leaves_by_path(tree), axes, strict=True))

        def scaled(u: jax.Array, direction: jax.Array, sign: jax.Array, own: _Axes) -> jax.Array:
            size = math.prod(u.shape[axis] for axis in own)
            # In float32 at least, since it may be as large as the number of elements.
            dtype = jnp.promote_types(direction.dtype, jnp.float32)
            count = _count(sign * direction > 0, own, dtype)
            if scale == "count_plus_one":
                return (u * (size / (count + 1))).astype(u.dtype)
            return (u * (1 / jnp.maximum(count / max(size, 1), 1e-3))).astype(u.dtype)

        # Computed again: otherwise a compiler keeps all directions in memory.
        directions = jax.tree.map(toward, jax.lax.optimization_barrier(updates), new)
        leaves, treedef = jax.tree.flatten(new)
        trees = (directions, new if signs is None else signs(state))
        columns = [
            leaves,
            *map(treedef.flatten_up_to, trees),
            [axes[path] for path in leaves_by_path(updates)],
        ]
        return treedef.unflatten(map(scaled, *columns)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def weight_axes(rule: DimensionNumbersRule, tree: Any) -> list[_Axes]:
    """The axes of one weight, for each leaf: all but those of stacked layers.

    For a matrix these are the axes in its dimension numbers. For another leaf they are all, except
    leading ones that all leaves of a subtree share and that are batch axes of its matrices, as in
    the scale ``[layers, d]`` of a norm beside kernels ``[layers, d, d]``.

    Example:
      >>> import jax.numpy as jnp
      >>> block = {"kernel": jnp.zeros((3, 4, 5)), "norm": {"scale": jnp.zeros((3, 4))}}
      >>> weight_axes(None, {"blocks": block, "norm": {"scale": jnp.zeros(4)}})
      [(1, 2), (1,), (0,)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = [leaf.shape for _, leaf in leaves]
    matrices = {}  # the axes of each
    for i, spec in enumerate(resolve_dimension_numbers(rule, tree)):
        if spec is not None:
            named = np.hstack((spec.reduction_axis, spec.output_axis))
            matrices[i] = tuple(int(axis) % len(shapes[i]) for axis in named)
    subtrees = defaultdict(list)
    for i, (path, _) in enumerate(leaves):
        names = normalised_path(path)
        for depth in range(len(names)):
            subtrees[names[:depth]].append(i)
    leading = [0] * len(leaves)
    for members in subtrees.values():
        inside = [matrices[i] for i in members if i in matrices]
        shared = 0
        for sizes in zip(*(shapes[i] for i in members), strict=False):
            if not inside or len(set(sizes)) > 1 or any(shared in axes for axes in inside):
                break
            shared += 1
        for i in members:
            leading[i] = max(leading[i], shared)
    return [
        matrices.get(i, tuple(range(count, len(shape))))
        for i, (shape, count) in enumerate(zip(shapes, leading, strict=True))
    ]


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)  # outside of a jit too
def _count(mask: jax.Array, axes: _Axes, dtype: Any) -> jax.Array:
    """The number of true elements along the axes, which become of size 1."""
    total = lambda x: jnp.sum(x, axes, dtype=dtype, keepdims=True)

    def in_one_pass(mask: jax.Array) -> jax.Array:
        # XLA for CPU writes the operand of a single sum to memory, but not that of two.
        both = (mask.astype(jnp.int32), (~mask).astype(jnp.int32))
        count, removed = (total(jnp.expand_dims(x, last)) for x in summed_together(both, last))
        # Adds 0: an unused sum would be removed.
        return count + jnp.minimum(removed, 0)

    if not axes:
        return total(mask)
    last = max(axes)
    return jax.lax.platform_dependent(mask, cpu=in_one_pass, default=total)


def _check(gradient: jax.Array, update: jax.Array) -> None:
    if gradient.shape != update.shape:
        raise ValueError(
            f"inner replaces a gradient of shape {gradient.shape} with an update of shape "
            f"{update.shape}, so their signs cannot be compared. For projected gradients put the "
            "rule inside: scale_by_projection(with_gradient_direction(...), ...)."
        )
    if jnp.iscomplexobj(gradient):
        raise ValueError(
            "A complex gradient has no sign; put optax.contrib.split_real_and_imaginary around "
            "with_gradient_direction."
        )
