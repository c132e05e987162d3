"""Rotations by blocks without a closed form compile for a TPU, whose eigenvectors are complex."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lowrank_optax.layers.comrope import block_exponentials


@pytest.mark.full
def test_exponentials_of_blocks_of_8_compile(chip: str, compile_for: Any) -> None:
    times = jax.ShapeDtypeStruct((16, 2, 2), jnp.float32)
    blocks = jax.ShapeDtypeStruct((2, 2, 8, 8), jnp.float32)
    assert compile_for(chip, block_exponentials, times, blocks).cost_analysis()["flops"] > 0
