"""Writes ``tables.json``: ``python -m lowrank_optax.activations.fit_tables``, some minutes."""

import json
from pathlib import Path
from typing import Any

from lowrank_optax.activations.density import DensityName
from lowrank_optax.activations.fit_arguments import Coding
from lowrank_optax.activations.fitting import fit
from lowrank_optax.activations.step_function import Codebook
from lowrank_optax.activations.tables import CODINGS, DENSITIES, DOMAIN, FUNCTIONS, MOST_BITS

DIGITS = 12


def row(name: str, bits: int, density: DensityName, coding: Coding) -> Codebook:
    """The codebook, fitted anew."""
    return fit(FUNCTIONS[name], bits, density, DOMAIN, coding)


def rows(name: str) -> dict[str, Any]:
    """All of a function: a list by ``bits - 1`` for each density and coding."""
    every = range(1, MOST_BITS + 1)
    return {
        density: {
            coding: [_as_lists(row(name, bits, density, coding)) for bits in every]
            for coding in CODINGS
        }
        for density in DENSITIES
    }


def _as_lists(book: Codebook) -> list[Any]:
    rounded = lambda x: float(f"{x:.{DIGITS}g}")
    boundaries, levels = (list(map(rounded, side)) for side in (book.boundaries, book.levels))
    return [boundaries, list(book.codes), levels, rounded(book.error)]


def main() -> None:
    """Fits all and writes the file: a line for each function."""
    lines = [
        f'"{name}": {json.dumps(rows(name), separators=(",", ":"))}' for name in sorted(FUNCTIONS)
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (Path(__file__).parent / "tables.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
