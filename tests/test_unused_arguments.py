"""Arguments that another one makes meaningless are refused, and named, wherever there are any."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

_svd, _adam = lro.subspaces.svd(8), optax.scale_by_adam()
_loss = lambda params: jnp.sum(params)
_recipes: dict[str, Callable[..., Any]] = {
    name: getattr(lro, name)
    for name in ("galore", "fira", "adarankgrad", "apollo", "ldadam", "dct_adamw")
}
_recipes |= {"online_subspace_descent": lro.online_subspace_descent}
_full: dict[str, Callable[..., Any]] = {"grams": lro.grams, "cautious_adamw": lro.cautious_adamw}
_of_decay = {"weight_decay_mask": {"kernel": True}, "decay_placement": "after_step"}
_training = lro.training

# What is refused, by the name of the argument and that of the one that makes it so.
REFUSED: dict[str, Callable[[], Any]] = {
    **{
        f"rank, subspace: {name}": lambda make=make: make(0.1, rank=4, subspace=_svd)
        for name, make in _recipes.items()
        if name not in ("dct_adamw", "online_subspace_descent")
    },
    **{
        f"b2, inner: {name}": lambda make=make: make(0.1, b2=0.8, inner=_adam)
        for name, make in (_recipes | {"apollo_mini": lro.apollo_mini}).items()
    },
    "b1, inner: ldadam": lambda: lro.ldadam(0.1, b1=0.8, inner=_adam),
    "eps_placement, inner": lambda: lro.fira(
        0.1, eps_placement="before_bias_correction", inner=_adam
    ),
    "rank, subspace: default of galore": lambda: lro.galore(0.1, rank=128, subspace=_svd),
    **{
        f"{name}, weight_decay=0: {recipe}": lambda make=make, name=name, value=value: make(
            0.1, weight_decay=0.0, **{name: value}
        )
        for recipe, make in (_recipes | _full).items()
        for name, value in _of_decay.items()
    },
    "weight_decay_mask, weight_decay=0: nag_gs": lambda: lro.nag_gs(
        0.1, weight_decay_mask=_of_decay["weight_decay_mask"]
    ),
    "weight_decay_mask, weight_decay=0: adagrad_norm": lambda: lro.adagrad_norm(
        0.1, weight_decay_mask=_of_decay["weight_decay_mask"]
    ),
    "rho, subspace: ldadam": lambda: lro.ldadam(0.1, rho=0.5, subspace=_svd),
    "min_rank, rank": lambda: lro.subspaces.adaptive_rank(_svd, min_rank=9),
    "b1, inner: galore": lambda: lro.galore(0.1, b1=0.8, inner=_adam),
    "eps, inner: galore": lambda: lro.galore(0.1, eps=1e-3, inner=_adam),
    "eps, inner: injected": lambda: optax.inject_hyperparams(
        lro.galore, static_args=("rank", "refresh_every", "seed")
    )(0.1, eps=1e-3, inner=_adam).init({"kernel": jnp.ones((4, 8))}),
    "subspace_learning_rate, subspace_optimizer": lambda: lro.online_subspace_descent(
        0.1, subspace_learning_rate=0.1, subspace_optimizer=optax.sgd(0.1)
    ),
    "momentum, inner": lambda: lro.scale_by_projection(
        optax.identity(), _svd, residual=lro.residuals.error_feedback(momentum=True)
    ).init({"kernel": jnp.ones((4, 8))}),
    "eps_placement, bias_correction": lambda: lro.grams(
        0.1, eps_placement="after_bias_correction", bias_correction=False
    ),
    "scale, mode": lambda: lro.with_gradient_direction(_adam, "grams", "none"),
    "weight_dimension_numbers, mode": lambda: lro.with_gradient_direction(
        _adam, weight_dimension_numbers=lro.WeightDimensionNumbers(-2, -1)
    ),
    "weight_dimension_numbers, scale": lambda: lro.cautious_adamw(
        0.1, scale="none", weight_dimension_numbers=lro.WeightDimensionNumbers(-2, -1)
    ),
    "weight_dimension_numbers, direction": lambda: lro.extrapolate(
        optax.sgd(0.1), 0.1, weight_dimension_numbers=lro.WeightDimensionNumbers(-2, -1)
    ),
    "noise, variant": lambda: lro.extrapolated_value_and_grad(_loss, "same", 0.1, noise="uniform"),
    "filter_normalized, variant": lambda: lro.extrapolated_value_and_grad(
        _loss, "same", 0.1, filter_normalized=True
    ),
    "direction, variant": lambda: lro.extrapolated_value_and_grad(
        _loss, "noise", 0.1, direction="normalized"
    ),
    "max_norm, variant": lambda: lro.extrapolated_value_and_grad(_loss, "none", 0.1, max_norm=1.0),
    "max_momentum, momentum_name": lambda: _training.one_cycle(
        optax.adam, 10, 0.1, max_momentum=0.9, momentum_name=None
    ),
    "min_momentum, optimizer_factory": lambda: _training.one_cycle(
        optax.adagrad, 10, 0.1, min_momentum=0.9
    ),
    "theta, test": lambda: _training.AdaptiveBatchSize(initial=1, maximum=2, theta=0.5),
    "nu, test": lambda: _training.AdaptiveBatchSize(
        initial=1, maximum=2, test="inner_product", nu=0.5
    ),
    "eta, test": lambda: _training.AdaptiveBatchSize(
        initial=1, maximum=2, test="augmented", eta=0.5
    ),
    "weight_decay_mask, weight_decay": lambda: _training.monitor_weight_decay(
        weight_decay_mask={"kernel": True}
    ),
    "key, samples": lambda: _training.jacobian_norm_sq(
        jnp.sin, jnp.ones(2), key=jax.random.key(0), samples=None
    ),
}


@pytest.mark.parametrize("names", REFUSED)
def test_an_argument_without_effect_is_refused(names: str) -> None:
    unused, because = names.split(":")[0].split(", ")
    with pytest.raises(ValueError, match=rf"(?s)\b{unused}=.*\b{because}\b"):
        REFUSED[names]()
