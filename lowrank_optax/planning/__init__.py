"""Memory of a training step, known before it runs."""

from lowrank_optax.planning.counting import (
    SavedResidualsComparison,
    SavedResidualsReport,
    SavedResidualsRow,
    compare_saved_residuals,
    saved_residuals,
)

__all__ = [
    "SavedResidualsComparison",
    "SavedResidualsReport",
    "SavedResidualsRow",
    "compare_saved_residuals",
    "saved_residuals",
]
