"""`randomized_linear` under JAX's transformations, and on eight devices."""

import functools
from typing import Any, get_args

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from lowrank_optax.layers import Sketch, randomized_linear
from lowrank_optax.layers.randomized.sketch import SketchKind

KINDS = get_args(SketchKind)
# Rows chosen alike, rows chosen by their norms, and mixtures of rows.
STANDARD = ("stratified", "norm_weighted", "srht")
KEY = jax.random.key(3)
X, KERNEL, Y = (
    np.random.default_rng(seed).standard_normal(shape, np.float32)
    for seed, shape in enumerate([(8, 16, 6), (6, 4), (8, 16, 4)])
)


def loss(kernel: jax.Array, x: jax.Array, y: jax.Array, key: Any, sketch: Sketch) -> jax.Array:
    return jnp.sum(y * randomized_linear(x, kernel, key=key, sketch=sketch))


@pytest.mark.parametrize(
    "kind", [x if x in STANDARD else pytest.param(x, marks=pytest.mark.full) for x in KINDS]
)
def test_jit_vmap_and_checkpoint_give_the_same_gradient(kind: SketchKind) -> None:
    of = functools.partial(loss, sketch=Sketch(kind, size=5))
    keys = jax.random.split(KEY, 4)
    slope, again = jax.grad(of), jax.grad(jax.checkpoint(of))

    @jax.jit
    def run(kernel: jax.Array, *args: Any) -> Any:
        mapped = jax.vmap(slope, (None, 0, 0, 0))(kernel, *args)
        return mapped, jax.lax.map(lambda args: again(kernel, *args), args)

    each = np.stack([jax.jit(slope)(KERNEL, *args) for args in zip(X, Y, keys, strict=False)])
    for found in run(KERNEL, X[:4], Y[:4], keys):
        assert_close(found, each, 100)


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("kind", ["stratified", "rademacher", "norm_weighted"])
@pytest.mark.parametrize("remat", [False, True])
def test_layers_in_a_scan_with_a_key_each_are_those_in_a_loop(
    kind: SketchKind, remat: bool
) -> None:
    kernels = np.stack([KERNEL @ KERNEL.T, KERNEL @ KERNEL.T]) / 4
    keys = jax.random.split(KEY, 2)

    def layer(x: jax.Array, parts: Any) -> tuple[jax.Array, None]:
        kernel, key = parts
        return jnp.tanh(randomized_linear(x, kernel, key=key, sketch=Sketch(kind, size=9))), None

    def scanned(kernels: jax.Array) -> jax.Array:
        body = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(body, X, (kernels, keys))[0] ** 2)

    def looped(kernels: jax.Array) -> jax.Array:
        x = X
        for i in range(2):
            x, _ = layer(x, (kernels[i], keys[i]))
        return jnp.sum(x**2)

    assert_close(*jax.jit(lambda k: (jax.grad(scanned)(k), jax.grad(looped)(k)))(kernels), 100)


def test_a_subset_of_a_module_is_differentiated() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(KERNEL)
            self.bias = nnx.Param(jnp.zeros(4))

        def __call__(self, x: jax.Array) -> jax.Array:
            return randomized_linear(
                x, self.kernel[...], self.bias[...], key=KEY, sketch=Sketch(size=9)
            )

    value = lambda model, x: jnp.sum(Y * model(x))
    chosen = nnx.DiffState(0, nnx.PathContains("bias"))
    of_bias = nnx.jit(nnx.grad(value, argnums=chosen))(Model(), X)
    assert "kernel" not in of_bias
    assert_close(of_bias["bias"][...], Y.sum((0, 1)), 100)
    both = nnx.jit(nnx.grad(value))(Model(), X)
    expected = jax.jit(jax.grad(loss), static_argnums=4)(KERNEL, X, Y, KEY, Sketch(size=9))
    assert_close(both["kernel"][...], expected, 100)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize(
    ("kind", "axis_type"),
    [
        pytest.param(kind, axis_type, marks=[] if kind in STANDARD else pytest.mark.full)
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        for kind in KINDS
    ],
)
def test_a_batch_on_eight_devices_has_the_gradient_of_one(
    kind: SketchKind, axis_type: AxisType
) -> None:
    sketch = Sketch(kind, size=32)
    expected = jax.jit(jax.grad(loss), static_argnums=4)(KERNEL, X, Y, KEY, sketch)
    with jax.set_mesh(mesh_of(axis_type)):
        x, y = (jax.device_put(v, PartitionSpec("data")) for v in (X, Y))
        kernel = jax.device_put(KERNEL, PartitionSpec())
        slope = jax.jit(jax.grad(loss), static_argnums=4)
        compiled = slope.lower(kernel, x, y, KEY, sketch).compile()
        got, text = compiled(kernel, x, y, KEY), compiled.as_text()
    assert_close(got, expected, 100)
    if kind == "stratified":  # each device keeps its own rows: the sum of gradients is all there is
        assert text.count(" all-reduce(") == 1
        assert "all-gather" not in text
        assert "collective-permute" not in text


@pytest.mark.parametrize("kind", ["stratified", "gaussian", "norm_weighted"])
def test_under_shard_map_each_shard_draws_its_own(kind: SketchKind) -> None:
    data, whole = PartitionSpec("data"), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(whole, data, data),
        out_specs=(whole, data),
    )
    def gradients(kernel: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        key = jax.random.fold_in(KEY, jax.lax.axis_index("data"))
        return jax.grad(loss, (0, 1))(kernel, x, y, key, Sketch(kind, size=4))

    of_kernel, of_x = jax.jit(gradients)(KERNEL, X, Y)
    keys = [jax.random.fold_in(KEY, i) for i in range(8)]
    slope = jax.jit(jax.grad(functools.partial(loss, sketch=Sketch(kind, size=4))))
    expected = sum(slope(KERNEL, x, y, key) for x, y, key in zip(X, Y, keys, strict=True))
    assert_close(of_kernel, expected, 100)
    assert_close(of_x, Y @ KERNEL.T)


@pytest.mark.parametrize("kind", ["rows", "stratified"])
def test_rows_need_fewer_operations_than_the_dense_step(kind: SketchKind) -> None:
    x, y = jnp.ones((1024, 64)), jnp.ones((1024, 64))
    kernel = jnp.ones((64, 64))

    def operations(fn: Any) -> float:
        compiled = jax.jit(jax.grad(fn, (0, 1))).lower(kernel, x, y, KEY).compile()
        return compiled.cost_analysis()["flops"]

    dense = operations(lambda kernel, x, y, _: jnp.sum(y * (x @ kernel)))
    found = operations(functools.partial(loss, sketch=Sketch(kind, size=128)))
    # Of two products one has an eighth of the rows.
    assert found / dense == pytest.approx(9 / 16, rel=0.05)
