"""What the kernels of `low_bit_adam` save: bytes and temporaries, compiled for a TPU.

    python benchmarks/kernels.py                  # for a v5e, without one: needs libtpu
    python benchmarks/kernels.py --chip v6e
    python benchmarks/kernels.py --row-major      # with all arguments and results in that order

A step reads gradient, codes and scales once and writes parameter, codes and scales once: that is
the floor. Bytes are those the compiled program accesses by the compiler's own account, in which a
kernel counts as its operands and results, and copies around it as what they move. Times on a device
are those of `accelerator.py`.
"""

import argparse
from collections.abc import Callable
import functools
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from timing import print_table

from lowrank_optax.kernels import AdamScalars, low_bit_adam
from lowrank_optax.quantization import BlockFormat, code_map, quantize

SCALARS = AdamScalars(1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.001)
LOW_BIT = [(24, 2048, 5461), (4096, 11008), (32000, 2048)]


class Case(NamedTuple):
    """A step: its name, its function, and the shapes of what it replaces and what it reads."""

    name: str
    step: Callable[..., Any]
    carry: Any
    given: Any

    @property
    def floor(self) -> int:
        return nbytes(self.given) + 2 * nbytes(self.carry)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def formats_of(bits: int) -> tuple[BlockFormat, BlockFormat]:
    """Dynamic codes, in blocks of the default sizes of `low_bit`."""
    block = 256 if bits == 8 else 128
    second = code_map("dynamic", bits, signed=False)
    return BlockFormat(code_map("dynamic", bits), block), BlockFormat(second, block, True)


def moments_of(shape: tuple[int, ...], bits: int) -> Any:
    """Shapes of both moments."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tuple(jax.eval_shape(functools.partial(quantize, fmt=f), x) for f in formats_of(bits))


def low_bit_case(shape: tuple[int, ...], bits: int, dtype: Any) -> Case:
    """A step of `low_bit_adam`."""

    def step(carry: Any, gradient: jax.Array, implementation: Any) -> Any:
        param, first, second = carry
        options = {"formats": formats_of(bits), "implementation": implementation}
        return low_bit_adam(gradient, first, second, param, SCALARS, **options)

    param = jax.ShapeDtypeStruct(shape, dtype)
    name = f"{' × '.join(map(str, shape))}, {bits} bits, {jnp.dtype(dtype).name}"
    return Case(name, step, (param, *moments_of(shape, bits)), (param,))


def cases(scale: int) -> list[Case]:
    """All cases, each size divided by ``scale``."""
    less = lambda shape: tuple(max(1, x // scale) for x in shape)
    return [low_bit_case(less(s), b, jnp.float32) for s in LOW_BIT for b in (8, 4)]


def compiled_row(case: Case, chip: str, row_major: bool) -> list[Any]:
    """Bytes accessed over the floor and gigabytes of temporaries, of reference and kernel."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
    device = SingleDeviceSharding(topology.devices[0])
    where = lambda x: Format(Layout(tuple(range(x.ndim))), device) if row_major else device
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x))
    told = {"out_shardings": jax.tree.map(where, case.carry)}
    row: list[Any] = [case.name, case.floor / 1e9]
    for implementation in ("xla", "mosaic_tpu"):
        step = functools.partial(case.step, implementation=implementation)
        arguments = jax.tree.map(place, (case.carry, *case.given))
        try:
            compiled = jax.jit(step, donate_argnums=0, **told).lower(*arguments).compile()
        except NotImplementedError as error:
            print(f"{case.name}: {error}")
            row += ["–", "–"]
            continue
        moved = compiled.cost_analysis()["bytes accessed"]
        row += [moved / case.floor, compiled.memory_analysis().temp_size_in_bytes / 1e9]
    return row


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--row-major", action="store_true", help="arrays not stored transposed")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes by this")
    args = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks the network where it is
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    columns = ["step", "floor GB", "XLA / floor", "XLA temp GB"]
    columns += ["kernel / floor", "kernel temp GB"]
    rows = [compiled_row(case, args.chip, args.row_major) for case in cases(args.scale)]
    print_table(f"low_bit_adam, {args.chip}", columns, rows)


if __name__ == "__main__":
    main()
