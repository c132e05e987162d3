"""What the TPU compiler makes of steps with moments in 8 bits, at the size of llama-1b."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config

pytestmark = pytest.mark.slow


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def llama_1b() -> Any:
    """Every weight of the model, as shapes."""
    model = nnx.eval_shape(lambda: Decoder(decoder_config("llama-1b"), rngs=nnx.Rngs(0)))
    return nnx.as_pure(nnx.split(model)[1])


def two_of_its_stacks() -> Any:
    """An attention weight and an MLP weight of its 24 layers."""
    shapes = {"query": (24, 2048, 2048), "down": (24, 5461, 2048)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "weights", [two_of_its_stacks, pytest.param(llama_1b, marks=pytest.mark.full)]
)
def test_no_moment_is_whole_in_float32_in_a_fused_step(compile_for: Any, weights: Any) -> None:
    """In bfloat16, the arrays row-major: see the page on kernels."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weights())
    smallest_stack = 4 * 24 * 2048 * 2048  # bytes of a moment of one attention weight in float32
    composed, fused = lro.low_bit(optax.adamw(1e-3)), lro.fused_adamw(1e-3)
    state = jax.eval_shape(fused.init, params)

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = composed.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    before = jax.eval_shape(composed.init, params)
    compiled = compile_for("v5e", step, params, before, params, donate_argnums=(1, 2))
    temporaries = [compiled.memory_analysis().temp_size_in_bytes]
    compiled = compile_for(
        "v5e", fused.step, params, state, params, donate_argnums=(1, 2), row_major=True
    )
    memory = compiled.memory_analysis()
    temporaries.append(memory.temp_size_in_bytes)
    least = 3 * nbytes(params) + 2 * nbytes(state)
    accessed = compiled.cost_analysis()["bytes accessed"] / least
    print(f"temporaries {[x / 1e9 for x in temporaries]} GB; {accessed:.2f} times the least bytes")
    assert temporaries[0] > 2 * smallest_stack
    assert temporaries[1] < smallest_stack / 8
    assert memory.alias_size_in_bytes >= nbytes((params, state))
    assert accessed < 1.5
