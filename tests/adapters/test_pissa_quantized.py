"""QPiSSA: the specification's numbers, and what a quantized base forbids."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from lowrank_optax.quantization import nf4_dequantize, nf4_quantize, nf4_round
from tests.quantization.tables import table

PiSSA = lro.adapters.PiSSA
KEY = jax.random.key(0)
RANK = 16


@functools.cache
def weights() -> np.ndarray:
    """The specification's ``[1, 256, 384]``: singular values ``j ** -0.5``."""
    draw = np.random.default_rng(0).standard_normal
    u, v = (np.linalg.qr(draw((n, 256)))[0] for n in (256, 384))
    return ((u * np.arange(1, 257) ** -0.5) @ v.T)[None]


def rounded(w: np.ndarray) -> np.ndarray:
    """NF4 of PyTorch's rows in blocks of 64, float64."""
    blocks = w.T.reshape(-1, 64)
    scales = np.abs(blocks).max(1, keepdims=True)
    levels = table("nf4", 4, True)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, blocks / scales)
    return (levels[codes] * scales).reshape(w.T.shape).T


def nuclear(w: np.ndarray) -> float:
    return float(np.linalg.svd(w, compute_uv=False).sum())


def principal(w: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


@functools.cache
def reference(rounds: int) -> float:
    """The reduction ratio of QPiSSA in float64."""
    w = target = weights()[0]
    for _ in range(rounds):
        low_rank = principal(target)
        base = rounded(w - low_rank)
        target = w - base
    return 100 * (1 - nuclear(w - base - low_rank) / nuclear(w - rounded(w)))


@functools.cache
def loftq(rounds: int) -> float:
    """That of LoftQ, which quantizes first."""
    w, low_rank = weights()[0], 0.0
    for _ in range(rounds):
        base = rounded(w - low_rank)
        low_rank = principal(w - base)
    return 100 * (1 - nuclear(w - base - low_rank) / nuclear(w - rounded(w)))


@functools.cache
def start(rounds: int, **options: Any) -> tuple[Any, Any, jax.Array]:
    """The method, its parameters, and the weight that the layer stands for at the start."""
    method = PiSSA(rank=RANK, nf4_rounds=rounds, **options)
    params = method.init(KEY, jnp.asarray(weights(), jnp.float32))
    return method, params, params.base + method.deltas(params, params.base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounds", "ratio"), [(1, 32.4), pytest.param(2, 37.2, marks=pytest.mark.full), (5, 42.7)]
)
def test_reduction_ratios_are_those_of_the_specification(rounds: int, ratio: float) -> None:
    """Over random singular vectors they vary by half a per cent."""
    found = lro.adapters.reduction_ratio(jnp.asarray(weights(), jnp.float32), start(rounds)[2])
    assert found.shape == (1,)
    assert abs(float(found[0]) - reference(rounds)) < 0.1
    assert abs(float(found[0]) - ratio) < 0.7


@pytest.mark.parametrize(
    ("rounds", "ratio"), [(1, 12.1), pytest.param(2, 17.2, marks=pytest.mark.full), (5, 22.0)]
)
def test_loftq_reduces_the_error_less(rounds: int, ratio: float) -> None:
    assert abs(loftq(rounds) - ratio) < 0.7
    assert loftq(rounds) < float(
        lro.adapters.reduction_ratio(jnp.asarray(weights(), jnp.float32), start(rounds)[2])[0]
    )


def test_the_ratio_is_zero_for_rounded_weights_and_a_hundred_for_the_weights() -> None:
    w = jnp.asarray(weights(), jnp.float32)
    ratio = lro.adapters.reduction_ratio
    assert abs(float(ratio(w, nf4_round(w))[0])) < 1e-3
    assert float(ratio(w, w)[0]) == 100
    with pytest.raises(ValueError, match="approximation of shape"):
        ratio(w, w[0])


@pytest.mark.parametrize("options", [{}, {"alpha": 4.0}], ids=str)
def test_one_round_is_the_quantized_residual_of_pissa(options: dict) -> None:
    w = jnp.asarray(weights(), jnp.float32)
    _, params, _ = start(1, **options)
    plain = PiSSA(rank=RANK, **options).init(KEY, w)
    np.testing.assert_allclose(params.trainable["A"], plain.trainable["A"], atol=1e-6)
    # The compiler may add in another order, so that here and there a code is the neighbour's.
    same = np.isclose(params.base, nf4_round(plain.base), atol=1e-6)
    assert same.mean() > 0.999


def test_the_scale_changes_nothing_of_what_the_layer_stands_for() -> None:
    one, other = (np.asarray(start(2, **options)[2]) for options in ({}, {"alpha": 4.0}))
    # Where a weight is between two codes, rounding decides, and a code is its neighbour.
    distance = np.abs(one - other)
    assert (distance < 2e-3).mean() > 0.999
    assert distance.max() < 0.31 * np.abs(one).max()  # the widest step between codes of NF4


@pytest.mark.slow
def test_a_randomized_decomposition_serves_as_well() -> None:
    w = jnp.asarray(weights(), jnp.float32)
    found = lro.adapters.reduction_ratio(w, start(5, power_iterations=4)[2])
    assert abs(float(found[0]) - reference(5)) < 1


def test_the_base_is_stored_in_its_codes_without_loss() -> None:
    base = start(5)[1].base
    stored = nf4_quantize(base)
    assert stored.codes.nbytes + stored.scales.nbytes == 4.5 / 8 * base.size
    np.testing.assert_array_equal(nf4_dequantize(stored, base.shape), base)


def test_what_needs_the_original_weight_is_refused() -> None:
    method, params, _ = start(1)
    p, base = method.layer_arrays(params, 0), params.base[0]
    x = Rows(jnp.ones((2, 256)))
    for use, reason in (
        (lambda: method.to_lora(p), "no change of low rank"),
        (lambda: method.original(p, base), "cannot give the weight back"),
        (lambda: method.removed(p, x), "cannot be switched off"),
    ):
        with pytest.raises(TypeError, match=rf"nf4_rounds=1\) .*{reason}.*quantized"):
            use()
    merged = method.merged(p, base).weight
    np.testing.assert_allclose(merged, start(1)[2][0], atol=1e-6)
