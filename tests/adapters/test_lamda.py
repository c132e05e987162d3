"""LaMDA's layer: its starts, what stays of the weight, and its limits."""

from typing import Any, get_args

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.methods.lamda import CoreInit
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import compiled, gradient, layer_output, switched_off

LaMDA, LoRA = compiled(lro.adapters.LaMDA), compiled(lro.adapters.LoRA)
KEY = jax.random.key(0)
L, D_IN, D_OUT, R = 2, 6, 5, 3
WEIGHTS = np.random.default_rng(0).normal(size=(L, D_IN, D_OUT)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(4, D_IN)).astype(np.float32)
every_start = pytest.mark.parametrize("core_init", get_args(CoreInit))


def base_of(params: lro.adapters.AdapterParams) -> np.ndarray:
    return WEIGHTS if params.base is None else params.base


def trained(params: lro.adapters.AdapterParams) -> lro.adapters.AdapterParams:
    """The same after some training of ``S`` and ``B``."""
    rng = np.random.default_rng(3)
    move = lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(x.dtype)
    return params._replace(trainable=jax.tree.map(move, params.trainable))


@pytest.mark.combinations(1)
@every_start
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_the_start_is_the_base_model(core_init: Any, alpha: float | None) -> None:
    method = LaMDA(rank=R, alpha=alpha, core_init=core_init)
    params = method.init(KEY, WEIGHTS)
    for layer in range(L):
        p, base = method.layer_arrays(params, layer), base_of(params)[layer]
        y = layer_output(method, p, Rows(X), X @ base, weight=base)
        if core_init in ("zero", "code"):
            np.testing.assert_array_equal(y, X @ WEIGHTS[layer])
        else:
            np.testing.assert_allclose(y, X @ WEIGHTS[layer], atol=1e-5)
    assert method.changes_base == (core_init in ("sigma", "eye"))
    assert (params.base is not None) == method.changes_base


@pytest.mark.parametrize("core_init", ["sigma", "eye"])
def test_the_core_holds_the_spectrum(core_init: Any) -> None:
    method = LaMDA(rank=R, alpha=6.0, core_init=core_init)  # c = 2
    params = method.init(KEY, WEIGHTS)
    sigma = np.linalg.svd(np.asarray(WEIGHTS, np.float64), compute_uv=False)
    core = sigma[:, :R] / 2 if core_init == "sigma" else np.full((L, R), 0.5)
    np.testing.assert_allclose(params.trainable["S"], core[..., None] * np.eye(R), atol=1e-5)
    rest = np.sum(np.square(sigma[:, R:]), axis=-1)
    assert_close(np.sum(np.square(params.base), axis=(-2, -1)), rest, 800)


def test_the_codes_start_is_loras_with_a_random_core() -> None:
    params = LaMDA(rank=50, core_init="code").init(
        KEY, jax.ShapeDtypeStruct((2, 200, 60), jnp.float32)
    )
    assert not np.any(params.trainable["B"])
    for array, bound in ((params.frozen["A"], 200**-0.5), (params.trainable["S"], 50**-0.5)):
        assert 0.98 * bound < np.abs(array).max() <= bound
        assert np.isclose(np.std(array), bound / np.sqrt(3), rtol=0.03)
        assert array.dtype == jnp.float32


@every_start
def test_merging_is_exact_and_undone(core_init: Any) -> None:
    method = LaMDA(rank=R, alpha=2.0, core_init=core_init)
    params = trained(method.init(KEY, WEIGHTS))
    for layer in range(L):
        p, base = method.layer_arrays(params, layer), base_of(params)[layer]
        y = layer_output(method, p, Rows(X), X @ base, weight=base)
        merged = method.merged(p, base).weight
        np.testing.assert_allclose(X @ merged, y, atol=1e-5)
        assert_close(method.unmerged(p, merged), base, 100)


@every_start
def test_the_original_is_found_again_whatever_was_trained(core_init: Any) -> None:
    method = LaMDA(rank=R, alpha=2.0, core_init=core_init)
    params = trained(method.init(KEY, WEIGHTS))
    for layer in range(L):
        p, base = method.layer_arrays(params, layer), base_of(params)[layer]
        np.testing.assert_allclose(method.original(p, base), WEIGHTS[layer], atol=1e-5)
        np.testing.assert_allclose(
            switched_off(method, p, Rows(X), X @ base), X @ WEIGHTS[layer], atol=1e-5
        )
        first, second = method.to_lora(p)
        assert first.shape[-1] == R  # A is the same before and after: no 2r is needed
        merged = method.merged(p, base).weight
        np.testing.assert_allclose(WEIGHTS[layer] + first @ second, merged, atol=1e-5)


def test_an_untrained_adapter_is_a_lora_of_zeros() -> None:
    method = LaMDA(rank=R)
    p = method.layer_arrays(method.init(KEY, WEIGHTS), 0)
    # Two equal products are subtracted.
    size = 2 * np.abs(p["S"]) @ np.abs(p["B"])
    assert_close(method.to_lora(p)[1], np.zeros((R, D_OUT)), size=size, dtype=np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backward_keeps_r_numbers_a_row_and_not_the_input(dtype: Any) -> None:
    method = LaMDA(rank=R)
    params = method.init(KEY, WEIGHTS)
    p, x = method.layer_arrays(params, 0), X.astype(dtype)
    frozen = {name: p[name] for name in params.frozen}

    def branch(trained: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        own = method.method.times(frozen | trained, Rows(x))
        return x @ jnp.asarray(params.base[0], dtype) + own

    of_trained = {name: p[name] for name in ("S", "B")}
    back = jax.eval_shape(lambda *args: jax.vjp(branch, *args)[1], of_trained, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(back)]
    assert X.shape not in shapes
    assert (X.shape[0], R) in shapes


def test_with_its_core_at_one_it_is_lora_with_a_frozen_first_factor() -> None:
    method, lora = LaMDA(rank=R, alpha=6.0, core_init="code"), LoRA(rank=R, alpha=6.0)
    params = trained(method.init(KEY, WEIGHTS))
    p = method.layer_arrays(params, 0) | {"S": np.eye(R, dtype=np.float32)}
    loss = lambda method: lambda b: jnp.sum(jnp.sin(method.times(p | {"B": b}, Rows(X))))
    value, slope = jax.jit(jax.value_and_grad(loss(method)))(p["B"])
    expected, expected_slope = jax.jit(jax.value_and_grad(loss(lora)))(p["B"])
    assert_close(value, expected, size=X.shape[0] * D_OUT)
    assert_close(slope, expected_slope, 100)


@pytest.mark.parametrize("core_init", ["sigma", "zero"])
def test_a_step_of_the_core_alone_is_a_projected_gradient(core_init: Any) -> None:
    method, rate, c = LaMDA(rank=R, alpha=6.0, core_init=core_init), 1e-2, 2.0
    params = method.init(KEY, WEIGHTS)
    p, base = method.layer_arrays(params, 0), base_of(params)[0]
    loss = lambda w: jnp.sum(jnp.sin(X @ w))
    of_core = lambda s: loss(base + method.delta(p | {"S": s}, base))
    moved = method.delta(p | {"S": p["S"] - rate * gradient(of_core, p["S"])}, base)
    u, _, vt = np.linalg.svd(np.asarray(WEIGHTS[0], np.float64), full_matrices=False)
    u, v = u[:, :R], vt[:R].T
    slope = X.T @ np.cos(X.astype(np.float64) @ WEIGHTS[0])
    expected = -rate * c**2 * u @ u.T @ slope @ v @ v.T
    np.testing.assert_allclose(moved - method.delta(p, base), expected, atol=1e-5)


def test_the_rank_is_capped_and_the_scale_is_of_the_capped_one() -> None:
    params = LaMDA(rank=40, alpha=10.0).init(KEY, WEIGHTS)
    assert params.trainable["S"].shape == (L, 5, 5)
    assert params.trainable["B"].shape == (L, 5, D_OUT)
    np.testing.assert_allclose(params.base, 0, atol=1e-5)  # all of the weight is in the adapter
    delta = LaMDA(rank=40, alpha=10.0).deltas(params, WEIGHTS)
    np.testing.assert_allclose(delta, WEIGHTS, atol=1e-5)


@every_start
def test_layers_of_smaller_ranks_are_as_if_they_were_alone(core_init: Any) -> None:
    method = LaMDA(rank=(1, 9), alpha=4.0, core_init=core_init)
    params = method.init(KEY, WEIGHTS)
    p, base = method.layer_arrays(params, 0), base_of(params)[0]
    if method.changes_base:
        alone = LaMDA(rank=1, alpha=4.0, core_init=core_init).init(KEY, WEIGHTS[:1])
        np.testing.assert_allclose(base, alone.base[0], atol=1e-5)

    def loss(trainable: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(X @ base + method.times(p | trainable, Rows(X))))

    trainable = {name: p[name] for name in ("S", "B")}
    slopes = gradient(loss, trainable)
    # What lies beyond the layer's rank is zero and has no gradient.
    inside = np.zeros((5, 5), bool)
    inside[0, 0] = True
    for x in (trainable, slopes):
        assert not np.any(np.asarray(x["S"])[~inside])
        assert not np.any(x["B"][1:])


def test_a_randomized_svd_gives_the_same_function() -> None:
    method = LaMDA(rank=R, power_iterations=2)
    params = method.init(KEY, WEIGHTS)
    total = params.base + method.deltas(params, WEIGHTS)
    np.testing.assert_allclose(total, WEIGHTS, atol=1e-5)
    exact = LaMDA(rank=R).init(KEY, WEIGHTS)
    np.testing.assert_allclose(
        method.deltas(params, WEIGHTS), LaMDA(rank=R).deltas(exact, WEIGHTS), atol=1e-3
    )


def test_counts_are_the_papers() -> None:
    """4096 x 4096 at rank 32: 132,096 at the start, 1,024 at the end, 20,685 on average."""
    wide = jax.ShapeDtypeStruct((1, 4096, 4096), jnp.float32)
    method = lro.adapters.LaMDA(rank=32, core_init="code")
    params = jax.eval_shape(lambda: method.init(KEY, wide))
    assert parameter_count(params.trainable) == 132_096
    core, rest = (parameter_count(params.trainable[name]) for name in ("S", "B"))
    assert core == 1_024
    assert round(core + 0.15 * rest) == 20_685
    lora = jax.eval_shape(lambda: lro.adapters.LoRA(rank=32).init(KEY, wide))
    assert parameter_count(lora.trainable) == 262_144


@pytest.mark.slow
@every_start
def test_attached_to_a_bfloat16_model_and_detached_again(core_init: Any) -> None:
    layer = nnx.Linear(6, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel, x = layer.kernel[...], X.astype(jnp.bfloat16)
    before = layer(x)
    method = lro.adapters.LaMDA(rank=2, core_init=core_init)
    lro.adapters.attach(layer, method, where=".*", rngs=0)
    np.testing.assert_allclose(layer(x).astype(jnp.float32), before.astype(jnp.float32), atol=0.05)
    assert layer(x).dtype == jnp.bfloat16
    state = nnx.state(layer, lro.adapters.trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    lro.adapters.detach(layer)
    assert layer.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        layer.kernel[...].astype(jnp.float32), kernel.astype(jnp.float32), atol=0.01
    )


@pytest.mark.slow
def test_weight_decay_can_leave_the_pretrained_part_alone() -> None:
    """By a mask, or towards the start: with no gradient nothing moves."""
    params = LaMDA(rank=R).init(KEY, WEIGHTS).trainable
    none = jax.tree.map(np.zeros_like, params)
    mask = lro.training.decay_mask(exclude=r"(^|/)[SB]$")
    towards = lro.training.add_weight_decay(0.1, learning_rate=0.5, anchor="initial")
    for tx in (
        optax.adamw(0.5, weight_decay=0.1, mask=mask),
        optax.chain(optax.adam(0.5), towards),
    ):
        updates, _ = tx.update(none, tx.init(params), params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
    decayed, _ = optax.adamw(0.5, weight_decay=0.1).update(
        none, optax.adamw(0.5).init(params), params
    )
    assert np.any(decayed["S"])


def test_unusable_options_are_refused() -> None:
    with pytest.raises(ValueError, match="core_init='ones'"):
        LaMDA(core_init="ones")
    with pytest.raises(ValueError, match="power_iterations=-1"):
        LaMDA(power_iterations=-1)
