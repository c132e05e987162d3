"""The figure of the page on LoTR: how many parameters, and what sharing subspaces loses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro

WIDTH, LAYERS, INNER = 64, 8, 2  # of the right half: eight LoRAs of rank 2
RANKS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)


def lotr(figure: Any) -> None:
    """Trained parameters by depth; the error of LoRAs put into shared factors, by rank."""
    counts, errors = figure.subplots(1, 2)
    depths = np.arange(1, 97)
    for rank in (1, 8):
        counts.plot(depths, depths * rank * 2 * 768, "--", label=f"LoRA, rank {rank}")
    for rank in (8, 32):
        counts.plot(depths, 2 * 768 * rank + depths * rank**2, label=f"LoTR, rank {rank}")
    counts.set_yscale("log")
    counts.set_xlabel("weights [768, 768] in the group")
    counts.set_ylabel("trained parameters")
    for share, colour in (("none", "#c0712a"), ("half", "#3c6e9f"), ("all", "#4f8a4f")):
        found = [lro.adapters.lotr_from_lora(loras(share), rank) for rank in RANKS]
        size = float(found[-1].error ** 2 + jnp.sum(found[-1].core ** 2)) ** 0.5
        label = f"{share} of the subspace shared"
        errors.plot(RANKS, [x.error / size for x in found], "o-", color=colour, label=label)
        errors.plot(RANKS, [x.bound / size for x in found], ":", color=colour)
    errors.set_ylim(0, 1.05)
    errors.set_xlabel("rank of LoTR")
    errors.set_ylabel("relative error (dotted: its bound)")
    for axes in (counts, errors):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


def loras(share: str) -> list[tuple[jax.Array, jax.Array]]:
    """Factors of the layers, of whose columns and rows none, half or all lie in one plane."""
    draw = np.random.default_rng(0).normal
    common = {"none": 0, "half": INNER // 2, "all": INNER}[share]
    left, right = draw(size=(WIDTH, INNER)), draw(size=(INNER, WIDTH))
    pairs = []
    for _ in range(LAYERS):
        first, second = draw(size=(WIDTH, INNER)), draw(size=(INNER, WIDTH))
        first[:, :common], second[:common] = left[:, :common], right[:common]
        inner = draw(size=(INNER, INNER))
        pairs.append((jnp.asarray(first @ inner, jnp.float32), jnp.asarray(second, jnp.float32)))
    return pairs
