"""The figure of the page on LaMDA: losses while its last factor freezes, and ranks by spectra."""

from typing import Any, get_args

from figure_aflora import RATE, STEPS, train
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.adapters.methods.lamda import CoreInit

SIZE, RANKS, AVERAGE = 64, (4, 8, 16, 32), 16


def lamda(figure: Any) -> None:
    """Losses of the starts, and energies of spectra with the ranks they get."""
    losses, energies = figure.subplots(1, 2)
    adam = optax.adam(RATE)
    losses.plot(train(lro.adapters.LoRA(rank=4), adam)[0], color="0.55", label="LoRA")
    tx = lro.adapters.lamda_freezing(adam, STEPS)
    colours = ("#c0712a", "#3c6e9f", "#4b8a4a", "#8a4b86")
    for core_init, colour in zip(get_args(CoreInit), colours, strict=True):
        method = lro.adapters.LaMDA(rank=4, core_init=core_init)
        losses.plot(train(method, tx)[0], color=colour, label=f"LaMDA, {core_init}")
    losses.axvline(0.3 * STEPS, color="0.8", linewidth=0.8)
    losses.set_yscale("log")
    losses.set_xlabel("step")
    losses.set_ylabel("loss")

    spectra = {
        "flat": np.ones(SIZE),
        "slow": np.arange(1, SIZE + 1) ** -0.3,
        "fast": np.arange(1, SIZE + 1) ** -0.8,
        "steep": 0.85 ** np.arange(SIZE),
    }
    ranks = lro.adapters.allocate_ranks(spectra, RANKS, AVERAGE)
    for (name, sigma), colour in zip(spectra.items(), colours, strict=True):
        curve = lro.adapters.energy(sigma)
        energies.plot(np.arange(1, SIZE + 1), curve, color=colour)
        rank = ranks[name]
        energies.plot(rank, curve[rank - 1], "o", color=colour, label=f"{name}: rank {rank}")
    energies.set_xlabel("rank")
    energies.set_ylabel("energy held")
    for axes in (losses, energies):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
