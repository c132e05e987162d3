"""`scale_by_projection`: the limits, closed forms and invariants of the specification."""

import itertools
from typing import Any

import chex
from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import Adam, first, float64, normal_gradients, run

SVD = lro.subspaces.svd


def _reference_adam_in_subspace(
    gradients: list[np.ndarray], rank: int, refresh_every: int, compress_rows: bool
) -> np.ndarray:
    """GaLore's sum of Adam directions in float64 NumPy, signs chosen as documented."""
    adam, basis, total = Adam(eps=1e-8), np.zeros(()), np.zeros(())
    for t, g in enumerate(gradients):
        if t % refresh_every == 0:
            u, _, vh = np.linalg.svd(g, full_matrices=False)
            new = u[:, :rank] if compress_rows else vh[:rank].T
            basis = new * np.where((new * basis).sum(0) < 0, -1, 1)
        n = adam.update(basis.T @ g if compress_rows else g @ basis)
        total = total + (basis @ n if compress_rows else n @ basis.T)
    return total


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_agrees_with_a_float64_reference_over_several_refreshes(side: str) -> None:
    gradients = normal_gradients((7, 5), 8)
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(3), refresh_every=3, side=side)
    moved = run(tx, {"kernel": jnp.zeros((7, 5))}, gradients)[-1][0]["kernel"]
    expected = _reference_adam_in_subspace(float64(gradients), 3, 3, compress_rows=side == "rows")
    np.testing.assert_allclose(moved, expected, atol=1e-3)  # whatever LAPACK's first signs are


def test_agrees_with_optax_before_the_second_refresh() -> None:
    gradients = normal_gradients((6, 9), 4)
    ours = lro.galore(0.1, 3, 200, 0.5, eps=1e-8, subspace=SVD(3), side="longer")
    theirs = optax.contrib.galore(0.1, rank=3, update_proj_gap=200, scale=0.5)
    start = {"kernel": jnp.zeros((6, 9))}
    chex.assert_trees_all_close(
        run(ours, start, gradients)[-1][0], run(theirs, start, gradients)[-1][0], atol=1e-5
    )


def test_full_rank_and_sgd_is_sgd_whatever_the_refresh() -> None:
    gradients, start = normal_gradients((4, 6), 7), {"kernel": jnp.zeros((4, 6))}
    tx = lro.scale_by_projection(optax.identity(), SVD(4), refresh_every=2)
    ours, sgd = (run(t, start, gradients)[-1][0] for t in (tx, optax.identity()))
    chex.assert_trees_all_close(ours, sgd, atol=1e-5)


def test_full_rank_without_refresh_is_the_inner_optimizer_in_rotated_coordinates() -> None:
    gradients, start = normal_gradients((4, 6), 5), {"kernel": jnp.zeros((4, 6))}
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(4), refresh_every=100)
    moved, state = run(tx, start, gradients)[-1]
    basis = state.basis["kernel"]
    rotated = [{"kernel": basis.T @ g["kernel"]} for g in gradients]
    expected = basis @ run(optax.scale_by_adam(), start, rotated)[-1][0]["kernel"]
    np.testing.assert_allclose(moved["kernel"], expected, atol=1e-5)


def test_first_adam_update_has_the_norm_of_the_closed_form() -> None:
    gradient = {"kernel": jax.random.normal(jax.random.key(0), (8, 20))}
    tx = lro.galore(0.01, rank=3, scale=0.25, eps=1e-12, subspace=SVD(3))
    updates, _ = first(tx, gradient)
    norm = np.linalg.norm(updates["kernel"])
    assert_close(norm, 0.01 * 0.25 * np.sqrt(3 * 20), 100)


def test_updates_stay_in_the_span_of_the_basis_between_refreshes() -> None:
    start = {"kernel": jnp.zeros((8, 12))}
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(2), refresh_every=5)
    moved, state = run(tx, start, normal_gradients((8, 12), 5))[-1]
    basis, moved = state.basis["kernel"], moved["kernel"]
    np.testing.assert_allclose(basis @ (basis.T @ moved), moved, atol=1e-5)
    assert np.linalg.matrix_rank(moved, tol=1e-4) == 2


def test_transposed_weights_get_transposed_updates() -> None:
    gradients = normal_gradients((5, 9), 6)
    transposed = [{"kernel": g["kernel"].T} for g in gradients]
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(3), refresh_every=2)
    one = run(tx, {"kernel": jnp.zeros((5, 9))}, gradients)[-1][0]["kernel"]
    other = run(tx, {"kernel": jnp.zeros((9, 5))}, transposed)[-1][0]["kernel"]
    np.testing.assert_allclose(one, other.T, atol=1e-4)


def test_flipping_a_basis_vector_with_its_moments_changes_nothing() -> None:
    gradients = normal_gradients((5, 9), 3)
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(3), refresh_every=100)
    _, state = run(tx, {"kernel": jnp.zeros((5, 9))}, gradients[:2])[-1]
    flip = jnp.array([1.0, -1.0, 1.0])
    flipped = state._replace(
        basis={"kernel": state.basis["kernel"] * flip},
        inner=state.inner._replace(mu={"kernel": state.inner.mu["kernel"] * flip[:, None]}),
    )
    update = jax.jit(tx.update)
    chex.assert_trees_all_close(
        update(gradients[2], state)[0], update(gradients[2], flipped)[0], atol=1e-5
    )


def test_a_refreshed_basis_agrees_in_sign_with_the_last() -> None:
    gradients = normal_gradients((5, 9), 2)
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(3), refresh_every=1)
    (_, before), (_, after) = run(tx, {"kernel": jnp.zeros((5, 9))}, gradients)
    agreement = jnp.sum(before.basis["kernel"] * after.basis["kernel"], axis=0)
    assert (agreement >= 0).all()


def test_leaves_that_are_no_matrices_get_the_inner_optimizer() -> None:
    others = {"bias": jnp.arange(5.0), "scalar": jnp.array(2.0), "embedding": jnp.ones((4, 3))}
    params = {**others, "kernel": jnp.ones((4, 3))}
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(2), scale=0.5)
    ours, theirs = (run(t, params, [params] * 3)[-1][0] for t in (tx, optax.scale_by_adam()))
    for name in others:
        assert_close(ours[name], theirs[name])


def test_nothing_to_project_is_refused_where_there_is_something_of_two_axes() -> None:
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(2))
    with pytest.raises(ValueError, match=r"no leaf .*the largest is 'embedding' \(4, 3\)"):
        tx.init({"embedding": jnp.ones((4, 3)), "embed": jnp.ones((2, 3)), "bias": jnp.ones(3)})
    for nothing in ({}, {"bias": jnp.ones(3)}, {"embedding": jnp.ones((0, 3))}):
        tx.init(nothing)  # there could be none
    params = {"embedding": jnp.ones((4, 3)), "kernel": jnp.ones((4, 3))}
    with pytest.warns(UserWarning, match="no leaf is a matrix"):  # a group may have none
        optax.masked(tx, {"embedding": True, "kernel": False}).init(params)
    none = {"kernel": None, "embedding": None}
    tx = lro.scale_by_projection(optax.identity(), SVD(2), weight_dimension_numbers=none)
    with pytest.raises(ValueError, match="no leaf is a matrix"):
        tx.init(params)


def test_a_tree_flattened_to_one_vector_is_warned_of() -> None:
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(2))
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    with pytest.warns(UserWarning, match=r"one vector.* optax\.flatten"):
        optax.flatten(tx).init(params)


def test_leaving_out_most_elements_is_warned_of_with_the_largest_leaf() -> None:
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(2))
    params = {"kernel": jnp.ones((4, 3)), "experts": jnp.ones((4, 3, 3)), "bias": jnp.ones(99)}
    with pytest.warns(UserWarning, match=r"^75% of the .*largest is 'experts' \(4, 3, 3\)"):
        tx.init(params)
    tx.init(params | {"experts": jnp.ones((1, 4, 3))})  # half is not most


def test_basis_is_refreshed_when_due_and_at_no_other_step() -> None:
    gradients = normal_gradients((5, 9), 7)
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(3), refresh_every=3)
    states = [state for _, state in run(tx, {"kernel": jnp.zeros((5, 9))}, gradients)]
    bases = [state.basis["kernel"] for state in states]
    changed = [bool((new != old).any()) for old, new in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]
    assert [int(state.next_refresh["kernel"]) for state in states] == [3, 3, 3, 6, 6, 6, 9]


@pytest.mark.parametrize("rule", [SVD, lro.subspaces.randomized_svd])
@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_an_unusable_gradient_keeps_the_basis_and_the_refresh_is_tried_again(
    rule: Any, bad: float
) -> None:
    good, last = normal_gradients((5, 9), 2)
    broken = {"kernel": good["kernel"] * 0 if bad == 0 else good["kernel"].at[2, 3].set(bad)}
    tx = lro.scale_by_projection(optax.scale_by_adam(), rule(3))
    states = [s for _, s in run(tx, {"kernel": jnp.zeros((5, 9))}, [broken, good, last])]
    assert (states[0].basis["kernel"] == 0).all()
    np.testing.assert_allclose(jnp.linalg.norm(states[1].basis["kernel"], axis=0), 1, atol=1e-5)
    chex.assert_trees_all_equal(states[1].basis, states[2].basis)
    assert [int(s.next_refresh["kernel"]) for s in states] == [0, 200, 200]


def test_one_unusable_layer_of_a_stack_does_not_hold_up_the_others() -> None:
    stack = np.array(normal_gradients((3, 5, 9), 1)[0]["kernel"])
    stack[1] = 0
    tx = lro.scale_by_projection(
        optax.scale_by_adam(),
        lro.subspaces.randomized_svd(3),
        weight_dimension_numbers=lro.WeightDimensionNumbers(-2, -1),
    )
    _, state = first(tx, {"kernel": stack})
    assert state.next_refresh["kernel"].tolist() == [200, 0, 200]
    assert (np.linalg.norm(state.basis["kernel"], axis=(1, 2)) > 0).tolist() == [True, False, True]


def test_attention_kernels_are_projected_in_the_view_they_are_given() -> None:
    kernel = jax.random.normal(jax.random.key(0), (6, 2, 4))
    spec = lro.WeightDimensionNumbers(0, (1, 2))
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(3), weight_dimension_numbers=spec)
    flat = lro.scale_by_projection(optax.scale_by_adam(), SVD(3))
    seen = first(tx, {"kernel": kernel})[0]["kernel"]
    expected = first(flat, {"kernel": np.asarray(kernel).reshape(6, 8)})[0]["kernel"]
    np.testing.assert_allclose(seen.reshape(6, 8), expected, atol=1e-5)


def test_an_inner_optimizer_that_needs_parameters_gets_projected_ones() -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (5, 9))}
    gradient = normal_gradients((5, 9), 1)[0]
    tx = lro.scale_by_projection(optax.add_decayed_weights(0.1), SVD(5))
    updates, _ = first(tx, gradient, params)
    expected = gradient["kernel"] + 0.1 * params["kernel"]  # the basis is complete
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-5)


def test_state_is_float32_for_bfloat16_parameters_and_updates_are_not() -> None:
    params = {"kernel": jnp.ones((4, 6), jnp.bfloat16), "bias": jnp.ones(6, jnp.bfloat16)}
    tx = lro.scale_by_projection(optax.scale_by_adam(), lro.subspaces.randomized_svd(2))
    updates, state = jax.eval_shape(lambda g: tx.update(g, tx.init(g)), params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("side", "expected"), [("shorter", 8), ("longer", 24), ("rows", 8), ("columns", 24)]
)
def test_side_says_which_axis_is_compressed(side: str, expected: int) -> None:
    params = {"kernel": jnp.ones((8, 24))}
    tx = lro.scale_by_projection(optax.scale_by_adam(), SVD(2), side=side)
    state = jax.eval_shape(tx.init, params)
    assert state.basis["kernel"].shape == (expected, 2)
    moments = sum(x.size for x in jax.tree.leaves((state.inner.mu, state.inner.nu)))
    assert moments == 2 * 2 * (8 + 24 - expected)


@pytest.mark.slow
def test_other_axes_of_a_mapped_ensemble_do_not_mix() -> None:
    gradients = jax.random.normal(jax.random.key(0), (3, 5, 9))
    tx = lro.scale_by_projection(optax.scale_by_adam(), lro.subspaces.randomized_svd(2))
    step = jax.jit(lambda g: tx.update({"kernel": g}, tx.init({"kernel": g}))[0]["kernel"])
    each = jnp.stack([step(g) for g in gradients])
    np.testing.assert_allclose(jax.vmap(step)(gradients), each, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"side": "left"}, ValueError, "side='left'"),
        ({"refresh_every": 0}, ValueError, "refresh_every=0"),
        ({"subspace": "svd"}, TypeError, "subspace='svd'"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_given(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        lro.scale_by_projection(optax.scale_by_adam(), **{"subspace": SVD(2), **arguments})
