"""Adapters on blocks of one class under ``nn.jit``, which share a trace in Flax."""

from collections.abc import Callable
import functools
from typing import Any

from close import assert_close
from flax import linen as nn
import jax
import numpy as np
import pytest

import lowrank_optax as lro

Adapted = lro.adapters.linen.Adapted
LORA = lro.adapters.LoRA(rank=2, alpha=4)
X = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.Dense(4, name="down")(nn.gelu(nn.Dense(6, name="up")(x)))


class Method(Block):
    __call__ = nn.jit(Block.__call__)


call = lambda module, x: module(x)
jitted = nn.jit(call)

WAYS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "plain": (Block, call),
    "class": (nn.jit(Block), call),
    "params": (nn.jit(Block, variables=["params"]), call),
    "method": (Method, call),
    "function": (Block, jitted),
}


class Two(nn.Module):
    """Two blocks of one class, called in one of these ways."""

    way: str = "plain"

    def setup(self) -> None:
        block, _ = WAYS[self.way]
        self.a, self.b = block(), block()

    def __call__(self, x: jax.Array) -> jax.Array:
        _, run = WAYS[self.way]
        return run(self.b, run(self.a, x))


class Body(nn.Module):
    way: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return Two(self.way, name="two")(x), None


class Scan(nn.Module):
    """A scan over two layers of two blocks each."""

    way: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Body, length=2, **options)(self.way, name="layers")(x, None)[0]


@functools.cache
def _base(model: Any) -> Any:
    return jax.device_get(jax.jit(model().init)(jax.random.key(0), X))


def _moved(tree: Any) -> Any:
    random = np.random.default_rng(5)
    noise = lambda a: 0.3 * random.normal(size=a.shape)
    return jax.tree.map(lambda a: (a + noise(a)).astype(a.dtype), tree)


def _check(adapt: Callable[[Any], Adapted], way: str, model: Any = Two) -> Any:
    """Attaches to the plain model and to the other; both then compute the same, merged too."""
    plain, compiled = adapt(model()), adapt(model(way))
    key, base = jax.random.key(1), _base(model)
    expected = plain.attach(base, key, X)
    variables = compiled.attach(base, key, X)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    for of in (variables, {**variables, "adapters": _moved(variables["adapters"])}):
        y = compiled.apply(of, X)
        assert_close(y, plain.apply(of, X), 64)
    merged, report = compiled.merge(of)
    assert len(report.rows) == len(plain.merge(of)[1].rows)
    assert_close(compiled.apply(merged, X), y, 256)
    return jax.tree.map(np.shape, dict(variables["adapters"]))


_is_of_b = lambda path, module: path[0] == "b"


@pytest.mark.parametrize("way", ["class", "params", "method", "function"])
@pytest.mark.parametrize(
    "where", ["a|b", "b", pytest.param(_is_of_b, id="function", marks=pytest.mark.full)]
)
def test_compiled_blocks_have_the_adapters_of_blocks_that_are_not(where: Any, way: str) -> None:
    shapes = _check(lambda model: Adapted(model, LORA, where), way)["default"]
    assert sorted(shapes) == (["a", "b"] if where == "a|b" else ["b"])
    assert sorted(shapes["b"]) == ["down", "up"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["class", pytest.param("function", marks=pytest.mark.full)])
def test_compiled_blocks_have_ranks_by_pattern_of_their_own(way: str) -> None:
    patterns = {"rank_pattern": {"a": 3, "b/up": 1}, "alpha_pattern": {"b": 7.0}}
    shapes = _check(lambda model: Adapted(model, LORA, "a|b", **patterns), way)["default"]
    ranks = [shapes[block][layer]["A"][1] for block in "ab" for layer in ("up", "down")]
    assert ranks == [3, 3, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", [lro.adapters.LoTR(rank=2), lro.adapters.VeRA(rank=2)], ids=type)
@pytest.mark.full
def test_compiled_blocks_with_different_layers_share_the_arrays_of_a_group(method: Any) -> None:
    _check(lambda model: Adapted(model, method, "a/up|b"), "class")


@pytest.mark.parametrize(
    ("first", "second"), [("a", "b"), pytest.param("a", "a|b", marks=pytest.mark.full)]
)
def test_compiled_blocks_have_several_adapters_of_their_own(first: str, second: str) -> None:
    adapt = lambda model: Adapted(Adapted(model, LORA, first, name="one"), LORA, second, name="two")
    shapes = _check(adapt, "class")
    assert sorted(shapes["one"]) == ["a"]
    assert "/".join(sorted(shapes["two"])) == second.replace("|", "/")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "patterns", "number"),
    [(LORA, {}, 1), (LORA, {"b": 3}, 2), (lro.adapters.LoTR(rank=2), {}, 2)],
)
def test_compiled_blocks_with_equal_adapters_are_traced_once_unless_they_share_arrays(
    method: Any, patterns: Any, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []

    class Counted(Block):
        def __call__(self, x: jax.Array) -> jax.Array:
            traced.append(1)
            return super().__call__(x)

    monkeypatch.setitem(WAYS, "counted", (nn.jit(Counted), call))
    adapted = Adapted(Two("counted"), method, "a|b", rank_pattern=patterns)
    variables = adapted.attach(_base(Two), jax.random.key(1), X)
    traced.clear()
    jax.eval_shape(adapted.apply, variables, X)
    assert len(traced) == number


@pytest.mark.slow
@pytest.mark.parametrize("where", [pytest.param("two/a|two/b", marks=pytest.mark.full), "two/b"])
def test_compiled_blocks_inside_a_scan_have_adapters_of_their_own(where: str) -> None:
    shapes = _check(lambda model: Adapted(model, LORA, where), "params", Scan)["default"]
    assert sorted(shapes["layers"]["two"]) == [x[-1] for x in where.split("|")]


def test_compiled_blocks_are_found_in_a_first_call_with_a_key_for_dropout() -> None:
    method = lro.adapters.LoRA(rank=2, dropout=0.5, initial="random")
    variables = Adapted(Two(), method, "a|b").attach(_base(Two), jax.random.key(1), X)
    restored = Adapted(Two("class"), method, "a|b")
    plain = restored.deactivate().apply(variables, X)
    first, second = (
        restored.apply(variables, X, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)
    )
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - plain).max() > 1e-3
    assert [row.path for row in restored.summary(variables).rows] == [
        "a/up",
        "a/down",
        "b/up",
        "b/down",
    ]
