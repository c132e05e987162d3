"""Kernels lowered for devices that are not here: block shapes and primitives they allow."""

from collections.abc import Callable
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
from kernels.steps import SCALARS, formats_of
import pytest

from lowrank_optax.kernels import low_bit_adam
from lowrank_optax.kernels.adam import coded_shapes
from lowrank_optax.quantization import Quantized

TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


def struct(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def coded(shape: tuple[int, ...], formats: Any) -> list[Quantized]:
    shapes = [coded_shapes(shape, fmt) for fmt in formats]
    return [Quantized(struct(codes, jnp.uint8), struct(scales)) for codes, scales in shapes]


def low_bit(shape: tuple[int, ...], bits: int, implementation: Any) -> tuple[Callable, Any]:
    formats = formats_of(bits, 256)

    def step(g, m, v, p):
        options = {"formats": formats, "implementation": implementation}
        return low_bit_adam(g, m, v, p, SCALARS, **options)

    return step, (struct(shape), *coded(shape, formats), struct(shape))


def has_kernel(exported: export.Exported) -> bool:
    text = exported.mlir_module()
    return "tpu_custom_call" in text or "triton" in text


@pytest.mark.combinations(2)
@pytest.mark.parametrize("shape", [(300, 600), (1, 256), (2, 24, 71, 512), (128, 256)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("implementation", ["mosaic_tpu", None], ids=str)
def test_low_bit_adam_lowers_for_tpus(shape: Any, bits: int, implementation: Any) -> None:
    step, arguments = low_bit(shape, bits, implementation)
    refused = bits == 4 and shape in [(300, 600), (1, 256)]
    if refused and implementation:
        with pytest.raises(NotImplementedError, match="packed"):
            export.export(jax.jit(step), platforms=["tpu"])(*arguments)
        return
    exported = export.export(jax.jit(step), platforms=["tpu"])(*arguments)
    assert has_kernel(exported) != refused


@pytest.mark.combinations(1)
@pytest.mark.parametrize("shape", [(300, 512), (2, 24, 7, 256), (128, 256)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("implementation", ["triton", None], ids=str)
def test_low_bit_adam_lowers_for_gpus(shape: Any, bits: int, implementation: Any) -> None:
    step, arguments = low_bit(shape, bits, implementation)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        exporter = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=[TRITON])
        assert has_kernel(exporter(*arguments))


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_other_platforms_get_the_reference(platform: str) -> None:
    step, arguments = low_bit((8, 256), 8, None)
    assert not has_kernel(export.export(jax.jit(step), platforms=[platform])(*arguments))


def test_an_export_to_several_platforms_at_once_has_the_reference_and_runs() -> None:
    step, arguments = low_bit((8, 256), 8, None)
    exported = export.export(jax.jit(step), platforms=["cpu", "tpu", "cuda"])(*arguments)
    assert not has_kernel(exported)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments)
    assert exported.call(*zeros)[0].shape == (8, 256)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_under_vmap_kernels_lower_too(platform: str) -> None:
    step, arguments = low_bit((8, 256), 8, None)
    stacked = jax.tree.map(lambda x: struct((3, *x.shape), x.dtype), arguments)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        exporter = export.export(
            jax.jit(jax.vmap(step)), platforms=[platform], disabled_checks=[TRITON]
        )
        assert has_kernel(exporter(*stacked))
