"""A linear layer that saves a sketch of its input for the backward pass, instead of the input."""

from collections.abc import Callable, Mapping
import copy
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.layers.randomized.sketch import (
    Seed,
    Sketch,
    SketchKind,
    draw_seed,
    scale,
    sketch_rows,
)
from lowrank_optax.matrices.explicit_sharding import partition_of, vary_alike


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
    r"""Compute a dense layer that saves p rows for the backward pass, instead of its B input rows.

    With X [B, N] the rows of ``x``, Y [B, M] the cotangent, W the kernel, and a random S [B, p]
    with E[S·Sᵀ] = I, drawn from ``key`` in the forward pass and again in the backward pass::

        forward             X·W + b           exact; saved: SᵀX [p, N], the key, W
        gradient of x       Y·Wᵀ              exact
        gradient of bias    Σ_rows Y          exact
        gradient of kernel  (SᵀX)ᵀ·(SᵀY)      its expectation is XᵀY

    All but the kernel's gradient are computed by the operations of the dense layer. SᵀX is:

    - ``"stratified"``: one row of each of p consecutive strata, of equal sizes up to 1 (the rows'
      gradients are weighted by them), ``"rows"``: p different rows. Rows are only moved, and the
      product is B / p times smaller: the step is never slower than the dense one.
    - ``"norm_weighted"``: p draws, the chance of a row proportional to its norm.
      ``"winner_take_all"``: the rows of the largest norms for sure, the others as before. Both also
      save the index and the weight of each row: 8·p bytes.
    - ``"gaussian"``, ``"rademacher"``: p sums of all rows with random normals, or signs:
      2·p·B·(N + M) operations.
    - ``"srht"``: p of the rows of a Hadamard transform of the rows with random signs, padded to a
      power of two; ``"dct"``: of the cosine transform, without signs. O(B·log(B)·(N + M)).

    `sketch_variance` says how noisy each is. If p is B, the layer is the dense one for any kind. If
    the kernel is not differentiated no sketch is saved, and if x is not, the kernel is not.

    Use each key once: fold in the step and the layer. Under ``jax.shard_map`` each shard of the
    rows needs its own, ``jax.random.fold_in(key, jax.lax.axis_index(name))``, and shards of the
    kernel the same one.

    Args:
      x: [..., N], floating point.
      kernel: [N, M].
      bias: [M], or None.
      key: A ``jax.random.key``, or the uint32 words of one; it has no gradient.
      sketch: Kind and size; B is the product of all axes of x but the last.
      valid: Bool, of x's shape without the last axis: False at padding. Such rows are not chosen,
        and contribute nothing to the kernel's gradient. Chosen rows are then saved with their
        indices and weights, 8·p bytes; with kinds that sum rows, ``valid`` itself is saved.
      dtype: Dtype of the computation and of what is saved; that of x, kernel and bias together by
        default. The kernel's gradient is summed in float32 and rounded once, to the kernel's dtype.
      precision: Precision of all products, as in ``jax.lax.dot_general``.
      preferred_element_type: Dtype of the forward product, as in ``nnx.Linear``.

    Returns:
      [..., M], as ``nnx.Linear`` computes it.

    Raises:
      TypeError: If ``sketch`` is not a `Sketch`, or x is not floating point.
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
    check_sketch(sketch)
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
    if dtype is None:
        dtype = jnp.result_type(x, kernel, *([] if bias is None else [bias]))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"x of dtype {x.dtype} must be floating point, or give dtype.")
    count = math.prod(x.shape[:-1])
    product = _Product(
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
    if x.size == 0 or kernel.size == 0 or (product.size == count and valid is None):
        y = product.dense(x, kernel)
    else:
        x, kernel = vary_alike(x, kernel)
        y = _sketched_product(product, x, kernel, key, valid)
    if bias is None:
        return y
    return y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


@dataclasses.dataclass(frozen=True)
class _Product:
    """Static facts of a product, and its parts."""

    kind: SketchKind
    size: int
    dtype: Any
    kernel_dtype: Any
    precision: Any
    preferred_element_type: Any
    input_partition: PartitionSpec | None
    kernel_partition: PartitionSpec | None

    def dense(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The product itself, as Flax computes it."""
        return self.dot(x, kernel, (x.ndim - 1, 0))

    def input_gradient(self, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        """The transpose of `dense`, by JAX's own operations, so equal to the last bit."""
        axes = gradient.ndim - 1, 1
        product = self.dot(gradient, kernel, axes, out_sharding=self.input_partition)
        return product.astype(self.dtype)

    def dot(self, a: Any, b: Any, axes: tuple[int, int], **options: Any) -> jax.Array:
        options = {"preferred_element_type": self.preferred_element_type, **options}
        dims = ((axes[:1], axes[1:]), ((), ()))
        b = b.astype(self.dtype)
        return jax.lax.dot_general(a, b, dims, precision=self.precision, **options)

    def sketch(self, x: jax.Array, key: Any, valid: jax.Array | None) -> tuple[jax.Array, Seed]:
        """What is saved of x: its sketch, and the seed to draw S again."""
        rows = x.reshape(-1, x.shape[-1])
        seed = draw_seed(self.kind, self.size, key, rows, None if valid is None else valid.ravel())
        sketch = sketch_rows(self.kind, self.size, seed, rows, self.precision)
        return sketch.astype(self.dtype), seed

    def sketch_partition(self, x: jax.Array) -> PartitionSpec:
        """Strata stay on their devices if every device has the same number."""
        if self.input_partition is None:
            return PartitionSpec()
        rows, features = self.input_partition[0], self.input_partition[-1]
        names = () if rows is None else rows if isinstance(rows, tuple) else (rows,)
        devices = math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in names)
        even = self.kind == "stratified" and x.ndim > 1 and self.size % devices == 0
        return PartitionSpec(rows if even else None, features)

    def kernel_gradient(self, sketch: jax.Array, seed: Seed, gradient: jax.Array) -> jax.Array:
        rows = gradient.reshape(-1, gradient.shape[-1])
        sketched = sketch_rows(self.kind, self.size, seed, rows, self.precision, weighted=True)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        total = self.dot(sketch, sketched, (0, 0), preferred_element_type=dtype)
        return (total * scale(self.kind, self.size, len(rows))).astype(self.kernel_dtype)

    def on_any_mesh(self, fn: Callable[..., Any], partition: Any) -> Callable[..., Any]:
        """``fn``, on explicit mesh axes as on automatic ones, with the partition of its result."""
        if self.input_partition is None and self.kernel_partition is None:
            return fn
        return jax.sharding.auto_axes(fn, out_sharding=partition)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sketched_product(
    product: _Product, x: jax.Array, kernel: jax.Array, key: Any, valid: jax.Array | None
) -> jax.Array:
    del key, valid
    return product.dense(x, kernel)


def _forward(product: _Product, x: Any, kernel: Any, key: Any, valid: Any) -> tuple[Any, Any]:
    y = product.dense(x.value, kernel.value)
    partitions = product.sketch_partition(x.value), PartitionSpec()
    sketch = product.on_any_mesh(product.sketch, partitions)
    operands = x.value, key.value, None if valid is None else valid.value
    # Calls of one compiled function share the structure of what they save, but may differentiate by
    # other arguments: an empty array is saved for what a call does not need.
    if kernel.perturbed:
        rows, seed = sketch(*operands)
        # The name is for jax.checkpoint_policies.save_only_these_names.
        sketched = checkpoint_name(rows, "linear_sketch"), seed
    else:
        sketched = jax.tree.map(lambda _: jnp.zeros(0), jax.eval_shape(sketch, *operands))
    return y, (sketched, kernel.value if x.perturbed else jnp.zeros(0))


def _backward(product: _Product, saved: Any, gradient: Any) -> tuple[Any, Any, None, None]:
    (rows, seed), kernel = saved
    input_gradient, kernel_gradient = None, None
    if not isinstance(gradient, SymbolicZero):
        if kernel.size:
            input_gradient = product.input_gradient(kernel, gradient)
        if rows.size:
            compute = product.on_any_mesh(product.kernel_gradient, product.kernel_partition)
            kernel_gradient = compute(rows, seed, gradient)
    return input_gradient, kernel_gradient, None, None


_sketched_product.defvjp(_forward, _backward, symbolic_zeros=True)


def call_sketched(
    call: Callable[..., jax.Array],
    layer: Any,
    *args: Any,
    key: jax.Array,
    sketch: Sketch,
    valid: jax.Array | None,
) -> jax.Array:
    """Run ``call`` of a Flax linear layer with a sketched product; Flax promotes and adds the bias.

    Raises:
      RuntimeError: If the layer does not multiply by its attribute ``dot_general``.
    """
    products = 0

    def product(
        x: jax.Array, kernel: jax.Array, _: Any, out_sharding: Any = None, **options: Any
    ) -> jax.Array:
        nonlocal products
        products += 1
        if out_sharding is not None:
            raise ValueError(
                f"out_sharding={out_sharding} cannot be given to a randomized layer; use "
                "jax.sharding.reshard on its output."
            )
        return randomized_linear(x, kernel, key=key, sketch=sketch, valid=valid, **options)

    vars(product)["plain_weights"] = True  # adapters may read the kernel
    # Not setattr: NNX would refuse it if the layer belongs to an enclosing trace, and Linen's
    # modules are frozen.
    sketched = copy.copy(layer)
    vars(sketched)["dot_general"] = product
    outputs = call(sketched, *args)
    if products != 1:
        raise RuntimeError(
            f"{type(layer).__name__} of this version of Flax called its attribute dot_general "
            f"{products} times instead of once, so its input would not be sketched."
        )
    return outputs


def check_sketch(sketch: Any) -> Sketch:
    """Return the sketch; raise TypeError if it is not one."""
    if not isinstance(sketch, Sketch):
        raise TypeError(
            f"sketch={sketch!r} must be a lro.layers.Sketch, for example Sketch(fraction=0.1)."
        )
    return sketch


def check_sketches(sketch: Any) -> None:
    """Raise unless this is a sketch, or sketches by patterns: TypeError, or ValueError if empty."""
    if isinstance(sketch, Mapping) and not sketch:
        raise ValueError("sketch={} has no pattern: give a sketch, or sketches by patterns.")
    for each in sketch.values() if isinstance(sketch, Mapping) else [sketch]:
        check_sketch(each)


def check_dot_general(dot_general: Any, layer: str) -> None:
    """Raise ValueError unless the layer's product is XLA's."""
    if dot_general not in (None, jax.lax.dot_general):
        raise ValueError(
            f"dot_general={dot_general!r} of {layer}: a randomized layer needs its own product, so "
            "leave jax.lax.dot_general there."
        )
