"""Draws the figures of the pages; here those on projected optimizers, a decoder on real text.

    python docs/figures.py               # all of them into docs/_static: some minutes on two cores
    python docs/figures.py galore fira   # some

The text is the source of Python's standard library, read as bytes; weights and batches are fixed by
seeds. Where losses are compared, each optimizer has the best of the rates in `RATES`, and a loss is
the mean of the last 20 batches before their weights were trained on them.
"""

from pathlib import Path
import sys
import time
from typing import Any

from figure_activation_memory import activation_memory
from figure_adapters import adapters
from figure_adaptive_batch_size import adaptive_batch_size
from figure_aflora import aflora
from figure_codes import low_bit
from figure_comrope import comrope
from figure_decoder_variants import decoder_variants
from figure_extrapolation import extrapolation
from figure_few_bit import few_bit
from figure_fixed_point import fixed_point
from figure_flylora import flylora
from figure_gated import gated_activations
from figure_grams import grams
from figure_lamda import lamda
from figure_lora import lora
from figure_lora_fa import lora_fa
from figure_lotr import lotr
from figure_maestro import maestro
from figure_mirror_sinkhorn import mirror_sinkhorn
from figure_nag_gs import nag_gs
from figure_one_cycle import one_cycle
from figure_pissa import pissa
from figure_powerpropagation import powerpropagation
from figure_random_feature_attention import random_feature_attention
from figure_randomized_linear import randomized_linear
from figure_runs import (
    CONFIG,
    IS_MATRIX,
    PARAMS,
    RANK,
    SPECS,
    STEPS,
    Optimizer,
    beside,
    captured,
    matrices,
    most,
    train,
    using,
)
from figure_svfit import svfit
from figure_weight_decay import weight_decay
from figure_widenet import widenet
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

import lowrank_optax as lro

OUTPUT = Path(__file__).parent / "_static"
PERIOD = 40  # steps from one refresh to the next
RATES = (0.003, 0.01, 0.03)
GREY, COLOURS = "0.55", ("#3c6e9f", "#c0712a", "#4b8a4a", "#8a4b86")


def best_run(optimizer: Optimizer) -> np.ndarray:
    """The losses at the rate of `RATES` that ends lowest."""
    run = train(optimizer)
    losses = {rate: smooth(run(rate)[0]) for rate in RATES}
    rate = min(losses, key=lambda rate: losses[rate][-1])
    print(f"    rate {rate}: {losses[rate][-1]:.3f}")
    return losses[rate]


def smooth(values: np.ndarray, width: int = 20) -> np.ndarray:
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def cosine_bases(indices: Any, gradients: Any) -> list[tuple[jax.Array, jax.Array]]:
    """The bases of `dct` and the gradients: read as a layer would, through the rule and a view."""
    rule = lro.subspaces.dct(RANK)

    def basis(chosen: jax.Array, gradient: jax.Array) -> jax.Array:
        view = lro.View.of(gradient, axis=-2, rank=RANK)
        eye = jnp.broadcast_to(jnp.eye(RANK), (*view.batch, RANK, RANK))
        return rule.lift(chosen, eye, view)

    return [(basis(i, g), g) for i, g in matrices(indices, gradients)]


def watch(gradients: Any, updates: Any, state: Any, new: Any) -> Any:
    """The share captured by the bases of a step, and the most that could be."""
    pairs = matrices(new[0].basis, gradients)
    return captured(pairs), most(pairs)


def galore(figure: Any) -> None:
    (axes,) = figure.subplots(1, 1, squeeze=False)[0]
    periods = {"every 20 steps": 20, "every 80 steps": 80, "once": None}
    for label, every in periods.items():
        run = train(using(lro.galore, RANK, every), watch)
        _, (share, best) = run(0.01)
        if every == 20:
            axes.plot(best, color=GREY, label="the most that 8 directions hold")
        axes.plot(share, label=f"refreshed {label}")
    energy(axes)


def fira(figure: Any) -> None:
    norms, losses = figure.subplots(1, 2)

    def outside(gradients: Any, updates: Any, state: Any, new: Any) -> jax.Array:
        pairs = matrices(new[0].basis, updates)
        return optax.tree.norm([u - p @ (p.mT @ u) for p, u in pairs])

    for label, gamma in {"γ = ∞": float("inf"), "γ = 1.01": 1.01}.items():
        run = train(using(lro.fira, RANK, PERIOD, gamma=gamma), outside)
        norms.plot(run(0.01)[1], label=label)
    norms.set_ylabel("norm of the update outside the subspace")
    norms.set_yscale("log")
    compare(
        losses,
        {
            "AdamW": optax.adamw,
            "GaLore": using(lro.galore, RANK, PERIOD),
            "Fira": using(lro.fira, RANK, PERIOD),
        },
    )
    finish(norms)


def adarankgrad(figure: Any) -> None:
    ranks, shares = figure.subplots(1, 2)

    def look(gradients: Any, updates: Any, state: Any, new: Any) -> Any:
        adaptive = new[0].basis
        pairs = matrices(adaptive.basis, gradients)
        inside = sum(jnp.sum((p.mT @ g) ** 2) for p, g in pairs)
        whole = sum(jnp.sum(g**2) for _, g in pairs)
        return [rank for rank, _ in matrices(adaptive.rank, gradients)], inside / whole

    optimizer = using(lro.adarankgrad, 32, PERIOD, threshold=0.3)
    _, (each, share) = train(optimizer, look)(0.01)
    for kind, colour in zip(("attention", "mlp"), COLOURS, strict=False):
        mine = [rank for rank, name in zip(each, names(), strict=True) if kind in name]
        lines = ranks.step(range(STEPS), np.concatenate(mine, axis=1), color=colour, alpha=0.6)
        lines[0].set_label(kind)
    ranks.set_ylabel("rank of each matrix")
    ranks.set_ylim(0, 33)
    finish(ranks)
    shares.axhline(1 - 0.3**2, color=GREY, label="asked for at a refresh, 1 - ξ²")
    shares.plot(share, color=COLOURS[0], label="AdaRankGrad")
    energy(shares)


def names() -> list[str]:
    """Paths of the matrices, in the order of the leaves."""
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
    return [path for path, is_matrix in zip(paths, IS_MATRIX, strict=True) if is_matrix]


def online_subspace_descent(figure: Any) -> None:
    shares, defects = figure.subplots(1, 2)

    def tracked(gradients: Any, updates: Any, state: Any, new: Any) -> Any:
        # The step projected with the basis it found, or with the one moved by the step before.
        first = state[0].count == 0
        pick = lambda a, b: jnp.where(first, a, b)
        used = jax.tree.map(pick, new[0].basis.basis, state[0].basis.basis)
        eye = jnp.eye(RANK)
        pairs = matrices(used, gradients)
        defect = [jnp.linalg.norm(p.mT @ p - eye, axis=(-2, -1)).mean() for p, _ in pairs]
        return captured(pairs), most(pairs), sum(defect) / len(defect)

    for penalty in (0.1, 0.0):
        optimizer = using(lro.online_subspace_descent, RANK, penalty=penalty)
        _, (share, best, defect) = train(optimizer, tracked)(0.01)
        if penalty:
            shares.plot(best, color=GREY, label="the most that 8 directions hold")
            shares.plot(share, label="Online Subspace Descent")
        defects.plot(defect, label=f"λ = {penalty}")
    for label, every in {f"GaLore, every {PERIOD}": PERIOD, "the first basis kept": None}.items():
        run = train(using(lro.galore, RANK, every), watch)
        shares.plot(run(0.01)[1][0], label=label)
    defects.set_ylabel("‖PᵀP − I‖, mean over matrices")
    finish(defects)
    energy(shares)


def dct_adamw(figure: Any) -> None:
    shares, staying = figure.subplots(1, 2)

    def chosen(gradients: Any, updates: Any, state: Any, new: Any) -> Any:
        old, now = (jnp.concatenate(jax.tree.leaves(s[0].basis)) for s in (state, new))
        kept = jnp.mean(jnp.any(now[:, :, None] == old[:, None, :], axis=-1))
        pairs = cosine_bases(new[0].basis, gradients)
        return captured(pairs), most(pairs), kept

    for order in (2, 1):
        run = train(using(lro.dct_adamw, RANK, order=order, b2=0.99), chosen)
        _, (share, best, kept) = run(0.003)
        if order == 2:
            shares.plot(best, color=GREY, label="the most that 8 directions hold")
            staying.plot(kept[1:], color=COLOURS[0])
        shares.plot(share, label=f"8 cosines, order={order}")
    shares.axhline(
        RANK / CONFIG.hidden_size, color=GREY, linestyle=":", label="8 random directions, expected"
    )
    staying.set_ylabel("share of the indices that stay (order=2)")
    staying.set_ylim(0, 1)
    finish(staying)
    energy(shares, legend=(0.02, 0.55))


def apollo(figure: Any) -> None:
    factors, losses = figure.subplots(1, 2)
    whole = lro.subspaces.fixed(lambda path, shape: jnp.eye(min(shape[-2:])))
    ranks = (1, 4, 16)
    scaling = lro.residuals.gradient_scaling(gamma=float("inf"))
    shadows = [
        lro.scale_by_projection(
            optax.scale_by_adam(),
            rule,
            residual=scaling,
            refresh_every=PERIOD,
            weight_dimension_numbers=SPECS,
        )
        for rule in (whole, *map(lro.subspaces.random, ranks))
    ]

    def columns(gradients: Any, updates: Any, state: Any, new: Any) -> Any:
        size = lambda x: jnp.linalg.norm(x, axis=-2).ravel()
        ratios = lambda pairs: jnp.concatenate([size(x) / size(g) for x, g in pairs])
        return [ratios(matrices(answer, gradients)) for answer in new.answers]

    seen = train(lambda rate: beside(using(lro.apollo)(rate), shadows), columns)(0.01)[1]
    true, *estimates = [each[-1] for each in seen]
    for rank, estimate in zip(ranks, estimates, strict=True):
        root = (CONFIG.hidden_size / rank) ** 0.5
        factors.loglog(true, root * estimate, ".", markersize=3, label=f"rank {rank}")
    ends = [true.min(), true.max()]
    factors.loglog(ends, ends, color=GREY, linewidth=1)
    factors.set_xlabel("factor of a column, Adam on the whole gradient")
    factors.set_ylabel("its estimate, times √(d/r)")
    compare(
        losses,
        {
            "AdamW": optax.adamw,
            "GaLore, rank 16": using(lro.galore, 16, PERIOD),
            "APOLLO, rank 16": using(lro.apollo, 16, PERIOD),
            "APOLLO-Mini": using(lro.apollo_mini, refresh_every=PERIOD),
        },
    )
    finish(factors, steps=False)


def ldadam(figure: Any) -> None:
    shares, losses = figure.subplots(1, 2)
    _, (share, best) = train(using(lro.ldadam, RANK), watch)(0.003)
    shares.plot(best, color=GREY, label="the most that 8 directions hold")
    shares.plot(share, label="LDAdam")
    _, (share, _) = train(using(lro.galore, RANK, PERIOD), watch)(0.01)
    shares.plot(share, label=f"GaLore, every {PERIOD}")
    compare(
        losses,
        {
            "AdamW": optax.adamw,
            "error in 32 bits": using(lro.ldadam, RANK),
            "error in 8 bits": using(lro.ldadam, RANK, error_feedback=8),
            "no error feedback": using(lro.ldadam, RANK, error_feedback=None),
        },
    )
    energy(shares)


def compare(axes: Any, optimizers: dict[str, Optimizer]) -> None:
    """The losses of several optimizers, each at its best rate."""
    for (label, optimizer), style in zip(optimizers.items(), ("-", "-", "-", "--"), strict=False):
        print(f"  {label}")
        axes.plot(best_run(optimizer), style, label=label)
    axes.set_ylabel("loss, mean of 20 batches")
    axes.set_ylim(top=4)
    finish(axes)


def energy(axes: Any, legend: str | tuple[float, float] = "best") -> None:
    axes.set_ylabel("share of the gradients' energy")
    axes.set_ylim(0, 1)
    finish(axes, legend=legend)


def finish(axes: Any, steps: bool = True, legend: str | tuple[float, float] = "best") -> None:
    if steps:
        axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc=legend)


FIGURES = {
    draw.__name__: draw
    for draw in (
        galore,
        fira,
        adarankgrad,
        online_subspace_descent,
        dct_adamw,
        apollo,
        ldadam,
        low_bit,
        nag_gs,
        grams,
        extrapolation,
        powerpropagation,
        mirror_sinkhorn,
        one_cycle,
        adaptive_batch_size,
        weight_decay,
        lora,
        lora_fa,
        lotr,
        decoder_variants,
        maestro,
        comrope,
        random_feature_attention,
        widenet,
        fixed_point,
        aflora,
        lamda,
        pissa,
        svfit,
        flylora,
        adapters,
        few_bit,
        gated_activations,
        randomized_linear,
        activation_memory,
    )
}


def main(names: list[str]) -> None:
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)
    for name in names or FIGURES:
        start = time.perf_counter()
        figure = plt.figure(figsize=(9, 3.4), layout="constrained")
        FIGURES[name](figure)
        figure.savefig(OUTPUT / f"{name}.png", dpi=130, metadata={"Software": None})
        plt.close(figure)
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
