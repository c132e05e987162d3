"""Random-feature attention on eight devices: the same results, no exchange, linear memory."""

import re
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from lowrank_optax.layers import RandomFeatures, frozen_score_attention, random_feature_attention

SPEC = P("data", None, "heads")  # of operands [batch, length, heads, ...]
COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def operands() -> tuple[jax.Array, ...]:
    """Queries in groups of 2 heads, keys, values, gates and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, heads: jax.random.normal(key, (2, 11, heads, 4))
    gate = jax.nn.sigmoid(jax.random.normal(keys[3], (2, 11, 4)))
    return draw(keys[0], 8), draw(keys[1], 4), draw(keys[2], 4), gate, draw(keys[4], 8)


def output_and_gradients(q: Any, k: Any, v: Any, gate: Any, cotangent: Any) -> Any:
    """Of gated causal attention, and of attention to all keys."""
    features = RandomFeatures(num_features=8, chunk_size=4)
    causal = lambda q, k, v, g: random_feature_attention(
        q, k, v, features=features, is_causal=True, gate=g
    )
    full = lambda q, k, v, g: random_feature_attention(q, k, v, features=features)
    both = lambda *x: (causal(*x), full(*x))
    out, pull = jax.vjp(both, q, k, v, gate)
    return out, pull((cotangent, cotangent))


@pytest.fixture(scope="module")
def one_device() -> Any:
    return jax.jit(output_and_gradients)(*operands())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["auto", "explicit", "shard_map"])
def test_batch_and_heads_over_eight_devices_exchange_nothing(where: str, one_device: Any) -> None:
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "heads"), (kind,) * 2)
    run = output_and_gradients
    if where == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    arguments = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in operands()]
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*arguments).compile()
    found = compiled(*arguments)
    assert_close(found, one_device, 100)
    assert not COLLECTIVE.findall(compiled.as_text())
    for x in jax.tree.leaves(found):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SPEC), x.ndim)


def test_frozen_scores_of_a_batch_over_eight_devices() -> None:
    x, kernel = jax.random.normal(jax.random.key(0), (8, 3, 2)), jnp.ones((70 * 3, 1))
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    attend = lambda x, kernel: frozen_score_attention(x, x, kernel, jax.random.key(1))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert_close(jax.jit(mapped)(x, kernel), jax.jit(attend)(x, kernel), 100)


def test_memory_of_training_grows_as_the_length() -> None:
    features = RandomFeatures(num_features=8, chunk_size=32)

    def gradients(q: Any, k: Any, v: Any) -> Any:
        loss = lambda *x: jnp.sum(
            random_feature_attention(*x, features=features, is_causal=True) ** 2
        )
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    def temporaries(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        return jax.jit(gradients).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    # A matrix of scores of 2048 positions alone has 16 MiB, and 16 times the bytes of 512.
    short, long = temporaries(512), temporaries(2048)
    assert long < 2**20
    assert long < 5 * short
