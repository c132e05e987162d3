"""How each optimizer of the library is made, for the benchmarks that compare all of them."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import optax

import lowrank_optax as lro

BASELINE = "optax.adamw"
RATE, RANK = 1e-3, 128
DTYPES = ("float32", "bfloat16")
adamw = functools.partial(optax.adamw, RATE)
MATRICES = lro.WeightDimensionNumbers(reduction_axis=-2, output_axis=-1)


def projected(recipe: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    """A recipe of the projected family at the common rank."""
    return lambda: recipe(RATE, rank=RANK, weight_dimension_numbers=MATRICES, **options)


def mini(**options: Any) -> Any:
    """APOLLO-Mini, whose rank is 1."""
    return lro.apollo_mini(RATE, weight_dimension_numbers=MATRICES, **options)


def muon() -> optax.GradientTransformation:
    """Muon of optax on the stacks."""
    dimensions = optax.contrib.MuonDimensionNumbers(-2, -1)
    rule = lambda params: jax.tree.map(lambda _: dimensions, params)
    return optax.contrib.muon(RATE, muon_weight_dimension_numbers=rule)


def rounded(method: str) -> optax.GradientTransformation:
    """AdamW in float32 on weights that are rounded."""
    return optax.chain(lro.in_float32(adamw()), lro.round_updates(method))


def monitored() -> optax.GradientTransformation:
    """AdamW whose weight decay is recorded."""
    decay = 0.1
    monitor = lro.training.monitor_weight_decay(learning_rate=RATE, weight_decay=decay)
    return optax.chain(optax.adamw(RATE, weight_decay=decay), monitor)


class Recipe(NamedTuple):
    """How an optimizer is made, and on which weights it is measured."""

    make: Callable[[], Any]
    dtypes: tuple[str, ...] = DTYPES
    int8_weights: bool = False


bf16 = functools.partial(Recipe, dtypes=("bfloat16",))
int8 = functools.partial(Recipe, int8_weights=True)

RECIPES = {
    BASELINE: Recipe(adamw),
    "lro.low_bit(optax.adamw, bits=8)": Recipe(lambda: lro.low_bit(adamw())),
    "lro.low_bit(optax.adamw, bits=4)": Recipe(lambda: lro.low_bit(adamw(), bits=4)),
    "lro.fused_adamw(bits=8)": Recipe(lambda: lro.fused_adamw(RATE)),
    "lro.fused_adamw(bits=4)": Recipe(lambda: lro.fused_adamw(RATE, bits=4)),
    "lro.galore": Recipe(projected(lro.galore)),
    "lro.galore(state_bits=8)": Recipe(projected(lro.galore, state_bits=8)),
    "lro.galore(state_bits=8, basis_bits=16)": Recipe(
        projected(lro.galore, state_bits=8, basis_bits=16)
    ),
    "lro.galore(state_bits=4, basis_bits=4)": Recipe(
        projected(lro.galore, state_bits=4, basis_bits=4)
    ),
    "lro.fira": Recipe(projected(lro.fira)),
    "lro.fira(state_bits=8)": Recipe(projected(lro.fira, state_bits=8)),
    "lro.adarankgrad": Recipe(projected(lro.adarankgrad)),
    "lro.online_subspace_descent": Recipe(projected(lro.online_subspace_descent)),
    "lro.dct_adamw": Recipe(projected(lro.dct_adamw)),
    "lro.apollo": Recipe(projected(lro.apollo)),
    "lro.apollo(state_bits=8)": Recipe(projected(lro.apollo, state_bits=8)),
    "lro.apollo_mini": Recipe(mini),
    "lro.ldadam": Recipe(projected(lro.ldadam)),
    "lro.nag_gs": Recipe(lambda: lro.nag_gs(RATE)),
    "lro.nag_gs(state_bits=8)": Recipe(lambda: lro.nag_gs(RATE, state_bits=8)),
    "lro.grams": Recipe(lambda: lro.grams(RATE)),
    "lro.grams(state_bits=8)": Recipe(lambda: lro.grams(RATE, state_bits=8)),
    "lro.cautious_adamw": Recipe(lambda: lro.cautious_adamw(RATE)),
    "lro.cautious_adamw(state_bits=8)": Recipe(lambda: lro.cautious_adamw(RATE, state_bits=8)),
    "lro.with_gradient_direction(optax.adamw)": Recipe(
        lambda: lro.with_gradient_direction(adamw())
    ),
    "lro.adagrad_norm": Recipe(lambda: lro.adagrad_norm(RATE)),
    "lro.extrapolate(optax.adamw)": Recipe(lambda: lro.extrapolate(adamw(), RATE)),
    "lro.training.one_cycle(optax.adamw)": Recipe(
        lambda: lro.training.one_cycle(optax.adamw, 10_000, RATE)
    ),
    "optax.adamw, lro.training.monitor_weight_decay": Recipe(monitored),
    "lro.layers.powerprop_updates(optax.adamw)": Recipe(
        lambda: lro.layers.powerprop_updates(adamw(), 2.0, where=".*")
    ),
    "lro.in_slices(optax.contrib.muon)": Recipe(lambda: lro.in_slices(muon())),
    'lro.in_float32(optax.adamw), lro.round_updates("stochastic")': bf16(
        lambda: rounded("stochastic")
    ),
    'lro.in_float32(optax.adamw), lro.round_updates("compensated")': bf16(
        lambda: rounded("compensated")
    ),
    "lro.update_int8_weights(lro.low_bit(optax.adamw))": int8(
        lambda: lro.update_int8_weights(lro.low_bit(adamw()))
    ),
    "lro.update_int8_weights(lro.galore(state_bits=8, basis_bits=4))": int8(
        lambda: lro.update_int8_weights(projected(lro.galore, state_bits=8, basis_bits=4)())
    ),
}
