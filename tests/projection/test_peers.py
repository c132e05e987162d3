"""Agreement with the PyTorch packages of the authors, where they are installed.

Their weights are ``[out, in]``; ours are transposed once, and so are the gradients. Singular
vectors are compared before the second refresh only: their signs are arbitrary.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import run

torch = pytest.importorskip("torch")
RANK, STEPS, DECAY = 2, 12, 0.1
SHAPES = pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["wide", "tall"])
# A bias correction inside or outside the root makes a difference of eps alone.
OPTIONS: dict[str, Any] = {"rank": RANK, "refresh_every": 200, "eps": 1e-8, "scale": 0.25}


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _theirs(optimizer: Callable[..., Any], shape: tuple[int, int], **group: Any) -> np.ndarray:
    """The weight ``[in, out]`` after all steps, by a PyTorch optimizer."""
    weight = torch.nn.Parameter(torch.from_numpy(_numbers(*shape)))
    steps = optimizer([{"params": [weight], "update_proj_gap": 200, "proj_type": "std", **group}])
    for gradient in _numbers(STEPS, *shape):
        weight.grad = torch.from_numpy(gradient)
        steps.step()
    return weight.detach().numpy().T


def _ours(tx: optax.GradientTransformation, shape: tuple[int, int]) -> np.ndarray:
    gradients = [{"kernel": jnp.asarray(g.T)} for g in _numbers(STEPS, *shape)]
    return np.asarray(
        run(tx, {"kernel": jnp.asarray(_numbers(*shape).T)}, gradients)[-1][0]["kernel"]
    )


def _assert_agree(ours: np.ndarray, theirs: np.ndarray, shape: tuple[int, int]) -> None:
    assert np.abs(theirs - _numbers(*shape).T).max() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def _decay_after(tx: optax.GradientTransformation, learning_rate: float) -> Any:
    """Decay of the weight as it is after the step, as the packages do it."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        new, state = tx.update(updates, state, params)
        shrink = lambda u, p: u - learning_rate * DECAY * (p + u)
        return {name: shrink(new[name], params[name]) for name in new}, state

    return optax.GradientTransformation(tx.init, update)


@SHAPES
def test_galore_agrees_with_galore_torch(shape: tuple[int, int]) -> None:
    galore_torch = pytest.importorskip("galore_torch")
    adamw = lambda groups: galore_torch.GaLoreAdamW(
        groups, lr=0.01, eps=1e-8, weight_decay=DECAY, no_deprecation_warning=True
    )
    tx = lro.galore(0.01, subspace=lro.subspaces.svd(RANK), **OPTIONS)
    theirs = _theirs(adamw, shape, rank=RANK, scale=0.25)
    _assert_agree(_ours(_decay_after(tx, 0.01), shape), theirs, shape)


@SHAPES
def test_fira_agrees_with_fira(shape: tuple[int, int]) -> None:
    fira = pytest.importorskip("fira")
    adamw = lambda groups: fira.FiraAdamW(
        groups, lr=0.01, eps=1e-8, weight_decay=DECAY, no_deprecation_warning=True
    )
    tx = lro.fira(0.01, subspace=lro.subspaces.svd(RANK), **OPTIONS)
    theirs = _theirs(adamw, shape, rank=RANK, alpha=0.25)
    _assert_agree(_ours(_decay_after(tx, 0.01), shape), theirs, shape)


@SHAPES
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo_agrees_with_apollo_torch_in_its_own_basis(
    shape: tuple[int, int], granularity: Any
) -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    made: list[Any] = []

    def adamw(groups: Any) -> Any:
        made.append(apollo_torch.APOLLOAdamW(groups, lr=0.01, eps=1e-8, weight_decay=DECAY))
        return made[0]

    theirs = _theirs(adamw, shape, rank=RANK, scale=4.0, proj="random", scale_type=granularity)
    (state,) = made[0].state.values()
    drawn = state["projector"].ortho_matrix.numpy()  # [r, in] where out >= in, or else [out, r]
    basis = drawn.T if shape[0] >= shape[1] else drawn
    rule = lro.subspaces.fixed(jnp.asarray(basis), orthonormal=False)
    options = {**OPTIONS, "scale": 4.0}
    tx = lro.apollo(0.01, subspace=rule, granularity=granularity, **options)
    _assert_agree(_ours(_decay_after(tx, 0.01), shape), theirs, shape)
