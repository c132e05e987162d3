"""A linear layer whose backward pass keeps a sketch of the input, in the place of the input."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.layers.randomized.sketch import Sketch, SketchKind
from lowrank_optax.layers.randomized.sketches import (
    Seed,
    scale,
    seed_of,
    sketch_cotangent,
    sketch_input,
)
from lowrank_optax.matrices.explicit_sharding import partition_of

SKETCH = "linear_sketch"
"""The name of what is kept, for ``jax.checkpoint_policies.save_only_these_names``."""


def randomized_linear(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    key: jax.Array,
    sketch: Sketch,
    valid: jax.Array | None = None,
    dtype: Any = None,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    r"""A dense layer whose backward pass keeps p rows that stand for its input's B rows.

    With X [B, N] the rows of ``x``, Y [B, M] the cotangent, W the kernel, and a random S [B, p]
    with E[S·Sᵀ] = I that is drawn from ``key``, in the forward pass and again in the backward one::

        forward             X·W + b           exact; kept: SᵀX [p, N], the key, W
        gradient of x       Y·Wᵀ              exact
        gradient of bias    Σ_rows Y          exact
        gradient of kernel  (SᵀX)ᵀ·(SᵀY)      its expectation is XᵀY

    All but the kernel's gradient come of the dense layer's own operations. What SᵀX is:

    - ``"stratified"``: one row of each of p consecutive strata, of equal sizes up to 1 (the rows'
      gradients are weighted by them), ``"rows"``: p different rows. Nothing but rows is moved, and
      the product is B / p times smaller: the step is never slower than the dense one.
    - ``"norm_weighted"``: p draws, the chance of a row in proportion to its norm.
      ``"winner_take_all"``: the rows of the largest norms for sure, the others as before. Both also
      keep the index and the weight of each row: 8·p bytes.
    - ``"gaussian"``, ``"rademacher"``: p sums of all rows with random normals, or signs:
      2·p·B·(N + M) operations.
    - ``"srht"``: p of the rows of a Hadamard transform of the rows with random signs, padded to a
      power of two; ``"dct"``: of the cosine transform, without signs. O(B·log(B)·(N + M)).

    `sketch_variance` says how noisy each is. Where p is B, the layer is the dense one, whatever the
    kind. If the kernel is not differentiated no sketch is kept, and if x is not, the kernel is not.

    A key must not be used twice: fold the step and the layer in. Under ``jax.shard_map`` each shard
    of the rows needs its own, ``jax.random.fold_in(key, jax.lax.axis_index(name))``, and shards of
    the kernel the same one.

    Args:
      x: [..., N], floating point.
      kernel: [N, M].
      bias: [M], or None.
      key: A ``jax.random.key``, or the uint32 words of one; it has no gradient.
      sketch: Kind and size; B is the product of all axes of x but the last.
      valid: Bool, of x's shape without the last axis: False at padding. Such rows have no chance to
        be kept, and none in the kernel's gradient. Rows that it allows for are found again by their
        indices and weights, 8·p bytes; with kinds that add rows up, ``valid`` itself is kept.
      dtype: Of the computation; that of x, kernel and bias together by default. What is kept has
        it; the kernel's gradient is summed in float32 and rounded to the kernel's dtype alone.
      precision: Of all products, as in ``jax.lax.dot_general``.
      preferred_element_type: Of the forward product, as in ``nnx.Linear``.

    Returns:
      [..., M], as ``nnx.Linear`` computes it.

    Raises:
      TypeError: If ``sketch`` is no `Sketch`, or x is not floating point.
      ValueError: If shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> x = jax.random.normal(jax.random.key(0), (8, 128, 64))
      >>> kernel = jax.random.normal(jax.random.key(1), (64, 32)) / 8
      >>> def loss(kernel, key):
      ...     sketch = lro.layers.Sketch("stratified", fraction=0.25)
      ...     return jnp.sum(lro.layers.randomized_linear(x, kernel, key=key, sketch=sketch) ** 2)
      >>> keys = jax.random.split(jax.random.key(2), 500)
      >>> gradients = jax.vmap(jax.grad(loss), (None, 0))(kernel, keys)
      >>> exact = 2 * jnp.einsum("abi,abj->ij", x, x @ kernel)
      >>> error = lambda g: jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact)
      >>> print(f"one {error(gradients[0]):.2f}, mean of 500 {error(gradients.mean(0)):.3f}")
      one 0.42, mean of 500 0.019

    Reference:
      Bershatsky et al., Memory-Efficient Backpropagation through Large Linear Layers, 2022,
      https://arxiv.org/abs/2201.13195, Algorithm 1; winner_take_all: Liu et al., Winner-Take-All
      Column Row Sampling for Memory Efficient Adaptation of Language Model, 2023,
      https://arxiv.org/abs/2305.15265, eq. 6.
    """
    _check(x, kernel, bias, sketch, valid)
    if dtype is None:
        dtype = jnp.result_type(x, kernel, *([] if bias is None else [bias]))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"x of dtype {x.dtype} must be floating point, or give dtype.")
    count = math.prod(x.shape[:-1])
    how = _Product(
        kind=sketch.kind,
        size=sketch.rows(count),
        dtype=jnp.dtype(dtype),
        kernel_dtype=jnp.dtype(kernel.dtype),
        precision=precision,
        preferred_element_type=preferred_element_type,
        input_partition=partition_of(x),
        kernel_partition=partition_of(kernel),
    )
    x = x.astype(dtype)
    if x.size == 0 or kernel.size == 0 or (how.size == count and valid is None):
        y = how.dense(x, kernel)
    else:
        y = _product(how, *_varying_alike(x, kernel), key, valid)
    if bias is None:
        return y
    return y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


@dataclasses.dataclass(frozen=True)
class _Product:
    """The static facts of a product; `dense` is the product itself, as Flax forms it."""

    kind: SketchKind
    size: int
    dtype: Any
    kernel_dtype: Any
    precision: Any
    preferred_element_type: Any
    input_partition: PartitionSpec | None
    kernel_partition: PartitionSpec | None

    def dense(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x,
            kernel.astype(self.dtype),
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def towards_input(self, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        """The transpose of `dense`, by the same operations as JAX's, so to the same bits."""
        last = gradient.ndim - 1
        return jax.lax.dot_general(
            gradient,
            kernel.astype(self.dtype),
            (((last,), (1,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=self.input_partition,
        ).astype(self.dtype)

    def sketched(self, x: jax.Array, key: Any, valid: jax.Array | None) -> tuple[jax.Array, Seed]:
        """What is kept of x: its sketch, and what that is drawn again from."""
        rows = x.reshape(-1, x.shape[-1])
        mask = None if valid is None else valid.reshape(-1)
        seed = seed_of(self.kind, self.size, key, rows, mask)
        kept = sketch_input(self.kind, self.size, seed, rows, self.precision)
        return kept.astype(self.dtype), seed

    def partition_of_sketch(self, x: jax.Array) -> PartitionSpec:
        """Of what is kept: strata stay where they are, if every device has as many."""
        if self.input_partition is None:
            return PartitionSpec()
        rows, features = self.input_partition[0], self.input_partition[-1]
        names = () if rows is None else rows if isinstance(rows, tuple) else (rows,)
        devices = math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in names)
        even = self.kind == "stratified" and x.ndim > 1 and self.size % devices == 0
        return PartitionSpec(rows if even else None, features)

    def towards_kernel(self, kept: jax.Array, seed: Seed, gradient: jax.Array) -> jax.Array:
        rows = gradient.reshape(-1, gradient.shape[-1])
        sketched = sketch_cotangent(self.kind, self.size, seed, rows, self.precision)
        total = jax.lax.dot_general(
            kept,
            sketched.astype(self.dtype),
            (((0,), (0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
        )
        return (total * scale(self.kind, self.size, len(rows))).astype(self.kernel_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    how: _Product, x: jax.Array, kernel: jax.Array, key: Any, valid: jax.Array | None
) -> jax.Array:
    del key, valid
    return how.dense(x, kernel)


def _forward(how: _Product, x: Any, kernel: Any, key: Any, valid: Any) -> tuple[jax.Array, Any]:
    """The product; kept is what a gradient that is asked for needs, and nothing else."""
    y = how.dense(x.value, kernel.value)
    sketched = None
    if kernel.perturbed:
        mask = None if valid is None else valid.value
        partitions = how.partition_of_sketch(x.value), PartitionSpec()
        sketch = _partitioned(how.sketched, how, partitions)
        rows, seed = sketch(x.value, key.value, mask)
        sketched = checkpoint_name(rows, SKETCH), seed
    return y, (sketched, kernel.value if x.perturbed else None)


def _backward(how: _Product, kept: Any, gradient: Any) -> tuple[Any, Any, None, None]:
    sketched, kernel = kept
    towards_input, towards_kernel = None, None
    if not isinstance(gradient, SymbolicZero):
        if kernel is not None:
            towards_input = how.towards_input(kernel, gradient)
        if sketched is not None:
            product = _partitioned(how.towards_kernel, how, how.kernel_partition)
            towards_kernel = product(*sketched, gradient)
    return towards_input, towards_kernel, None, None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _partitioned(fn: Callable[..., Any], how: _Product, partition: Any) -> Callable[..., Any]:
    """On explicit axes of a mesh, ``fn`` as on automatic ones, but for the partition it returns."""
    if how.input_partition is None and how.kernel_partition is None:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=partition)


def _varying_alike(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both varying over the same axes of ``jax.shard_map``; gradients are summed over others."""
    axes = _varying(x) | _varying(kernel)
    vary = lambda a: jax.lax.pcast(a, tuple(axes - _varying(a)), to="varying")
    return (vary(x), vary(kernel)) if axes else (x, kernel)


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _check(
    x: jax.Array, kernel: jax.Array, bias: Any, sketch: Any, valid: jax.Array | None
) -> None:
    if not isinstance(sketch, Sketch):
        raise TypeError(f"sketch={sketch!r} must be a Sketch: lro.layers.Sketch(fraction=0.1).")
    if kernel.ndim != 2 or x.ndim == 0 or x.shape[-1] != len(kernel):
        raise ValueError(f"x {x.shape} and kernel {kernel.shape} must be [..., N] and [N, M].")
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"bias {bias.shape} must be {kernel.shape[1:]}, for kernel {kernel.shape}."
        )
    if valid is not None and (valid.shape != x.shape[:-1] or valid.dtype != bool):
        raise ValueError(
            f"valid, {valid.dtype}{list(valid.shape)}, must be bool{list(x.shape[:-1])}, for x."
        )
