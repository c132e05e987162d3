"""A Linen model that nobody here wrote: the ``gemma`` package's transformer, small and random."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

gemma = pytest.importorskip("gemma")

WHERE = r"attn/(q_einsum|kv_einsum|attn_vec_einsum)|mlp/(gating_einsum|linear)"
TOKENS = jnp.arange(10).reshape(2, 5)


def _model():
    from gemma.gm.nn import _config, _modules, _transformer

    config = _config.TransformerConfig(
        num_embed=16,
        embed_dim=8,
        hidden_dim=12,
        num_heads=2,
        head_dim=4,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=[_modules.AttentionType.GLOBAL] * 2,
    )
    return _transformer.Transformer(config=config, tokens="tokens", dtype=jnp.float32)


def test_gemma_is_adapted_untouched_trained_and_merged():
    model = _model()
    base = model.init(jax.random.key(0), TOKENS)
    adapted = lro.adapters.linen.Adapted(model, lro.adapters.LoRA(rank=2, alpha=4), WHERE)
    variables = adapted.attach(base, jax.random.key(1), TOKENS)
    before = model.apply(base, TOKENS).logits
    np.testing.assert_array_equal(adapted.apply(variables, TOKENS).logits, before)
    layer = variables["adapters"]["default"]["layer_1"]
    assert {n: x["B"].shape for n, x in layer["attn"].items()} == {
        "q_einsum": (2, 8),  # heads × head_dim
        "kv_einsum": (2, 8),  # keys and values × heads × head_dim
        "attn_vec_einsum": (2, 8),
    }
    assert {n: x["A"].shape for n, x in layer["mlp"].items()} == {
        "gating_einsum": (8, 2),
        "linear": (12, 2),
    }

    @jax.jit
    def step(trained):
        def loss(trained):
            logits = adapted.apply({**variables, "adapters": trained}, TOKENS[:, :-1]).logits
            cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
            return cross_entropy(logits, TOKENS[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(trained)
        return value, jax.tree.map(lambda x, g: x - 3.0 * g, trained, gradient)

    trained, losses = variables["adapters"], []
    for _ in range(3):
        value, trained = step(trained)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    variables = {**variables, "adapters": trained}
    after = adapted.apply(variables, TOKENS).logits
    assert jnp.abs(after - before).max() > 1e-3
    merged, _ = adapted.merge(variables)
    alone = model.apply({"params": merged["params"]}, TOKENS).logits
    np.testing.assert_allclose(alone, after, atol=1e-5)
    assert jax.tree.structure(adapted.detach(merged)) == jax.tree.structure(base)
