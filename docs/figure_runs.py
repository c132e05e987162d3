"""Runs of a small decoder on real text, and what is measured in them, for `figures.py`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.matrices import resolve_dimension_numbers
from lowrank_optax.models import Decoder, DecoderConfig

STEPS, BATCH, LENGTH, RANK = 160, 8, 64, 8
CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.125,
)

Optimizer = Callable[[Any], optax.GradientTransformation]
Observe = Callable[[Any, Any, Any, Any], Any]  # of gradients, updates, the state before and after


def batches() -> jax.Array:
    """Random windows of the text, ``[STEPS, BATCH, LENGTH + 1]``."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    text = np.frombuffer(b"\0".join(path.read_bytes() for path in sources), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - LENGTH, size=(STEPS, BATCH, 1))
    return jnp.asarray(text[starts + np.arange(LENGTH + 1)], jnp.int32)


MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
GRAPH, PARAMS = nnx.split(MODEL)
SPECS = lro.weight_dimension_numbers(MODEL)
TEXT = batches()
IS_MATRIX = [spec is not None for spec in resolve_dimension_numbers(SPECS, PARAMS)]


def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
    logits = nnx.merge(GRAPH, params)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def using(method: Callable[..., Any], *args: Any, **options: Any) -> Optimizer:
    """The optimizer as a function of its learning rate."""
    return lambda rate: method(rate, *args, weight_dimension_numbers=SPECS, **options)


def train(
    optimizer: Optimizer,
    observe: Observe = lambda *_: (),
) -> Callable[[float], Any]:
    """A jitted run: from a learning rate to the losses and observations of every step."""

    @jax.jit
    def run(learning_rate: jax.Array) -> Any:
        tx = optimizer(learning_rate)

        def step(carry: Any, tokens: jax.Array) -> Any:
            params, state = carry
            loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
            updates, new = tx.update(gradients, state, params)
            seen = observe(gradients, updates, state, new)
            return (optax.apply_updates(params, updates), new), (loss, seen)

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), TEXT)[1]

    return lambda rate: jax.tree.map(np.asarray, run(rate))


def matrices(tree: Any, gradients: Any) -> list[tuple[Any, jax.Array]]:
    """What a tree has for each stack of matrices, and its gradient, the shorter side first."""
    leaves, treedef = jax.tree.flatten(gradients)
    pairs = zip(treedef.flatten_up_to(tree), leaves, IS_MATRIX, strict=True)
    turn = lambda x, g: x.mT if g.shape[-2] > g.shape[-1] and x.shape == g.shape else x
    return [(turn(x, g), turn(g, g)) for x, g, is_matrix in pairs if is_matrix]


def captured(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The share of the gradients' energy in the spans of their bases, over all matrices."""
    inside = [jnp.sum((jnp.linalg.qr(p)[0].mT @ g) ** 2) for p, g in pairs]
    return sum(inside) / sum(jnp.sum(g**2) for _, g in pairs)


def most(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The largest share that any `RANK` directions hold."""
    inside = [jnp.sum(jnp.linalg.svdvals(g)[..., :RANK] ** 2) for _, g in pairs]
    return sum(inside) / sum(jnp.sum(g**2) for _, g in pairs)


class Beside(NamedTuple):
    """State of an optimizer, and of others that see the same gradients, with their answers."""

    main: Any
    others: list[Any]
    answers: list[Any]


def beside(
    main: optax.GradientTransformation, others: list[optax.GradientTransformation]
) -> optax.GradientTransformation:
    """``main``, while ``others`` are shown the same gradients."""

    def init(params: Any) -> Beside:
        zeros = optax.tree.zeros_like(params)
        return Beside(main.init(params), [tx.init(params) for tx in others], [zeros] * len(others))

    def update(gradients: Any, state: Beside, params: Any = None) -> Any:
        updates, own = main.update(gradients, state.main, params)
        pairs = [tx.update(gradients, s) for tx, s in zip(others, state.others, strict=True)]
        return updates, Beside(own, [s for _, s in pairs], [answer for answer, _ in pairs])

    return optax.GradientTransformation(init, update)
