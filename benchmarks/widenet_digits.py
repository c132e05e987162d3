"""WideNet on scikit-learn's digits; times of a mixture's forms, and memory by depth.

    python benchmarks/widenet_digits.py             # whatever is missing in the results file
    python benchmarks/widenet_digits.py --markdown  # the tables as Markdown

Vision transformers on patches of 2 × 2 pixels, trained on 400 images and tested on the other 1397:
nothing shared, one dense block for all layers, and WideNet with and without its load-balance loss.
Then a mixture of four experts at 1576 tokens, forward and backward, in each form of dispatch, in
turn with all experts on all tokens; and the memory of a training step of one shared block and of
separate ones, by the number of layers. Some seven minutes of one core; a stopped run goes on after
the last result.
"""

import argparse
from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any

from comrope_digits import load
from family_table import Column, print_columns
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from projection_family import RESULTS, Results
from timing import Stepper, milliseconds

import lowrank_optax as lro
from lowrank_optax.layers import Experts, RoutingStatistics
from lowrank_optax.models import WideNetViT

WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 64, 4
TRAINED, BATCH = 400, 128
LAST = 20  # steps over which routing is averaged
# Name: whether each layer has a block of its own, number of experts, factor of the balance loss.
MODELS = {
    "nothing shared": (True, 1, 0.0),
    "one dense block": (False, 1, 0.0),
    "WideNet": (False, 4, 0.01),
    "WideNet, no balance loss": (False, 4, 0.0),
}
FORMS = {
    "all experts on all tokens": None,
    "slots, capacity 1.2": (Experts(4, 2, 1.2), "slots"),
    "slots for all choices": (Experts(4, 2, None), "slots"),
    "ragged": (Experts(4, 2, None), "ragged"),
}
TOKENS = (8, 197)
SIZES = (256, 8, 1024)  # width, heads, hidden units
DEPTHS = (2, 6, 12)


class SeparateBlocks(nnx.Module):
    """One block for each layer, with one expert: a plain transformer's."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = lambda: lro.layers.WideNetBlock(WIDTH, HEADS, HIDDEN, 1, 1, rngs=rngs)
        self.blocks = nnx.List([make() for _ in range(LAYERS)])

    def __call__(self, x: jax.Array, **options: Any) -> tuple[jax.Array, RoutingStatistics]:
        """As a `WideNetBlock`."""
        layers = []
        for block in self.blocks:
            x, routing = block(x, **options)
            layers.append(routing)
        return x, jax.tree.map(lambda *each: jnp.concatenate(each), *layers)


def vision_transformer(name: str, rngs: nnx.Rngs) -> WideNetViT:
    """An untrained model of the table."""
    separate, experts, _ = MODELS[name]
    sizes = (WIDTH, HEADS, HIDDEN, LAYERS)
    model = WideNetViT(8, 2, 10, *sizes, experts, channels=1, rngs=rngs)
    if separate:
        model.blocks = SeparateBlocks(rngs)
    return model


def block_parameters(model: WideNetViT) -> int:
    """Parameters of the blocks, without a router that has nothing to choose."""
    params = nnx.to_flat_state(nnx.state(model.blocks, nnx.Param))
    leaves = [(path, leaf[...]) for path, leaf in params]
    return sum(x.size for path, x in leaves if path[-1] != "router" or x.shape[-1] > 1)


def train_and_test(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Accuracy in %, and routing in the last steps of training, of one model."""
    images, labels = map(jnp.concatenate, zip(load()[:2], load()[2:], strict=True))
    images = images[..., None]
    model = vision_transformer(name, nnx.Rngs(seed))
    parameters, factor = block_parameters(model), MODELS[name][2]
    graphdef, params = nnx.split(model)
    tx = optax.adamw(4e-3)

    def loss(params: Any, chosen: jax.Array, key: jax.Array) -> Any:
        model = nnx.merge(graphdef, params)
        logits, routing = model(images[chosen], training=True, key=key)
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[chosen])
        return each.mean() + factor * routing.balance_loss.sum(), routing

    def step(carry: Any, key: jax.Array) -> Any:
        (params, state), (pick, noise) = carry, jax.random.split(key)
        chosen = jax.random.randint(pick, (BATCH,), 0, TRAINED)
        gradient, routing = jax.grad(loss, has_aux=True)(params, chosen, noise)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), routing

    @jax.jit
    def run(params: Any, keys: jax.Array) -> Any:
        (params, _), routing = jax.lax.scan(step, (params, tx.init(params)), keys)
        logits, _ = nnx.merge(graphdef, params)(images[TRAINED:])
        accuracy = (logits.argmax(-1) == labels[TRAINED:]).mean()
        return accuracy, jax.tree.map(lambda x: x[-LAST:].mean(0), routing)

    accuracy, routing = run(params, jax.random.split(jax.random.key(seed), steps))
    return {
        "parameters": parameters,
        "accuracy": round(100 * float(accuracy), 2),
        "balance_loss": round(float(routing.balance_loss.mean()), 4),
        "load": np.asarray(routing.load, np.float64).round(4).tolist(),
        "dropped": round(float(routing.dropped.mean()), 5),
    }


def mixture_step(form: tuple[Experts, Any] | None) -> Callable[[Any, jax.Array], Any]:
    """A small step down the gradient of the mixture's weights and of its input, the carry."""

    def experts(rows: jax.Array, sizes: jax.Array | None, weights: Any) -> jax.Array:
        (up, up_bias), (down, down_bias) = weights
        hidden = nnx.gelu(lro.layers.grouped_linear(rows, up, up_bias, sizes=sizes))
        return lro.layers.grouped_linear(hidden, down, down_bias, sizes=sizes)

    def outputs(x: jax.Array, router: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
        if form is not None:
            options, dispatch = form
            call = functools.partial(experts, weights=weights)
            y, routing = lro.layers.mixture_of_experts(x, router, call, options, dispatch=dispatch)
            return y, routing.balance_loss
        routing = lro.layers.route_to_experts(x, router)
        (up, up_bias), (down, down_bias) = weights
        hidden = nnx.gelu(jnp.einsum("td,edf->etf", x, up) + up_bias[:, None])
        each = jnp.einsum("etf,efd->etd", hidden, down) + down_bias[:, None]
        one_hot = jax.nn.one_hot(routing.experts, len(up))
        y = jnp.einsum("tk,tke,etd->td", routing.gates, one_hot, each)
        return y, routing.balance_loss

    def loss(given: Any, target: jax.Array) -> jax.Array:
        y, balance = outputs(*given)
        return jnp.mean((y - target) ** 2) + 0.01 * balance

    def step(given: Any, target: jax.Array) -> Any:
        return jax.tree.map(lambda x, g: x - 1e-4 * g, given, jax.grad(loss)(given, target))

    return step


def mixture_forms(rounds: int) -> dict[str, Any]:
    """Milliseconds and MiB of temporaries of each form."""
    tokens, (width, _, hidden) = TOKENS[0] * TOKENS[1], SIZES
    shapes = {"x": (tokens, width), "router": (width, 4)}
    shapes |= {"up": (4, width, hidden), "down": (4, hidden, width), "target": (tokens, width)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    normal = {
        name: jax.random.normal(key, shape) / (1 if name in ("x", "target") else shape[-2] ** 0.5)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    weights = [(normal["up"], jnp.zeros((4, hidden))), (normal["down"], jnp.zeros((4, width)))]
    carry = normal["x"], normal["router"], weights
    steppers = {
        name: Stepper(mixture_step(form), carry, normal["target"]) for name, form in FORMS.items()
    }
    times = milliseconds(steppers, rounds)
    memory = {name: each.compiled.memory_analysis() for name, each in steppers.items()}
    return {
        name: {
            "milliseconds": round(times[name], 1),
            "temporaries_mib": round(memory[name].temp_size_in_bytes / 2**20, 1),
        }
        for name in FORMS
    }


def step_memory(shared: bool, layers: int) -> dict[str, float]:
    """MiB of weights, gradients and AdamW's state, and of the temporaries of a compiled step."""
    make = lambda rngs, count: lro.layers.WideNetBlock(*SIZES, count, remat=True, rngs=rngs)
    stacked = nnx.split_rngs(splits=layers)(nnx.vmap(lambda rngs: make(rngs, 1)))
    init = (lambda rngs: make(rngs, layers)) if shared else stacked
    graphdef, params = nnx.split(nnx.eval_shape(lambda: init(nnx.Rngs(0))))
    tx = optax.adamw(1e-3)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        call = lambda x, own: nnx.merge(graphdef, own)(x, training=True)
        y, routing = call(x, params) if shared else jax.lax.scan(call, x, params)
        return jnp.mean((y - x[:, ::-1]) ** 2) + 0.01 * routing.balance_loss.sum()

    def step(carry: Any, x: jax.Array) -> Any:
        (params, state), gradient = carry, jax.grad(loss)(carry[0], x)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    carry = params, jax.eval_shape(tx.init, params)
    x = jax.ShapeDtypeStruct((*TOKENS, SIZES[0]), jnp.float32)
    memory = jax.jit(step, donate_argnums=0).lower(carry, x).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return {
        "parameters": size // 4,
        "weights_gradients_state_mib": round(4 * size / 2**20, 1),
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
    }


def print_tables(content: dict[str, Any], markdown: bool) -> None:
    """Prints accuracy and routing, the forms of dispatch, and memory by depth."""

    def mean(name: str) -> Callable[[Any], str]:
        return lambda row: f"{np.mean([each[name] for each in row[1]]):.3f}"

    def accuracy(row: Any) -> str:
        values = [each["accuracy"] for each in row[1]]
        error = np.std(values, ddof=1) / len(values) ** 0.5
        return f"{np.mean(values):.1f} ± {error:.1f}"

    def loads(row: Any) -> str:
        load = np.array([each["load"] for each in row[1]])
        return f"{load.min():.2f}–{load.max():.2f}"

    columns = [
        Column("model", lambda row: row[0]),
        Column("parameters of blocks", lambda row: f"{row[1][0]['parameters']:,}"),
        Column("test accuracy, %", accuracy),
        Column("balance loss / L", mean("balance_loss")),
        Column("loads", loads),
        Column("dropped", lambda row: f"{100 * float(mean('dropped')(row)):.1f} %"),
    ]
    models = list(content["models"].items())
    print_columns("Digits, mean ± standard error over seeds", models, columns, markdown)
    forms = content["forms"]["all"]
    dense = next(iter(forms.values()))
    ratio = lambda name: lambda row: f"{row[1][name] / dense[name]:.2f}"
    columns = [
        Column("dispatch", lambda row: row[0]),
        Column("milliseconds", lambda row: f"{row[1]['milliseconds']:.0f}"),
        Column("ratio", ratio("milliseconds")),
        Column("temporaries, MiB", lambda row: f"{row[1]['temporaries_mib']:.0f}"),
        Column("ratio", ratio("temporaries_mib")),
    ]
    print_columns("A mixture, forward and backward", list(forms.items()), columns, markdown)
    memory = content["memory"]
    cell = lambda kind, name: lambda depth: f"{memory[kind][depth][name]:,.0f}"
    columns = [Column("layers", str)]
    for kind in memory:
        held = Column(
            f"{kind}: weights, gradients, AdamW", cell(kind, "weights_gradients_state_mib")
        )
        columns += [held, Column("temporaries", cell(kind, "temporaries_mib"))]
    print_columns("A training step, MiB", list(next(iter(memory.values()))), columns, markdown)


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of all forms")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "widenet_digits.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"steps": args.steps, "seeds": args.seeds, "batch_size": BATCH, "rounds": args.rounds}
    results = Results(args.output, setting, args.log)
    results.once(("forms", "all"), lambda: mixture_forms(args.rounds))
    for kind in ("one shared block", "separate blocks"):
        for depth in DEPTHS:
            measure = functools.partial(step_memory, kind == "one shared block", depth)
            results.once(("memory", kind, str(depth)), measure)
    for name in MODELS:
        run = lambda n=name: [train_and_test(n, seed, args.steps) for seed in range(args.seeds)]
        results.once(("models", name), run)
    print_tables(results.content, args.markdown)


if __name__ == "__main__":
    main()
