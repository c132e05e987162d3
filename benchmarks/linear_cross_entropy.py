"""Memory and time of `lro.losses.linear_cross_entropy` over the loss with logits.

    python benchmarks/linear_cross_entropy.py --memory    # compiled for a v5e; needs libtpu, no TPU
    python benchmarks/linear_cross_entropy.py --time      # on the device at hand
    python benchmarks/linear_cross_entropy.py --markdown  # both tables, from the results file

Value and gradients by hidden states and head, or by hidden states alone where the head is frozen.
Memory is what the compiler assigns to the program, without arguments and gradients. Times are
lower quartiles over rounds in which all take their turn, as ratios to the plain loss.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

from family_table import Column, print_columns
import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import Stepper
from tpu_compiler import allocated_bytes, device_of, lowered_for

import lowrank_optax as lro

RESULTS = Path(__file__).parent / "results" / "linear_cross_entropy.json"
TOKENS, WIDTH, VOCABULARIES = 2048, 2048, (32_000, 152_000)  # compiled
TIMED = (512, 768, 8_000)  # tokens, width, words
FROZEN = ", frozen head"


def plain(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss as it is usually written."""
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def chunked(**options: Any) -> Callable[..., jax.Array]:
    """The loss in chunks."""

    def loss(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
        return lro.losses.linear_cross_entropy(hidden, head, labels, **options)

    return loss


LOSSES = {
    "plain": plain,
    "recompute": chunked(design="recompute"),
    "forward": chunked(design="forward"),
    "auto": chunked(),
}


def steps() -> dict[str, Callable[..., Any]]:
    """Value and gradients of each loss, with a trained and with a frozen head."""
    trained = {name: jax.value_and_grad(loss, (0, 1)) for name, loss in LOSSES.items()}
    frozen = {name + FROZEN: jax.value_and_grad(loss) for name, loss in LOSSES.items()}
    return trained | frozen


def shapes(tokens: int, width: int, words: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of hidden states, head and labels."""
    of = jax.ShapeDtypeStruct
    return of((tokens, width), dtype), of((width, words), dtype), of((tokens,), jnp.int32)


def plan(name: str, arguments: Any) -> str:
    """The design that is taken, and its chunks."""
    loss, frozen = name.removesuffix(FROZEN), name.endswith(FROZEN)
    if loss == "plain":
        return ""
    plan = lro.losses.chunk_plan(*arguments[:2], head_trained=not frozen, design=loss)
    return f"{plan.design}, {plan.tokens} × {plan.words}"


def lowered_step(name: str, words: int, chip: str) -> jax.stages.Lowered:
    """The program for a chip that need not be there."""
    return lowered_for(device_of(chip), steps()[name], *compiled_shapes(words))


def compiled_shapes(words: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the arguments of a program that is compiled."""
    return shapes(TOKENS, WIDTH, words, jnp.bfloat16)


def temporary_mib(name: str, words: int, chip: str) -> float:
    """What the compiler assigns to a program beside its arguments and results."""
    size = allocated_bytes(lowered_step, name, words, chip)
    assert size is not None
    arguments = compiled_shapes(words)
    given = jax.tree.leaves((arguments, jax.eval_shape(steps()[name], *arguments)))
    return (size - sum(x.size * x.dtype.itemsize for x in given)) / 2**20


def timed(rounds: int) -> dict[str, float]:
    """Lower quartiles in milliseconds."""
    tokens, width, words = TIMED
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(width, words)) / np.sqrt(width), jnp.float32)
    labels = jnp.asarray(rng.integers(0, words, tokens))
    steppers = {}
    for name, step in steps().items():
        whole = lambda _, *arguments, step=step: step(*arguments)
        carry = jax.eval_shape(step, hidden, head, labels)
        carry = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry)
        steppers[name] = Stepper(whole, carry, hidden, head, labels)
    seconds = [[stepper() for stepper in steppers.values()] for _ in range(rounds + 2)]
    quartiles = np.quantile(seconds[2:], 0.25, axis=0) * 1e3
    return dict(zip(steppers, quartiles.tolist(), strict=True))


def main() -> None:
    """Measures what is asked for, and prints what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="compile for --chip")
    parser.add_argument("--time", action="store_true", help="run on the device at hand")
    parser.add_argument("--only", default="", help="designs with this in their name")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.memory:
        for words in VOCABULARIES:
            figures = content.setdefault("memory", {}).setdefault(f"{args.chip}, {words}", {})
            for name in steps():
                if args.only in name:
                    figures[name] = round(temporary_mib(name, words, args.chip), 1)
                    print(words, name, figures[name], flush=True)
    if args.time:
        device = jax.devices()[0].device_kind
        content.setdefault("milliseconds", {})[device] = timed(args.rounds)
    args.output.write_text(json.dumps(content, indent=1) + "\n")

    names = list(steps())
    for key, figures in content.get("memory", {}).items():
        arguments = compiled_shapes(int(key.split(", ")[1]))
        columns = [
            Column("loss", str),
            Column("design, tokens × words", lambda name: plan(name, arguments)),  # noqa: B023
            Column("temporaries, MiB", lambda name: f"{figures.get(name, np.nan):,.1f}"),  # noqa: B023
        ]
        print_columns(f"{key} words", names, columns, args.markdown)
    for device, figures in content.get("milliseconds", {}).items():
        arguments = shapes(*TIMED, jnp.float32)
        base = lambda name: figures["plain" + FROZEN * name.endswith(FROZEN)]  # noqa: B023
        columns = [
            Column("loss", str),
            Column("design, tokens × words", lambda name: plan(name, arguments)),  # noqa: B023
            Column("ms", lambda name: f"{figures[name]:.1f}"),  # noqa: B023
            Column("over plain", lambda name: f"{figures[name] / base(name):.2f}"),  # noqa: B023
        ]
        print_columns(f"{device}, {TIMED} tokens, width, words", names, columns, args.markdown)


if __name__ == "__main__":
    main()
