"""What the library assumes of Flax beyond its documented interface."""

from typing import Any

from flax import linen, nnx
import jax
import jax.numpy as jnp
import pytest

from lowrank_optax.compat.flax import (
    in_interceptor,
    is_lifted_call,
    is_nnx_state,
    linen_children,
    run_traced_apart,
    set_class,
)
from lowrank_optax.compat.nnx_context import ContextModule


class Doubled(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:  # pyrefly: ignore[bad-override]
        return 2 * super().__call__(x)


class Marked(nnx.Param):
    """A type of variable that a parameter is changed into."""


def test_an_nnx_module_can_change_its_class_and_back() -> None:
    layer, x = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2))
    plain, definition = layer(x), nnx.graphdef(layer)
    set_class(layer, Doubled)
    assert (layer(x) == 2 * plain).all()
    assert nnx.graphdef(layer) != definition
    set_class(layer, nnx.Linear)
    assert nnx.graphdef(layer) == definition


def test_an_nnx_module_can_change_its_class_within_a_transformation() -> None:
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    @jax.jit
    def call(x: jax.Array) -> jax.Array:
        set_class(layer, Doubled)
        y = layer(x)
        set_class(layer, nnx.Linear)
        return y

    assert (call(jnp.ones((1, 2))) == 2 * layer(jnp.ones((1, 2)))).all()


def test_an_nnx_variable_can_change_its_type() -> None:
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    set_class(layer.kernel, Marked)
    assert list(nnx.to_pure_dict(nnx.state(layer, Marked))) == ["kernel"]


def test_the_state_of_an_nnx_module_is_of_the_module_statelib() -> None:
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert is_nnx_state(nnx.state(layer))
    assert not is_nnx_state({"kernel": layer.kernel})


def test_a_lifted_linen_layer_has_its_call_from_transforms() -> None:
    lifted = linen.vmap(linen.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
    assert is_lifted_call(lifted)
    assert not is_lifted_call(linen.Dense)


class Pair(linen.Module):
    def setup(self) -> None:
        self.first = linen.Dense(3)
        self.rest = [linen.Dense(2), linen.LayerNorm()]

    def __call__(self, x: jax.Array) -> Any:
        return self.rest[1](self.rest[0](self.first(x)))


def test_linen_modules_of_setup_are_attributes_of_a_bound_module_without_its_parent() -> None:
    x = jnp.ones((1, 4))
    bound = Pair().bind(Pair().init(jax.random.key(0), x))
    assert sorted(child.name for child in linen_children(bound)) == ["first", "rest_0", "rest_1"]


def test_a_linen_interceptor_is_known_while_it_is_active() -> None:
    pass_on = lambda call, args, kwargs, context: call(*args, **kwargs)
    assert not in_interceptor()
    with linen.intercept_methods(pass_on):
        assert in_interceptor()
    assert not in_interceptor()


TRACED: list[str] = []


class Counted(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        TRACED.append("/".join(self.path))
        return linen.Dense(4)(x)


class CountedMethod(Counted):
    __call__ = linen.jit(Counted.__call__)


called = linen.jit(lambda module, x: module(x))


class Two(linen.Module):
    """Two blocks of one class, called under ``nn.jit`` in one of three ways."""

    blocks: tuple[Any, Any]
    is_function: bool = False

    def __call__(self, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
        for block in self.blocks:
            x = called(block, x) if self.is_function else block(x)
        return scale * x


@pytest.mark.parametrize("way", ["class", "method", "function"])
def test_calls_under_linen_jit_share_a_trace_unless_they_are_traced_apart(way: str) -> None:
    block = {"class": linen.jit(Counted), "method": CountedMethod, "function": Counted}[way]
    module, x, key = Two((block(), block()), way == "function"), jnp.ones(4), jax.random.key(0)
    variables = module.init(key, x)
    expected = module.apply(variables, x)
    TRACED.clear()
    module.apply(variables, x)
    assert not TRACED
    for of in (variables, None, variables):
        options = {"method": Two.__call__, "mutable": True, "capture_intermediates": True}
        result = run_traced_apart(module, of, {"params": key}, x, scale=2.0, **options)
        assert jnp.allclose(result, 2 * expected, rtol=1e-6, atol=1e-6)
        assert TRACED == ["blocks_0", "blocks_1"]
        TRACED.clear()


class InContext(ContextModule):
    """Adds a number that is not its own."""

    added = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nnx.Param(jnp.ones(2))

    def context(self) -> float:
        return InContext.added

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.weight[...] * x + InContext.added


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_nnx_compiles_again_where_a_static_attribute_differs_when_a_module_is_flattened(
    graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x, traced = InContext(), jnp.ones(2), []

    def call(module: InContext, x: jax.Array) -> jax.Array:
        traced.append(InContext.added)
        return module(x)

    compiled = nnx.jit(call) if graph else jax.jit(call)
    for added in (1.0, 5.0, 1.0):
        monkeypatch.setattr(InContext, "added", added)
        assert (compiled(module, x) == 1 + added).all()
        assert nnx.graphdef(module) == nnx.graphdef(InContext())
    assert traced == [1.0, 5.0]
