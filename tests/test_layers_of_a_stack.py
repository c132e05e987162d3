"""Layers of a stack are updated as if each were a weight of its own, whatever befalls others."""

from collections.abc import Callable
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

LAYERS, SHAPE, STEPS = 3, (6, 9), 6
_stacked = lro.WeightDimensionNumbers(-2, -1)
_falling = optax.linear_schedule(0.1, 0.0, 10)


def _projected(subspace: Any = None, inner: Any = None, **options: Any) -> Any:
    subspace = lro.subspaces.randomized_svd(2) if subspace is None else subspace
    inner = optax.scale_by_adam() if inner is None else inner
    return lambda specs: lro.scale_by_projection(
        inner, subspace, **{"refresh_every": 2, "weight_dimension_numbers": specs} | options
    )


def _recipe(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return lambda specs: make(0.1, *args, weight_dimension_numbers=specs, **options)


_rules = lro.subspaces
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "galore": _recipe(lro.galore, 2, 2, basis_bits=8),
    "fira": _recipe(lro.fira, 2, 2),
    "adarankgrad": _recipe(lro.adarankgrad, 3, 4, threshold=0.5),
    "apollo": _recipe(lro.apollo, 2, 2),
    "apollo_mini": _recipe(lro.apollo_mini, 1, 2),
    "ldadam": _recipe(lro.ldadam, 2, error_feedback=8),
    "dct_adamw": _recipe(lro.dct_adamw, 2, error_feedback=32),
    "online_subspace_descent": _recipe(lro.online_subspace_descent, 2, _falling),
    "svd": _projected(_rules.svd(2), on_refresh="reset"),
    "warm_start": _projected(_rules.randomized_svd(2, warm_start=True), on_refresh="rotate"),
    "both_sides": _projected(side="both"),
    "online_pca_in_bfloat16": _projected(_rules.quantized(_rules.online_pca(2), 16)),
    "lazily": _projected(refresh_every=lro.refresh.lazily(1, threshold=0.3, patience=2)),
    "when_converged": _projected(
        refresh_every=lro.refresh.when_converged(shortest=1, longest=3, energy=0.9)
    ),
    "accumulated": _projected(accumulate_steps=2),
    "limit_norm_growth": lambda specs: lro.limit_norm_growth(1.01, specs),
    "cautious_adamw": _recipe(lro.cautious_adamw),
    "grams": lambda specs: lro.grams(0.1),
    "nag_gs": lambda specs: lro.nag_gs(0.1),
    "extrapolate": lambda specs: lro.extrapolate(
        optax.adam(0.1), 0.1, direction="normalized", weight_dimension_numbers=specs
    ),
    "mirror_sinkhorn_updates": lambda specs: lro.optimizers.mirror_sinkhorn_updates(),
    "low_bit": lambda specs: lro.low_bit(optax.adam(0.1), block_size=4, min_size=1),
}

OFTEN = ("fira", "online_subspace_descent", "lazily", "limit_norm_growth", "cautious_adamw")


def _gradients() -> np.ndarray:
    """Of which those of the first layer are zero, infinite and NaN by turns."""
    drawn = np.random.default_rng(0).normal(size=(STEPS, LAYERS, *SHAPE)).astype(np.float32)
    drawn[0, 0], drawn[2, 0], drawn[4, 0] = 0, np.inf, np.nan
    return drawn


def _updates(tx: Any) -> Any:
    """All updates as a function of all gradients ``[steps, *shape]``, compiled once a shape."""

    def run(gradients: jax.Array) -> jax.Array:
        params = {"kernel": jnp.ones(gradients.shape[1:])}
        step = lambda state, g: tx.update({"kernel": g}, state, params)[::-1]
        return jax.lax.scan(step, tx.init(params), gradients)[1]["kernel"]

    return jax.jit(run)


@pytest.mark.parametrize(
    "name", [x if x in OFTEN else pytest.param(x, marks=pytest.mark.full) for x in OPTIMIZERS]
)
def test_layers_of_a_stack_do_not_see_each_other(name: str) -> None:
    gradients, updates = _gradients(), _updates(OPTIMIZERS[name](_stacked))
    together = updates(gradients)
    for layer in range(LAYERS):
        assert_close(together[:, layer], updates(gradients[:, layer]), 400)
