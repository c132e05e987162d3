"""The figure of the page on LoRA-FA: memory of a scanned stack, and what projecting does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.adapters import LoRA, LoRAFA, lora_fa_factors, lora_fa_projection
from lowrank_optax.adapters.operands import Rows

LAYERS, WIDTH, RANK, STEPS = 8, 128, 8, 60
TOKENS = (256, 512, 1024, 2048)
COLOURS = ("#3c6e9f", "#c0712a", "#4b8a4a")


def lora_fa(figure: Any) -> None:
    """Temporaries over the tokens of a batch; losses over the scale of A."""
    memory, scales = figure.subplots(1, 2)
    for name, method, colour in (
        ("all weights", None, "0.55"),
        ("LoRA", LoRA(rank=RANK), COLOURS[0]),
        ("LoRA-FA", LoRAFA(rank=RANK), COLOURS[1]),
    ):
        mebibytes = [temporaries(method, tokens) / 2**20 for tokens in TOKENS]
        memory.plot(TOKENS, mebibytes, "o-", color=colour, label=name, markersize=4)
    memory.set_ylim(0)
    memory.set_xlabel("tokens in a batch")
    memory.set_ylabel("temporaries, MiB")
    sizes = np.geomspace(0.1, 10, 9)
    for name, project, style in (
        ("LoRA-FA", False, COLOURS[1]),
        ("LoRA-FA, projected", True, COLOURS[2]),
    ):
        ends = [fitted(size, project=project) for size in sizes]
        scales.loglog(sizes, ends, "o-", color=style, label=name, markersize=4)
    scales.set_ylim(top=3)
    scales.set_xlabel("scale of A, over that at the start")
    scales.set_ylabel(f"loss over the first, {STEPS} steps of SGD")
    for axes in (memory, scales):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


def temporaries(method: LoRA | None, tokens: int) -> int:
    """Bytes of the compiled gradient of a scanned stack of MLPs; None trains all weights."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    weights = (array(LAYERS, WIDTH, 4 * WIDTH), array(LAYERS, 4 * WIDTH, WIDTH))
    used = LoRA(rank=1) if method is None else method
    params = [used.init(jax.random.key(0), w) for w in weights]
    adapters, frozen = [p.trainable for p in params], [p.frozen for p in params]

    def times(x: jax.Array, w: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        y = x @ w
        return y if method is None else y + method.branch(p, Rows(x), y=y, weight=w)

    def loss(trained: Any, constant: Any, frozen: Any, x: jax.Array) -> jax.Array:
        weights, adapters = (trained, constant) if method is None else (constant, trained)

        def layer(x: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
            (up, down), (p, q) = of_layer
            return x + times(jax.nn.silu(times(x, up, p)), down, q), None

        together = [a | f for a, f in zip(adapters, frozen, strict=True)]
        return jnp.mean(jnp.square(jax.lax.scan(layer, x, (weights, together))[0]))

    both = (weights, adapters) if method is None else (adapters, weights)
    lowered = jax.jit(jax.grad(loss)).lower(*both, frozen, array(tokens, WIDTH))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def fitted(size: float, *, project: bool) -> float:
    """The last loss over the first one of a linear layer fitted by SGD at a fixed rate."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, w = normal(256, 32), normal(32, 16)
    method = LoRAFA(rank=RANK)
    params = method.init(jax.random.key(0), w[None])
    frozen = {"A": size * params.frozen["A"]}
    y = x @ (w + frozen["A"][0] @ normal(RANK, 16) / size)
    projection = [lora_fa_projection(lora_fa_factors(frozen, method))] if project else []
    tx = optax.chain(*projection, optax.sgd(4.0))

    def loss(trained: dict[str, jax.Array]) -> jax.Array:
        p = {"A": frozen["A"][0], "B": trained["B"][0]}
        return jnp.mean(jnp.square(x @ w + method.branch(p, Rows(x), y=x @ w, weight=w) - y))

    def step(carry: Any, _: None) -> Any:
        trained, state = carry
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return (optax.apply_updates(trained, updates), state), None

    start = (params.trainable, tx.init(params.trainable))
    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=STEPS))(start)
    return float(loss(trained) / loss(params.trainable))
