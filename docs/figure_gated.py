"""The figure and the table of the page on gated activations: errors of SwiGLU's gradients."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lowrank_optax as lro
from lowrank_optax.activations.block_codes import BLOCK_SIZE, block_decode, block_encode

SHAPE = (256, 512)
SCALES = 16 / BLOCK_SIZE  # bits an element, of one array
INPUTS = {
    "normal": lambda key: jax.random.normal(key, SHAPE),
    "Student's t, 4 degrees of freedom": lambda key: jax.random.t(key, 4.0, SHAPE),
}


class Point(NamedTuple):
    """What is kept, its bits for each pair of gate and up, and the errors it makes.

    Attributes:
      scheme: What is kept.
      setting: Bits of its parts.
      bits: Of all of it.
      gate: Relative error of the gate's gradient.
      up: Of up's.
    """

    scheme: str
    setting: str
    bits: float
    gate: float
    up: float

    @property
    def error(self) -> float:
        """Root of the mean of both squares."""
        return ((self.gate**2 + self.up**2) / 2) ** 0.5


def measured(name: str) -> Iterator[Point]:
    """The points of a distribution of the inputs."""
    gate, up = (INPUTS[name](key) for key in jax.random.split(jax.random.key(0)))
    y = jax.random.normal(jax.random.key(1), SHAPE)
    value, slope = jax.nn.silu(gate), jax.vmap(jax.vmap(jax.grad(jax.nn.silu)))(gate)
    exact = y * up * slope, y * value
    coded = lambda x, bits: block_decode(block_encode(x, bits), x.shape, bits)
    relative = lambda found: [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(found, exact, strict=True)
    ]
    for bits in range(1, 9):
        swiglu = lambda gate, up, bits=bits: lro.activations.swiglu(gate, up, bits)
        found = jax.vjp(swiglu, gate, up)[1](y)
        yield Point("gate, up", f"{bits}, {bits}", 2 * (bits + SCALES), *relative(found))
    for factor_bits in (3, 4, 8):
        for bits in (1, 2, 3, 4):
            book = lro.activations.codebook(jax.nn.silu, bits, density="normal")
            level = book.decode(book.encode(gate))
            found = y * coded(up, factor_bits) * level, y * coded(value, factor_bits)
            total = bits + 2 * (factor_bits + SCALES)
            setting = f"{bits}, {factor_bits}, {factor_bits}"
            yield Point("fn', fn, up", setting, total, *relative(found))


def gated_activations(figure: Any) -> None:
    """Errors against bits, for inputs with light and with heavy tails."""
    for axes, name in zip(figure.subplots(1, 2, sharey=True), INPUTS, strict=True):
        points = list(measured(name))
        ours = [p for p in points if p.scheme == "gate, up"]
        axes.plot(
            [p.bits for p in ours], [p.error for p in ours], "o-", label="gate and up, b bits each"
        )
        for factor_bits, marker in ((3, "v"), (4, "s"), (8, "^")):
            some = [p for p in points if p.setting.endswith(f", {factor_bits}, {factor_bits}")]
            axes.plot(
                [p.bits for p in some],
                [p.error for p in some],
                f"{marker}:",
                label=f"fn' in 1 to 4 bits, fn(gate) and up in {factor_bits}",
            )
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("bits kept for a pair of gate and up")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("relative error of the gradients")
    figure.axes[0].legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    for inputs in INPUTS:
        print(inputs)
        for point in sorted(measured(inputs), key=lambda point: point.bits):
            print(
                f"| {point.scheme} | {point.setting} | {point.bits:.1f} | {100 * point.gate:.1f}% "
                f"| {100 * point.up:.1f}% |"
            )
