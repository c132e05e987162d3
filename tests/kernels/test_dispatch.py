"""Which implementation runs: by name, by support, by platform, by devices."""

import functools
import re
import sys

from close import assert_close
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels.steps import SCALARS, formats_of, step_of
import numpy as np
import pytest

from lowrank_optax.kernels import low_bit_adam
from lowrank_optax.kernels.dispatch import dispatch
from tests.quantization.tables import assert_same_codes

FORMATS = formats_of(8, 128)


def step(*arguments, implementation=None, **options):
    return low_bit_adam(
        *arguments, SCALARS, formats=FORMATS, implementation=implementation, **options
    )


@pytest.fixture(name="arguments")
def fixture_arguments():
    return step_of((64, 256), FORMATS)


@functools.cache
def reference_results():
    """What the reference makes of the `arguments`."""
    step_jitted = jax.jit(functools.partial(step, implementation="xla"))
    return step_jitted(*step_of((64, 256), FORMATS))


def assert_same(found, wanted) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if y.dtype == jnp.uint8:
            assert_same_codes(x, y, 8)
        else:
            assert_close(x, y)


def on_mesh(arguments, axis_type: AxisType):
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(axis_type,))
    return mesh, jax.device_put(arguments, NamedSharding(mesh, P("x")))


@pytest.mark.parametrize("implementation", ["mosaic", "gpu", ("xla", "pallas"), ()])
def test_an_unknown_name_is_refused(arguments, implementation) -> None:
    with pytest.raises(ValueError, match=r"must be None, or one or some of xla, mosaic_tpu, tri"):
        step(*arguments, implementation=implementation)


def test_a_kernel_whose_compiler_jax_no_longer_has_is_refused(arguments, monkeypatch) -> None:
    from jax.experimental import pallas
    import jax.experimental.pallas.triton

    monkeypatch.delattr(pallas, "triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delitem(sys.modules, "lowrank_optax.kernels.low_bit_adam_triton", raising=False)
    with pytest.raises(NotImplementedError, match=rf"triton: jax {jax.__version__} does not have"):
        step(*arguments, implementation="triton")
    jax.eval_shape(step, *arguments)


def test_interpret_is_for_one_kernel(arguments) -> None:
    for implementation in (None, "xla", ("mosaic_tpu", "xla")):
        with pytest.raises(ValueError, match="is for one kernel"):
            step(*arguments, implementation=implementation, interpret=True)


@pytest.mark.slow
def test_none_is_the_reference_on_a_cpu(arguments) -> None:
    assert_same(step(*arguments), reference_results())
    assert_same(jax.jit(step)(*arguments), reference_results())
    both = functools.partial(step, implementation=("mosaic_tpu", "xla"))
    assert_same(jax.jit(both)(*arguments), reference_results())


@pytest.mark.slow
def test_under_vmap_none_is_the_reference_on_a_cpu(arguments) -> None:
    stacked = jax.tree.map(lambda x: np.stack([x, x]), arguments)
    together = jax.jit(jax.vmap(step))(*stacked)
    assert_same(jax.tree.map(lambda x: np.asarray(x)[1], together), reference_results())


def test_a_kernel_named_alone_does_not_run_elsewhere(arguments) -> None:
    with pytest.raises(ValueError, match="interpret"):
        step(*arguments, implementation="mosaic_tpu")


def test_names_without_the_reference_raise_with_all_reasons() -> None:
    arguments = step_of((1000,), FORMATS)
    with pytest.raises(NotImplementedError, match=r"^low_bit_adam .*mosaic_tpu: .*; triton: "):
        step(*arguments, implementation=("mosaic_tpu", "triton"))


def test_a_kernel_that_the_operation_does_not_have_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"^add .*triton: there is no such kernel"):
        dispatch("add", jnp.add, {}, "triton", False, jnp.ones(2), jnp.ones(2))
    assert_close(dispatch("add", jnp.add, {}, ("triton", "xla"), False, 1.0, 2.0), np.float32(3))


@pytest.mark.parametrize(
    ("transform", "axis_type"),
    [
        pytest.param(jax.jit, AxisType.Auto, id="jit-auto"),
        pytest.param(jax.jit, AxisType.Explicit, id="jit-explicit"),
        pytest.param(lambda f: f, AxisType.Explicit, id="eager-explicit", marks=pytest.mark.slow),
        pytest.param(lambda f: f, AxisType.Auto, id="eager-auto", marks=pytest.mark.full),
    ],
)
def test_sharded_arguments_get_the_reference(arguments, axis_type, transform) -> None:
    mesh, sharded = on_mesh(arguments, axis_type)
    with jax.set_mesh(mesh):
        assert_same(transform(step)(*sharded), reference_results())
        with pytest.raises(NotImplementedError, match="cannot be partitioned"):
            step(*sharded, implementation="mosaic_tpu", interpret=True)


@pytest.mark.slow
def test_sharding_that_only_the_compiler_sees_gets_the_reference(arguments) -> None:
    """No mesh is set, so that nothing tells while the step is traced."""
    mesh, _ = on_mesh(arguments, AxisType.Auto)
    where = NamedSharding(mesh, P("x"))
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(arguments)]
    rebuild = jax.tree.structure(arguments).unflatten
    sharded = jax.jit(lambda *x: step(*rebuild(x)), in_shardings=where)
    assert (
        "tpu_custom_call" not in export.export(sharded, platforms=["tpu"])(*structs).mlir_module()
    )
    alone = jax.jit(lambda *x: step(*rebuild(x)))
    assert "tpu_custom_call" in export.export(alone, platforms=["tpu"])(*structs).mlir_module()


@pytest.mark.slow
def test_inside_shard_map_the_kernel_runs_on_what_a_device_has(arguments) -> None:
    mesh, sharded = on_mesh(arguments, AxisType.Auto)

    def local(*x):
        assert x[0].shape == (16, 256)
        return step(*x, implementation="mosaic_tpu", interpret=True)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    assert_same(jax.jit(mapped)(*sharded), reference_results())


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_none_is_the_kernel_on_a_tpu(arguments, check_vma: bool) -> None:
    mesh, _ = on_mesh(arguments, AxisType.Auto)
    specs = {"mesh": mesh, "in_specs": P("x"), "out_specs": P("x"), "check_vma": check_vma}
    mapped = jax.jit(jax.shard_map(step, **specs))
    exported = export.export(mapped, platforms=["tpu"])(*arguments)
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.slow
def test_the_compiled_step_is_written_over_its_donated_arguments(arguments) -> None:
    options = {"implementation": "mosaic_tpu", "interpret": True}
    donating = jax.jit(lambda *x: step(*x, **options), donate_argnums=(1, 2, 3))
    text = donating.lower(*arguments).compile().as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases is not None
    assert aliases.group(1).count("alias") == 5
    given = [x.copy() for x in jax.tree.leaves(arguments)]
    rebuilt = jax.tree.structure(arguments).unflatten(given)
    donating(*rebuilt)
    assert all(x.is_deleted() for x in given[1:])
