"""Time of a step of each optimizer and training control, as a ratio to AdamW's in the same run.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --rows 4096 --columns 11008   # on a GPU or TPU

Four 1024 × 2752 float32 weights. Every function is jitted with its weights and state donated, and
they take turns in one run. On a CPU the time goes into moving bytes, so a passage over an array
more or less is what tells two optimizers apart; temporary memory is what the compiled step needs
beside weights, gradients and state.
"""

import argparse
from collections.abc import Callable

import jax
from low_bit_step import nbytes
import optax
from projection_step import optimizer_step, weights
from timing import Stepper, milliseconds, print_table

import lowrank_optax as lro

LEARNING_RATE = 1e-3
BASELINE = "optax.adamw"


def monitored() -> optax.GradientTransformation:
    """AdamW whose weight decay is watched."""
    return optax.chain(
        optax.adamw(LEARNING_RATE, weight_decay=0.1),
        lro.training.monitor_weight_decay(learning_rate=LEARNING_RATE, weight_decay=0.1),
    )


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    BASELINE: lambda: optax.adamw(LEARNING_RATE),
    "optax.sgd, momentum": lambda: optax.sgd(LEARNING_RATE, 0.9),
    "nag_gs": lambda: lro.nag_gs(LEARNING_RATE),
    "grams": lambda: lro.grams(LEARNING_RATE),
    "cautious_adamw": lambda: lro.cautious_adamw(LEARNING_RATE),
    "cautious_adamw, not rescaled": lambda: lro.cautious_adamw(LEARNING_RATE, scale="none"),
    "with_gradient_direction(adamw)": lambda: lro.with_gradient_direction(
        optax.adamw(LEARNING_RATE)
    ),
    "extrapolate(adamw)": lambda: lro.extrapolate(optax.adamw(LEARNING_RATE), LEARNING_RATE),
    "adagrad_norm": lambda: lro.adagrad_norm(LEARNING_RATE),
    "powerprop_updates(adamw)": lambda: lro.layers.powerprop_updates(
        optax.adamw(LEARNING_RATE), 2.0
    ),
    "adamw, monitor_weight_decay": monitored,
    "one_cycle(adamw)": lambda: lro.training.one_cycle(optax.adamw, 10_000, LEARNING_RATE),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2752)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    args = parser.parse_args()
    params, gradients = (weights(seed, args.weights, args.rows, args.columns) for seed in (0, 1))
    steppers, state_bytes = {}, {}
    for name in dict.fromkeys([BASELINE, *args.only]):
        tx = OPTIMIZERS[name]()
        state = jax.jit(tx.init)(params)
        state_bytes[name] = nbytes(state)
        steppers[name] = Stepper(optimizer_step(tx), (params, state), gradients)
    times = milliseconds(steppers, args.rounds)
    temporary = {k: s.compiled.memory_analysis().temp_size_in_bytes for k, s in steppers.items()}
    rows = [
        [name, ms, f"{ms / times[BASELINE]:.2f}", state_bytes[name] / 1e6, temporary[name] / 1e6]
        for name, ms in times.items()
    ]
    device = jax.devices()[0].device_kind
    print_table(
        f"{args.weights} weights {args.rows} × {args.columns}, float32, {device}",
        ["step", "ms", "over adamw", "state MB", "temporary MB"],
        rows,
    )


if __name__ == "__main__":
    main()
