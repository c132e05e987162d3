"""Every subspace with every residual rule and every way to carry moments over, as one table."""

import functools
import itertools
from typing import Any

from family_table import Column, print_columns
import optax
from training_runs import Text, Trainer, Weights

import lowrank_optax as lro

# Steps between two refreshes: those of the papers, shortened like the runs; None is never.
SUBSPACES = {
    "svd": 50,
    "randomized_svd": 50,
    "online_pca": None,
    "dct": 1,
    "random": 50,
    "power_iteration": 1,
}
RESIDUALS = ("drop", "fira", "gradient_scaling", "error_feedback", "sign")
ON_REFRESH = ("keep", "reset", "rotate_moments")
RATE, B2, RANK = 5e-3, 0.95, 32  # one rate for all: the scale of the projected part is one


def run(results: Any, text: Text, steps: int) -> None:
    """Trains with each combination that there is."""
    for on_refresh, subspace, residual in itertools.product(ON_REFRESH, SUBSPACES, RESIDUALS):
        cell = (subspace, residual, on_refresh)
        results.once((f"{steps} steps", *cell), functools.partial(_run, text, *cell, steps))


def _run(text: Text, subspace: str, residual: str, on_refresh: str, steps: int) -> Any:
    def make(schedule: optax.Schedule) -> optax.GradientTransformation:
        projected = lro.scale_by_projection(
            optax.scale_by_adam(b2=B2),
            getattr(lro.subspaces, subspace)(RANK),
            residual=residual,
            on_refresh=on_refresh,
            refresh_every=SUBSPACES[subspace],
            weight_dimension_numbers=text.rule,
        )
        return optax.chain(projected, optax.scale_by_learning_rate(schedule))

    try:
        return Trainer(text, make, Weights()).run(0, RATE, steps)
    except (TypeError, ValueError) as error:
        return {"invalid": str(error).partition("\n")[0]}


def show(results: Any, steps: int, markdown: bool) -> None:
    """Prints held-out losses, a row for each pair of subspace and carrying over."""
    losses = results.content.get(f"{steps} steps", {})
    rows = [(subspace, on_refresh) for subspace in SUBSPACES for on_refresh in ON_REFRESH]

    def column(residual: str) -> Column:
        return Column(
            residual, lambda row: _spell(losses.get(row[0], {}).get(residual, {}).get(row[1]))
        )

    period = lambda every: "never" if every is None else f"every {every}"
    head = [
        Column("subspace", lambda row: row[0]),
        Column("refresh", lambda row: period(SUBSPACES[row[0]])),
        Column("on_refresh", lambda row: row[1]),
    ]
    title = f"held-out loss after {steps} steps at learning rate {RATE:g}, rank {RANK}"
    print_columns(title, rows, head + [column(name) for name in RESIDUALS], markdown)


def _spell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "–"
    if "invalid" in figures:
        return "invalid"
    loss = figures["held_out_loss"]
    return "diverged" if loss is None else f"{loss:.3f}"
