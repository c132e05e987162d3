"""Few-bit nonlinearities in Linen models, which stay as they are."""

from typing import Any

from close import assert_close
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

FewBit = lro.activations.linen.FewBit
X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4), np.float32))


class Block(nn.Module):
    act: Any = nn.gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        h = self.act(nn.Dense(8)(x))
        h = nn.BatchNorm(use_running_average=not train)(h)
        h = nn.Dropout(0.5, deterministic=not train)(h)
        self.sow("intermediates", "hidden", h)
        return nn.Dense(4)(h)


class Net(nn.Module):
    act: Any = nn.gelu
    last: Any = nn.silu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = Block(self.act, name="first")(x, train)
        x = nn.remat(Block, static_argnums=(2,))(self.act, name="second")(x, train)
        stacked = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = stacked(Block(self.act, name="stack"), x, None)
        return self.last(x)


RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
TRAIN = {"rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats", "intermediates"]}


@pytest.mark.slow
def test_results_and_what_is_written_are_the_same_under_scan_and_remat() -> None:
    few = FewBit(Net())
    variables, plain = (jax.jit(lambda m=m: m.init(RNGS, X))() for m in (few, Net()))

    def run(model: Any) -> Any:
        both = lambda v: (model.apply(v, X, **TRAIN), model.apply(v, X, train=False))
        return jax.jit(both)(plain)

    assert_close(variables, plain, 100)
    assert_close(run(few), run(Net()), 400)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_model_written_by_hand() -> None:
    by_hand = Net(lro.activations.gelu, lro.activations.silu)
    variables = jax.jit(Net().init)(RNGS, X)

    def gradient(model: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            y, _ = model.apply({**variables, "params": params}, X, **TRAIN)
            return (y**2).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    assert_close(gradient(FewBit(Net())), gradient(by_hand), 400)


@pytest.mark.slow
def test_where_is_the_path_of_a_module_and_the_report_counts_turns_of_scans() -> None:
    variables = jax.eval_shape(lambda: Net().init(RNGS, X))
    rows = FewBit(Net()).report(variables, X, **TRAIN).rows
    found = [(row.function, row.scope.split("/")[1:2], row.count, row.remat) for row in rows]
    assert found[:2] == [("gelu", ["first"], 1, False), ("gelu", ["second"], 1, True)]
    assert found[2][2] == 3
    assert "stack" in rows[2].scope
    assert found[3] == ("silu", [], 1, False)
    chosen = FewBit(Net(), where="/(second|stack)").report(variables, X, **TRAIN).rows
    assert [row.count for row in chosen] == [1, 3]
    with pytest.raises(ValueError, match="places that match third"):
        FewBit(Net(), where="third").report(variables, X, **TRAIN)


def test_what_is_trained_decides_what_is_kept_anyway() -> None:
    model = nn.Sequential([nn.Dense(8), nn.gelu, nn.Dense(2)])
    few = FewBit(model, 4)
    variables = jax.eval_shape(few.init, jax.random.key(0), X)
    assert few.report(variables, X).rows[0].saved_for == ("product",)
    assert few.report(variables, X, wrt="adapters").rows[0].saved_for == ()


@pytest.mark.slow
def test_a_model_with_adapters() -> None:
    model = nn.Sequential([nn.Dense(8), nn.gelu, nn.Dense(2)])
    adapted = lro.adapters.linen.Adapted(model, lro.adapters.LoRA(rank=2))
    few = FewBit(adapted)
    variables = jax.jit(few.init)(jax.random.key(0), X)
    run = lambda module: jax.jit(lambda v: module.apply(v, X))(variables)
    assert_close(run(few), run(adapted))
    loss = lambda a: few.apply({**variables, "adapters": a}, X).sum()
    gradient = jax.jit(jax.grad(loss))(variables["adapters"])
    assert any(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="module=3"):
        FewBit(3)
    with pytest.raises(ValueError, match="bits=0"):
        FewBit(Net(), 0)
    variables = jax.eval_shape(nn.Dense(3).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="none of the functions"):
        jax.eval_shape(FewBit(nn.Dense(3)).apply, variables, X)


def test_gemma_is_untouched_and_computes_the_same() -> None:
    pytest.importorskip("gemma")
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
    model = _transformer.Transformer(config=config, tokens="tokens", dtype=jnp.float32)
    tokens = jnp.arange(10).reshape(2, 5)
    variables = model.init(jax.random.key(0), tokens)
    few = FewBit(model)
    run = lambda model: jax.jit(lambda v: model.apply(v, tokens).logits)(variables)
    assert_close(run(few), run(model), 100)
    assert {row.function for row in few.report(variables, tokens).rows} == {"gelu"}
    jax.jit(jax.grad(lambda v: few.apply(v, tokens).logits.sum()))(variables)
