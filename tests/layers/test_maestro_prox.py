"""The proximal step of Maestro's penalty: its numbers, and the transformation."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from lowrank_optax.layers import maestro
from lowrank_optax.layers.maestro import prox_tails

prox = jax.jit(prox_tails)


def test_prox_has_its_worked_numbers_and_is_the_minimiser() -> None:
    x = np.array([[3.0, 0, 0.3], [4, 1, 0.4]])
    with jax.enable_x64(True):
        found = prox(x, 0.6)
        known = [[2.641146, 0, 0], [3.521529, 0.352153, 0]]
        np.testing.assert_allclose(found, known, atol=1e-6)
        rng = np.random.default_rng(8)
        y = rng.standard_normal((4, 3)) * [1.0, 0.7, 0.5]
        shrunk = np.asarray(prox(y, 0.3))
    for matrix, threshold, result in ((x, 0.6, np.asarray(found)), (y, 0.3, shrunk)):

        def total(z: np.ndarray, matrix: np.ndarray = matrix, t: float = threshold) -> float:
            z = z.reshape(matrix.shape)
            tails = sum(np.linalg.norm(z[:, k:]) for k in range(z.shape[1]))
            return 0.5 * np.sum((z - matrix) ** 2) + t * tails

        options = {"xtol": 1e-10, "ftol": 1e-14, "maxiter": 100_000}
        best = scipy.optimize.minimize(total, matrix.ravel(), method="Powell", options=options)
        assert total(result) <= best.fun + 1e-12
        np.testing.assert_allclose(result, best.x.reshape(matrix.shape), atol=1e-5)


def test_prox_of_stacks_edges_and_narrow_dtypes() -> None:
    x = np.random.default_rng(9).standard_normal((3, 4, 5), np.float32)
    stacked = prox(x, 0.2)
    assert_close(stacked, np.stack([prox(m, 0.2) for m in x]))
    np.testing.assert_array_equal(prox(x, 0.0), x)
    assert jax.eval_shape(prox_tails, jnp.bfloat16(x), 0.2).dtype == jnp.bfloat16
    np.testing.assert_array_equal(prox(x, 1e3), 0)
    np.testing.assert_array_equal(prox(np.zeros_like(x), 0.1), 0)
    assert prox_tails(jnp.zeros((4, 0)), 0.1).shape == (4, 0)
    x[1, 0, 2] = np.nan
    assert np.all(np.isnan(prox(x, 0.1)[1, :, 2]))


def kernels(*shape: int) -> dict[str, Any]:
    """Parameters of a layer, or a stack of them, and others that look alike."""
    rng = np.random.default_rng(10)
    draw = lambda *own: jnp.asarray(rng.standard_normal((*shape, *own), np.float32))
    layer = {"ordered_in": {"kernel": draw(4, 3)}, "ordered_out": {"kernel": draw(3, 5)}}
    return {"up": layer, "other": {"first": {"kernel": draw(4, 3)}}}


def test_prox_makes_the_proximal_point_of_what_the_update_would_have_made() -> None:
    params = kernels(2)
    schedule = optax.linear_schedule(0.1, 0.0, 2)
    tx = optax.chain(optax.sgd(0.5), maestro.prox(schedule, 2.0))
    gradient = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    for step in range(3):
        updates, state = jax.jit(tx.update)(gradient, state, params)
        plain = jax.tree.map(lambda p: p - 0.5, params)
        params = optax.apply_updates(params, updates)
        t = 2 * 0.1 * max(1 - step / 2, 0)
        a, b = (plain["up"][name]["kernel"] for name in ("ordered_in", "ordered_out"))
        assert_close(params["up"]["ordered_in"]["kernel"], prox_tails(a, t))
        assert_close(params["up"]["ordered_out"]["kernel"], prox_tails(b.mT, t).mT)
        assert_close(params["other"], plain["other"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_prox_makes_exact_zeros_within_other_transformations(dtype: Any) -> None:
    params = kernels()
    a = params["up"]["ordered_in"]
    a["kernel"] = a["kernel"].at[:, 2].multiply(0.1)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    of_layers = lambda params: {"up": True, "other": False}
    tx = optax.chain(
        optax.adam(1e-3),
        optax.masked(optax.inject_hyperparams(maestro.prox)(1.0, penalty=0.4), of_layers),
    )
    tx = optax.MultiSteps(tx, 2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    a = params["up"]["ordered_in"]["kernel"]
    assert a.dtype == dtype
    assert not np.any(a[:, 2])
    assert np.all(a[:, 0] != 0)


def test_prox_refuses_what_it_cannot_do() -> None:
    params = kernels()
    for options, message in (
        ((-1.0, 1.0), "learning_rate=-1.0 must be finite and not negative"),
        ((np.float32(-1), 1.0), "learning_rate=.* must be finite and not negative"),
        ((1.0, -1.0), "penalty=-1.0 must be finite and not negative"),
        ((1.0, float("nan")), "penalty=nan must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            maestro.prox(*options)
    tx = maestro.prox(1.0, 1.0)
    with pytest.raises(ValueError, match="prox finds no factor of a Maestro layer"):
        tx.init({"other": params["other"]})
    with pytest.raises(ValueError, match="prox needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="up/ordered_in/kernel without up/ordered_out/kernel"):
        tx.init({"up": {"ordered_in": params["up"]["ordered_in"]}})
