"""Models changed in place: wrapped layers, what a layer is, which are meant, and reports."""

from lowrank_optax.modules.selection_table import SelectionRow, SelectionTable, selection_table

__all__ = ["SelectionRow", "SelectionTable", "selection_table"]
