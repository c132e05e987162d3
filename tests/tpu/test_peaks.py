"""What a TPU's compiler allocates for a step in slices: the state's savings come off the peak."""

import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config

pytestmark = pytest.mark.slow

GIB = 2**30
# Much more than on-chip memory, which is not counted.
STACKS = {"query": (24, 2048, 2048), "up": (24, 2048, 5632), "embed": (32000, 2048)}
STACKED = lambda tree: jax.tree.map(
    lambda x: lro.WeightDimensionNumbers(-2, -1) if x.ndim > 2 else None, tree
)
GALORE = {"rank": 128, "weight_dimension_numbers": STACKED}
METHODS = {
    "low_bit-8": lambda: lro.low_bit(optax.adamw(1e-3)),
    "low_bit-4": lambda: lro.low_bit(optax.adamw(1e-3), bits=4),
    "galore-8": lambda: lro.galore(1e-2, state_bits=8, basis_bits=16, **GALORE),
    "apollo": lambda: lro.apollo(1e-2, **GALORE),
}


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def allocated(program: Any) -> int:
    memory = program.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes


def compiled(compile_for: Any, tx: Any) -> tuple[Any, int]:
    """A step whose gradients are made on the way, and the bytes of the state."""

    def step(params: Any, state: Any) -> Any:
        gradients = jax.lax.optimization_barrier(jax.tree.map(jnp.sin, params))
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = {name: jax.ShapeDtypeStruct(s, jnp.bfloat16) for name, s in STACKS.items()}
    state = jax.eval_shape(tx.init, params)
    return compile_for("v5e", step, params, state, donate_argnums=(0, 1)), nbytes(state)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n == "apollo")) for n in METHODS]
)
def test_what_a_state_saves_comes_off_the_peak(compile_for: Any, name: str) -> None:
    adamw, of_adamw = compiled(compile_for, optax.adamw(1e-3))
    program, kept = compiled(compile_for, METHODS[name]())
    one_slice = 16 * 2048 * 5632
    assert allocated(adamw) - allocated(program) > 0.9 * (of_adamw - kept) - one_slice
    for shape in STACKS.values():  # nothing of a whole stack in float32
        sizes = ",".join(map(str, shape))
        assert not re.search(
            rf"= f32\[{sizes}\]\S* (copy|fusion|convert|broadcast)\(", entry(program)
        )


def entry(program: Any) -> str:
    """The computation that runs first; the fused ones hold nothing in memory."""
    return program.as_text().split("\nENTRY")[1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "most"),
    [("galore-8", 7.7), ("low_bit-8", 10.5), ("low_bit-4", 9.9), ("galore", 9.0)],
)
def test_a_whole_step_of_llama_1b(compile_for: Any, name: str, most: float) -> None:
    model = nnx.eval_shape(
        lambda: Decoder(decoder_config("llama-1b"), rngs=nnx.Rngs(0), remat="full")
    )
    graphdef, params = nnx.split(model)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), nnx.as_pure(params)
    )
    options = {"rank": 256, "weight_dimension_numbers": lro.weight_dimension_numbers(model)}
    tx = {
        "galore-8": lambda: lro.galore(1e-2, state_bits=8, basis_bits=16, **options),
        "galore": lambda: lro.galore(1e-2, **options),
    }.get(name, METHODS.get(name))()

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(tokens[:, :-1]).astype(jnp.float32)
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return loss.mean()

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        gradients = jax.grad(loss)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    tokens = jax.ShapeDtypeStruct((1, 257), jnp.int32)
    state = jax.eval_shape(tx.init, params)
    program = compile_for("v5e", step, params, state, tokens, donate_argnums=(0, 1))
    assert allocated(program) < most * GIB
