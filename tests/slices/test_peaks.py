"""What a state saves comes off the peak: compiled programs for the CPU, nothing run."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

LAYERS, SIDE = 12, 256
STACKS = ("query", "up")
RANK = {"rank": SIDE // 8, "weight_dimension_numbers": lro.WeightDimensionNumbers(-2, -1)}
WHOLE = optax.adamw(1e-3)
METHODS = {
    "low_bit-8": lro.low_bit(optax.adamw(1e-3)),
    "low_bit-4": lro.low_bit(optax.adamw(1e-3), bits=4),
    "galore": lro.galore(1e-2, **RANK),
    "galore-8": lro.galore(1e-2, state_bits=8, **RANK),
    "apollo": lro.apollo(1e-2, **RANK),
    "fira": lro.fira(1e-2, **RANK),
    "online": lro.online_subspace_descent(1e-2, **RANK),
    "dct_adamw": lro.dct_adamw(1e-2, **RANK),
    "adarankgrad": lro.adarankgrad(1e-2, **RANK),
}


def params(dtype: Any) -> Any:
    return {name: jax.ShapeDtypeStruct((LAYERS, SIDE, SIDE), dtype) for name in STACKS}


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def compiled(tx: Any, dtype: Any, slices: Any) -> Any:
    """A whole step, parameters and state donated."""
    step = lambda *args: lro.apply_in_slices(tx, *args, slices=slices)
    weights = params(dtype)
    state = jax.eval_shape(tx.init, weights)
    return jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, weights).compile()


def allocated(program: Any) -> int:
    memory = program.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_what_a_state_saves_comes_off_the_peak(name: str) -> None:
    tx, weights = METHODS[name], params(jnp.float32)
    saved = nbytes(jax.eval_shape(WHOLE.init, weights)) - nbytes(jax.eval_shape(tx.init, weights))
    whole, sliced = compiled(WHOLE, jnp.float32, "off"), compiled(tx, jnp.float32, LAYERS)
    lower = allocated(whole) - allocated(sliced)
    assert saved > 0
    # But for what one slice takes, an eighth of these small stacks.
    assert lower > 0.9 * saved - 8 * 4 * SIDE**2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_of_a_whole_stack_is_copied_or_wide(dtype: Any) -> None:
    program = compiled(METHODS["low_bit-8"], dtype, LAYERS)
    whole = rf"\[{LAYERS},{SIDE},{SIDE}\]"
    text = program.as_text()
    assert not re.search(rf"= (f32|bf16|u16|u8){whole}\S* copy\(", text)
    if dtype == jnp.bfloat16:
        assert not re.search(rf"f32{whole}", text)
    # At most a copy of the weights, and one of the gradients, as integers of the same bits.
    bits = 2 * nbytes(params(dtype)) if dtype == jnp.bfloat16 else 0
    assert program.memory_analysis().temp_size_in_bytes < bits + 8 * 4 * SIDE**2


@pytest.mark.slow
def test_smaller_slices_take_less() -> None:
    temporaries = [
        compiled(METHODS["galore"], jnp.float32, slices).memory_analysis().temp_size_in_bytes
        for slices in (3, 6, 12)
    ]
    for more, less in itertools.pairwise(temporaries):
        assert less < 0.65 * more


def test_updates_take_the_memory_of_gradients() -> None:
    tx, weights = lro.in_slices(METHODS["galore-8"], slices=LAYERS), params(jnp.float32)
    state = jax.eval_shape(tx.init, weights)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    memory = update.lower(weights, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(weights)
    assert memory.temp_size_in_bytes < 8 * 4 * SIDE**2


def test_large_leaves_are_cut_by_default_and_small_ones_are_not() -> None:
    tx = lro.low_bit(optax.adamw(1e-3))
    loops = {}
    for rows in (1024, 4096):
        weights = {"embed": jax.ShapeDtypeStruct((rows, 1024), jnp.float32)}
        state = jax.eval_shape(tx.init, weights)
        loops[rows] = str(jax.make_jaxpr(tx.update)(weights, state, weights)).count("scan[")
    assert loops[1024] == 0
    assert loops[4096] > 0
