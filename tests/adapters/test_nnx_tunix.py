"""An untouched model of google-tunix, which nobody here wrote."""

from collections.abc import Iterator
from typing import Any
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

WHERE = "attn/(q_proj|k_proj|v_proj|o_proj|q_einsum|kv_einsum|attn_vec_einsum)$"


@pytest.fixture(autouse=True)
def older_ways_of_flax_are_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama() -> Any:
    models = _imported("tunix.models.llama3.model")
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
    return models.Llama3(config, rngs=nnx.Rngs(0))


def gemma() -> Any:
    models = _imported("tunix.models.gemma.model")
    config = models.ModelConfig(
        num_layers=2,
        num_embed=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=[models.AttentionType.GLOBAL] * 2,
    )
    return models.Gemma(config, rngs=nnx.Rngs(0))


def _imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("method", [lro.adapters.LoRA(rank=2, alpha=4), lro.adapters.LoTR(rank=2)])
def test_a_model_of_tunix_is_adapted_trained_merged_and_given_back(make: Any, method: Any) -> None:
    model = make()
    graphdef = nnx.graphdef(model)
    tokens = jnp.arange(10).reshape(2, 5)
    mask = jnp.tril(jnp.ones((2, 5, 5), bool))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    call = lambda model: model(tokens, positions, None, mask)[0]
    before = call(model)
    lro.adapters.attach(model, method, WHERE, rngs=0)
    assert len(lro.adapters.summary(model).rows) >= 6
    assert bool((call(model) == before).all())
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=lro.adapters.trainable)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
        def loss_of(model: Any) -> jax.Array:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels
            return losses(call(model)[:, :-1], tokens[:, 1:]).mean()

        wrt = nnx.DiffState(0, lro.adapters.trainable)
        loss, grads = nnx.value_and_grad(loss_of, argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert min(losses) < losses[0]
    after = call(model)
    lro.adapters.merge(model)
    np.testing.assert_allclose(call(model), after, atol=1e-4)
    lro.adapters.detach(model)
    assert nnx.graphdef(model) == graphdef
    np.testing.assert_allclose(call(model), after, atol=1e-4)
