"""Truncated singular value decompositions, exact and randomized."""

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.adapters.spectra import nonzero, singular_values, truncated_svd


def decaying(seed: int = 0) -> np.ndarray:
    """``[256, 384]`` with random singular vectors and the values ``j ** -0.5``, float64."""
    draw = np.random.default_rng(seed).standard_normal
    u, v = (np.linalg.qr(draw((n, 256)))[0] for n in (256, 384))
    return (u * np.arange(1, 257) ** -0.5) @ v.T


def principal(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def assembled(spectrum) -> np.ndarray:
    u, s, v = (np.asarray(x, np.float64) for x in spectrum)
    return (u * s[..., None, :]) @ np.swapaxes(v, -1, -2)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (2, 3, 6, 5)])
def test_the_leading_triplets_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    found = truncated_svd(jnp.asarray(w), 3)
    assert [x.shape[-1] for x in found] == [3, 3, 3]
    values = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    assert_close(found.s, values[..., :3], 100)
    assert_close(singular_values(jnp.asarray(w)), values, 100)
    np.testing.assert_allclose(assembled(found), principal(w, 3), atol=1e-5)
    largest = np.take_along_axis(
        np.asarray(found.u), np.abs(found.u).argmax(-2, keepdims=True), axis=-2
    )
    assert (largest > 0).all()


def test_a_rank_beyond_the_sides_is_all_there_is() -> None:
    w = jax.random.normal(jax.random.key(0), (3, 5))
    for iterations in (None, 2):
        found = truncated_svd(w, 9, power_iterations=iterations, key=jax.random.key(1))
        assert found.s.shape == (3,)
        np.testing.assert_allclose(assembled(found), w, atol=1e-5)


@pytest.mark.parametrize("iterations", [None, 3])
def test_zero_and_equal_singular_values_have_orthonormal_vectors(iterations: int | None) -> None:
    thrice = jnp.zeros((6, 8)).at[:3, :3].set(2 * jnp.eye(3))
    for w, values in ((jnp.zeros((6, 8)), [0] * 5), (thrice, [2, 2, 2, 0, 0])):
        found = truncated_svd(w, 5, power_iterations=iterations, key=jax.random.key(0))
        np.testing.assert_allclose(found.s, values, atol=1e-5)
        assert nonzero(found.s).tolist() == [v > 0 for v in values]
        for vectors in (found.u, found.v):
            np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-5)
        np.testing.assert_allclose(assembled(found), w, atol=1e-5)


def test_rounding_errors_of_rank_deficient_matrices_count_as_zero() -> None:
    draw = np.random.default_rng(0).standard_normal
    w = jnp.asarray(draw((300, 5)) @ draw((5, 200)), jnp.float32)
    assert int(nonzero(singular_values(w)).sum()) == 5


def test_bfloat16_weights_are_decomposed_in_float32() -> None:
    w = jax.random.normal(jax.random.key(0), (9, 6), jnp.bfloat16)
    found, wide = truncated_svd(w, 2), truncated_svd(w.astype(jnp.float32), 2)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    assert_close(found, wide, 100)


@pytest.mark.slow
def test_the_randomized_one_has_the_errors_of_the_specification() -> None:
    w = decaying()
    exact = principal(w, 16)
    for iterations, expected in ((1, 0.26), (4, 0.046), (16, 3e-4)):
        found = truncated_svd(
            jnp.asarray(w, jnp.float32), 16, power_iterations=iterations, key=jax.random.key(0)
        )
        error = np.linalg.norm(assembled(found) - exact) / np.linalg.norm(exact)
        assert expected / 2 < error < 1.6 * expected, (iterations, error)


def test_without_oversampling_the_error_is_larger_as_in_the_reference() -> None:
    w = decaying()
    exact = principal(w, 16)
    for iterations, expected in ((1, 0.37), (4, 0.21), (16, 0.09)):
        found = truncated_svd(
            jnp.asarray(w, jnp.float32),
            16,
            power_iterations=iterations,
            oversample=0,
            key=jax.random.key(0),
        )
        error = np.linalg.norm(assembled(found) - exact) / np.linalg.norm(exact)
        assert expected / 2 < error < 1.6 * expected, (iterations, error)


def test_the_same_key_gives_the_same_vectors_and_layers_have_their_own() -> None:
    w = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (20, 16)), (2, 20, 16))
    once, again = (truncated_svd(w, 2, power_iterations=0, key=jax.random.key(3)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert not np.allclose(once.u[0], once.u[1], atol=1e-3)


def test_a_deeper_stack_needs_no_larger_workspace() -> None:
    def workspace(layers: int) -> int:
        stack = jax.ShapeDtypeStruct((layers, 64, 96), jnp.float16)
        compiled = jax.jit(lambda w: truncated_svd(w, 4)).lower(stack).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert workspace(6) == workspace(2)


def test_bad_arguments_are_refused_by_name() -> None:
    w = jnp.ones((4, 4))
    for options, message in (
        ({"rank": 0}, "rank=0"),
        ({"rank": 1, "power_iterations": -1, "key": jax.random.key(0)}, "power_iterations=-1"),
        ({"rank": 1, "power_iterations": 1}, "key=None"),
        ({"rank": 1, "oversample": -1}, "oversample=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            truncated_svd(w, **options)
    with pytest.raises(ValueError, match="must be matrices"):
        truncated_svd(jnp.ones(4), 1)
