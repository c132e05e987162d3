"""The kernels as the TPU compiler takes them: registers, VMEM, copies around them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from kernels.steps import SCALARS, formats_of
import pytest

from lowrank_optax.kernels import low_bit_adam
from lowrank_optax.kernels.adam import coded_shapes
from lowrank_optax.quantization import Quantized

pytestmark = pytest.mark.slow
SCALAR_STRUCTS = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), SCALARS)


def _struct(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _coded(shape: tuple[int, ...], formats: Any) -> list[Quantized]:
    shapes = [coded_shapes(shape, fmt) for fmt in formats]
    return [Quantized(_struct(codes, jnp.uint8), _struct(scales)) for codes, scales in shapes]


def _nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _assert_in_one_pass(compiled: Any, donated: Any, given: Any) -> None:
    """In place, no temporaries to speak of, and few bytes moved beside each operand once.

    At these sizes those are scales in padded rows, and what is fetched to faster memory.
    """
    memory, moved = compiled.memory_analysis(), compiled.cost_analysis()["bytes accessed"]
    assert "tpu_custom_call" in compiled.as_text()
    assert memory.alias_size_in_bytes >= _nbytes(donated)
    assert memory.temp_size_in_bytes < 0.5 * _nbytes(donated)
    assert moved < 3 * (_nbytes(given) + 2 * _nbytes(donated))


@pytest.mark.combinations(1)
@pytest.mark.parametrize(
    ("shape", "bits", "dtype"),
    [
        ((512, 1024), 8, jnp.float32),
        ((512, 1024), 4, jnp.bfloat16),
        ((3, 6, 135, 1024), 4, jnp.float32),
        ((72, 1000, 512), 8, jnp.bfloat16),
    ],
)
def test_low_bit_adam_is_one_pass_in_place(
    compile_for: Callable[..., Any], chip: str, shape: tuple[int, ...], bits: int, dtype: Any
) -> None:
    formats = formats_of(bits, 256)
    step = lambda *args: low_bit_adam(*args, formats=formats)
    gradient, moments = _struct(shape, dtype), _coded(shape, formats)
    arguments = (gradient, *moments, gradient, SCALAR_STRUCTS)
    compiled = compile_for(chip, step, *arguments, donate_argnums=(1, 2, 3))
    _assert_in_one_pass(compiled, (moments, gradient), gradient)
