"""LoTR against LoRA with equally many parameters, as models get deeper.

    python benchmarks/lotr_depth.py             # whatever is missing in the results file
    python benchmarks/lotr_depth.py --markdown  # the tables as Markdown
    python benchmarks/lotr_depth.py --plot lotr_depth.png

Residual networks of 2 to 16 layers [64, 64] learn scikit-learn's digits; then stem and head are
frozen, and adapters on the layers learn the digits mirrored at the diagonal. The learning rate of
each method and size is the one with the least training loss, over all seeds; accuracies are of
held-out images. All rates and seeds of a size are one compiled program, and a stopped run goes on
after the last. Some eight minutes of two cores.
"""

import argparse
import functools
import math
from pathlib import Path
import time
from typing import Any

import digits
from family_table import Column, print_columns
import jax
import jax.numpy as jnp
import numpy as np
import optax
from projection_family import RESULTS, Results

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.operands import Rows

WIDTH = 64
DEPTHS = (2, 4, 8, 16)
LORA_RANKS = (1, 2)
SMALL_RANKS = (1, 2, 4)  # of LoTR, also where LoRA cannot be as small
RATES = (0.003, 0.01, 0.03, 0.1)
METHODS = {"LoRA": lro.adapters.LoRA, "LoTR": lro.adapters.LoTR}


def network(depth: int) -> digits.Model:
    """A stem, residual layers in one stack, a head."""

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        normal = lambda k, shape: jax.random.normal(k, shape) * (2 / shape[-2]) ** 0.5
        layers = {"kernel": normal(keys[1], (depth, WIDTH, WIDTH)), "bias": jnp.zeros((depth, 64))}
        return {
            "stem": normal(keys[0], (64, WIDTH)),
            "layers": layers,
            "head": normal(keys[2], (WIDTH, 10)),
        }

    return digits.Model(init, forward)


def forward(
    params: Any, images: jax.Array, method: Any = None, arrays: dict[str, jax.Array] | None = None
) -> jax.Array:
    """Logits, with an adapter on the layers if a method and its arrays are given."""
    arrays = arrays or {}
    shared = {name: x for name, x in arrays.items() if method and name in method.shared}
    own = {name: x for name, x in arrays.items() if name not in shared}
    depth = len(params["layers"]["bias"])

    def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        layer, own = inputs
        normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        y = normed @ layer["kernel"] + layer["bias"]
        if method is not None:
            y += method.branch({**shared, **own}, Rows(normed), y=y, weight=layer["kernel"])
        return x + jax.nn.relu(y) / depth**0.5, None

    x = images.reshape(len(images), -1) @ params["stem"]
    x, _ = jax.lax.scan(layer, x, (params["layers"], own))
    return x @ params["head"]


def cosine(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Adam with a rate that falls to zero."""
    return optax.adam(lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * count / steps)))


def mirrored(data: digits.Digits) -> digits.Digits:
    """The images with rows and columns exchanged."""
    return data._replace(images=data.images.transpose(0, 2, 1, 3))


@functools.cache
def pretrained(depth: int, seeds: int, steps: int) -> Any:
    """Weights of all seeds, ``[seeds, ...]``."""
    data, model = digits.load().train, network(depth)
    run = lambda seed: digits.train(
        model, cosine(jnp.float32(2e-3), steps), jax.random.key(seed), data, steps
    )
    return jax.jit(jax.vmap(run))(jnp.arange(seeds)).params


def before(depth: int, seeds: int, steps: int) -> dict[str, list[float]]:
    """Accuracies of the networks before they are adapted."""
    params, test = pretrained(depth, seeds, steps), digits.load().test
    share = lambda data: jax.vmap(
        lambda p: digits.accuracy(digits.Model(network(depth).init, forward), p, data)
    )
    each = {"upright": share(test)(params), "mirrored": share(mirrored(test))(params)}
    return {name: [round(float(x), 4) for x in values] for name, values in each.items()}


def adapt(method: Any, depth: int, seeds: int, steps: int) -> dict[str, Any]:
    """Adapts from every seed at every rate, all at once; what the results hold of it."""
    began = time.perf_counter()
    split = digits.Split(*map(mirrored, digits.load()))
    params = pretrained(depth, seeds, steps)
    shapes = jax.ShapeDtypeStruct((depth, WIDTH, WIDTH), jnp.float32)

    def run(rate: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        frozen = jax.tree.map(lambda x: x[seed], params)
        model = digits.Model(
            lambda key: method.init(key, frozen["layers"]["kernel"]).trainable,
            lambda arrays, images: forward(frozen, images, method, arrays),
        )
        key = jax.random.fold_in(jax.random.key(seed), 1)
        trained = digits.train(model, cosine(rate, steps), key, split.train, steps)
        accuracy = digits.accuracy(model, trained.params, split.test)
        return accuracy, digits.loss(model, trained.params, split.train)

    rates = jnp.array(RATES)
    pairs = jnp.repeat(rates, seeds), jnp.tile(jnp.arange(seeds), len(rates))
    accuracy, loss = (
        np.asarray(x).reshape(len(RATES), seeds) for x in jax.jit(jax.vmap(run))(*pairs)
    )
    arrays = jax.eval_shape(method.init, jax.random.key(0), shapes).trainable
    each = {
        f"{rate:g}": {
            "accuracy": [round(float(x), 4) for x in accuracy[i]],
            "loss": [float(f"{x:.4g}") if math.isfinite(x) else None for x in loss[i]],
        }
        for i, rate in enumerate(RATES)
    }
    seconds = round(time.perf_counter() - began, 1)
    return {"parameters": parameter_count(arrays), "rates": each, "seconds": seconds}


def equal_rank(depth: int, lora_rank: int) -> int:
    """The largest rank at which LoTR has no more parameters than LoRA."""
    most = 2 * WIDTH * lora_rank * depth
    return max(r for r in range(1, WIDTH + 1) if 2 * WIDTH * r + depth * r**2 <= most)


def ranks(name: str, depth: int) -> list[int]:
    """The ranks that are trained of a method."""
    if name == "LoRA":
        return list(LORA_RANKS)
    return sorted({*SMALL_RANKS, *(equal_rank(depth, rank) for rank in LORA_RANKS)})


def best(run: dict[str, Any]) -> dict[str, Any]:
    """The accuracies at the rate with the least training loss."""
    loss = lambda rate: np.mean([math.inf if x is None else x for x in run["rates"][rate]["loss"]])
    rate = min(run["rates"], key=loss)
    return {"rate": rate, "parameters": run["parameters"], **run["rates"][rate]}


def rows_of(content: dict[str, Any], depths: list[int]) -> list[dict[str, Any]]:
    """Every run at its best rate, by depth and parameters."""
    rows = [
        {"depth": depth, "method": name, "rank": rank} | best(content[str(depth)][f"{name} {rank}"])
        for depth in depths
        for name in METHODS
        for rank in ranks(name, depth)
    ]
    return sorted(rows, key=lambda row: (row["depth"], row["parameters"]))


def print_tables(content: dict[str, Any], depths: list[int], markdown: bool) -> None:
    """Equal counts as depth grows, then all sizes."""
    rows = rows_of(content, depths)
    find = lambda *key: next(r for r in rows if (r["depth"], r["method"], r["rank"]) == key)
    mean = lambda row: float(np.mean(row["accuracy"]))
    spread = lambda row: f"{100 * mean(row):.1f} ± {100 * np.std(row['accuracy'], ddof=1):.1f}"
    pairs = [
        (depth, rank, find(depth, "LoRA", rank), find(depth, "LoTR", equal_rank(depth, rank)))
        for rank in LORA_RANKS
        for depth in depths
    ]
    before = lambda depth: 100 * np.mean(content[str(depth)]["before"]["mirrored"])
    print_columns(
        "held-out accuracy, %, with no more parameters than LoRA's",
        pairs,
        [
            Column("layers", lambda p: str(p[0])),
            Column("before", lambda p: f"{before(p[0]):.1f}"),
            Column("LoRA: rank", lambda p: str(p[1])),
            Column("parameters", lambda p: str(p[2]["parameters"])),
            Column("accuracy", lambda p: spread(p[2])),
            Column("LoTR: rank", lambda p: str(p[3]["rank"])),
            Column("parameters ", lambda p: str(p[3]["parameters"])),
            Column("accuracy ", lambda p: spread(p[3])),
            Column("difference", lambda p: f"{100 * (mean(p[3]) - mean(p[2])):+.1f}"),
        ],
        markdown,
    )
    print_columns(
        "by parameters",
        rows,
        [
            Column("layers", lambda r: str(r["depth"])),
            Column("method", lambda r: f"{r['method']}, rank {r['rank']}"),
            Column("parameters", lambda r: str(r["parameters"])),
            Column("learning rate", lambda r: r["rate"]),
            Column("accuracy", spread),
        ],
        markdown,
    )


def draw(axes: Any, content: dict[str, Any], depths: list[int]) -> None:
    """Accuracy against parameters: a colour a depth, LoRA dashed."""
    rows = rows_of(content, depths)
    for index, depth in enumerate(depths):
        for name, style in (("LoRA", "s--"), ("LoTR", "o-")):
            mine = [r for r in rows if (r["depth"], r["method"]) == (depth, name)]
            x, y = [r["parameters"] for r in mine], [100 * np.mean(r["accuracy"]) for r in mine]
            label = f"{name}, {depth} layers"
            axes.plot(x, y, style, color=f"C{index}", label=label, markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda count, _: f"{count:g}")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("held-out accuracy, %")


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--plot", type=Path, help="a PNG of accuracy against parameters")
    parser.add_argument("--output", type=Path, default=RESULTS / "lotr_depth.json")
    args = parser.parse_args()
    setting = {"width": WIDTH, "seeds": args.seeds, "steps": args.steps, "rates": list(RATES)}
    results = Results(args.output, setting, None)
    size = {"seeds": args.seeds, "steps": args.steps}
    for depth in args.depths:
        results.once((str(depth), "before"), functools.partial(before, depth, **size))
        for name, method in METHODS.items():
            for rank in ranks(name, depth):
                run = functools.partial(adapt, method(rank=rank), depth, **size)
                results.once((str(depth), f"{name} {rank}"), run)
    print_tables(results.content, args.depths, args.markdown)
    if args.plot:
        from matplotlib.figure import Figure

        figure = Figure((5, 3.6), layout="constrained")
        axes = figure.subplots()
        draw(axes, results.content, args.depths)
        axes.legend(fontsize=7, frameon=False)
        figure.savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
