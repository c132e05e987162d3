"""SaRA's two claims in miniature: what small weights do, and what training them alone forgets.

    python benchmarks/sara_miniature.py

A tanh network 16-64-64-8 learns a teacher A of its own shape. First its smallest weights are set to
zero, and as many random ones. Then it is adapted to a teacher B, which is A with noise, by SaRA, by
as many entries drawn at random, by LoRA of nearly as many numbers, and by all weights. Errors are
norms relative to the teacher's outputs, on the inputs of the training; mean and standard deviation
of three seeds. Some two minutes of two cores.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

SEEDS, STEPS, RATE = 3, 1500, 3e-3
SHAPES = list(itertools.pairwise((16, 64, 64, 8)))
Params = dict[str, jax.Array]


def net(params: Params, x: jax.Array) -> jax.Array:
    """Outputs ``[n, 8]``."""
    *hidden, last = (params[name] for name in sorted(params))
    for w in hidden:
        x = jnp.tanh(x @ w)
    return x @ last


def drawn(rng: np.random.Generator) -> Params:
    """Weights at random."""
    draw = lambda n, m: jnp.asarray(rng.normal(size=(n, m)) / n**0.5, jnp.float32)
    return {f"w{i}": draw(*shape) for i, shape in enumerate(SHAPES)}


def error(params: Params, teacher: Params, x: jax.Array) -> jax.Array:
    """Distance of the outputs from the teacher's, relative to theirs."""
    wanted = net(teacher, x)
    return jnp.linalg.norm(net(params, x) - wanted) / jnp.linalg.norm(wanted)


@functools.partial(jax.jit, static_argnames=("weights", "reselect", "steps"))
def fitted(
    trained: Any,
    rest: Any,
    teacher: Params,
    x: jax.Array,
    *,
    weights: Any,
    reselect: bool,
    steps: int,
) -> Any:
    """What is trained, after AdamW with a rate that falls to zero."""
    tx = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=1e-2)
    if reselect:
        tx = lro.adapters.sara_reselection(tx, steps // 2)
    wanted = net(teacher, x)
    loss = lambda trained: jnp.square(net(weights(trained, rest), x) - wanted).mean()

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        trained, state = carry
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return (optax.apply_updates(trained, updates), state), None

    return jax.lax.scan(step, (trained, tx.init(trained)), length=steps)[0][0]


def at_random(adapter: Any, params: Params, rng: np.random.Generator) -> Any:
    """The adapter with the same number of entries at random positions."""
    frozen, trained = {}, {}
    for name, w in params.items():
        count = adapter.trainable[name]["values"].size
        indices = np.sort(rng.choice(w.size, count, replace=False)).astype(np.int32)
        initial = w.ravel()[indices]
        frozen[name] = {"indices": jnp.asarray(indices), "initial": initial}
        trained[name] = {"values": jnp.copy(initial)}
    return type(adapter)(trained, frozen, {}, adapter.leaves)


def methods(fraction: float, rank: int) -> dict[str, tuple[Any, bool]]:
    """The methods by name, and whether there is a reselection; None for all weights."""
    sara = lro.adapters.SaRA(fraction=fraction)
    return {
        "SaRA": (sara, False),
        "SaRA, reselected at half": (sara, True),
        "random entries": (sara, False),
        f"LoRA, rank {rank}": (lro.adapters.LoRA(rank=rank), False),
        "all weights": (None, False),
    }


def run(seed: int) -> tuple[dict[str, list[float]], dict[tuple[int, str], list[float]]]:
    """Errors after pruning, and on B and A after adaptation, with the number of trained numbers."""
    rng, pytree = np.random.default_rng(seed), lro.adapters.pytree
    start, a = drawn(rng), drawn(rng)
    b = jax.tree.map(lambda w, noise: w + 0.25 * noise, a, drawn(rng))
    x = jnp.asarray(rng.normal(size=(1024, 16)), jnp.float32)
    plain = lambda trained, rest: trained
    params = fitted(start, None, a, x, weights=plain, reselect=False, steps=4 * STEPS)
    pruned = {"0 %": 2 * [float(error(params, a, x))]}
    magnitudes = np.sort(np.concatenate([np.abs(w).ravel() for w in params.values()]))
    for fraction in (0.1, 0.2):
        theta = magnitudes[round(fraction * magnitudes.size)]
        small = {k: jnp.where(jnp.abs(w) < theta, 0, w) for k, w in params.items()}
        random = {k: jnp.where(rng.random(w.shape) < fraction, 0, w) for k, w in params.items()}
        errors = [float(error(p, a, x)) for p in (small, random)]
        pruned[f"{100 * fraction:.0f} %"] = errors
    adapted = {(0, "before"): [float(error(params, t, x)) for t in (b, a)] + [0.0]}
    for group, (fraction, rank) in enumerate(((0.1, 2), (0.2, 4))):
        for name, (method, reselect) in methods(fraction, rank).items():
            if method is None and group:
                continue  # these are no more
            trained, weights, rest = params, plain, None
            if method is not None:
                rest = pytree.init(jax.random.key(seed), params, method, ".*")
                rest = at_random(rest, params, rng) if name.startswith("random") else rest
                weights = lambda t, rest: pytree.effective(rest[0], rest[1].replace(t))
                trained, rest = rest.trainable, (params, rest)
            new = fitted(trained, rest, b, x, weights=weights, reselect=reselect, steps=STEPS)
            errors = [float(error(weights(new, rest), t, x)) for t in (b, a)]
            numbers = sum(w.size for w in jax.tree.leaves(trained))
            adapted[group, name] = [*errors, numbers]
    return pruned, adapted


def main() -> None:
    """Prints the two tables as Markdown."""
    runs = [run(seed) for seed in range(SEEDS)]
    shown = lambda values: f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    print("| set to zero | the smallest | random ones |\n|---|---|---|")
    for fraction in runs[0][0]:
        columns = zip(*(pruned[fraction] for pruned, _ in runs), strict=True)
        print(f"| {fraction} | " + " | ".join(map(shown, columns)) + " |")
    print("\n| trained | numbers | error on B | error on A |\n|---|---:|---|---|")
    for key in runs[0][1]:
        on_b, on_a, numbers = zip(*(adapted[key] for _, adapted in runs), strict=True)
        print(f"| {key[1]} | {numbers[0]:.0f} | {shown(on_b)} | {shown(on_a)} |")


if __name__ == "__main__":
    main()
