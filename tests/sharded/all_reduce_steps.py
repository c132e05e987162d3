"""Steps of every subspace rule on eight CPU devices, with the all-reduce of data parallelism.

LAPACK's threads for a batch would wait for threads that wait in a collective, and the reverse. A
program of its own: where a step waits for ever, only its process can be ended.
"""

import itertools
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import optax

import lowrank_optax as lro

RANK, WIDTH = 24, 128
# LAPACK would take threads of the pool for a batch of this size.
SHAPES = {name: (3, WIDTH, 160 + 32 * i) for i, name in enumerate("abc")}
randomized = lro.subspaces.randomized_svd(RANK)
RULES = {
    "adaptive_rank": lro.subspaces.adaptive_rank(randomized),
    "both_sides": lro.subspaces.both_sides(randomized),
    "dct": lro.subspaces.dct(RANK),
    "dct, fft": lro.subspaces.dct(RANK, transform="fft"),
    "fixed": lro.subspaces.fixed(jnp.eye(WIDTH, RANK)),
    "online_pca": lro.subspaces.online_pca(RANK),
    "power_iteration": lro.subspaces.power_iteration(RANK),
    "quantized": lro.subspaces.quantized(randomized, bits=8),
    "random": lro.subspaces.random(RANK),
    "randomized_svd": randomized,
    "svd": lro.subspaces.svd(RANK),
}


def loss(params, batch):
    for weight in itertools.chain(*params.values()):
        batch = jnp.tanh(batch @ weight @ weight.T)
    return jnp.mean(jnp.square(batch))


def check(program: str) -> None:
    """An all-reduce, and no call of LAPACK for more than one matrix."""
    assert "all-reduce" in program
    calls = [line for line in program.splitlines() if 'custom_call_target="lapack' in line]
    assert not [line for line in calls if re.search(r"f32\[\d+,\d+,\d", line)]


def main(leaves: int) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    normal = lambda shape: jax.random.normal(jax.random.key(0), shape)
    params = {name: normal(shape) / WIDTH**0.5 for name, shape in [*SHAPES.items()][:leaves]}
    params, batch = jax.device_put((params, normal((64, WIDTH))), (whole, rows))
    for name, rule in RULES.items():
        print(name, flush=True)
        tx = lro.scale_by_projection(
            optax.scale_by_adam(),
            rule,
            refresh_every=1,
            weight_dimension_numbers=lro.WeightDimensionNumbers(-2, -1),
        )

        @jax.jit
        def step(params, state, batch, tx=tx):
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        new, state = params, jax.jit(tx.init)(params)
        program = step.lower(new, state, batch).compile()
        check(program.as_text())
        for _ in range(2):
            new, state = program(new, state, batch)
        jax.block_until_ready(new)
    print("done", flush=True)


if __name__ == "__main__":
    main(leaves=int(sys.argv[1]))
