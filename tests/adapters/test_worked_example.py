"""The new method that docs/architecture.md shows works on every host, unrolled and scanned."""

import importlib.util
from pathlib import Path

from close import assert_close
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.adapters.nnx_models import Scanned, Unrolled, call, loss_of, tokens

PAGE = Path(__file__).parents[2] / "docs" / "example_adapter.py"
spec = importlib.util.spec_from_file_location("example_adapter", PAGE)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def test_the_example_is_short() -> None:
    assert len(PAGE.read_text().splitlines()) <= 60


@pytest.mark.parametrize("kind", [Unrolled, Scanned])
def test_a_new_method_trains_merges_and_comes_off_in_nnx(kind: type) -> None:
    model = kind(2, nnx.Rngs(0))
    plain, before = nnx.graphdef(model), call(model, tokens())
    example.in_nnx(model, "up")
    assert_close(call(model, tokens()), before, 1)  # R is zero
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lro.adapters.trainable)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        wrt = nnx.DiffState(0, lro.adapters.trainable)
        value, gradients = nnx.value_and_grad(loss_of, argnums=wrt)(model, tokens())
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    trained = np.asarray(call(model, tokens()))
    lro.adapters.merge(model)
    assert_close(call(model, tokens()), trained, 100)
    lro.adapters.detach(model)
    assert nnx.graphdef(model) == plain


def test_a_new_method_works_in_linen_and_in_a_pytree() -> None:
    module, x = nn.Dense(8), np.ones((2, 6), np.float32)
    variables = module.init(jax.random.key(0), x)
    adapted = example.in_linen(module, ".*")
    of_linen = adapted.attach(variables, jax.random.key(1), x)
    of_pytree = example.in_pytree(variables["params"], "kernel")
    # The same arrays, made by the same rule.
    (r,) = jax.tree.leaves(of_linen["adapters"])
    filled = jnp.arange(r.size, dtype=r.dtype).reshape(r.shape)
    of_linen["adapters"] = jax.tree.map(lambda _: filled, of_linen["adapters"])
    of_pytree = of_pytree.replace(jax.tree.map(lambda _: filled, of_pytree.trainable))
    merged = lro.adapters.pytree.merge(variables["params"], of_pytree)
    expected = module.apply({"params": merged}, x)
    assert_close(adapted.apply(of_linen, x), expected, 200)
    folded, _ = adapted.merge(of_linen)
    assert_close(module.apply({"params": folded["params"]}, x), expected, 200)
