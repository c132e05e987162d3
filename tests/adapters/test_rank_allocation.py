"""LaMDA++: energies of spectra, and ranks that keep to a budget."""

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters import allocate_ranks, energy, weight_spectra

spectrum = st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=9)


@given(spectrum, st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=50)
def test_energy_rises_to_one_whatever_the_scale(sigma: list[float], scale: float) -> None:
    found = energy(sigma)
    assert np.all(np.diff(found) >= -1e-15)
    assert np.isclose(found[-1], 1)
    np.testing.assert_allclose(energy(np.multiply(scale, sigma)), found, rtol=1e-6, atol=1e-12)


def test_energy_is_of_squares_of_the_largest_first() -> None:
    np.testing.assert_allclose(energy([[1.0, 3.0], [2.0, 0.0]]), [[0.9, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(energy(np.full(8, 5.0)), np.arange(1, 9) / 8)


def by_hand(energies: np.ndarray, ranks: list[int], budget: float) -> list[int]:
    """The rule for spectra of which no two gains are equal."""
    at = dict.fromkeys(range(len(energies)), 0)
    gain = lambda i: (
        (energies[i][ranks[at[i] + 1] - 1] - energies[i][ranks[at[i]] - 1])
        / (ranks[at[i] + 1] - ranks[at[i]])
        if at[i] + 1 < len(ranks)
        else -np.inf
    )
    while (best := max(at, key=gain)) is not None and gain(best) > 0:
        raised = sum(ranks[j] for i, j in at.items() if i != best) + ranks[at[best] + 1]
        if raised > budget:
            break
        at[best] += 1
    return [ranks[j] for j in at.values()]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_the_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(size=(6, 16)) ** rng.uniform(0.2, 5, size=(6, 1))
    ranks = [2, 4, 8, 16]
    for average in (2, 3.5, 5, 16):
        found = allocate_ranks({"stack": sigma}, ranks, average)["stack"]
        found = (found,) * 6 if isinstance(found, int) else found
        assert list(found) == by_hand(energy(sigma), ranks, 6 * average)
        assert sum(found) <= 6 * average


@given(
    st.integers(1, 7),
    st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True),
    st.floats(0, 12),
    spectrum,
)
@settings(deadline=None, max_examples=80)
def test_identical_layers_get_equal_or_adjacent_ranks(
    layers: int, ranks: list[int], more: float, sigma: list[float]
) -> None:
    average = min(ranks) + more
    found = allocate_ranks({"stack": np.tile(sigma, (layers, 1))}, ranks, average)["stack"]
    found = (found,) * layers if isinstance(found, int) else found
    assert sum(found) <= layers * average
    places = [sorted(ranks).index(r) for r in found]
    assert max(places) - min(places) <= 1
    assert places == sorted(places, reverse=True)  # of equal ones the first


def test_flat_spectra_get_more_than_steep_ones() -> None:
    steep, flat = 0.5 ** np.arange(16), np.ones(16)
    assert allocate_ranks({"steep": steep, "flat": flat}, (2, 4, 8), 5) == {"steep": 2, "flat": 8}


@pytest.mark.slow
def test_ranks_of_a_model_are_what_attach_takes() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), axis_size=3)
            self.stack = make(rngs.split(3))
            self.one = nnx.Linear(8, 6, rngs=rngs)
            self.one_more = nnx.Linear(8, 6, rngs=rngs)

    model = Model(nnx.Rngs(0))
    kernel = model.stack.kernel[...]
    u, _, vt = np.linalg.svd(np.asarray(kernel), full_matrices=False)
    steep = (u * 0.3 ** np.arange(8)) @ vt
    model.stack.kernel[...] = kernel.at[1].set(steep[1])
    spectra = weight_spectra(model)
    assert {k: v.shape for k, v in spectra.items()} == {
        "^stack$": (3, 8),
        "^one$": (6,),
        "^one_more$": (6,),
    }
    np.testing.assert_allclose(spectra["^stack$"][1], 0.3 ** np.arange(8), atol=1e-5)
    pattern = allocate_ranks(spectra, (1, 2, 4), average=2.5)
    assert pattern["^stack$"][1] == 1
    largest = max(pattern["^stack$"])
    assert largest > 1
    x = jnp.ones((2, 8))
    before = model.one(x)
    lro.adapters.attach(model, lro.adapters.LaMDA(), rngs=0, rank_pattern=pattern)
    np.testing.assert_allclose(model.one(x), before, atol=1e-5)
    total = sum(sum(r) if isinstance(r, tuple) else r for r in pattern.values())
    assert total <= 2.5 * 5
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model, lro.adapters.trainable)))
    assert shapes["stack"]["adapters"]["default"]["arrays"]["S"] == (3, largest, largest)
    assert shapes["one"]["adapters"]["default"]["arrays"]["S"] == (pattern["^one$"],) * 2


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks="):
        allocate_ranks({"a": [1.0]}, (), 2)
    with pytest.raises(ValueError, match="at least one layer"):
        allocate_ranks({}, (1,), 2)
    with pytest.raises(ValueError, match="average=1"):
        allocate_ranks({"a": [1.0]}, (2, 4), 1)
