"""The figure of the page on codebooks: a derivative in 1 to 4 bits, and errors against bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations import codebook
from lowrank_optax.activations.codebooks import Coding

STYLES: dict[Coding, dict[str, Any]] = {
    "interval": {"linestyle": "--", "color": "tab:orange"},
    "value": {"linestyle": "-", "color": "tab:blue"},
}
DRAWN = {"GELU": jax.nn.gelu, "SiLU": jax.nn.silu, "tanh": jnp.tanh, "Mish": jax.nn.mish}
BITS = np.arange(1, 9)


def few_bit(figure: Any) -> None:
    """GELU's derivative and its stand-ins; how errors fall."""
    left, right = figure.subfigures(1, 2)
    small = left.subplots(2, 2, sharex=True, sharey=True)
    x = jnp.linspace(-4, 4, 4001)
    exact = jax.vmap(jax.grad(jax.nn.gelu))(x)
    for bits, axes in enumerate(small.flat, 1):
        axes.plot(x, exact, color="0.7", linewidth=3)
        for coding, style in STYLES.items():
            book = codebook(jax.nn.gelu, bits, coding=coding)
            axes.plot(x, book.decode(book.encode(x)), linewidth=1, label=coding, **style)
        axes.text(-3.9, 0.92, f"{bits} bit{'s' * (bits > 1)}", fontsize=8)
    small[0, 0].legend(fontsize=7, frameon=False, loc="lower right", title="coding of the")
    small[0, 0].get_legend().get_title().set_fontsize(7)
    left.supxlabel("x", fontsize=9)
    errors = right.subplots()
    for number, (name, fn) in enumerate(DRAWN.items()):
        for coding, style in STYLES.items():
            values = [codebook(fn, int(bits), coding=coding).error for bits in BITS]
            label = name if coding == "value" else None
            look = {"color": f"C{number}", "linestyle": style["linestyle"]}
            errors.plot(BITS, values, marker=".", label=label, **look)
    errors.set_yscale("log")
    errors.set_xlabel("bits")
    errors.set_ylabel("error, uniform on [-10, 10]")
    title = "solid: value\ndashed: interval"
    errors.legend(fontsize=7, frameon=False, title=title, title_fontsize=7)
    for axes in (*small.flat, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
