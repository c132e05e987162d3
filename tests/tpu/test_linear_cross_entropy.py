"""What the TPU compiler allocates for a loss in chunks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lowrank_optax as lro

pytestmark = pytest.mark.slow

TOKENS, WIDTH, WORDS = 2048, 2048, 32_000


def test_no_logits_and_no_float32_sum_of_the_head_are_allocated(
    allocated_for: Callable[..., Any],
) -> None:
    """All logits are 250 MiB in float32, as is such a sum."""
    of = jax.ShapeDtypeStruct
    hidden, head = of((TOKENS, WIDTH), jnp.bfloat16), of((WIDTH, WORDS), jnp.bfloat16)
    assert lro.losses.chunk_plan(hidden, head).design == "recompute"
    step = jax.value_and_grad(lro.losses.linear_cross_entropy, (0, 1))
    compiled, temporary = allocated_for("v5e", step, hidden, head, of((TOKENS,), jnp.int32))
    print(f"temporaries {temporary / 2**20:.1f} MiB")
    assert temporary < 24 * 2**20
    assert f"f32[{TOKENS},{WORDS}]" not in compiled.as_text()
