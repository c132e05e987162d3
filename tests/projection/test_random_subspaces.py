"""Random bases: their mean, and that a seed is all that is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.rules import case, gram_error, normal

KINDS = pytest.mark.parametrize("kind", ["gaussian", "orthonormal", "rademacher", "sparse"])


@KINDS
def test_the_mean_projector_is_a_multiple_of_the_identity(kind: str) -> None:
    """``I``, or ``(r/d) I`` of orthonormal ones; 4000 keys leave an error of about 3%."""
    one = case(kind, (5, 7), -2, 2)

    def projector(key: jax.Array) -> jax.Array:
        seed = one.rule.refresh(key, None, None, None, None)
        basis = one.rule.lift(seed, jnp.eye(2), one.view)
        return basis @ basis.T

    keys = jax.random.split(jax.random.key(0), 4000)
    mean = jnp.mean(jax.jit(jax.vmap(projector))(keys), axis=0)
    expected = (2 / 5 if kind == "orthonormal" else 1) * np.eye(5)
    np.testing.assert_allclose(mean, expected, atol=0.08)


@KINDS
def test_the_same_seed_gives_the_same_basis_and_another_another(kind: str) -> None:
    one = case(kind, (2, 6, 8))
    same, again, other = (one.dense(one.found(normal(2, 6, 8), seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert (same != other).any()
    np.testing.assert_array_equal(same[0], same[1])  # one for all layers


def test_entries_have_the_values_of_their_kind() -> None:
    values = {"rademacher": [-1, 1], "sparse": [-(3**0.5), 0, 3**0.5]}
    for kind, expected in values.items():
        one = case(kind, (2, 6, 8))
        entries = one.dense(one.found(normal(2, 6, 8))).astype(np.float64) * 3**0.5
        np.testing.assert_allclose(np.unique(entries.round(4)), expected, atol=1e-4)


def test_orthonormal_bases_are_orthonormal_in_long_axes() -> None:
    one = case("orthonormal", (1000, 32), -2, 32)
    assert gram_error(one.dense(one.found(normal(1000, 32)))) < 1e-5


def test_only_one_seed_is_stored_for_all_leaves() -> None:
    gradients = {"first": normal(6, 8), "second": normal(3, 5, seed=1)}
    tx = lro.scale_by_projection(optax.identity(), lro.subspaces.random(2), refresh_every=2)
    state, step, seeds = tx.init(gradients), jax.jit(tx.update), []
    assert state.basis.shape == ()
    assert sum(x.size for x in jax.tree.leaves(state)) == 3  # count, seed, and when it is due
    for _ in range(4):
        _, state = step(gradients, state)
        seeds.append(int(state.basis))
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
