"""SaRA: the entries of a weight with the smallest magnitudes are trained, and no others."""

import dataclasses
import functools
import math
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lowrank_optax.adapters.base import (
    Adapter,
    AdapterParams,
    Arrays,
    Merged,
    Weights,
    rounded_to,
)
from lowrank_optax.adapters.operands import Operand
from lowrank_optax.matrices.explicit_sharding import constrain, partition_of
from lowrank_optax.matrices.polar import polar_factor

_LARGEST_INDEX = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaRA(Adapter):
    r"""Progressive sparse low-rank adaptation: trains the entries with :math:`|w| < \theta`.

    .. math::
      y = x P, \qquad P_{ij} = \begin{cases}
        p_k & \text{if } (i, j) \text{ is the } k\text{-th selected entry} \\
        W_{ij} & \text{otherwise} \end{cases}

    The selection is made once, of the weights as they are when the adapter is attached. Parameters
    of a stack ``[L, d_in, d_out]``: ``values [L, N]``, the selected entries themselves, trained in
    float32, so that weight decay acts on the weights as it does without an adapter; frozen are
    ``indices [L, N]``, int32 positions in the flattened matrix in ascending order, and
    ``initial [L, N]``, the entries at the start in the weight's dtype. The start function is the
    model's bit for bit. Entries that are not selected never change.

    The backward pass saves the input of the layer and nothing of the weight's size: it makes the
    change :math:`P - W` and the gradient of all its entries again for one layer after the other,
    and reads the selected ones. Gradients and optimizer state are of ``values`` alone.

    Wrap the optimizer in `sara_reselection` to freeze entries that have grown.

    Args:
      fraction: Fraction of each matrix that is selected, above 0 and at most 1: its smallest
        entries by magnitude, at least one. Equal magnitudes are selected in the order of positions.
      threshold: The threshold :math:`\theta` instead: all entries of smaller magnitude. Layers of a
        stack have different numbers of them; their arrays are padded to the largest with positions
        beyond the matrix. It needs the weights' values, so the adapter cannot be attached under
        ``jax.jit``.

    Raises:
      TypeError: If an option is not a number; in ``init``, if the weights are not floating point
        numbers, are a shape alone, or (with `threshold`) are traced.
      ValueError: If not exactly one of `fraction` and `threshold` is given, or one is out of its
        range; in ``init``, if positions of a matrix do not fit into int32.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> weights = jnp.array([[[0.5, -0.1], [0.2, 3.0]]])
      >>> params = lro.adapters.SaRA(threshold=0.3).init(jax.random.key(0), weights)
      >>> print(params.trainable["values"], params.frozen["indices"])
      [[-0.1  0.2]] [[1 2]]

    Reference:
      Hu et al., SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
      Adaptation, 2024, https://arxiv.org/abs/2409.06633, and its code,
      https://github.com/sjtuplayer/SaRA, whose first step, which drops the signs, is not followed.
    """

    fraction: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        check_selection(self.fraction, self.threshold)

    @property
    def reads_weights(self) -> bool:
        """True: the selection is by their magnitudes."""
        return True

    @property
    def has_static_shapes(self) -> bool:
        """Whether the number of selected entries is known without the weights' values."""
        return self.threshold is None

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """The selected entries, where they are, and a copy of them."""
        del key, shared, embedding
        if isinstance(weights, jax.ShapeDtypeStruct):
            raise TypeError(f"SaRA selects entries of weights, and {weights} is a shape alone.")
        if not jnp.issubdtype(weights.dtype, jnp.floating):
            raise TypeError(
                f"SaRA trains entries of weights, and these are {weights.dtype}: dequantize them, "
                "or leave the layer out of `where`."
            )
        size, count = math.prod(weights.shape[1:]), self._count(weights)
        # Positions of padding are beyond those of the matrix.
        if size + (0 if self.has_static_shapes else count) > _LARGEST_INDEX:
            raise ValueError(
                f"a matrix of shape {tuple(weights.shape[1:])} has more than {_LARGEST_INDEX} "
                "positions, which do not fit into int32: leave the layer out of `where`."
            )
        partition = partition_of(weights)
        whole = None if partition is None else PartitionSpec(None, None, None)
        indices, initial = _selected(self, count, constrain(jnp.asarray(weights), whole))
        # A copy also of float32, so that a step that donates the values leaves `initial`.
        values = jnp.array(initial, jnp.promote_types(initial.dtype, jnp.float32))
        return AdapterParams({"values": values}, {"indices": indices, "initial": initial})

    def branch(
        self,
        p: Arrays,
        x: Operand,
        *,
        y: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """``x (P - W)``; see `Adapter.branch`."""
        del bias, key
        change = lambda p: _dense(_change(p).astype(y.dtype), p["indices"], weight)
        return jax.checkpoint(lambda p: x @ change(p))(dict(p))

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """``P - W``, with ``-0.0`` outside of the selection; see `Adapter.delta`."""
        return _dense(_change(p).astype(jnp.float32), p["indices"], weight)

    @property
    def depends_on_weight(self) -> bool:
        """False: the change is `values - initial`, whatever the weight."""
        return False

    def merged(self, p: Arrays, weight: jax.Array) -> Merged:
        """``P``, with the values rounded once; see `Adapter.merged`.

        Where an entry is not ``initial``, as beside a merged LoRA, the change is added.
        """
        wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
        added = wide + self.delta(p, weight)
        is_base = _are_bits(p["initial"], p["indices"], weight)
        values = _dense(p["values"], p["indices"], weight)
        is_selected = _selection(p["indices"], weight)
        changed = rounded_to(weight.dtype, jnp.where(is_base, values, added))
        return changed._replace(weight=jnp.where(is_selected, changed.weight, weight))

    def unmerged(self, p: Arrays, merged: jax.Array) -> jax.Array:
        """The weight before `merged`, bit for bit where an entry is the rounded value.

        From other entries the change is subtracted, to the rounding of the weight's dtype.
        """
        subtracted = super().unmerged(p, merged)
        is_value = _are_bits(p["values"], p["indices"], merged)
        initial = _dense(p["initial"].astype(merged.dtype), p["indices"], merged)
        changed = jnp.where(is_value, initial, subtracted)
        return jnp.where(_selection(p["indices"], merged), changed, merged)

    def nuclear_norm_gradient(self, p: Arrays, weight: Weights) -> jax.Array:
        r"""The gradient of the nuclear norm of the selected entries, for ``values``.

        It is that of :math:`\lVert P \odot M \rVert_*`, where :math:`M` is the selection: the
        entries of :math:`U V^\top` (`polar_factor`) that are selected. Times the paper's
        :math:`\lambda_\mathrm{rank}` it is added to the gradient of ``values`` before the
        optimizer. It costs some 50 products with a square matrix of the shorter side.

        Args:
          p: One layer's arrays.
          weight: Its weight ``[..., d_in, d_out]``, or its shape.

        Returns:
          float32 ``[..., N]``.

        Example:
          >>> import jax, jax.numpy as jnp, lowrank_optax as lro
          >>> method, weights = lro.adapters.SaRA(fraction=0.5), jnp.diag(jnp.array([3.0, -2.0]))
          >>> p = {"values": jnp.array([3.0, -2.0]), "indices": jnp.array([0, 3])}
          >>> print(method.nuclear_norm_gradient(p, weights).round(3))
          [ 1. -1.]
        """
        dense = _dense(p["values"], p["indices"], weight)
        flat = polar_factor(dense).reshape(*dense.shape[:-2], -1)
        entries = lambda flat, indices: flat.at[indices].get(mode="fill", fill_value=0)
        return jnp.vectorize(entries, signature="(m),(n)->(n)")(flat, p["indices"])

    def check_base(self, params: AdapterParams, weights: jax.Array) -> None:
        """Checks that the selection of these weights is the adapter's; see `Adapter.check_base`.

        Raises:
          ValueError: If other entries would be selected, or the selected ones have other values.
        """
        now, then = self.init(jax.random.key(0), weights).frozen, params.frozen
        own, saved = now["initial"], then["initial"]
        if (own.shape, own.dtype) != (saved.shape, saved.dtype):
            raise ValueError(
                f"the entries to select of these weights are {own.dtype}{list(own.shape)}, and "
                f"those of this SaRA {saved.dtype}{list(saved.shape)}. Load the weights that it "
                "was trained on."
            )
        pairs = [(_bits(now[name]), _bits(then[name])) for name in now]
        different = np.any([a != b for a, b in pairs], axis=0)
        if different.any():
            raise ValueError(
                f"{different.sum()} of {different.size} entries to select of it are others than "
                "this SaRA's. Load the weights that it was trained on."
            )

    def _count(self, weights: jax.Array) -> int:
        """Entries that are selected of each layer, or the most of one."""
        if self.threshold is None:
            assert self.fraction is not None
            return max(1, round(self.fraction * math.prod(weights.shape[1:])))
        if isinstance(weights, jax.core.Tracer):
            raise TypeError(
                f"SaRA(threshold={self.threshold}) selects a number of entries that depends on the "
                "weights' values, and they are traced: attach it outside of jit, or give fraction=."
            )
        counts = np.asarray(_below(weights, self.threshold).sum((-2, -1), dtype=jnp.int32))
        if not counts.any():
            warnings.warn(
                f"SaRA(threshold={self.threshold}) selects no entry of weights "
                f"{tuple(weights.shape)}: nothing is trained there.",
                stacklevel=2,
            )
        return max(1, int(counts.max(initial=0)))  # arrays without elements cannot be saved


def check_selection(fraction: Any, threshold: Any) -> None:
    """Checks the two ways to select entries: exactly one of them is a number in its range."""
    given = {"fraction": fraction, "threshold": threshold}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"fraction={fraction!r} and threshold={threshold!r}: give exactly one of them."
        )
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}={value!r} must be a number.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be finite and above 0.")
    if name == "fraction" and value > 1:
        raise ValueError(f"fraction={value!r} must be at most 1.")


def _below(weights: jax.Array, threshold: float) -> jax.Array:
    return jnp.abs(weights.astype(jnp.promote_types(weights.dtype, jnp.float32))) < threshold


@functools.partial(jax.jit, static_argnums=(0, 1))
def _selected(method: SaRA, count: int, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions of the selected entries and the entries, both ``[L, count]``."""
    size = math.prod(weights.shape[1:])

    def one(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = w.ravel()
        if method.threshold is None:
            magnitude = jnp.where(jnp.isnan(w), jnp.inf, jnp.abs(w))
            indices = jnp.sort(jax.lax.top_k(-magnitude, count)[1])
        else:
            below = _below(w, method.threshold)
            (indices,) = jnp.nonzero(below, size=count, fill_value=size)
            # Different ones, so that a scatter may take all positions for unique.
            indices = jnp.where(indices == size, size + jnp.arange(count), indices)
        return indices.astype(jnp.int32), w.at[indices].get(mode="fill", fill_value=0)

    return jax.lax.map(one, weights)


def _change(p: Arrays) -> jax.Array:
    """``values - initial [..., N]``, in the dtype of ``values``."""
    return p["values"] - p["initial"].astype(p["values"].dtype)


def _dense(entries: jax.Array, indices: jax.Array, weight: Weights) -> jax.Array:
    """A matrix of the weight's shape with these entries, and ``-0.0``, which adds nothing."""
    sides = weight.shape[-2:]

    def one(entries: jax.Array, indices: jax.Array) -> jax.Array:
        flat = jnp.full(math.prod(sides), -0.0, entries.dtype)
        options: dict[str, Any] = {"indices_are_sorted": True, "unique_indices": True}
        return flat.at[indices].set(entries, mode="drop", **options).reshape(sides)

    dense = jnp.vectorize(one, signature="(n),(n)->(i,o)")(entries, indices)
    return constrain(dense, partition_of(weight))


def _selection(indices: jax.Array, weight: jax.Array) -> jax.Array:
    """Which entries are selected, bool in the weight's shape."""
    return _dense(jnp.ones(indices.shape, bool), indices, weight)


def _are_bits(entries: jax.Array, indices: jax.Array, weight: jax.Array) -> jax.Array:
    """Which entries of a weight are selected and equal these, rounded to its dtype, in all bits.

    Numbers would be compared in a wider dtype, where XLA may leave out the rounding.
    """
    kind = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
    bits = lambda x: jax.lax.bitcast_convert_type(x, kind)
    equal = bits(_dense(entries.astype(weight.dtype), indices, weight)) == bits(weight)
    return _selection(indices, weight) & equal


def _bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(f"u{x.dtype.itemsize}")
