"""What a TPU's compiler allocates for attention: in chunks, nothing of the size of all pairs."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lowrank_optax.layers import dot_product_attention

pytestmark = pytest.mark.slow

HEADS, WIDTH = 4, 128


def compiled(allocated_for: Callable[..., Any], name: Any, length: int) -> tuple[Any, int]:
    """Output and gradients of causal attention of one sequence, and the bytes of temporaries."""
    attention = functools.partial(dot_product_attention, is_causal=True, implementation=name)

    def run(gradient: jax.Array, *arrays: jax.Array) -> Any:
        output, backward = jax.vjp(attention, *arrays)
        return output, backward(gradient)

    array = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16)
    return allocated_for("v5e", run, *[array] * 4)


@pytest.mark.parametrize("name", ["chunked", pytest.param("splash", marks=pytest.mark.full)])
def test_no_array_has_all_pairs_and_temporaries_are_linear_in_the_length(
    allocated_for: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    length = 4096
    program, temporary = compiled(allocated_for, name, length)
    assert f"{length},{length}" not in program.as_text()
    in_float32 = 4 * length * HEADS * WIDTH
    # Of queries, keys, values, output and their gradients; one chunk of scores is 16 MiB at most.
    assert temporary < 8 * in_float32 + 2**25
