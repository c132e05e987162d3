"""Every transformation, through every check. To add one, add a row."""

from harness import Check, Convergence, Row, checks_for, name_of
import optax
import pytest

import lowrank_optax as lro

STRUCTURE = ("rank", "refresh_every", "subspace", "side", "seed", "weight_dimension_numbers")

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
        static_args=STRUCTURE,
        convergence=Convergence(learning_rate=2e-2, overrides={"weight_decay": 0.0}),
        basis="basis",
    ),
    Row(
        name="galore_svd",
        factory=lro.galore,
        kwargs={"learning_rate": 1e-2, "subspace": lro.subspaces.svd(2), "refresh_every": 3},
        static_args=STRUCTURE,
        convergence=Convergence(learning_rate=2e-2),
        basis="basis",
    ),
]


def cases() -> list[object]:
    """All pairs of a check and a row; a row's exceptions must fail."""
    params = []
    for row in ROWS:
        for check in checks_for(row):
            reason = row.exceptions.get(name_of(check))
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            params.append(pytest.param(check, row, id=f"{row.name}-{name_of(check)}", marks=marks))
    return params


@pytest.mark.parametrize(("check", "row"), cases())
def test_transformation(check: Check, row: Row) -> None:
    check(row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_exceptions_name_a_check(row: Row) -> None:
    assert set(row.exceptions) <= {name_of(check) for check in checks_for(row)}
