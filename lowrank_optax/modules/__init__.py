"""Models changed in place: layers wrapped, described, selected and reported."""

from lowrank_optax.modules.selection_table import SelectionRow, SelectionTable, selection_table

__all__ = ["SelectionRow", "SelectionTable", "selection_table"]
