"""Residual rules: Fira and APOLLO against their closed forms, and what must hold of them."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import first, moved, normal_gradients, orthonormal, run

SHAPE = (5, 8)
BASIS = orthonormal(5, 2)
FORMS = pytest.mark.parametrize("form", ["paper", "code"])
residuals = lro.residuals


def _projected(residual: Any, inner: Any = None, **options: Any) -> Any:
    return lro.scale_by_projection(
        optax.scale_by_adam() if inner is None else inner,
        options.pop("subspace", lro.subspaces.fixed(BASIS)),
        residual=residual,
        **{"side": "rows", **options},
    )


def _updates(tx: Any, gradients: list[Any]) -> list[np.ndarray]:
    step, state, seen = jax.jit(tx.update), tx.init(gradients[0]), []
    for gradient in gradients:
        updates, state = step(gradient, state)
        seen.append(np.asarray(updates["kernel"], np.float64))
    return seen


def _growing(count: int) -> list[Any]:
    return [{"kernel": 2.0**i * g["kernel"]} for i, g in enumerate(normal_gradients(SHAPE, count))]


@FORMS
def test_fira_is_galore_where_the_limit_shuts_the_residual_off(form: Any) -> None:
    gradients = normal_gradients(SHAPE, 3)
    shut = _updates(_projected(residuals.fira(1e-12, form), scale=0.25), gradients)
    galore = _updates(_projected("drop", scale=0.25), gradients)
    np.testing.assert_allclose(shut[1:], galore[1:], atol=1e-5)
    assert np.abs(shut[0] - galore[0]).max() > 0.01  # the first step is not limited


@FORMS
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_fira_of_gradient_descent_is_gradient_descent(form: Any, granularity: Any) -> None:
    gradients = normal_gradients(SHAPE, 2)
    rule = residuals.fira(jnp.inf, form, granularity=granularity)
    seen = _updates(_projected(rule, optax.identity()), gradients)
    np.testing.assert_allclose(seen, [g["kernel"] for g in gradients], atol=1e-5)


def test_fira_with_a_complete_basis_is_galore() -> None:
    gradients = normal_gradients(SHAPE, 3)
    options = {"subspace": lro.subspaces.fixed(orthonormal(5, 5)), "scale": 0.25}
    fira, galore = (_projected(rule, **options) for rule in (residuals.fira(), "drop"))
    np.testing.assert_allclose(
        moved(fira, SHAPE, gradients), moved(galore, SHAPE, gradients), atol=1e-5
    )


@pytest.mark.parametrize(("form", "decays"), [("paper", None), ("code", (0.9, 0.999))])
def test_the_residual_grows_by_no_more_than_gamma(form: Any, decays: Any) -> None:
    gradients = _growing(6)
    fira = _updates(_projected(residuals.fira(1.01, form, decays)), gradients)
    galore = _updates(_projected("drop"), gradients)
    norms = np.array([np.linalg.norm(x - y) for x, y in zip(fira, galore, strict=True)])
    if decays is not None:  # the limited norm is that without bias corrections
        t = np.arange(1, 7)
        norms *= (1 - 0.9**t) / np.sqrt(1 - 0.999**t)
    growth = norms[1:] / norms[:-1]
    assert growth.max() <= 1.01 * (1 + 1e-5)
    assert_close(growth.max(), 1.01, 100, dtype=np.float32)  # so the limit was reached


@FORMS
def test_the_first_update_of_fira_does_not_depend_on_the_gradients_scale(form: Any) -> None:
    gradient = normal_gradients(SHAPE, 1)[0]
    tx = _projected(residuals.fira(form=form), optax.scale_by_adam(eps=1e-16), scale=0.25)
    one, other = (_updates(tx, [{"kernel": c * gradient["kernel"]}])[0] for c in (1.0, 1e3))
    assert_close(one, other, 800, dtype=np.float32)


def test_the_residual_of_fira_is_scaled_column_by_column() -> None:
    gradient = normal_gradients(SHAPE, 1)[0]
    update = _updates(_projected(residuals.fira()), [gradient])[0]
    outside = np.eye(5) - np.asarray(BASIS @ BASIS.T, np.float64)
    seen, expected = outside @ update, outside @ np.asarray(gradient["kernel"], np.float64)
    cosines = (seen * expected).sum(0) / np.linalg.norm(seen, axis=0)
    assert_close(cosines, np.linalg.norm(expected, axis=0), 100, dtype=np.float32)


@pytest.mark.combinations(2)
@FORMS
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("orthonormal_basis", [True, False])
def test_the_norm_of_the_residual_is_that_of_what_is_applied(
    form: Any, granularity: Any, orthonormal_basis: bool
) -> None:
    basis = BASIS if orthonormal_basis else jax.random.normal(jax.random.key(3), (5, 2))
    rule = lro.subspaces.fixed(basis, orthonormal=orthonormal_basis)
    fira = residuals.fira(form=form, granularity=granularity)
    gradient = normal_gradients(SHAPE, 1)[0]
    tx = _projected(fira, subspace=rule, scale=0.25)
    updates, state = first(tx, gradient)
    lifted = _updates(_projected("drop", subspace=rule, scale=0.25), [gradient])[0]
    kernel = np.asarray(updates["kernel"], np.float64) - lifted
    applied = np.linalg.norm(kernel) / (0.25 if form == "paper" else 1)
    assert_close(state.residual["kernel"], applied, 800, dtype=np.float32)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_norm_of_a_residual_far_smaller_than_the_gradient_is_right(granularity: Any) -> None:
    length, count, rank = 48, 64, 8
    basis = orthonormal(length, rank)
    inside, beside = (normal_gradients(s, 1)[0]["kernel"] for s in ((rank, count), (length, count)))
    gradient = basis @ inside + 1e-5 * beside
    fira = residuals.fira(granularity=granularity)
    tx = _projected(fira, optax.identity(), subspace=lro.subspaces.fixed(basis))
    norm = first(tx, {"kernel": gradient})[1].residual["kernel"]
    p, g = np.asarray(basis, np.float64), np.asarray(gradient, np.float64)
    expected = np.linalg.norm(g - p @ (p.T @ g))  # all factors are one
    np.testing.assert_allclose(norm, expected, rtol=1e-3)


def test_a_column_outside_the_subspace_gets_no_first_update() -> None:
    gradient = {"kernel": np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], np.float32)}
    for form in ("paper", "code"):
        tx = lro.fira(0.01, 1, subspace=lro.subspaces.svd(1), residual_form=form)
        updates, _ = first(tx, gradient)
        assert (updates["kernel"][:, 1:] == 0).all()
        assert updates["kernel"][0, 0] < 0


def test_a_floor_bounds_the_factor_of_a_column_that_left_the_subspace() -> None:
    rule = lro.subspaces.fixed(jnp.eye(2, 1))
    gradients = [{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.array([[0.0] * 3, [1.0] * 3])}]
    make = lambda floor: _projected(residuals.fira(jnp.inf, floor=floor), subspace=rule)
    free, bounded = (np.abs(_updates(make(x), gradients)[1]).max() for x in (0.0, 0.5))
    assert free > 1e6
    assert bounded < 2


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_gradient_scaling_gives_the_gradient_the_norms_of_the_inner_update(
    granularity: Any,
) -> None:
    gradient = normal_gradients(SHAPE, 1)[0]
    rule = residuals.gradient_scaling(granularity=granularity)
    update = _updates(_projected(rule, scale=2.0), [gradient])[0]
    projected = np.asarray(BASIS.T @ gradient["kernel"], np.float64)
    axis = 0 if granularity == "channel" else None
    answer = np.linalg.norm(np.sign(projected), axis=axis)
    factor = answer / np.linalg.norm(projected, axis=axis)
    expected = 2 * factor * np.asarray(gradient["kernel"])
    assert_close(update, expected, 800, dtype=np.float32)


def test_norms_are_along_rows_where_columns_are_compressed() -> None:
    gradients = normal_gradients(SHAPE, 3)
    transposed = [{"kernel": g["kernel"].T} for g in gradients]
    for rule in (residuals.fira(), residuals.gradient_scaling()):
        rows, columns = (_projected(rule, side=side) for side in ("rows", "columns"))
        seen = moved(columns, SHAPE[::-1], transposed)
        np.testing.assert_allclose(seen.T, moved(rows, SHAPE, gradients), atol=1e-5)


@pytest.mark.parametrize("name", ["fira", "gradient_scaling"])
def test_norms_survive_a_step_that_is_zero_or_not_finite(name: str) -> None:
    gradients = normal_gradients(SHAPE, 3)
    tx = _projected(name)
    zero, broken = {"kernel": jnp.zeros(SHAPE)}, {"kernel": jnp.full(SHAPE, jnp.nan)}
    states = [s for _, s in run(tx, zero, [gradients[0], broken])]
    np.testing.assert_array_equal(states[0].residual["kernel"], states[1].residual["kernel"])
    states = [s for _, s in run(tx, zero, [zero, gradients[0], gradients[1]])]
    norms = [float(s.residual["kernel"]) for s in states]
    assert norms[0] == 0
    assert norms[1] > 0.1  # after no norm at all, the next one is a first one
    assert norms[2] <= 1.01 * norms[1] * (1 + 1e-5)


@pytest.mark.parametrize(("name", "size"), [("raw", lambda x: x), ("sign", np.sign)])
def test_raw_and_sign_add_the_residual_and_its_signs(name: str, size: Any) -> None:
    gradient = normal_gradients(SHAPE, 1)[0]
    rule = getattr(residuals, name)(0.5)
    update = _updates(_projected(rule, optax.scale(3.0)), [gradient])[0]
    matrix, basis = np.asarray(gradient["kernel"], np.float64), np.asarray(BASIS, np.float64)
    inside = basis @ basis.T @ matrix
    np.testing.assert_allclose(update, 3 * inside + 0.5 * size(matrix - inside), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: residuals.fira(gamma=0.0), "gamma=0.0"),
        (lambda: residuals.fira(form="other"), "form='other'"),
        (lambda: residuals.fira(granularity="row"), "granularity='row'"),
        (lambda: residuals.fira(floor=1.0), "floor=1.0"),
        (lambda: residuals.gradient_scaling(gamma=-1.0), "gamma=-1.0"),
        (lambda: residuals.error_feedback(bits=4), "bits=4"),
        (lambda: _projected("throw_away"), "residual='throw_away'.*'drop'"),
        (lambda: _projected("fira", side="both"), "side='both'"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_given(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
