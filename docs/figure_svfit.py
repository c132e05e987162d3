"""The figure of the page on SVFit: how many singular values, and loss against trained numbers."""

from typing import Any

from figure_pissa import best_run, tasks
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro


def svfit(figure: Any) -> None:
    """Energy held by the leading singular values, and the loss against trained numbers."""
    energies, losses = figure.subplots(1, 2)
    for power in (0.5, 1.0):
        s = jnp.arange(1, 257) ** -power
        held = np.cumsum(np.square(s)) / np.sum(np.square(s))
        (line,) = energies.plot(np.arange(1, 257), held, label=f"$S_j = j^{{-{power:g}}}$")
        rank = int(lro.adapters.energy_rank(s, 0.99))
        energies.plot(rank, held[rank - 1], "o", color=line.get_color())
        place = {"xytext": (8, -34), "textcoords": "offset points", "ha": "right"}
        energies.annotate(f"r = {rank}", (rank, held[rank - 1]), **place)
    energies.set_xscale("log")
    energies.set_ylim(0, 1.05)
    energies.set_xlabel("singular values")
    energies.set_ylabel("share of the sum of squares")
    energies.legend(frameon=False, loc="lower right")
    values, turned = tasks()["values"], tasks()["turned"]
    methods = {
        "SVFit": (lro.adapters.SVFit, (1, 4, 16, 64)),
        "LoRA": (lro.adapters.LoRA, (1, 2, 4)),
    }
    for i, (name, (make, ranks)) in enumerate(methods.items()):
        counts = [r if name == "SVFit" else r * (96 + 64) for r in ranks]
        for goal, line, what in ((values, "-", "values"), (turned, ":", "turned")):
            found = [best_run(make(rank=r), goal)[-1] for r in ranks]
            look = {"color": f"C{i}", "linestyle": line, "marker": "o", "label": f"{name}, {what}"}
            losses.plot(counts, found, **look)
    losses.set_xscale("log")
    losses.set_ylim(0, 1.05)
    losses.set_xlabel("trained numbers")
    losses.set_ylabel("loss at the end, over that at the start")
    losses.legend(frameon=False, loc="lower left")
    for axes in (energies, losses):
        axes.spines[["top", "right"]].set_visible(False)
