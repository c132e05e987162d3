"""Stacked layers: scans, rematerialisation, dropout, experts, and arrays that layers share."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
import copy
import dataclasses
import threading
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.adapters.nnx_models import (
    Scanned,
    Unrolled,
    call,
    loss_and_gradients,
    loss_of,
    randomized,
    tokens,
)

LoRA, LoTR = lro.adapters.LoRA, lro.adapters.LoTR


def copied_from(scanned: Any, depth: int) -> Any:
    """The unrolled model with the same weights and the same adapters."""
    model = Unrolled(depth, nnx.Rngs(1))
    method = scanned.blocks.up.adapters["default"].method
    lro.adapters.attach(model, method, rngs=0)
    pure = nnx.to_pure_dict(nnx.state(scanned, nnx.Not(nnx.RngState)))
    layer = lambda i: jax.tree.map(lambda x: x[i], pure["blocks"])
    blocks = {i: layer(i) for i in range(depth)}
    state = nnx.state(model, nnx.Not(nnx.RngState))
    nnx.replace_by_pure_dict(state, pure | {"blocks": blocks})
    nnx.update(model, state)
    return model


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=3), LoTR(rank=2, alpha=3)])
@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_stack_is_the_unrolled_model_in_value_and_gradient(
    method: Any, remat: bool
) -> None:
    scanned = Scanned(2, nnx.Rngs(0), remat=remat)
    lro.adapters.attach(scanned, method, rngs=0)
    unrolled = copied_from(randomized(scanned), 2)
    (loss, of_scan), (loss_of_loop, of_loop) = (
        loss_and_gradients(m, tokens()) for m in (scanned, unrolled)
    )
    assert_close(loss, loss_of_loop)
    stacked = jax.tree.map(lambda *x: np.stack(x), *of_loop.pop("blocks").values())
    expected = of_loop | {"blocks": stacked}
    assert jax.tree.structure(of_scan) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), of_scan, expected)


def test_nnx_jit_and_split_and_merge_see_the_same_model() -> None:
    model = Scanned(2, nnx.Rngs(0))
    lro.adapters.attach(model, LoTR(rank=2), rngs=0)
    expected = randomized(model)(tokens())  # eagerly
    jitted = call(model, tokens())
    graphdef, trained, rest = nnx.split(model, lro.adapters.trainable, ...)
    split = jax.jit(lambda trained, rest: nnx.merge(graphdef, trained, rest)(tokens()))
    np.testing.assert_allclose(jitted, expected, atol=1e-5)
    np.testing.assert_allclose(split(trained, rest), expected, atol=1e-5)
    np.testing.assert_allclose(nnx.clone(model)(tokens()), expected, atol=1e-5)


def test_a_part_of_the_model_cannot_be_called_without_what_it_shares() -> None:
    model = Unrolled(2, nnx.Rngs(0))
    lro.adapters.attach(model, LoTR(rank=2), rngs=0)
    with pytest.raises(RuntimeError, match="not of a part of it"):
        model.blocks[0](np.ones((2, 6), np.float32))
    lro.adapters.deactivate(model)
    lro.adapters.detach(model)
    assert model.blocks[0](np.ones((2, 6), np.float32)).shape == (2, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [nnx.jit, *(pytest.param(x, marks=pytest.mark.full) for x in (nnx.remat, None))]
)
def test_a_part_compiled_by_itself_is_not_taken_for_that_with_other_shared_arrays(
    wrap: Callable[..., Any] | None,
) -> None:
    call = lambda layer, x: layer(x)
    whole = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    run = whole if wrap is None else wrap(call)

    class Model(nnx.Module):
        def __init__(self) -> None:
            make = lambda rngs: nnx.Linear(4, 4, rngs=rngs)
            stack = nnx.vmap(make)
            self.layer = stack(nnx.Rngs(0).split(2)) if wrap is None else make(nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return run(self.layer, x)

    model, x = Model(), np.ones((2, 4), np.float32)
    base = model(x)
    lro.adapters.attach(model, LoTR(rank=2), rngs=0)
    first = randomized(model)(x)
    assert not np.allclose(first, base, atol=1e-2)
    np.testing.assert_array_equal(model(x), first)
    shared = nnx.state(model.adapter_groups)
    zeros = lambda x: jnp.asarray(np.zeros(x.shape, x.dtype))
    nnx.update(model.adapter_groups, jax.tree.map(zeros, shared))
    np.testing.assert_allclose(model(x), base, atol=1e-6)
    randomized(model)
    outside = jax.jit(nnx.grad(loss_of, argnums=nnx.DiffState(0, lro.adapters.trainable)))
    for _ in range(2):  # the second time all is compiled
        grads = nnx.to_pure_dict(outside(model, x))
        assert all(np.any(g) for g in jax.tree.leaves(grads))
        eager = nnx.grad(loss_of, argnums=nnx.DiffState(0, lro.adapters.trainable))(model, x)
        eager = nnx.to_pure_dict(eager)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, eager)


def test_the_models_own_methods_share_too() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def encode(self, x: jax.Array) -> jax.Array:
            return self.layer(x)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.encode(x)

    model = Model()
    lro.adapters.attach(model, LoTR(rank=2), rngs=0)
    randomized(model)
    x = np.ones(4, np.float32)
    outside = nnx.graphdef(model)
    np.testing.assert_array_equal(model.encode(x), model(x))
    assert nnx.graphdef(model) == outside


BY_ANOTHER_THREAD = {
    "called": lambda model, x: model(x),
    "compiled": nnx.jit(lambda model, x: model(x)),
}
_between = threading.local()
_flax = threading.Lock()  # nnx.jit takes its layers apart: two threads must not do so at once


class Interrupted(nnx.Module):
    """Two layers compiled by themselves, and something between them that this thread does."""

    def __init__(self) -> None:
        self.first, self.second = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))
        self.compiled = nnx.jit(lambda layer, x: layer(x))

    def run(self, layer: nnx.Linear, x: jax.Array) -> jax.Array:
        with _flax:
            return self.compiled(layer, x)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.run(self.first, x)
        getattr(_between, "do", lambda: None)()
        return self.run(self.second, x)


@pytest.mark.parametrize("how", ["called", "compiled"])
def test_two_threads_may_call_a_model_whose_layers_share_arrays(how: str) -> None:
    model, x = Interrupted(), np.ones((2, 4), np.float32)
    lro.adapters.attach(model, LoTR(rank=2), rngs=0)
    expected, graphdef = randomized(model)(x), nnx.graphdef(model)
    inside, first_is_done = threading.Event(), threading.Event()

    def other() -> jax.Array:
        _between.do = lambda: (inside.set(), first_is_done.wait(timeout=60))
        return BY_ANOTHER_THREAD[how](model, x)

    with ThreadPoolExecutor() as pool:
        others: list[Future[jax.Array]] = []

        def start() -> None:
            others.append(pool.submit(other))
            inside.wait(timeout=60)

        _between.do = start
        outputs = [model(x)]
        first_is_done.set()
        outputs.append(others[0].result(timeout=60))
    _between.do = lambda: None
    for output in outputs:
        assert_close(output, expected, 10)
    assert nnx.graphdef(model) == graphdef


def test_two_threads_may_call_two_models_that_call_each_other() -> None:
    models = [Interrupted() for _ in range(2)]
    for model in models:
        lro.adapters.attach(model, LoTR(rank=2), rngs=0)
    x, inside, done = np.ones((2, 4), np.float32), [threading.Event() for _ in models], []

    def run(i: int) -> None:
        def call_other() -> None:
            _between.do = lambda: None
            inside[i].set()
            inside[1 - i].wait(timeout=60)
            models[1 - i](x)

        _between.do = call_other
        models[i](x)
        done.append(i)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(done) == [0, 1]


def test_layers_of_a_dataclass_which_has_no_hash_may_share_arrays() -> None:
    @dataclasses.dataclass
    class Model(nnx.Module):
        first: nnx.Linear
        second: nnx.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    model, x = Model(*(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))), jnp.ones(4)
    before = model(x)
    assert_close(lro.adapters.attach(model, LoTR(rank=2), rngs=0)(x), before)


@pytest.mark.slow
def test_a_model_that_is_one_layer_can_share_and_not_share_at_once() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    lro.adapters.attach(model, LoTR(rank=1), ".*", rngs=0, name="a")
    lro.adapters.attach(model, LoRA(rank=1, initial="random"), ".*", rngs=0, name="b")
    x = np.ones(4, np.float32)
    with_b = model(x)
    lro.adapters.detach(model, "a")
    np.testing.assert_allclose(model(x), with_b, atol=1e-6)
    lro.adapters.detach(model, "b")
    assert nnx.graphdef(model) == graphdef


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Scanned, Unrolled])
def test_dropout_acts_in_training_alone_and_each_layer_draws_its_own(kind: Any) -> None:
    model = kind(2, nnx.Rngs(0))
    lro.adapters.attach(model, LoRA(rank=2, dropout=0.5, initial="random"), rngs=0)
    model.eval()
    still = call(model, tokens())
    np.testing.assert_array_equal(call(model, tokens()), still)
    model.train()
    one, two = call(model, tokens()), call(model, tokens())
    assert not np.allclose(one, still, atol=1e-3)
    assert not np.allclose(one, two, atol=1e-3)
    view = nnx.view(model, deterministic=True)
    np.testing.assert_allclose(call(view, tokens()), still, atol=1e-5)
    keys = jax.tree.leaves(nnx.state(model, nnx.RngKey))
    data = [np.asarray(jax.random.key_data(x)).reshape(-1, 2) for x in keys]
    drawn = {bytes(key) for of_one in data for key in of_one}
    assert len(drawn) == 4  # two layers with two adapted weights each


@pytest.mark.slow
def test_experts_in_a_stack_have_adapters_of_their_own() -> None:
    make = lambda rngs: nnx.Einsum("ebd,edf->ebf", (3, 4, 4), rngs=rngs)
    stack = nnx.vmap(make)(nnx.Rngs(0).split(2))
    run = nnx.jit(nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry))
    model = nnx.Sequential(stack)
    method = LoRA(rank=2, alpha=3, dropout=0.1)
    lro.adapters.attach(model, method, rngs=0)
    model.eval()
    randomized(model)
    arrays, x = stack.adapters["default"].arrays, np.ones((3, 2, 4), np.float32)
    assert arrays["A"].shape == (2, 3, 4, 2)
    after = run(stack, x)
    model.train()
    assert not np.allclose(run(stack, x), after, atol=1e-3)
    lro.adapters.merge(model)
    np.testing.assert_allclose(run(stack, x), after, atol=1e-4)


@pytest.mark.slow
def test_a_stack_of_stacks_has_adapters_and_streams_of_its_own() -> None:
    make = lambda rngs: nnx.Linear(4, 4, rngs=rngs)
    stack = nnx.vmap(nnx.vmap(make))(nnx.Rngs(0).split((2, 3)))
    over = lambda f: nnx.scan(f, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    run = nnx.jit(over(over(lambda layer, x: layer(x))))
    lro.adapters.attach(stack, LoRA(rank=2, dropout=0.5), ".*", rngs=0)
    randomized(stack)
    assert stack.adapters["default"].arrays["B"].shape == (2, 3, 2, 4)
    assert stack.adapters["default"].dropout.key.shape == (2, 3)
    x = np.ones((2, 4), np.float32)
    assert not np.allclose(run(stack, x), run(stack, x), atol=1e-3)
    stack.eval()
    after = run(stack, x)
    lro.adapters.merge(stack)
    np.testing.assert_allclose(run(stack, x), after, atol=1e-4)


@pytest.mark.parametrize("inner", [nnx.jit, nnx.remat], ids=["jit", "remat"])
def test_a_model_that_has_run_is_pickled_and_copied(inner: Any) -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return inner(lambda layer, x: layer(x))(self.layer, x)

    model, x = Model(), np.ones(4, np.float32)
    lro.adapters.attach(model, LoTR(rank=2), rngs=0)
    expected = randomized(model)(x)
    again = copy.deepcopy(model)
    np.testing.assert_array_equal(again(x), expected)
    assert vars(model.layer.adapters["default"])["traced_in"] is None


def test_adapters_that_come_and_go_leave_the_classes_that_the_others_made() -> None:
    def made(names: str) -> nnx.Module:
        model = Unrolled(2, nnx.Rngs(0))
        for name in names:
            where = {"a": "up", "b": "down"}[name]
            lro.adapters.attach(model, LoTR(rank=2), where, rngs=0, name=name)
        return model

    both = lro.adapters.detach(made("ab"), "b")
    assert type(both) is type(made("a"))
    assert nnx.graphdef(both) == nnx.graphdef(made("a"))


def test_a_model_that_is_one_randomized_layer_is_restored_below_shared_arrays() -> None:
    model, x = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), np.ones(8, np.float32)
    lro.layers.randomize(model, lro.layers.Sketch(fraction=0.5), where=".*", rngs=3)
    lro.adapters.attach(model, LoTR(rank=2), where=".*", rngs=1)
    expected = randomized(model)(x)
    lro.layers.restore_linears(model)
    np.testing.assert_array_equal(model(x), expected)
