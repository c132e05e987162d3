"""Few-bit nonlinearities in NNX models, in place and back."""

from collections.abc import Iterator
import pickle
from typing import Any
import warnings

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config

quantize_model, restore_model = lro.activations.quantize_model, lro.activations.restore_model
pytestmark = pytest.mark.usefixtures("coarse_grid")
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6), np.float32))
TOKENS = jnp.asarray(np.arange(10).reshape(2, 5))


def decoder(**options: Any) -> Decoder:
    config = decoder_config(
        "llama-tiny",
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
    )
    return Decoder(config, rngs=nnx.Rngs(0), **options)


def sequential() -> nnx.Sequential:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(6, 8, rngs=rngs), nnx.gelu, nnx.Linear(8, 3, rngs=rngs), nnx.relu
    )


class Stateful(nnx.Module):
    """Batch statistics, random numbers of its own and of the caller, sown values, a shared part."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.again = self.linear
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, scale: float = 1.0, rngs: Any = None) -> jax.Array:
        x = self.dropout(nnx.gelu(self.norm(self.linear(x))), rngs=rngs)
        self.sow(nnx.Intermediate, "hidden", x)
        self.calls[...] += 1
        assert isinstance(scale, float)
        return self.again(x) * scale


@pytest.fixture
def sowing_is_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def same(a: Any, b: Any) -> None:
    (leaves, tree), (others, other_tree) = map(jax.tree.flatten, (a, b))
    assert tree == other_tree
    for x, y in zip(leaves, others, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@nnx.jit
def gradient(model: Any) -> Any:
    return nnx.grad(lambda model: (model(TOKENS) ** 2).mean())(model)


@nnx.jit
def call(model: Any, *args: Any) -> jax.Array:
    return model(*args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="scan"),
        pytest.param({"scan_layers": False}, id="list", marks=pytest.mark.full),
        pytest.param({"remat": "full"}, id="remat", marks=pytest.mark.full),
    ],
)
def test_a_decoder_computes_the_same_and_its_graph_comes_back(options: dict[str, Any]) -> None:
    model = decoder(**options)
    graphdef, before, exact = nnx.graphdef(model), call(model, TOKENS), gradient(model)
    report = quantize_model(model, 4, inputs=(TOKENS,))
    assert report.calls is not None
    (row,) = report.calls.rows
    assert (row.function, row.count, row.saved_for) == ("silu", 2, ("multiplication",))
    assert "feed_forward.py" in row.source
    assert row.remat == ("remat" in options)
    assert_close(call(model, TOKENS), before, 100)
    whole = gradient(model)
    assert jax.tree.structure(whole) == jax.tree.structure(exact)
    restore_model(model)
    assert nnx.graphdef(model) == graphdef
    same(gradient(model), exact)
    report = quantize_model(model, 4, where="mlp$", inputs={"tokens": TOKENS})
    assert {row.module for row in report.rows} == {"MLP"}
    assert report.calls is not None
    assert sum(row.count for row in report.calls.rows) == 2
    assert all("mlp" in row.scope for row in report.calls.rows)
    assert_close(call(model, TOKENS), before, 100)
    assert_close(nnx.to_pure_dict(gradient(model)), nnx.to_pure_dict(whole), 400)
    graphdef, state = nnx.split(model)
    merged = jax.jit(lambda state: nnx.merge(graphdef, state)(TOKENS))
    assert_close(merged(state), before, 100)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_model_written_by_hand() -> None:
    model, by_hand = sequential(), sequential()
    by_hand.layers[1] = lro.activations.gelu
    by_hand.layers[3] = lro.activations.relu
    quantize_model(model)
    both = nnx.jit(nnx.value_and_grad(lambda model: (model(X) ** 2).sum()))
    assert_close(nnx.as_pure(both(model)), nnx.as_pure(both(by_hand)), 100)
    plain = nnx.as_pure(both(sequential())[1])["layers"][0]["kernel"]
    found = nnx.as_pure(both(model)[1])["layers"][0]["kernel"]
    assert np.abs(np.subtract(found, plain)).max() > 1e-3


def test_less_is_kept() -> None:
    model = nnx.Sequential(nnx.gelu, nnx.silu)
    kept = lambda: jax.eval_shape(lambda x: jax.vjp(model, x)[1], X)
    shapes = lambda: [x.dtype for x in jax.tree.leaves(kept())]
    assert jnp.float32 in shapes()
    quantize_model(model, 4)
    assert shapes() == [jnp.uint8, jnp.uint8]


@pytest.mark.slow
@pytest.mark.usefixtures("sowing_is_allowed")
@pytest.mark.parametrize("jitted", [False, True])
def test_what_a_call_writes_is_written(jitted: bool) -> None:
    plain, few = Stateful(nnx.Rngs(0)), Stateful(nnx.Rngs(0))
    quantize_model(few)
    outcomes = []
    for model in (plain, few):
        rngs = nnx.Rngs(1)

        def run(model: Any, rngs: nnx.Rngs) -> Any:
            return model(X), model(X, scale=2.0), model(X, rngs=rngs), model(X, rngs=rngs)

        out = (nnx.jit(run) if jitted else run)(model, rngs)
        outcomes.append((out, nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(rngs))))
    (out, state, rngs), (few_out, few_state, few_rngs) = outcomes
    same(few_rngs, rngs)
    assert state["calls"] == 4
    assert len(state["hidden"]) == 4
    numbers = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
    assert_close(numbers((few_out, few_state)), numbers((out, state)), 400)
    assert nnx.graphdef(restore_model(few)) == nnx.graphdef(plain)


@pytest.mark.slow
def test_captured_intermediates_are_those_of_the_plain_model() -> None:
    plain, few = Stateful(nnx.Rngs(0)), Stateful(nnx.Rngs(0))
    quantize_model(few)
    capture = nnx.capture(lambda model: model(X), nnx.Intermediate)
    assert_close(capture(few), capture(plain), 100)


@pytest.mark.slow
@pytest.mark.combinations(2)
@pytest.mark.parametrize("method", [lro.adapters.LoRA(rank=2), lro.adapters.LoTR(rank=2)])
@pytest.mark.parametrize("order", ["attach first", "quantize first"])
@pytest.mark.parametrize("back", ["detach first", "restore first"])
def test_adapters_are_attached_and_detached_in_any_order(
    method: Any, order: str, back: str
) -> None:
    model = decoder()
    graphdef, before = nnx.graphdef(model), call(model, TOKENS)
    attach = lambda: lro.adapters.attach(model, method, "mlp", rngs=0)
    quantize = lambda: quantize_model(model, where="blocks/mlp$")
    for step in (attach, quantize) if order == "attach first" else (quantize, attach):
        step()
    adapted = nnx.graphdef(model)
    np.testing.assert_allclose(call(model, TOKENS), before, atol=1e-6)
    wrt = nnx.DiffState(0, lro.adapters.trainable)
    grads = nnx.jit(nnx.grad(lambda model: (model(TOKENS) ** 2).mean(), argnums=wrt))(model)
    assert any(jnp.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    assert adapted != graphdef
    steps = [lambda: lro.adapters.detach(model), lambda: restore_model(model)]
    for step in steps if back == "detach first" else steps[::-1]:
        step()
    assert nnx.graphdef(model) == graphdef


def test_the_report_knows_what_is_trained() -> None:
    model = sequential()
    report = quantize_model(model, inputs=(jax.ShapeDtypeStruct((4, 6), jnp.float32),))
    assert report.calls is not None
    assert [row.saved_for for row in report.calls.rows] == [("product",), ()]
    lro.adapters.attach(model, lro.adapters.LoRAFA(rank=2), "layers/0", rngs=0)
    report = quantize_model(model, inputs=(X,), wrt=lro.adapters.trainable)
    assert report.calls is not None
    assert [row.saved_for for row in report.calls.rows] == [(), ()]
    assert "(the model)" in str(report)
    assert "few bits pay" in str(report)
    assert "Give inputs=" in str(quantize_model(model))


@pytest.mark.slow
def test_several_methods_and_modules_with_options_of_their_own() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second = sequential(), nnx.Sequential(nnx.silu)

        def encode(self, x: jax.Array) -> jax.Array:
            return nnx.gelu(x)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(self.encode(x)))

    model = Model()
    run = nnx.jit(lambda model: (model(X), model.encode(X)))
    before = run(model)
    quantize_model(model, 8, methods=("__call__", "encode"))
    (row,) = quantize_model(model, 2, where="second").rows
    assert (row.path, row.bits, row.methods) == ("second", 2, ("__call__",))
    assert_close(run(model), before)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(model.encode, x)[1], X))
    assert [x.dtype for x in kept] == [jnp.uint8]
    restore_model(model)
    assert type(model) is Model
    (row,) = quantize_model(model, where=["first", "first/layers"]).rows
    assert row.path == "first"


@pytest.mark.slow
def test_layers_stacked_by_nnx_scan_and_rematerialised() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.gelu(self.linear(x))

    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            layer = nnx.remat(lambda x, block: block(x))
            return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)

    model = Stack(nnx.Rngs(0))
    before = call(model, X)
    for where in (None, "blocks"):
        report = quantize_model(model, where=where, inputs=(X,))
        assert report.calls is not None
        (row,) = report.calls.rows
        assert (row.count, row.remat) == (3, True)
        assert_close(call(model, X), before, 100)
        nnx.jit(nnx.grad(lambda model: model(X).sum()))(model)
        restore_model(model)


def test_a_few_bit_model_is_pickled_as_a_plain_one_is() -> None:
    model = Stateful(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    quantize_model(model)
    other = pickle.loads(pickle.dumps(model))
    assert nnx.graphdef(other) == nnx.graphdef(model)
    assert nnx.graphdef(restore_model(other)) == graphdef


def test_several_modules_in_none_of_which_anything_is_found_are_an_error() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second = sequential(), nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    model = Model()
    before, graphdef = model(X), nnx.graphdef(model)
    quantize_model(model, where=nnx.Linear)
    message = r"modules first/layers/0, first/layers/2, second calls none of the functions"
    for run in (model, lambda x: call(model, x)):
        with pytest.raises(ValueError, match=message):
            run(X)
    restore_model(model)
    assert nnx.graphdef(model) == graphdef
    quantize_model(model, where="^(first|second)$")
    for _ in range(2):
        assert_close(model(X), before, 100)
    assert nnx.graphdef(restore_model(model)) == graphdef


class Pair(nnx.Module):
    """Two modules inside, each a linear layer below a function."""

    def __init__(self, *functions: Any) -> None:
        rngs = nnx.Rngs(0)
        self.parts = nnx.List([nnx.Sequential(nnx.Linear(6, 6, rngs=rngs), f) for f in functions])

    def __call__(self, x: jax.Array) -> jax.Array:
        for part in self.parts:
            x = part(x)
        return x


def test_what_is_found_in_one_model_says_nothing_of_another() -> None:
    found, plain = Pair(nnx.relu, jnp.asarray), Pair(jnp.asarray, jnp.asarray)
    for model in (found, plain):
        quantize_model(model, where="parts")
    assert nnx.graphdef(found) != nnx.graphdef(plain)
    other = Pair(nnx.relu, jnp.asarray)
    quantize_model(other, where="parts")
    jax.tree.map(jnp.add, other, found)  # equal models are of one class, as for an average
    found(X)
    copy = pickle.loads(pickle.dumps(plain))
    assert nnx.graphdef(copy) == nnx.graphdef(plain)
    for model in (plain, copy):
        with pytest.raises(ValueError, match="modules parts/0, parts/1 calls none"):
            model(X)


def test_what_is_found_in_a_part_that_was_quantised_before_counts_for_the_model() -> None:
    model = nnx.Sequential(Pair(nnx.relu, nnx.relu), nnx.Linear(6, 6, rngs=nnx.Rngs(0)))
    before = model(X)
    quantize_model(model.layers[0], where="parts")
    quantize_model(model, where="parts/0|layers/1$")
    assert_close(model(X), before, 100)


def test_bad_arguments_are_refused_and_change_nothing() -> None:
    model = sequential()
    graphdef = nnx.graphdef(model)
    with pytest.raises(TypeError, match="must be a module"):
        quantize_model(jnp.ones(3))  # type: ignore
    with pytest.raises(ValueError, match="bits=0"):
        quantize_model(model, 0)
    with pytest.raises(ValueError, match="where='mlp' matches no module with a method"):
        quantize_model(model, where="mlp")
    with pytest.raises(ValueError, match="is no module with a method decode"):
        quantize_model(model, methods="decode")
    with pytest.raises(ValueError, match="none of the functions that are looked for"):
        quantize_model(model, functions=["mish"], inputs=(X,))
    with pytest.raises(TypeError, match="inputs="):
        quantize_model(model, inputs=X)  # type: ignore
    with pytest.raises(ValueError, match="no few-bit modules"):
        restore_model(model)
    assert nnx.graphdef(model) == graphdef
    quantize_model(model, functions=["mish"])
    with pytest.raises(ValueError, match=r"Sequential.__call__ calls none of the functions"):
        model(X)
