"""Modules are wrapped in place: stacked in any order, taken off in any order, and pickled."""

import copy
import dataclasses
import itertools
import pickle
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from lowrank_optax.modules.wrap import around_of, unwrap, wrap, wrapped


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Multiplies what a call returns, and adds a number."""

    factor: float
    added: float = 0.0

    def __call__(self, call: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.factor * call(*args, **kwargs) + self.added


WRAPS = {"a": Scaled(2.0), "b": Scaled(3.0, 1.0), "c": Scaled(-1.0, 0.5)}
X = jnp.arange(3.0)


def layer() -> nnx.Linear:
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def wrapped_layer(names: Any = "abc") -> nnx.Linear:
    made = layer()
    for name in names:
        wrap(made, name, WRAPS[name])
    return made


@pytest.mark.parametrize("names", list(itertools.permutations("abc")))
def test_order_of_wrapping_does_not_matter(names: tuple[str, ...]) -> None:
    one = wrapped_layer(names)
    assert nnx.graphdef(one) == nnx.graphdef(wrapped_layer())
    # The last in the alphabet is the outermost.
    assert jnp.array_equal(one(X), -1.0 * (3.0 * (2.0 * layer()(X)) + 1.0) + 0.5)


@pytest.mark.parametrize("names", list(itertools.permutations("abc")))
def test_wraps_come_off_in_any_order(names: tuple[str, ...]) -> None:
    one = wrapped_layer()
    for count, name in enumerate(names, 1):
        assert unwrap(one, name) == [()]
        rest = [x for x in "abc" if x not in names[:count]]
        assert nnx.graphdef(one) == nnx.graphdef(wrapped_layer(rest))
    assert type(one) is nnx.Linear
    assert nnx.graphdef(one) == nnx.graphdef(layer())


def test_innermost_wrap_is_inside_of_all_others() -> None:
    one = wrapped_layer("a")
    wrap(one, "z", Scaled(1.0, 10.0), innermost=True)
    assert jnp.array_equal(one(X), 2.0 * (layer()(X) + 10.0))


def test_wrap_of_the_same_name_replaces_the_first() -> None:
    one = wrapped_layer("a")
    wrap(one, "a", Scaled(5.0))
    assert around_of(one, "a") == Scaled(5.0)
    assert jnp.array_equal(one(X), 5.0 * layer()(X))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), nnx.clone],
    ids=["deepcopy", "pickle", "clone"],
)
def test_wrapped_modules_are_copied_as_plain_ones_are(copied: Any) -> None:
    model = nnx.Sequential(wrapped_layer(), nnx.Dropout(0.5, deterministic=True))
    again = copied(model)
    assert jnp.array_equal(again(X), model(X))
    assert type(again.layers[0]) is type(model.layers[0])
    for name in "abc":
        assert unwrap(again, name) == [("layers", "0")]
        assert list(wrapped(model, name)) == [("layers", "0")]  # a copy of its own
    plain = nnx.Sequential(layer(), nnx.Dropout(0.5, deterministic=True))
    assert nnx.graphdef(again) == nnx.graphdef(copied(plain))


def test_wrapped_modules_are_split_jitted_and_differentiated() -> None:
    one = wrapped_layer()
    graphdef, state = nnx.split(one)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    expected = -1.0 * (3.0 * (2.0 * layer()(X)) + 1.0) + 0.5
    eps = jnp.finfo(jnp.float32).eps
    assert jnp.max(jnp.abs(run(state, X) - expected)) <= 64 * eps
    gradient = nnx.grad(lambda m: m(X).sum())(one)
    plain = nnx.grad(lambda m: m(X).sum())(layer())
    assert jnp.array_equal(gradient["kernel"][...], -6.0 * plain["kernel"][...])


def test_stacked_modules_are_wrapped_once() -> None:
    stack = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs))(nnx.Rngs(0).split(2))
    scan = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    before = scan(X, stack)
    wrap(stack, "a", Scaled(-1.0))
    assert jnp.array_equal(scan(X, stack), before)  # of two layers, without biases, both negated
    wrap(stack, "a", Scaled(0.0, 1.0))
    assert jnp.array_equal(scan(X, stack), jnp.ones(3))


def test_several_methods_are_told_apart_by_their_names() -> None:
    def doubled(call: Any, module: Any, *args: Any) -> Any:
        return (2 if call.__name__ == "attend" else 1) * call(*args)

    embed = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    tokens, attended = embed(jnp.arange(2)), embed.attend(X)
    wrap(embed, "a", doubled, ("__call__", "attend"))
    assert jnp.array_equal(embed(jnp.arange(2)), tokens)
    assert jnp.array_equal(embed.attend(X), 2 * attended)
