"""Few-bit nonlinearities in untouched models of google-tunix, which nobody here wrote."""

from collections.abc import Iterator
from typing import Any
import warnings

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import lowrank_optax as lro


@pytest.fixture(autouse=True)
def older_ways_of_flax_are_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_llama_of_tunix_computes_the_same_and_comes_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("tunix.models.llama3.model", exc_type=ImportError)
    config = models.ModelConfig(
        num_layers=2,
        vocab_size=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model: Any = models.Llama3(config, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    tokens = jnp.arange(10).reshape(2, 5)
    mask = jnp.tril(jnp.ones((2, 5, 5), bool))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    inputs = (tokens, positions, None, mask)
    call = nnx.jit(lambda model: model(*inputs)[0])
    before = call(model)
    for where in (None, "layers/[0-9]+$"):
        report = lro.activations.quantize_model(model, where=where, inputs=inputs)
        assert report.calls is not None
        assert {row.function for row in report.calls.rows} == {"silu"}
        assert sum(row.count for row in report.calls.rows) == 2
        assert_close(call(model), before, 100)
        gradient = nnx.jit(nnx.grad(lambda model: model(*inputs)[0].sum()))(model)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
        lro.activations.restore_model(model)
        assert nnx.graphdef(model) == graphdef
