"""The figure of the page on low-bit states: what numbers codes stand for, and how well."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_optax.quantization import CodeMap, code_map

MAPS = {
    "dynamic, 8 bits, first moment": code_map("dynamic", 8),
    "dynamic, 8 bits, second moment": code_map("dynamic", 8, signed=False),
    "linear, 8 bits": code_map("linear", 8),
    "dynamic, 4 bits, first moment": code_map("dynamic", 4),
    "dynamic, 4 bits, second moment": code_map("dynamic", 4, signed=False),
}
DRAWN = ("dynamic, 8 bits, first moment", "linear, 8 bits", "dynamic, 4 bits, second moment")


def low_bit(figure: Any) -> None:
    """Numbers of the maps, and relative errors."""
    numbers, errors = figure.subplots(1, 2)
    for row, (name, code) in enumerate(MAPS.items()):
        levels = np.asarray(code.decode(jnp.arange(code.least_positive, code.largest + 1)))
        numbers.plot(levels, np.full(levels.shape, -row), "|", color="0.3", markersize=9)
        numbers.annotate(name, (1.1e-8, -row + 0.28), fontsize=7)
    numbers.set_xscale("log")
    numbers.set_xlim(1e-8, 2)
    numbers.set_ylim(-len(MAPS) + 0.4, 0.9)
    numbers.set_yticks([])
    numbers.set_xlabel("number, over the largest of its block")
    for name in DRAWN:
        sizes, worst = worst_errors(MAPS[name])
        four = {"color": "0.3", "linestyle": ":"} if "4 bits" in name else {}
        errors.plot(sizes, worst, label=name, **four)
    errors.set_xscale("log")
    errors.set_ylim(0, 1.05)
    errors.set_xlabel("size, over the largest of its block")
    errors.set_ylabel("largest relative error")
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    errors.legend(fontsize=7, frameon=False, ncols=2, **above)
    for axes in (numbers, errors):
        axes.spines[["top", "right"]].set_visible(False)


def worst_errors(code: CodeMap, steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """The largest relative error of what is stored as something, in small ranges of sizes."""
    edges = np.geomspace(1e-8, 1, 8 * steps + 1)
    x = jnp.asarray(np.geomspace(edges[:-1], edges[1:], 64, axis=1).ravel(), jnp.float32)
    error = np.abs(np.asarray(code.decode(code.encode(x))) / np.asarray(x) - 1)
    return np.sqrt(edges[:-1] * edges[1:]), np.minimum(error, 1).reshape(-1, 64).max(axis=1)
