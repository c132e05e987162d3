"""What becomes of the inner optimizer's state when the basis turns."""

from typing import Any
import warnings

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import Adam, float64, moved, normal_gradients, orthonormal, run

SHAPE = (5, 8)
BASIS = orthonormal(5, 3)


def _sequence(*turns: Any) -> lro.subspaces.Subspace:
    """A rule whose basis is ``BASIS`` and then, refresh by refresh, ``BASIS`` times each of these.

    Each refresh finds its place in the sequence by the basis it is given.
    """
    bases = [jnp.zeros_like(BASIS), BASIS, *(BASIS @ jnp.asarray(turn) for turn in turns)]

    def refresh(key: Any, matrix: Any, last: jax.Array, momentum: Any, view: Any) -> jax.Array:
        new = bases[-1]
        for before, after in zip(bases[-2::-1], bases[:0:-1], strict=True):
            new = jnp.where(jnp.abs(last - before).max() < 1e-3, after, new)
        return new

    return lro.subspaces.from_basis(3, refresh)


def _projected(subspace: lro.subspaces.Subspace, on_refresh: Any, **options: Any) -> Any:
    return lro.scale_by_projection(
        options.pop("inner", optax.scale_by_adam()),
        subspace,
        on_refresh=on_refresh,
        **{"refresh_every": 1, "side": "rows", **options},
    )


@pytest.mark.combinations(1)
@pytest.mark.parametrize("on_refresh", ["rotate", "rotate_moments"])
@pytest.mark.parametrize("subspace", [lro.subspaces.fixed(BASIS), lro.subspaces.dct(5)])
def test_an_unchanged_basis_changes_nothing(subspace: Any, on_refresh: Any) -> None:
    gradients = normal_gradients(SHAPE, 5)
    kept, rotated = (_projected(subspace, how) for how in ("keep", on_refresh))
    np.testing.assert_allclose(
        moved(rotated, SHAPE, gradients), moved(kept, SHAPE, gradients), atol=1e-5
    )


@pytest.mark.parametrize(
    "turn",
    [np.diag([1.0, -1.0, -1.0]), np.eye(3)[[2, 0, 1]], -np.eye(3)[[1, 0, 2]]],
    ids=["signs", "order", "signs_and_order"],
)
def test_signs_and_order_of_the_basis_do_not_matter_if_moments_are_rotated(turn: Any) -> None:
    gradients = normal_gradients(SHAPE, 4)
    still = _projected(lro.subspaces.fixed(BASIS), "rotate_moments")
    turning = _projected(_sequence(turn, turn @ turn, turn), "rotate_moments")
    start = {"kernel": jnp.zeros(SHAPE)}
    expected, seen = run(still, start, gradients)[1], run(turning, start, gradients)[1]
    np.testing.assert_allclose(seen[0]["kernel"], expected[0]["kernel"], atol=1e-5)
    place = np.abs(turn.T)
    second = expected[1].inner.nu["kernel"], seen[1].inner.nu["kernel"]
    assert_close(second[1], place @ second[0], 800)
    np.testing.assert_allclose(
        moved(turning, SHAPE, gradients), moved(still, SHAPE, gradients), atol=1e-4
    )


def test_moments_turn_by_the_rule_of_ldadam() -> None:
    gradients = normal_gradients(SHAPE, 3)
    angle = np.pi / 5
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    tx = _projected(_sequence(turn), "rotate_moments", refresh_every=2)
    _, state = run(tx, {"kernel": jnp.zeros(SHAPE)}, gradients)[-1]

    basis, adam = np.asarray(BASIS, np.float64), Adam(eps=1e-8)
    first, second, third = float64(gradients)
    adam.update(basis.T @ first)
    adam.update(basis.T @ second)
    adam.turn(turn.T)
    adam.update((basis @ turn).T @ third)
    np.testing.assert_allclose(state.inner.mu["kernel"], adam.first, atol=1e-5)
    assert_close(state.inner.nu["kernel"], adam.second, 800)


@pytest.mark.parametrize(
    ("before", "factor"),
    [
        (lambda: optax.clip_by_global_norm(0.1), lambda x: 0.1 / np.linalg.norm(x)),
        (lambda: optax.scale(128.0), lambda x: 128.0),
    ],
    ids=["clipped", "scaled"],
)
def test_moments_of_changed_gradients_turn_by_their_own_decays(before: Any, factor: Any) -> None:
    gradients = normal_gradients(SHAPE, 3)
    turn = np.asarray(orthonormal(3, 3, seed=1), np.float64)
    inner = optax.chain(before(), optax.scale_by_adam())
    tx = _projected(_sequence(turn), "rotate_moments", refresh_every=2, inner=inner)
    _, state = run(tx, {"kernel": jnp.zeros(SHAPE)}, gradients)[-1]

    basis, adam = np.asarray(BASIS, np.float64), Adam(eps=1e-8)
    for i, gradient in enumerate(float64(gradients)):
        if i == 2:
            adam.turn(turn.T)
            basis = basis @ turn
        seen = basis.T @ gradient
        adam.update(seen * factor(seen))
    assert_close(state.inner[1].mu["kernel"], adam.first, 800)
    assert_close(state.inner[1].nu["kernel"], adam.second, 800)


def test_moments_in_bfloat16_turn() -> None:
    turn = np.asarray(orthonormal(3, 3, seed=1), np.float64)
    adam, rounded = (optax.scale_by_adam(eps=0, mu_dtype=x) for x in (None, jnp.bfloat16))
    one, other, scaled = (
        moved(_projected(_sequence(turn), "rotate_moments", inner=inner), SHAPE, gradients)
        for gradients in [normal_gradients(SHAPE, 3)]
        for inner in (adam, rounded, optax.chain(optax.scale(8.0), rounded))
    )
    np.testing.assert_allclose(other, scaled, atol=1e-4)
    assert np.linalg.norm(one - other) < 0.03 * np.linalg.norm(one)


def test_how_moments_average_is_looked_at_outside_of_the_program() -> None:
    zeros = {"kernel": jnp.zeros(SHAPE)}
    tx = _projected(lro.subspaces.power_iteration(3), "rotate_moments")
    small = "f32[2,2]"  # what the inner optimizer is looked at with
    assert small not in str(jax.make_jaxpr(tx.init)(zeros))
    assert small not in str(jax.make_jaxpr(tx.update)(zeros, tx.init(zeros)))


def test_decays_that_are_traced_are_looked_at_within_the_program() -> None:
    gradients, zeros = normal_gradients(SHAPE, 3), {"kernel": jnp.zeros(SHAPE)}
    make = lambda b1: _projected(
        lro.subspaces.power_iteration(3), "rotate_moments", inner=optax.scale_by_adam(b1)
    )
    injected = optax.inject_hyperparams(make)(b1=0.8)
    ours, theirs = (run(tx, zeros, gradients)[-1][0] for tx in (injected, make(0.8)))
    np.testing.assert_allclose(ours["kernel"], theirs["kernel"], atol=1e-5)


def test_moments_are_looked_at_in_the_precision_that_is_set() -> None:
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = optax.chain(optax.scale(jnp.float64(1.0)), optax.scale_by_adam())
        tx = _projected(lro.subspaces.svd(2), "rotate_moments", inner=inner)
        tx.init({"kernel": jnp.ones(SHAPE, jnp.float64)})


@pytest.mark.parametrize(
    "inner",
    [
        optax.scale_by_belief,
        optax.scale_by_adamax,
        optax.scale_by_yogi,
        optax.contrib.scale_by_adopt,
    ],
    ids=lambda inner: inner.__name__,
)
def test_second_moments_that_are_not_mean_squares_are_not_rotated(inner: Any) -> None:
    params = {"kernel": jnp.ones(SHAPE)}
    tx = _projected(lro.subspaces.svd(2), "rotate_moments", inner=inner())
    with pytest.raises(
        ValueError, match=r"'rotate_moments'.*nu.*; it is not\. .*'rotate', 'keep' or 'reset'"
    ):
        tx.init(params)


@pytest.mark.parametrize("residual", ["drop", lro.residuals.error_feedback(momentum=True)])
@pytest.mark.parametrize(
    ("inner", "match"),
    [
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.scale_by_adam()), "optax.add_noise"),
        (
            optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation(),
            "optax.MultiSteps",
        ),
    ],
    ids=["noise", "skipped"],
)
def test_what_keeps_moments_from_averaging_is_named(inner: Any, match: str, residual: Any) -> None:
    how = "rotate_moments" if residual == "drop" else "keep"
    tx = _projected(lro.subspaces.svd(2), how, inner=inner, residual=residual)
    with pytest.raises(ValueError, match=rf"(?s)mu.*{match}.* the whole optimizer"):
        tx.init({"kernel": jnp.ones(SHAPE)})


def test_second_moments_stay_where_they_are_if_only_first_ones_rotate() -> None:
    gradient = normal_gradients(SHAPE, 1)[0]
    tx = _projected(_sequence(-np.eye(3)), "rotate")
    (_, one), (_, two) = run(tx, {"kernel": jnp.zeros(SHAPE)}, [gradient, gradient])
    assert_close(two.inner.mu["kernel"], -1.9 * one.inner.mu["kernel"], 800)
    assert_close(two.inner.nu["kernel"], 1.999 * one.inner.nu["kernel"], 800)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("rank", [2, 6])
def test_turned_momentum_is_the_projection_of_the_momentum(axis: int, rank: int) -> None:
    matrix = jax.random.normal(jax.random.key(0), (6, 6))
    rule, view = lro.subspaces.fixed(orthonormal(6, rank)), lro.View.of(matrix, axis, rank)
    old, new = orthonormal(6, rank, seed=1), orthonormal(6, rank, seed=2)
    momentum = jax.random.normal(jax.random.key(1), view.projected_shape)
    turned = rule.rotate(old, new, momentum, view)
    whole = rule.lift(old, momentum, view)
    np.testing.assert_allclose(turned, rule.project(new, whole, view), atol=1e-5)
    again = rule.lift(new, turned, view)
    if rank == 6:  # a complete basis carries it exactly
        np.testing.assert_allclose(again, whole, atol=1e-5)
    else:
        assert jnp.linalg.norm(again) < jnp.linalg.norm(whole)


def test_reset_restarts_moments_and_counts_of_the_matrices_that_are_due() -> None:
    gradients = normal_gradients((2, *SHAPE), 3)
    periods = jnp.array([2, 3])
    rule = lro.refresh.RefreshRule(
        lambda view: (), lambda statistics, count, phase, overlap: (count + periods, statistics)
    )
    tx = _projected(
        lro.subspaces.fixed(BASIS),
        "reset",
        refresh_every=rule,
        weight_dimension_numbers=lro.WeightDimensionNumbers(-2, -1),
    )
    _, state = run(tx, {"kernel": jnp.zeros((2, *SHAPE))}, gradients)[-1]
    assert state.inner.count["kernel"].tolist() == [1, 3]
    seen = [BASIS.T @ g["kernel"] for g in gradients]
    first = state.inner.mu["kernel"]
    np.testing.assert_allclose(first[0], 0.1 * seen[2][0], atol=1e-5)
    kept = sum(0.1 * 0.9 ** (2 - i) * x[1] for i, x in enumerate(seen))
    np.testing.assert_allclose(first[1], kept, atol=1e-5)


def test_a_step_after_a_reset_is_a_first_step() -> None:
    gradients = normal_gradients(SHAPE, 4)
    tx = _projected(lro.subspaces.fixed(BASIS), "reset", refresh_every=3)
    (before, _), (after, _) = run(tx, {"kernel": jnp.zeros(SHAPE)}, gradients)[2:]
    update = after["kernel"] - before["kernel"]
    expected = BASIS @ jnp.sign(BASIS.T @ gradients[3]["kernel"])
    np.testing.assert_allclose(update, expected, atol=1e-3)


def test_on_refresh_does_not_touch_leaves_that_are_no_matrices() -> None:
    params = {"kernel": jnp.ones(SHAPE), "bias": jnp.arange(1.0, 4.0)}
    tx = _projected(lro.subspaces.fixed(BASIS), "reset")
    ours, adam = (run(t, params, [params] * 3)[-1][0] for t in (tx, optax.scale_by_adam()))
    assert_close(ours["bias"], adam["bias"])


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        (optax.scale_by_factored_rms(min_dim_size_to_factor=2), "v_row"),
        (optax.scale_by_amsgrad(), "nu_max"),
    ],
)
def test_an_array_that_nobody_knows_how_to_rotate_is_named(inner: Any, name: str) -> None:
    params = {"kernel": jnp.ones(SHAPE)}
    tx = _projected(lro.subspaces.svd(2), "rotate", inner=inner)
    with pytest.raises(ValueError, match=rf"cannot rotate .*{name}.*'keep' or 'reset'"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="on_refresh='turn' must be one of 'keep'"):
        _projected(lro.subspaces.svd(2), "turn")
