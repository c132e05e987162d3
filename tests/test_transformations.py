"""Every transformation, through every check. To add one, add a row."""

from collections.abc import Callable
from inspect import signature

from harness import Check, Convergence, Row, checks_for, name_of
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.quantization import Bits
from lowrank_optax.states.rounding import Rounding

# Arguments that are no numbers, or fix shapes or the program: never traced.
STATIC = {
    "error_feedback",
    "basis_bits",
    "bits",
    "granularity",
    "inner",
    "min_rank",
    "monotone",
    "on_refresh",
    "order",
    "rank",
    "rank_step",
    "refresh_every",
    "residual_form",
    "side",
    "state_bits",
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


TYPES_OF_UPDATES = (
    "updates_keep_dtype",
    "mixed_dtypes_in_one_tree",
    "multi_steps",
    "inject_hyperparams_in_bfloat16",
)

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
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
        basis="basis",
    ),
    Row(
        name="low_bit_adamw",
        factory=low_bit_adamw,
        kwargs={"learning_rate": 1e-2, "bits": 8, "weight_decay": 1e-3},
        static_args=("bits",),
        convergence=Convergence(learning_rate=1e-2, overrides={"weight_decay": 0.0}),
    ),
    Row(
        name="four_bit_adamw",
        factory=low_bit_adamw,
        kwargs={"learning_rate": 1e-2, "bits": 4},
        static_args=("bits",),
        convergence=Convergence(learning_rate=1e-2),
    ),
    Row(
        name="low_bit_galore",
        factory=low_bit_galore,
        kwargs={"learning_rate": 1e-2},
        static_args=("weight_dimension_numbers",),
        convergence=Convergence(learning_rate=2e-2),
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
        name="limit_norm_growth",
        factory=limited_sgd,
        kwargs={"gamma": 1.01, "learning_rate": 1e-2},
        static_args=("weight_dimension_numbers",),
        convergence=Convergence(learning_rate=1e-3, steps=20000),
        exceptions={
            "inject_hyperparams_in_bfloat16": "optax.scale_by_learning_rate promotes to float32",
        },
    ),
]


# Checks that take a second or more; the quick part makes them of few rows, all others of every row.
LONG = {
    "cond_between_old_and_new_state",
    "inject_hyperparams",
    "inject_hyperparams_in_bfloat16",
    "jit_equals_eager",
    "leaves_of_any_size",
    "masked",
    "multi_steps",
    "nnx_optimizer",
    "sharded_on_an_auto_mesh",
    "vmap_equals_a_loop",
}
QUICK_ROWS = ("optax_adamw", "galore")
# Of a method that has a row already: all checks are slow ones.
VARIANTS = {
    "galore_svd",
    "galore_both_sides_reset",
    "galore_lazy",
    "apollo_mini",
    "four_bit_adamw",
    "round_updates_with_compensation",
}


def cases() -> list[object]:
    """All pairs of a check and a row; a row's exceptions must fail."""
    params = []
    for row in ROWS:
        for check in checks_for(row):
            reason = row.exceptions.get(name_of(check))
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            long = name_of(check) in LONG and row.name not in QUICK_ROWS
            if long or row.name in VARIANTS:
                marks.append(pytest.mark.slow)
            params.append(pytest.param(check, row, id=f"{row.name}-{name_of(check)}", marks=marks))
    return params


@pytest.mark.parametrize(("check", "row"), cases())
def test_transformation(check: Check, row: Row) -> None:
    check(row)


def test_the_long_checks_and_quick_rows_exist() -> None:
    assert {name_of(check) for row in ROWS for check in checks_for(row)} >= LONG
    assert {row.name for row in ROWS} >= {*QUICK_ROWS, *VARIANTS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_exceptions_name_a_check(row: Row) -> None:
    assert set(row.exceptions) <= {name_of(check) for check in checks_for(row)}
