"""Every transformation, through every check. To add one, add a row."""

from collections.abc import Callable
from inspect import signature
from typing import Literal

from harness import Check, Convergence, Row, checks_for, name_of
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.quantization import Bits
from lowrank_optax.states.rounding import Rounding
from lowrank_optax.training.weight_decay import Coupling

# Arguments that are no numbers, or fix shapes or the program: never traced.
STATIC = {
    "axis",
    "error_feedback",
    "basis_bits",
    "bits",
    "granularity",
    "inner",
    "min_rank",
    "monotone",
    "mu_dtype",
    "on_refresh",
    "order",
    "rank",
    "rank_step",
    "refresh_every",
    "residual_form",
    "side",
    "state_bits",
    "state_dtype",
    "subspace",
    "subspace_optimizer",
    "transform",
    "weight_dimension_numbers",
}


def static_args_of(factory: Callable[..., object]) -> tuple[str, ...]:
    """What `optax.inject_hyperparams` must not trace."""
    return tuple(STATIC & set(signature(factory).parameters))


def limited_sgd(
    learning_rate: float, gamma: float, weight_dimension_numbers: DimensionNumbersRule = None
) -> optax.GradientTransformation:
    """Gradient descent whose norm may grow by a factor of gamma."""
    limited = lro.limit_norm_growth(gamma, weight_dimension_numbers)
    return optax.chain(limited, optax.scale_by_learning_rate(learning_rate))


def low_bit_adamw(
    learning_rate: optax.ScalarOrSchedule, bits: Bits, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW with all of its moments in few bits, the smallest too."""
    return lro.low_bit(
        optax.adamw(learning_rate, weight_decay=weight_decay), bits, block_size=4, min_size=1
    )


def low_bit_galore(
    learning_rate: optax.ScalarOrSchedule,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformation:
    """GaLore with moments in 8 bits that turn with the basis, and that in bfloat16."""
    galore = lro.galore(
        learning_rate,
        rank=2,
        refresh_every=3,
        basis_bits=16,
        on_refresh="rotate",
        weight_dimension_numbers=weight_dimension_numbers,
    )
    return lro.low_bit(galore, block_size=4, min_size=1)


def rounded_adamw(
    learning_rate: optax.ScalarOrSchedule, rounding: Rounding
) -> optax.GradientTransformation:
    """AdamW in float32 for parameters of any dtype."""
    return optax.chain(lro.in_float32(optax.adamw(learning_rate)), lro.round_updates(rounding))


def extrapolated_sgd(
    learning_rate: optax.ScalarOrSchedule, inner_learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Nesterov's momentum, with gradients taken ahead along the last one."""
    return lro.extrapolate(optax.sgd(learning_rate, 0.9, nesterov=True), inner_learning_rate)


def extrapolated_adamw(
    learning_rate: optax.ScalarOrSchedule,
    inner_learning_rate: optax.ScalarOrSchedule,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformation:
    """AdamW in float32, looking ahead by steps of its own size."""
    adamw = lro.in_float32(optax.adamw(learning_rate, weight_decay=1e-3))
    return lro.extrapolate(
        adamw,
        inner_learning_rate,
        direction="normalized",
        weight_dimension_numbers=weight_dimension_numbers,
    )


def monitored_adamw(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float, every: int = 1
) -> optax.GradientTransformation:
    """AdamW and, behind it, the monitor of what its weight decay does."""
    monitor = lro.training.monitor_weight_decay(
        every=every, learning_rate=learning_rate, weight_decay=weight_decay
    )
    return optax.chain(optax.adamw(learning_rate, weight_decay=weight_decay), monitor)


def separately_decayed_adam(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    coupling: Coupling = "adamw",
    anchor: float | Literal["initial"] = 0.0,
) -> optax.GradientTransformation:
    """Adam, and weight decay behind it."""
    decay = lro.training.add_weight_decay(
        weight_decay,
        coupling,
        learning_rate=learning_rate,
        peak_learning_rate=1e-2,
        anchor=anchor,
        mask=lro.training.decay_mask(),
    )
    return optax.chain(optax.adam(learning_rate), decay)


def one_cycle_sgd(learning_rate: float, total_steps: int = 3000) -> optax.GradientTransformation:
    """Gradient descent whose momentum falls while its learning rate rises."""
    return lro.training.one_cycle(optax.sgd, total_steps, learning_rate)


def one_cycle_adamw(
    learning_rate: float, weight_decay: float = 0.0, total_steps: int = 3000
) -> optax.GradientTransformation:
    """AdamW whose first decay falls while its learning rate rises."""
    return lro.training.one_cycle(
        optax.adamw, total_steps, learning_rate, weight_decay=weight_decay
    )


def where_of(
    weight_dimension_numbers: DimensionNumbersRule,
) -> Callable[[str, tuple[int, ...]], bool] | None:
    """What Powerpropagation is to select: all matrices, where the harness says which are some."""
    return None if weight_dimension_numbers is None else lambda path, shape: len(shape) > 1


def powerprop_momentum(
    learning_rate: optax.ScalarOrSchedule,
    alpha: float,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformation:
    """Gradient descent with momentum on what Powerpropagation trains."""
    where = where_of(weight_dimension_numbers)
    return lro.layers.powerprop_updates(optax.sgd(learning_rate, momentum=0.9), alpha, where=where)


def powerprop_adam(
    learning_rate: optax.ScalarOrSchedule,
    alpha: float,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformation:
    """Adam in weight space, the update of Powerpropagation around it."""
    where = where_of(weight_dimension_numbers)
    return lro.layers.powerprop_updates(optax.adam(learning_rate), alpha, where=where)


def half_pruned_momentum(
    learning_rate: optax.ScalarOrSchedule, weight_dimension_numbers: DimensionNumbersRule = None
) -> optax.GradientTransformation:
    """Gradient descent with momentum that leaves the smaller half of each matrix as it is."""
    specs = weight_dimension_numbers
    masks = lambda params: lro.layers.magnitude_masks(params, 0.5, weight_dimension_numbers=specs)
    return lro.layers.mask_updates(optax.sgd(learning_rate, momentum=0.9), masks)


def frozen_matrices_adamw(
    learning_rate: optax.ScalarOrSchedule, total_steps: int, final_steps: int, warmup_steps: int = 1
) -> optax.GradientTransformation:
    """AdamW whose matrices AFLoRA's rule freezes on the way."""
    return lro.adapters.aflora_freezing(
        optax.adamw(learning_rate, weight_decay=1e-3),
        total_steps,
        warmup_steps,
        final_steps,
        window=2,
        names=FROZEN_NAMES,
    )


def frozen_rows_sgd(
    learning_rate: optax.ScalarOrSchedule, total_steps: int, eta: float
) -> optax.GradientTransformation:
    """Momentum whose matrices LaMDA's rule freezes row by row."""
    momentum = optax.sgd(learning_rate, momentum=0.9)
    return lro.adapters.lamda_freezing(momentum, total_steps, eta, names=FROZEN_NAMES)


def selected_entries_adamw(
    learning_rate: optax.ScalarOrSchedule, threshold: float, weight_decay: float = 1e-3
) -> optax.GradientTransformation:
    """AdamW of the small entries alone, from which SaRA's rule selects again."""
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay)
    return lro.adapters.sara(adamw, threshold=threshold, reselect_after=2)


# The matrices of the trees that the checks work on.
FROZEN_NAMES = ("kernel", "rows", "columns", "layers")
TYPES_OF_UPDATES = (
    "updates_keep_dtype",
    "mixed_dtypes_in_one_tree",
    "multi_steps",
    "inject_hyperparams_in_bfloat16",
)

CODES = {"float64_is_kept": "codes have float32 scales"}
FLOAT32_SCORES = {"float64_is_kept": "what decides when to freeze is float32"}
FLOAT32_MEASUREMENTS = {"float64_is_kept": "what it measures is float32"}
MOMENTS_OF_OPTAX = {
    "inject_hyperparams_in_bfloat16": "its moments become float32 (optax issue 1414)",
}
# Those of any schedule under optax.inject_hyperparams, and of one that takes no other.
ONE_CYCLE_EXCEPTIONS = {
    "donated_buffers": "a step writes the hyper-parameters and does not read them: jit drops them",
    "learning_rate_schedule": "the cycle is the schedule",
    "float64_is_kept": "its schedules are float32",
}

ROWS = [
    Row(
        # A control: what optax's own optimizer does, no check may refuse.
        name="optax_adamw",
        factory=optax.adamw,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3},
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
        exceptions={
            "inject_hyperparams_in_bfloat16": "its moments become float32 (optax issue 1414)",
        },
    ),
    Row(
        name="galore",
        factory=lro.galore,
        kwargs={"learning_rate": 1e-2, "rank": 2, "refresh_every": 3, "weight_decay": 1e-3},
        static_args=static_args_of(lro.galore),
        convergence=Convergence(learning_rate=2e-2, overrides={"weight_decay": 0.0}),
        basis="basis",
    ),
    Row(
        name="galore_svd",
        factory=lro.galore,
        kwargs={"learning_rate": 1e-2, "subspace": lro.subspaces.svd(2), "refresh_every": 3},
        static_args=static_args_of(lro.galore),
        convergence=Convergence(learning_rate=2e-2),
        basis="basis",
    ),
    Row(
        # With a small eps, Adam would blow up the rounding errors beside a diagonal of R.
        name="galore_both_sides_reset",
        factory=lro.galore,
        kwargs={
            "learning_rate": 1e-2,
            "rank": 2,
            "refresh_every": 3,
            "eps": 1e-1,
            "on_refresh": "reset",
            "side": "both",
        },
        static_args=static_args_of(lro.galore),
        convergence=Convergence(learning_rate=2e-2, overrides={"rank": 4}),
        basis="basis",
    ),
    Row(
        name="galore_lazy",
        factory=lro.galore,
        kwargs={"learning_rate": 1e-2, "rank": 2, "refresh_every": lro.refresh.lazily(2)},
        static_args=static_args_of(lro.galore),
        convergence=Convergence(learning_rate=2e-2),
        basis="basis",
    ),
    Row(
        name="fira",
        factory=lro.fira,
        kwargs={"learning_rate": 1e-2, "rank": 2, "refresh_every": 3, "weight_decay": 1e-3},
        static_args=static_args_of(lro.fira),
        convergence=Convergence(learning_rate=2e-2, overrides={"weight_decay": 0.0}),
        basis="basis",
    ),
    Row(
        name="adarankgrad",
        factory=lro.adarankgrad,
        kwargs={"learning_rate": 1e-2, "rank": 3, "refresh_every": 3},
        static_args=static_args_of(lro.adarankgrad),
        convergence=Convergence(learning_rate=2e-2),
        basis="basis",
    ),
    Row(
        name="online_subspace_descent",
        factory=lro.online_subspace_descent,
        kwargs={"learning_rate": 1e-2, "rank": 2},
        static_args=static_args_of(lro.online_subspace_descent),
        convergence=Convergence(learning_rate=2e-2),
        basis="basis",
    ),
    Row(
        name="dct_adamw",
        factory=lro.dct_adamw,
        kwargs={"learning_rate": 1e-2, "rank": 2, "weight_decay": 1e-3, "error_feedback": 8},
        static_args=static_args_of(lro.dct_adamw),
        convergence=Convergence(
            optax.cosine_decay_schedule(1e-2, 3000), overrides={"weight_decay": 0.0}
        ),
        basis="basis",
        exceptions=CODES,
    ),
    Row(
        name="apollo",
        factory=lro.apollo,
        kwargs={"learning_rate": 1e-2, "rank": 2, "refresh_every": 3, "weight_decay": 1e-3},
        static_args=static_args_of(lro.apollo),
        convergence=Convergence(learning_rate=2e-2, overrides={"weight_decay": 0.0}),
    ),
    Row(
        name="apollo_mini",
        factory=lro.apollo_mini,
        kwargs={"learning_rate": 1e-2, "refresh_every": 3, "scale": 4.0},
        static_args=static_args_of(lro.apollo_mini),
        convergence=Convergence(learning_rate=1e-2),
    ),
    Row(
        name="ldadam",
        factory=lro.ldadam,
        kwargs={"learning_rate": 1e-2, "rank": 2, "weight_decay": 1e-3},
        static_args=static_args_of(lro.ldadam),
        # At a constant rate it stays up to 0.05 away, wherever rounding takes it.
        convergence=Convergence(
            optax.cosine_decay_schedule(1e-2, 3000), overrides={"weight_decay": 0.0}
        ),
        basis="basis",
    ),
    Row(
        name="low_bit_adamw",
        quantized=True,
        factory=low_bit_adamw,
        kwargs={"learning_rate": 1e-2, "bits": 8, "weight_decay": 1e-3},
        static_args=("bits",),
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
        exceptions=CODES,
    ),
    Row(
        name="four_bit_adamw",
        quantized=True,
        factory=low_bit_adamw,
        kwargs={"learning_rate": 1e-2, "bits": 4},
        static_args=("bits",),
        convergence=Convergence(learning_rate=1e-2),
        exceptions=CODES,
    ),
    Row(
        name="low_bit_galore",
        quantized=True,
        factory=low_bit_galore,
        kwargs={"learning_rate": 1e-2},
        static_args=("weight_dimension_numbers",),
        convergence=Convergence(learning_rate=2e-2),
        exceptions=CODES,
    ),
    Row(
        name="round_updates_stochastically",
        factory=rounded_adamw,
        kwargs={"learning_rate": 1e-2, "rounding": "stochastic"},
        static_args=("rounding",),
        convergence=Convergence(learning_rate=1e-2),
        exceptions=dict.fromkeys(TYPES_OF_UPDATES, "its updates are float32: see round_updates"),
    ),
    Row(
        name="round_updates_with_compensation",
        factory=rounded_adamw,
        kwargs={"learning_rate": 1e-2, "rounding": "compensated"},
        static_args=("rounding",),
        convergence=Convergence(learning_rate=1e-2),
        exceptions=dict.fromkeys(TYPES_OF_UPDATES, "its updates are float32: see round_updates"),
    ),
    Row(
        name="nag_gs",
        factory=lro.nag_gs,
        kwargs={"learning_rate": 0.1, "mu": 0.5, "gamma": 2.0, "weight_decay": 1e-3},
        static_args=static_args_of(lro.nag_gs),
        convergence=Convergence(learning_rate=0.03, overrides={"mu": 1.0, "weight_decay": 0.0}),
    ),
    Row(
        name="nag_gs_constant_gamma",
        factory=lro.nag_gs,
        kwargs={
            "learning_rate": 0.1,
            "mu": 0.5,
            "gamma": 2.0,
            "constant_gamma": True,
            "paper_start": True,
        },
        static_args=static_args_of(lro.nag_gs),
        convergence=Convergence(learning_rate=0.03, overrides={"mu": 1.0, "gamma": 1.0}),
    ),
    Row(
        name="grams",
        factory=lro.grams,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3},
        static_args=static_args_of(lro.grams),
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
    ),
    Row(
        name="cautious_adamw",
        factory=lro.cautious_adamw,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3},
        static_args=static_args_of(lro.cautious_adamw),
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
    ),
    Row(
        name="cautious_adamw_count_plus_one",
        factory=lro.cautious_adamw,
        kwargs={"learning_rate": 1e-2, "scale": "count_plus_one", "bias_correction": False},
        static_args=static_args_of(lro.cautious_adamw),
        convergence=Convergence(learning_rate=1e-2),
    ),
    Row(
        name="adagrad_norm",
        factory=lro.adagrad_norm,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3},
        static_args=static_args_of(lro.adagrad_norm),
        convergence=Convergence(1.0, steps=20000, overrides={"weight_decay": 0.0}),
        exceptions={
            "non_finite_gradient_stays_in_its_leaf": "one norm for all leaves",
            "stacked_leaves_equal_separate_leaves": "one norm for all leaves",
        },
    ),
    Row(
        name="adagrad_norm_by_columns",
        factory=lro.adagrad_norm,
        kwargs={"learning_rate": 1e-2, "axis": (0, -1)},
        static_args=static_args_of(lro.adagrad_norm),
        convergence=Convergence(1.0, steps=20000),
        exceptions={
            "stacked_leaves_equal_separate_leaves": "axes are counted, whatever the layer's",
        },
    ),
    Row(
        name="extrapolated_sgd",
        factory=extrapolated_sgd,
        kwargs={"learning_rate": 1e-2, "inner_learning_rate": 5e-3},
        convergence=Convergence(
            learning_rate=5e-4, steps=8000, overrides={"inner_learning_rate": 1e-4}
        ),
    ),
    Row(
        name="extrapolated_adamw",
        factory=extrapolated_adamw,
        static_args=("weight_dimension_numbers",),
        kwargs={"learning_rate": 1e-2, "inner_learning_rate": 1e-2},
        convergence=Convergence(learning_rate=1e-2, overrides={"inner_learning_rate": 1e-3}),
    ),
    Row(
        name="monitor_weight_decay",
        factory=monitored_adamw,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3},
        static_args=("every",),
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
        exceptions=MOMENTS_OF_OPTAX | FLOAT32_MEASUREMENTS,
    ),
    Row(
        name="monitor_weight_decay_every_third_step",
        factory=monitored_adamw,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3, "every": 3},
        static_args=("every",),
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
        exceptions=MOMENTS_OF_OPTAX | FLOAT32_MEASUREMENTS,
    ),
    Row(
        name="add_weight_decay",
        factory=separately_decayed_adam,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3},
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
        exceptions=MOMENTS_OF_OPTAX,
    ),
    Row(
        name="add_weight_decay_squared_towards_the_start",
        factory=separately_decayed_adam,
        kwargs={
            "learning_rate": 1e-2,
            "weight_decay": 1e-3,
            "coupling": "squared",
            "anchor": "initial",
        },
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
        exceptions=MOMENTS_OF_OPTAX,
    ),
    Row(
        name="limit_norm_growth",
        factory=limited_sgd,
        kwargs={"gamma": 1.01, "learning_rate": 1e-2},
        static_args=("weight_dimension_numbers",),
        convergence=Convergence(learning_rate=1e-3, steps=20000),
        exceptions={
            "inject_hyperparams_in_bfloat16": "optax.scale_by_learning_rate promotes to float32",
        },
    ),
    Row(
        name="one_cycle_sgd",
        factory=one_cycle_sgd,
        kwargs={"learning_rate": 1e-2},
        convergence=Convergence(learning_rate=1e-3),
        exceptions=ONE_CYCLE_EXCEPTIONS,
    ),
    Row(
        name="one_cycle_adamw",
        factory=one_cycle_adamw,
        kwargs={"learning_rate": 1e-2, "weight_decay": 1e-3},
        convergence=Convergence(learning_rate=2e-2, overrides={"weight_decay": 0.0}),
        exceptions=ONE_CYCLE_EXCEPTIONS,
    ),
    Row(
        name="powerprop_momentum",
        factory=powerprop_momentum,
        kwargs={"learning_rate": 1e-2, "alpha": 1.5},
        static_args=("weight_dimension_numbers",),
        exceptions={"converges": "weights that are all zero have no gradient, and are refused"},
    ),
    Row(
        name="powerprop_adam",
        factory=powerprop_adam,
        kwargs={"learning_rate": 1e-2, "alpha": 1.5},
        static_args=("weight_dimension_numbers",),
        exceptions={"converges": "weights that are all zero have no gradient, and are refused"},
    ),
    Row(
        name="lora_plus_adamw",
        factory=lro.adapters.lora_plus_adamw,
        kwargs={"learning_rate": 1e-2, "ratio": 2.0, "weight_decay": 1e-3},
        static_args=("state_bits",),
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
    ),
    Row(
        name="mask_updates",
        factory=half_pruned_momentum,
        kwargs={"learning_rate": 1e-2},
        static_args=("weight_dimension_numbers",),
        exceptions={
            "converges": "half of the weights stay as they are",
            "inject_hyperparams_in_bfloat16": "optax.scale_by_learning_rate promotes to float32",
            "non_finite_gradient_stays_in_its_leaf": "nothing is seen of a pruned weight's",
        },
    ),
    Row(
        name="aflora_freezing",
        factory=frozen_matrices_adamw,
        kwargs={"learning_rate": 1e-2, "total_steps": 6, "final_steps": 2},
        convergence=Convergence(1e-2),
        exceptions=MOMENTS_OF_OPTAX | FLOAT32_SCORES,
    ),
    Row(
        name="lamda_freezing",
        factory=frozen_rows_sgd,
        kwargs={"learning_rate": 1e-2, "total_steps": 20, "eta": 0.5},
        convergence=Convergence(1e-3),
        exceptions={
            "inject_hyperparams_in_bfloat16": "optax.scale_by_learning_rate promotes to float32",
        },
    ),
    Row(
        name="sara",
        factory=selected_entries_adamw,
        kwargs={"learning_rate": 1e-2, "threshold": 1.3},
        exceptions=MOMENTS_OF_OPTAX | {"converges": "large entries stay as they are"},
    ),
]


# The rows whose code is run by no other row are put through all checks.
OF_THEIR_OWN = {
    "optax_adamw",
    "galore",
    "dct_adamw",
    "low_bit_adamw",
    "round_updates_stochastically",
    "nag_gs",
    "grams",
    "cautious_adamw",
    "adagrad_norm",
    "extrapolated_sgd",
    "monitor_weight_decay",
    "add_weight_decay",
    "limit_norm_growth",
    "one_cycle_sgd",
    "powerprop_momentum",
    "mask_updates",
    "aflora_freezing",
    "lamda_freezing",
    "sara",
}
# All others are recipes over shared code, or variants of a row: what those can break. That a recipe
# passes its dimension numbers on, stacked leaves show.
OF_RECIPES = {
    "float32_is_kept_where_float64_is_enabled",
    "float64_is_kept",
    "state_types_constant",
    "updates_keep_dtype",
    "stacked_leaves_equal_separate_leaves",
    "non_finite_gradient_stays_in_its_leaf",
    "non_finite_gradient_never_enters_a_basis",
    "converges",
}
# Rows above with another argument, or one in another: their types here, and what they compute by
# tests of their own.
VARIANTS = {
    "galore_svd",
    "galore_lazy",
    "apollo_mini",
    "four_bit_adamw",
    "low_bit_galore",
    "round_updates_with_compensation",
    "nag_gs_constant_gamma",
    "cautious_adamw_count_plus_one",
    "monitor_weight_decay_every_third_step",
    "add_weight_decay_squared_towards_the_start",
    "one_cycle_adamw",
    "powerprop_adam",
}
OF_VARIANTS = {
    "float32_is_kept_where_float64_is_enabled",
    "float64_is_kept",
    "state_types_constant",
    "updates_keep_dtype",
    "non_finite_gradient_never_enters_a_basis",
}
# What `wrappers_in_each_other` checks at once, one by one where a failure would be looked for.
WRAPPERS = {
    "masked",
    "partition",
    "inject_hyperparams",
    "multi_steps",
    "chain_and_named_chain",
    "apply_if_finite",
}
WRAPPED_ALONE = {"optax_adamw", "galore"}
# Rows of their own are sharded on explicit axes, which say more; `tests/sharded` has both, and
# projected optimizers.
ON_AUTO_AXES = {"galore"}
# The quick part makes these checks of these rows.
QUICK_ROWS = {"optax_adamw", "galore", "grams"}
QUICK_CHECKS = {
    "state_types_constant",
    "masked",
    "wrappers_in_each_other",
    "cond_between_old_and_new_state",
}


def tier(check: str, row: str) -> list[pytest.MarkDecorator]:
    """The marks of a case: `full`, `slow`, or neither."""
    if check in WRAPPERS and row not in WRAPPED_ALONE:
        return [pytest.mark.full]
    if check == "sharded_on_an_auto_mesh" and row not in ON_AUTO_AXES:
        return [pytest.mark.full]
    if row not in OF_THEIR_OWN and check not in (OF_VARIANTS if row in VARIANTS else OF_RECIPES):
        return [pytest.mark.full]
    return [] if row in QUICK_ROWS and check in QUICK_CHECKS else [pytest.mark.slow]


def cases() -> list[object]:
    """All pairs of a check and a row; a row's exceptions must fail."""
    params = []
    for row in ROWS:
        for check in checks_for(row):
            name = name_of(check)
            marks = tier(name, row.name)
            if name in row.exceptions:
                marks.append(pytest.mark.xfail(reason=row.exceptions[name], strict=True))
            params.append(pytest.param(check, row, id=f"{row.name}-{name}", marks=marks))
    return params


@pytest.mark.distinct
@pytest.mark.parametrize(("check", "row"), cases())
def test_transformation(check: Check, row: Row) -> None:
    check(row)


def test_tiers_name_checks_and_rows() -> None:
    checks = {name_of(check) for row in ROWS for check in checks_for(row)}
    assert checks >= OF_RECIPES | OF_VARIANTS | WRAPPERS | QUICK_CHECKS
    names = {row.name for row in ROWS}
    assert names >= OF_THEIR_OWN | VARIANTS | WRAPPED_ALONE | ON_AUTO_AXES | QUICK_ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_exceptions_name_a_check(row: Row) -> None:
    assert set(row.exceptions) <= {name_of(check) for check in checks_for(row)}
