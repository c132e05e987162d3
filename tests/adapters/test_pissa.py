"""PiSSA against NumPy in float64, and what the specification says must hold."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import Arrays, parameter_count
from lowrank_optax.adapters.operands import Lookup, Rows
from tests.adapters.compiled import compiled, gradient, layer_output, switched_off, times

PiSSA = compiled(lro.adapters.PiSSA)
KEY = jax.random.key(0)
BOTH = {"alpha": 6.0, "rank_stabilized": True}
OTHERS = [{"alpha": 6.0}, {"rank_stabilized": True}]
every_scale = pytest.mark.parametrize(
    "scale", [{}, BOTH, *(pytest.param(x, marks=pytest.mark.full) for x in OTHERS)], ids=str
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scale_of(rank: int, alpha: float | None = None, rank_stabilized: bool = False) -> float:
    return (alpha or rank) / (rank**0.5 if rank_stabilized else rank)


def initial(method: Any, weights: np.ndarray) -> tuple[Any, list[Arrays]]:
    """The parameters of a stack and those of each layer."""
    params = method.init(KEY, weights)
    return params, [method.layer_arrays(params, i) for i in range(len(weights))]


def moved(p: Arrays, seed: int = 9) -> Arrays:
    """One layer's arrays after some training."""
    change = lambda i, x: x + 0.3 * normal(seed + i, *x.shape)
    return p | {"A": change(0, p["A"]), "B": change(1, p["B"])}


def size_of(p: Arrays, base: np.ndarray, scale: float) -> np.ndarray:
    """The sum of the base and the factors' product with all terms made positive."""
    return np.abs(base) + scale * np.abs(p["A"]) @ np.abs(p["B"])


def output(method: Any, p: Arrays, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return layer_output(method, p, Rows(x), times(x, weight), weight=weight)


@every_scale
def test_the_start_function_is_the_models(scale: dict) -> None:
    weights, x = normal(0, 2, 10, 8) / 3, normal(1, 6, 10)
    method = PiSSA(rank=3, **scale)
    params, layers = initial(method, weights)
    assert method.changes_base
    whole = params.base + method.deltas(params, params.base)
    for w, base, p, sum_ in zip(weights, params.base, layers, whole, strict=True):
        size = size_of(p, base, scale_of(3, **scale))
        assert_close(sum_, w, size=size)
        assert_close(output(method, p, x, base), x @ w, size=np.abs(x) @ size)


@pytest.mark.combinations(1)
@every_scale
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_residual_the_start_is_bit_for_bit_the_models(scale: dict, dtype: str) -> None:
    weights, x = (z.astype(jnp.dtype(dtype)) for z in (normal(0, 2, 10, 8), normal(1, 6, 10)))
    method = PiSSA(rank=3, residual=False, **scale)
    params, layers = initial(method, weights)
    assert params.base is None
    assert not method.changes_base
    for w, p in zip(weights, layers, strict=True):
        y = output(method, p, x, w)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, times(x, w))


@every_scale
def test_factors_are_balanced_and_leave_the_smaller_singular_values(scale: dict) -> None:
    weights = normal(2, 2, 10, 8)
    params, layers = initial(PiSSA(rank=3, **scale), weights)
    for w, base, p in zip(weights, params.base, layers, strict=True):
        s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
        diagonal = np.diag(s[:3]) / scale_of(3, **scale)
        np.testing.assert_allclose(p["A"].T @ p["A"], diagonal, atol=1e-5)
        np.testing.assert_allclose(p["B"] @ p["B"].T, diagonal, atol=1e-5)
        assert_close(np.sum(np.square(base)), np.sum(s[3:] ** 2), 100, dtype=np.float32)
        assert_close(np.linalg.norm(base, 2), s[3], 100, dtype=np.float32)


@every_scale
@pytest.mark.parametrize("residual", [True, False])
def test_the_converted_lora_on_the_original_weight_gives_the_same(
    scale: dict, residual: bool
) -> None:
    w, x = normal(3, 2, 10, 8) / 3, normal(4, 6, 10)
    method = PiSSA(rank=3, residual=residual, **scale)
    params, (p, _) = initial(method, w)
    untrained = np.matmul(*method.to_lora(p))
    np.testing.assert_array_equal(untrained, np.zeros((10, 8)))
    p = moved(p)
    first, second = method.to_lora(p)
    assert (first.shape, second.shape) == ((10, 6), (6, 8))
    a, a_0, b, b_0 = (np.asarray(p[k], np.float64) for k in ("A", "A_0", "B", "B_0"))
    c = scale_of(3, **scale)
    change = np.hstack([a, a_0]) @ np.vstack([c * b, -c * b_0])
    np.testing.assert_allclose(first @ second, change, atol=1e-5)
    base = params.base[0] if residual else w[0]
    np.testing.assert_allclose(output(method, p, x, base), x @ (w[0] + change), atol=2e-5)
    merged = method.merged(p, base)
    np.testing.assert_allclose(merged.weight, w[0] + change, atol=1e-5)
    np.testing.assert_allclose(method.unmerged(p, merged.weight), base, atol=1e-5)
    np.testing.assert_allclose(method.original(p, base), w[0], atol=1e-6)
    y = output(method, p, x, base)
    before = switched_off(method, p, Rows(x), x @ base)
    np.testing.assert_allclose(before, x @ w[0], atol=5e-6)
    assert np.abs(y - before).max() > 0.1


@every_scale
def test_both_forms_have_the_gradients_of_the_product(scale: dict) -> None:
    w, x, g = normal(5, 2, 10, 8), normal(6, 6, 10), normal(7, 6, 8)
    c = scale_of(3, **scale)
    found = []
    for residual in (True, False):
        method = PiSSA(rank=3, residual=residual, **scale)
        params, (start, _) = initial(method, w)
        base = params.base[0] if residual else w[0]

        @jax.jit
        def slopes(p: Arrays, method: Any = method, base: np.ndarray = base) -> Arrays:
            return jax.grad(lambda p: jnp.sum(g * output(method, p, x, base)))(p)

        for p in (start, moved(start)):
            a, b = (np.asarray(p[k], np.float64) for k in "AB")
            da, db = map(slopes(p).get, "AB")
            np.testing.assert_allclose(da, c * x.T @ g @ b.T, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(db, c * a.T @ x.T @ g, rtol=1e-3, atol=1e-4)
            found.append((da, db))
    assert min(np.abs(x).max() for pair in found for x in pair) > 0.1  # also of the first step


@every_scale
def test_the_first_step_of_sgd_is_the_gradient_weighted_by_the_principal_subspaces(
    scale: dict,
) -> None:
    w, d, rate = normal(8, 2, 10, 8), normal(9, 10, 8).astype(np.float64), 1e-4
    method, c = PiSSA(rank=3, **scale), scale_of(3, **scale)
    _, (p, _) = initial(method, w)
    a, b = (np.asarray(p[k], np.float64) for k in "AB")
    change = c * ((a - rate * c * d @ b.T) @ (b - rate * c * a.T @ d) - a @ b)
    u, s, vt = np.linalg.svd(w[0].astype(np.float64), full_matrices=False)
    left, right = (u[:, :3] * s[:3]) @ u[:, :3].T, (vt[:3].T * s[:3]) @ vt[:3]
    np.testing.assert_allclose(change, -rate * c * (left @ d + d @ right), rtol=0.02, atol=2e-6)
    # The error of singular vectors grows with the inverse of the gap between singular values.
    assert_close(c * a @ a.T, left, 400, dtype=np.float32)
    assert_close(c * b.T @ b, right, 400, dtype=np.float32)


def test_the_worked_example() -> None:
    w = np.diag([9.0, 4.0, 1.0]).astype(np.float32)[None]
    for alpha, size in ((None, 3.0), (4.0, 1.5)):
        params, (p,) = initial(PiSSA(rank=1, alpha=alpha), w)
        assert_close(p["A"], np.array([[size], [0], [0]]), dtype=np.float32)
        assert_close(p["B"], np.array([[size, 0, 0]]), dtype=np.float32)
        assert_close(params.base[0], np.diag([0.0, 4.0, 1.0]), size=9, dtype=np.float32)


def test_a_scaled_weight_has_factors_scaled_by_the_square_root() -> None:
    w, method = normal(0, 1, 6, 5), PiSSA(rank=2, alpha=3)
    small, large = (initial(method, a * w)[0].trainable for a in (1, 9))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(3 * x, y, atol=1e-5), small, large)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 4])
def test_a_randomized_start_is_exact_too(iterations: int) -> None:
    w = normal(1, 2, 30, 20)
    method = PiSSA(rank=2, alpha=5, power_iterations=iterations)
    params, _ = initial(method, w)
    np.testing.assert_allclose(params.base + method.deltas(params, params.base), w, atol=2e-6)
    exact = initial(PiSSA(rank=2, alpha=5), w)[0]
    error = np.linalg.norm(params.base) / np.linalg.norm(exact.base) - 1
    assert (0.001 < error < 0.1) if iterations == 0 else (0 <= error < 1e-3)


@pytest.mark.parametrize("rank", [5, 8])
def test_a_full_rank_leaves_nothing_and_rebuilds_the_weight(rank: int) -> None:
    w = normal(2, 1, 5, 7)
    method = PiSSA(rank=rank)
    params, _ = initial(method, w)
    assert params.trainable["A"].shape == (1, 5, 5)
    assert_close(params.base, np.zeros_like(w), 100, size=np.abs(w).max())
    assert_close(method.deltas(params, params.base), w, 100)


def test_counts_are_those_of_lora() -> None:
    params, _ = initial(PiSSA(rank=4), normal(0, 3, 9, 7))
    assert parameter_count(params.trainable) == 3 * 4 * (9 + 7)
    assert parameter_count(params.frozen) == 3 * 4 * (9 + 7)


@pytest.mark.parametrize("residual", [True, False])
def test_components_of_singular_value_zero_can_still_be_trained(residual: bool) -> None:
    deficient = np.outer(normal(0, 6), normal(1, 5))
    weights = np.stack([deficient, np.zeros((6, 5), np.float32)])
    method = PiSSA(rank=3, residual=residual)
    params, layers = initial(method, weights)
    start = method.deltas(params, weights) + (params.base if residual else weights)
    np.testing.assert_allclose(start, weights, atol=1e-6)
    for p, dead in zip(layers, (slice(1, 3), slice(0, 3)), strict=True):
        np.testing.assert_allclose(np.linalg.norm(p["A"][:, dead], axis=0), 1, atol=1e-5)
        np.testing.assert_array_equal(p["B"][dead], 0)
        for power, least in ((3, -1), (1, 0.01)):
            weighted = lambda b, p: jnp.sum(
                normal(3, 6, 5) * method.delta(p | {"B": b}, weights[0]) ** power  # noqa: B023
            )
            slope = gradient(weighted, p["B"], p)
            assert np.isfinite(slope).all()
            assert (np.abs(slope).max(1) > least).all()


def test_a_bfloat16_base_is_the_residual_rounded_once() -> None:
    w = normal(4, 1, 12, 10).astype(jnp.bfloat16)
    for dtype in ("float32", "bfloat16"):
        params, (p,) = initial(PiSSA(rank=3, param_dtype=dtype), w)
        assert params.base.dtype == jnp.bfloat16
        assert p["A"].dtype == p["B_0"].dtype == jnp.dtype(dtype)
        a, b = (np.asarray(p[k], np.float64) for k in "AB")  # as they are stored
        rest = np.asarray(w[0], np.float64) - a @ b
        error = np.abs(np.asarray(params.base[0], np.float64) - rest)
        assert (error <= 2.0**-8 * np.abs(rest) + 1e-6).all()
        assert error.max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"residual": False}, pytest.param({"alpha": 2.0}, marks=pytest.mark.full)],
    ids=str,
)
def test_layers_of_unlike_ranks_are_those_of_their_own_rank(options: dict) -> None:
    weights = normal(5, 3, 8, 6)
    method = PiSSA(rank=(1, 4, 2), **options)
    params, layers = initial(method, weights)
    assert params.trainable["A"].shape == (3, 8, 4)
    for i, rank in enumerate(method.rank):
        alone, (p,) = initial(PiSSA(rank=rank, **options), weights[i : i + 1])
        for name in ("A", "B"):
            inside = layers[i][name][:, :rank] if name == "A" else layers[i][name][:rank]
            np.testing.assert_allclose(inside, p[name], atol=1e-5)
        if alone.base is not None:
            np.testing.assert_allclose(params.base[i], alone.base[0], atol=1e-5)
        loss = lambda p: jnp.sum(normal(6, 8, 6) * method.delta(p, weights[0]))
        slopes = gradient(loss, layers[i])
        assert np.abs(slopes["A"][:, rank:]).sum() + np.abs(slopes["B"][rank:]).sum() == 0
    with pytest.raises(ValueError, match=r"rank=\(1, 4, 2\) has 3 ranks"):
        method.init(KEY, jnp.zeros((2, 8, 6)))


def test_rows_of_an_embedding_are_looked_up() -> None:
    w, index = normal(7, 1, 11, 4), np.array([3, 0, 10])
    method = PiSSA(rank=2)
    params = method.init(KEY, w, embedding=True)
    p, base = method.layer_arrays(params, 0), params.base[0]
    y = layer_output(method, p, Lookup(index), base[index], weight=base)
    np.testing.assert_allclose(y, w[0][np.asarray(index)], atol=1e-6)


def test_trained_arrays_may_be_donated() -> None:
    init = lambda: lro.adapters.PiSSA(rank=2).init(KEY, normal(0, 1, 6, 5))
    params, same = init(), init()  # NumPy's view of an array would keep it from being donated
    jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t), donate_argnums=0)(params.trainable)
    for name in ("A_0", "B_0"):
        assert not params.frozen[name].is_deleted()
        np.testing.assert_array_equal(params.frozen[name], same.frozen[name])


@pytest.mark.slow
def test_under_jit_the_start_is_the_same() -> None:
    w, PiSSA = normal(1, 2, 7, 6), lro.adapters.PiSSA
    for method in (PiSSA(rank=2), PiSSA(rank=(1, 2), power_iterations=2)):
        eager, traced = method.init(KEY, w), jax.jit(lambda w: method.init(KEY, w))(w)  # noqa: B023
        assert_close(eager, traced)


def test_bad_options_are_refused_by_name() -> None:
    for options, message in (
        ({"dropout": 0.1}, r"dropout=0.1 must be 0: .* pretrained"),
        ({"alpha": 0}, "alpha=0 must be above 0"),
        ({"alpha": -1.0}, r"alpha=-1.0 must be above 0"),
        ({"rank": 0}, "rank=0"),
        ({"power_iterations": -1}, "power_iterations=-1"),
        ({"nf4_rounds": -1}, "nf4_rounds=-1"),
        ({"nf4_rounds": 1, "residual": False}, "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=message):
            PiSSA(**options)


def test_shapes_alone_are_refused() -> None:
    with pytest.raises(TypeError, match="a shape alone"):
        PiSSA(rank=1).init(KEY, jax.ShapeDtypeStruct((1, 4, 4), jnp.float32))
