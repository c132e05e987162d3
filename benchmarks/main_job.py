"""The main job's whole training step, GaLore against AdamW; and what its bases capture.

    python benchmarks/main_job.py
    python benchmarks/main_job.py --model llama-60m --steps 20 --batch-size 4

Trains the main job's decoder on its text for some steps. Then prints the time of its step (hold and
refresh) with either optimizer, taken in turn, and, for the gradient of the trained model, the share
of the energy of the exact leading singular vectors that the randomized bases capture.
"""

import argparse
from pathlib import Path
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import Stepper, milliseconds, print_table

import lowrank_optax as lro
from lowrank_optax.matrices import resolve_dimension_numbers, to_matrix
from lowrank_optax.models import Decoder, decoder_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _corpus import load_corpus
from pretrain import mean_loss, train_step


def captured_energy(gradients: Any, rule: Any, rank: int) -> list[float]:
    """Energy in the randomized basis over that in the exact one, for each matrix."""
    ratios = []
    specs = resolve_dimension_numbers(rule, gradients)
    for gradient, spec in zip(jax.tree.leaves(gradients), specs, strict=True):
        if spec is None:
            continue
        stack = to_matrix(gradient, spec)
        for matrix in stack.reshape(-1, *stack.shape[-2:]):
            axis = -2 if matrix.shape[0] <= matrix.shape[1] else -1
            energies = []
            for subspace in (lro.subspaces.randomized_svd(rank), lro.subspaces.svd(rank)):
                view = lro.View.of(matrix, axis, subspace.rank)
                start = subspace.init(view)
                basis = subspace.refresh(jax.random.key(0), matrix, start, None, view)
                energies.append(float(jnp.sum(subspace.project(basis, matrix, view) ** 2)))
            ratios.append(energies[0] / energies[1])
    return ratios


def main() -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=150, help="steps of training before")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    corpus = load_corpus(None, None, args.sequence_length)
    config = decoder_config(args.model, vocab_size=corpus.vocab_size)
    model = Decoder(config, rngs=nnx.Rngs(0))
    rule = lro.weight_dimension_numbers(model)
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    starts = np.random.default_rng(0).integers(
        len(corpus.train) - args.sequence_length - 1, size=(args.steps + 1, args.batch_size, 1)
    )
    batches = jnp.asarray(corpus.train[starts + np.arange(args.sequence_length + 1)], jnp.int32)

    def training_step(tx: optax.GradientTransformation) -> Any:
        tx = optax.with_extra_args_support(tx)
        return lambda carry, tokens: train_step(*carry, tokens[None], graphdef=graphdef, tx=tx)[:2]

    adamw = optax.adamw(3e-3)
    train = jax.jit(training_step(adamw), donate_argnums=0)
    carry = (params, adamw.init(params))
    for tokens in batches[:-1]:
        carry = train(carry, tokens)
    trained, tokens = carry[0], batches[-1]

    optimizers = {
        "adamw": adamw,
        "galore, hold": lro.galore(1e-2, args.rank, weight_dimension_numbers=rule),
        "galore, refresh": lro.galore(1e-2, args.rank, 1, weight_dimension_numbers=rule),
    }
    steppers = {
        name: Stepper(training_step(tx), (trained, tx.init(trained)), tokens)
        for name, tx in optimizers.items()
    }
    times = milliseconds(steppers, args.rounds)
    title = f"{args.model}, batch {args.batch_size} × {args.sequence_length}, rank {args.rank}"
    print_table(
        title, ["step", "ms", "/ adamw"], [[k, t, t / times["adamw"]] for k, t in times.items()]
    )
    gradients = jax.jit(jax.grad(mean_loss), static_argnums=1)(trained, graphdef, tokens)
    ratios = captured_energy(gradients, rule, args.rank)
    print_table(
        f"energy of the randomized bases over the exact ones', after {args.steps} steps",
        ["matrices", "least", "mean"],
        [[len(ratios), f"{min(ratios):.5f}", f"{np.mean(ratios):.5f}"]],
    )


if __name__ == "__main__":
    main()
