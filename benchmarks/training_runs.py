"""Short training runs of the main job's model on its text, compiled once for all of an optimizer's.

Learning rates are data: every rate, seed and length of run uses the same compiled program, which
makes fifty steps a call.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
from pathlib import Path
import sys
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.projection.subspaces import AdaptiveBasis

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _corpus import Corpus, held_out_windows, load_corpus, training_batches
from _optimizers import TUNED, choose, in_few_bits, make_optimizer, make_schedule
from _run_folder import read_json, write_json
from _settings import Settings
from pretrain import held_out_loss, make_model, make_sketch, mean_loss

__all__ = ["CHUNK", "MakeOptimizer", "Settings", "Text", "Trainer", "Weights", "steps_of"]
__all__ += ["TUNED", "choose", "in_few_bits", "make_optimizer", "read_json", "write_json"]

CHUNK = 50  # steps in one call of a compiled program

MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]


class Text(NamedTuple):
    """The main job's text and model.

    Attributes:
      settings: The main job's settings.
      corpus: The tokens.
      model: The model, as shapes.
      params: Its weights, as shapes.
      rule: Which of them are matrices.
    """

    settings: Settings
    corpus: Corpus
    model: Any
    params: Any
    rule: Any

    @classmethod
    def load(cls, settings: Settings) -> "Text":
        """Reads the text."""
        corpus = load_corpus(settings.data, settings.tokenizer, settings.sequence_length)
        model = nnx.eval_shape(lambda: make_model(settings, corpus.vocab_size))
        params = nnx.as_pure(nnx.split(model)[1])
        return cls(settings, corpus, model, params, lro.weight_dimension_numbers(model))


class Weights(NamedTuple):
    """What is trained in the place of the model's weights.

    Attributes:
      init: ``init(key, params) -> trained``.
      full: ``full(trained) -> params``.
    """

    init: Callable[[jax.Array, Any], Any] = lambda key, params: params
    full: Callable[[Any], Any] = lambda trained: trained


def steps_of(
    corpus: Corpus, settings: Settings, peak: float, steps: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields tokens ``[CHUNK, batch, length + 1]`` and rates ``[CHUNK]``, a cosine's."""
    schedule = make_schedule("cosine", steps, steps // 10)
    rates = peak * np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)
    batches = training_batches(corpus, settings)
    for first in range(0, steps, CHUNK):
        tokens = np.stack([next(batches) for _ in range(CHUNK)])
        yield jnp.asarray(tokens), jnp.asarray(rates[first : first + CHUNK])


class Trainer:
    """Trains with one optimizer, from a seed, at a learning rate, for a number of steps."""

    def __init__(self, text: Text, make: MakeOptimizer, weights: Weights) -> None:
        """Nothing is compiled before the first run."""
        self.text, self.weights = text, weights
        graphdef = nnx.split(text.model)[0]
        sketch = make_sketch(text.settings)
        loss = lambda trained, tokens, key: mean_loss(
            weights.full(trained), graphdef, tokens, sketch, key
        )

        def step(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
            (trained, state), (tokens, rate, key) = carry, inputs
            tx = make(lambda count: rate)
            value, gradient = jax.value_and_grad(loss)(trained, tokens, key)
            updates, state = tx.update(gradient, state, trained)
            return (optax.apply_updates(trained, updates), state), value

        self.init_state = jax.jit(lambda trained: make(lambda count: 0.0).init(trained))
        self.chunk = jax.jit(
            lambda carry, tokens, rates, keys=None: jax.lax.scan(
                step, carry, (tokens, rates, keys)
            ),
            donate_argnums=0,
        )
        evaluate = functools.partial(held_out_loss, graphdef=graphdef)
        self.evaluate = jax.jit(lambda trained, windows: evaluate(weights.full(trained), windows))

    def start(self, seed: int) -> tuple[Any, Any]:
        """What is trained, and the optimizer's state, before the first step."""
        # Drawn in float32, so that weights in fewer bits start from the same ones, rounded.
        settings = dataclasses.replace(
            self.text.settings, seed=seed, param_dtype="float32", rounding=None
        )
        params = nnx.as_pure(nnx.split(make_model(settings, self.text.corpus.vocab_size))[1])
        params = optax.tree.cast_like(params, self.text.params)
        trained = self.weights.init(jax.random.key(seed), params)
        return trained, self.init_state(trained)

    def inputs(self, seed: int, peak: float, steps: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields tokens ``[CHUNK, batch, length + 1]`` and rates ``[CHUNK]`` of one call."""
        settings = dataclasses.replace(self.text.settings, seed=seed)
        return steps_of(self.text.corpus, settings, peak, steps)

    def run(self, seed: int, peak: float, steps: int) -> dict[str, Any]:
        """Trains; returns the figures of the run. A loss that is not finite is None."""
        began = time.perf_counter()
        carry = self.start(seed)
        figures = {"weight_bytes": _bytes(carry[0]), "state_bytes": _bytes(carry[1])}
        losses, keys = jnp.zeros(0), None
        for first, (tokens, rates) in enumerate(self.inputs(seed, peak, steps)):
            if self.text.settings.sketch is not None:
                keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), first), CHUNK)
            carry, losses = self.chunk(carry, tokens, rates, keys)
        windows = jnp.asarray(held_out_windows(self.text.corpus, self.text.settings))
        held_out = float(self.evaluate(carry[0], windows))
        figures["held_out_loss"] = _finite(held_out)
        figures["training_loss"] = _finite(float(losses.mean()))
        leaves = jax.tree.leaves(carry[1], is_leaf=lambda x: isinstance(x, AdaptiveBasis))
        for leaf in leaves:
            if isinstance(leaf, AdaptiveBasis):
                ranks = np.concatenate([np.ravel(x) for x in jax.tree.leaves(leaf.rank)])
                figures["mean_rank"] = round(float(ranks.mean()), 2)
                figures["compacted_state_bytes"] = _bytes(lro.compact(carry[1]))
        return figures | {"seconds": round(time.perf_counter() - began, 1)}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))
