"""Adam in a fixed subspace: every implementation against NumPy."""

import functools
from typing import Any

from close import assert_close
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from kernels.steps import SCALARS, Formats, Step, assert_moments, expected_of, formats_of, step_of
import numpy as np
import pytest

from lowrank_optax.kernels import projected_adam
from lowrank_optax.kernels.projected_adam.tiles import stored_by_columns

# Shape, rank, axis, bits of the moments.
CASES = {
    "rows, columns beyond a tile": ((16, 300), 8, -2, 32),
    "columns, rows beyond a tile": ((300, 20), 5, -1, 32),
    "columns, stacked": ((2, 3, 40, 16), 8, -1, 32),
    "rows, stored by columns": ((256, 130), 16, -2, 32),
    "columns, stored by columns": ((128, 300), 16, -1, 32),
    "rows in pieces": ((256, 384), 16, -2, 32),
    "rows, 8 bits": ((40, 300), 32, -2, 8),
    "rows, 4 bits, stacked": ((2, 70, 300), 64, -2, 4),
    "columns, 8 bits": ((70, 130), 128, -1, 8),
    "columns, 4 bits": ((128, 130), 128, -1, 4),
}


@functools.partial(jax.jit, static_argnames=("axis", "formats", "implementation", "interpret"))
def run_jitted(step: Step, **options: Any) -> Any:
    return projected_adam(*step.arguments, SCALARS, **options)


def run(
    implementation: str,
    step: Step,
    axis: int,
    formats: Formats | None = None,
    interpret: Any = True,
) -> Any:
    interpret = interpret if implementation != "xla" else False
    options = {"formats": formats, "implementation": implementation, "interpret": interpret}
    return run_jitted(step, axis=axis, **options)


def assert_agrees(step: Step, axis: int, formats: Formats | None, found: Any) -> None:
    """Parameter (or update) and moments are those of NumPy."""
    wanted, wanted_moments = expected_of(step, formats, axis)
    assert_close(found[0], wanted, 100)
    assert_moments(found[1:], wanted_moments, formats)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "xla"])
class TestEveryImplementation:
    """Kernels are interpreted: this is a CPU."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", CASES)
    def test_agrees_with_float64(self, implementation: str, name: str) -> None:
        shape, rank, axis, bits = CASES[name]
        formats = None if bits == 32 else formats_of(bits, 128)
        step = step_of(shape, formats, rank, axis)
        assert_agrees(step, axis, formats, run(implementation, step, axis, formats))

    @pytest.mark.parametrize("axis", [-2, -1])
    def test_without_a_parameter_returns_the_update(self, implementation: str, axis: int) -> None:
        step = step_of((24, 40), None, 8, axis)._replace(param=None)
        assert_agrees(step, axis, None, run(implementation, step, axis))

    @pytest.mark.parametrize("axis", [-2, -1])
    def test_a_bfloat16_gradient_is_projected_in_full(self, implementation: str, axis: int) -> None:
        step = step_of((24, 40), None, 8, axis, jnp.bfloat16)._replace(param=None)
        found = run(implementation, step, axis)
        assert found[0].dtype == jnp.float32
        assert_agrees(step, axis, None, found)

    def test_under_vmap_each_is_as_alone(self, implementation: str) -> None:
        steps = [step_of((24, 40), None, 8, seed=i) for i in range(3)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *steps)
        together = jax.jit(jax.vmap(lambda step: run(implementation, step, -2)))(stacked)
        for i, step in enumerate(steps):
            alone = run(implementation, step, -2)
            for x, y in zip(together, alone, strict=True):
                assert_close(np.asarray(x)[i], y, 100)


@pytest.mark.slow
def test_the_tpu_kernel_has_no_races_and_reads_nothing_unwritten() -> None:
    formats = formats_of(8, 128)
    step = step_of((32, 512), formats, 32)
    params = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    assert_agrees(step, -2, formats, run("mosaic_tpu", step, -2, formats, interpret=params))


def test_matrices_are_stored_so_that_they_are_padded_less() -> None:
    assert stored_by_columns((2048, 5461))
    assert not stored_by_columns((5461, 2048))
    assert not stored_by_columns((4096, 11008))


@pytest.mark.parametrize(
    ("shape", "rank", "axis", "bits", "why"),
    [
        ((65536, 256), 512, -2, 32, "do not fit"),
        ((40, 300), 20, -2, 8, "not in whole chunks"),
        ((40, 300), 32, -2, 4, "not packed along rows"),
        ((300, 40), 20, -1, 8, "shorter than a block"),
    ],
)
def test_the_tpu_kernel_says_what_it_does_not_support(shape, rank, axis, bits, why) -> None:
    formats = None if bits == 32 else formats_of(bits, 128)
    moment = (rank, shape[1]) if axis == -2 else (shape[0], rank)
    small = step_of(moment, formats)
    struct = jax.ShapeDtypeStruct(shape, jnp.float32)
    basis = jax.ShapeDtypeStruct((shape[axis], rank), jnp.float32)
    step = Step(struct, basis, small.first, small.second, struct)
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: .*{why}"):
        jax.eval_shape(lambda step: run("mosaic_tpu", step, axis, formats), step)
    jax.eval_shape(lambda step: run("xla", step, axis, formats), step)


def test_arguments_that_do_not_agree_are_refused() -> None:
    step = step_of((24, 40), None, 8)
    with pytest.raises(ValueError, match="axis=0 must be -2"):
        run("xla", step, 0)
    with pytest.raises(ValueError, match=r"basis \(24, 8\) does not fit"):
        run("xla", step, -1)
    with pytest.raises(ValueError, match="first is of shape"):
        run("xla", step._replace(first=step.param), -2)
    with pytest.raises(ValueError, match="first is no Quantized"):
        run("xla", step, -2, formats_of(8, 128))
