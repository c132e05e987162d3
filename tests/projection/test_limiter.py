"""`limit_norm_growth`: the norm of an update grows by no more than a factor."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

MATRIX = np.array([[3.0, 4.0]], np.float32)  # of norm 5


def _norms(tx: Any, updates: list[Any]) -> list[float]:
    """Norm of each update after limiting."""
    state, step, norms = tx.init(updates[0]), jax.jit(tx.update), []
    for update in updates:
        limited, state = step(update, state)
        norms.append(float(np.linalg.norm(limited["kernel"])))
    return norms


def test_growth_is_limited_and_shrinking_is_not() -> None:
    sizes = [1.0, 1.005, 8.0, 8.0, 0.1, 0.5]
    norms = _norms(lro.limit_norm_growth(1.5), [{"kernel": MATRIX * s / 5} for s in sizes])
    expected = [1.0, 1.005, 1.5 * 1.005, 1.5**2 * 1.005, 0.1, 0.15]
    assert_close(norms, expected, 100, dtype=np.float32)


def test_an_update_after_none_is_a_first_one() -> None:
    norms = _norms(lro.limit_norm_growth(), [{"kernel": MATRIX * s} for s in (1.0, 0.0, 7.0)])
    assert_close(norms, [5.0, 0.0, 35.0], dtype=np.float32)


def test_an_update_that_is_not_finite_is_passed_on_and_not_remembered() -> None:
    tx = lro.limit_norm_growth(2.0)
    norms = _norms(tx, [{"kernel": MATRIX * s} for s in (1.0, jnp.nan, 9.0)])
    assert np.isnan(norms[1])
    assert_close(norms[2], 10.0, 100, dtype=np.float32)


def test_layers_of_a_stack_are_limited_one_by_one() -> None:
    spec = lro.WeightDimensionNumbers(-2, -1)
    tx = lro.limit_norm_growth(2.0, weight_dimension_numbers=spec)
    stack = lambda *sizes: {"kernel": np.stack([MATRIX * s for s in sizes])}
    state = tx.init(stack(1.0, 1.0))
    assert state.norm["kernel"].shape == (2,)
    _, state = tx.update(stack(1.0, 1.0), state)
    limited, state = tx.update(stack(1.0, 10.0), state)
    assert_close(jnp.linalg.norm(limited["kernel"], axis=(1, 2)), [5.0, 10.0])
    assert_close(state.norm["kernel"], [5.0, 10.0])


def test_other_leaves_have_one_norm_each() -> None:
    tx = lro.limit_norm_growth(2.0)
    update = {"bias": jnp.array([3.0, 4.0]), "attention": jnp.ones((2, 3, 4)), "one": jnp.ones(())}
    state = tx.init(update)
    assert all(norm.shape == () for norm in jax.tree.leaves(state.norm))
    _, state = tx.update(update, state)
    limited, _ = tx.update(jax.tree.map(lambda x: 10 * x, update), state)
    for name, x in update.items():
        assert_close(limited[name], 2 * x)


def test_norms_are_float32_and_updates_keep_their_dtype() -> None:
    update = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    tx = lro.limit_norm_growth()
    limited, state = tx.update(update, tx.init(update))
    assert limited["kernel"].dtype == jnp.bfloat16
    assert state.norm["kernel"].dtype == jnp.float32


def test_alone_and_around_apollo_without_a_limit_it_is_apollo_with_one() -> None:
    gradients = [{"kernel": 2.0**i * MATRIX * np.ones((4, 1), np.float32)} for i in range(4)]
    make = lambda gamma: lro.scale_by_projection(
        optax.trace(0.9),
        lro.subspaces.random(2),
        residual=lro.residuals.gradient_scaling(gamma),
    )
    around = optax.chain(make(jnp.inf), lro.limit_norm_growth())
    inside, outside = _norms(make(1.01), gradients), _norms(around, gradients)
    assert_close(inside, outside, 100, dtype=np.float32)
    assert_close(inside[1] / inside[0], 1.01, 100, dtype=np.float32)


@pytest.mark.parametrize("gamma", [0, -1.0])
def test_a_gamma_that_is_not_positive_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma={gamma}"):
        lro.limit_norm_growth(gamma)
