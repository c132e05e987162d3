"""State bytes at the size of real models, by abstract evaluation."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config
from tests.projection.runs import state_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama_7b() -> tuple[Any, Any]:
    model = nnx.eval_shape(lambda: Decoder(decoder_config("llama-7b"), rngs=nnx.Rngs(0)))
    return nnx.as_pure(nnx.split(model)[1]), lro.weight_dimension_numbers(model)


@pytest.mark.parametrize(
    ("transformation", "most"),
    [
        (lambda rule: lro.low_bit(optax.adam(1e-3), 8), 0.256),
        (lambda rule: lro.low_bit(optax.adam(1e-3), 4), 0.135),
        # At a quarter of the width, embeddings and head in 8 bits too.
        (
            lambda rule: lro.galore(
                1e-2, 1024, state_bits=8, basis_bits=16, weight_dimension_numbers=rule
            ),
            0.12,
        ),
    ],
    ids=["8 bits", "4 bits", "8-bit galore"],
)
def test_share_of_the_bytes_of_adam(transformation: Any, most: float, llama_7b: Any) -> None:
    params, rule = llama_7b
    bytes_of = lambda tx: state_bytes(jax.eval_shape(tx.init, params))
    share = bytes_of(transformation(rule)) / bytes_of(optax.adam(1e-3))
    print(f"{100 * share:.2f}% of Adam's")
    assert most - 0.02 < share <= most
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
