"""Agreement with the PyTorch packages of the authors, where they are installed.

Their weights are ``[out, in]``; ours are transposed once, and so are the gradients. Singular
vectors are compared before the second refresh only: their signs are arbitrary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import run

torch = pytest.importorskip("torch")
RANK, STEPS, DECAY = 2, 12, 0.1
SHAPES = pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["wide", "tall"])
TOLERANCES = {"float32": 3e-6, "float64": 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)
EPS = 1e-3  # large, so that its place counts
OPTIONS: dict[str, Any] = {
    "eps": EPS,
    "eps_placement": "before_bias_correction",
    "weight_decay": DECAY,
    "decay_placement": "after_step",
}


def _numbers(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def _theirs(
    optimizer: Callable[..., Any], shape: tuple[int, int], dtype: str, **group: Any
) -> np.ndarray:
    """The weight ``[in, out]`` after all steps, by a PyTorch optimizer."""
    weight = torch.nn.Parameter(torch.from_numpy(_numbers(dtype, *shape)))
    steps = optimizer([{"params": [weight], "update_proj_gap": 200, "proj_type": "std", **group}])
    for gradient in _numbers(dtype, STEPS, *shape):
        weight.grad = torch.from_numpy(gradient)
        steps.step()
    return weight.detach().numpy().T


def _assert_agree(
    make: Callable[[], optax.GradientTransformation],
    theirs: np.ndarray,
    shape: tuple[int, int],
    dtype: str,
) -> None:
    start = _numbers(dtype, *shape).T
    with jax.enable_x64(dtype == "float64"):
        gradients = [{"kernel": jnp.asarray(g.T)} for g in _numbers(dtype, STEPS, *shape)]
        ours = np.asarray(run(make(), {"kernel": jnp.asarray(start)}, gradients)[-1][0]["kernel"])
    assert np.abs(theirs - start).max() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCES[dtype])


def _their_basis(optimizer: Any, shape: tuple[int, int]) -> lro.subspaces.Subspace:
    """The rule of the basis that they found; singular vectors are float32 in any dtype."""
    (state,) = optimizer.state.values()
    found = state["projector"].ortho_matrix.numpy()  # [r, in] where out >= in, or else [out, r]
    basis = found.T if shape[0] >= shape[1] else found
    return lro.subspaces.fixed(lambda path, shape: jnp.asarray(basis), orthonormal=False)


@SHAPES
@DTYPES
@pytest.mark.parametrize("recipe", ["galore", "fira"])
def test_galore_and_fira_agree_with_their_packages(
    shape: tuple[int, int], dtype: str, recipe: str
) -> None:
    package = pytest.importorskip({"galore": "galore_torch", "fira": "fira"}[recipe])
    made: list[Any] = []

    def adamw(groups: Any) -> Any:
        kind = package.GaLoreAdamW if recipe == "galore" else package.FiraAdamW
        options = {"weight_decay": DECAY, "no_deprecation_warning": True}
        made.append(kind(groups, lr=0.01, eps=EPS, **options))
        return made[0]

    theirs = _theirs(adamw, shape, dtype, rank=RANK, scale=0.25, alpha=0.25)
    same = dtype == "float32"
    rule = lro.subspaces.svd(RANK) if same else _their_basis(made[0], shape)
    make = lambda: getattr(lro, recipe)(0.01, subspace=rule, scale=0.25, **OPTIONS)
    _assert_agree(make, theirs, shape, dtype)


@SHAPES
@DTYPES
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo_agrees_with_apollo_torch_in_its_own_basis(
    shape: tuple[int, int], dtype: str, granularity: Any
) -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    made: list[Any] = []

    def adamw(groups: Any) -> Any:
        made.append(apollo_torch.APOLLOAdamW(groups, lr=0.01, eps=EPS, weight_decay=DECAY))
        return made[0]

    theirs = _theirs(
        adamw, shape, dtype, rank=RANK, scale=4.0, proj="random", scale_type=granularity
    )
    rule = _their_basis(made[0], shape)
    make = lambda: lro.apollo(0.01, subspace=rule, granularity=granularity, scale=4.0, **OPTIONS)
    _assert_agree(make, theirs, shape, dtype)
