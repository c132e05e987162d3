"""The randomized layer in Linen is nn.Dense but for its kernel's gradient."""

import copy
import dataclasses
import functools
import pickle
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen as nn

import lowrank_optax as lro
from lowrank_optax.layers import Sketch

X = np.random.default_rng(0).standard_normal((2, 8, 3), np.float32)
T = np.random.default_rng(1).standard_normal((2, 8, 4), np.float32)
QUARTER = Sketch("rows", fraction=0.25)
Dense = lro.layers.linen.RandomizedDense
Randomized = lro.layers.linen.Randomized
KEY = {"rngs": {"sketch": jax.random.key(1)}}


@functools.partial(jax.jit, static_argnames=("module", "deterministic"))
def gradients(module: nn.Module, variables: Any, seed: int | None, **call: Any) -> Any:
    rngs = None if seed is None else {"sketch": jax.random.key(seed)}

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        return jnp.sum((module.apply(variables, x, rngs=rngs, **call) - T) ** 2)

    of_variables, of_x = jax.grad(loss, argnums=(0, 1))(variables, X)
    return {**of_variables["params"], "x": of_x}


def initial(module: nn.Module) -> Any:
    return jax.jit(module.init)(jax.random.key(0), X)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}],
    ids=str,
)
def test_outputs_and_other_gradients_are_those_of_the_plain_layer(options: dict[str, Any]) -> None:
    layer, plain = Dense(4, sketch=QUARTER, **options), nn.Dense(4, **options)
    variables = initial(layer)
    assert_close(variables, initial(plain))
    run = jax.jit(lambda v, key: layer.apply(v, X, rngs={"sketch": key}))
    outputs, expected = run(variables, jax.random.key(1)), jax.jit(plain.apply)(variables, X)
    assert outputs.dtype == expected.dtype
    assert_close(outputs, expected)
    found, expected = gradients(layer, variables, 1), gradients(plain, variables, None)
    assert not np.allclose(*(np.float32(of.pop("kernel")) for of in (found, expected)))
    assert_close(found, expected)


def test_without_a_key_or_deterministic_it_is_the_plain_layer() -> None:
    layer, plain = Dense(4, sketch=QUARTER), nn.Dense(4)
    fixed = Dense(4, sketch=QUARTER, deterministic=True)
    variables = initial(plain)
    expected = gradients(plain, variables, None)
    for found in (
        gradients(layer, variables, None),
        gradients(layer, variables, 1, deterministic=True),
        gradients(fixed, variables, 1),
    ):
        assert_close(found, expected)
    randomized = gradients(fixed, variables, 1, deterministic=False)["kernel"]
    assert_close(randomized, gradients(layer, variables, 1)["kernel"])
    assert not np.allclose(randomized, expected["kernel"])


def test_gradient_changes_with_the_key_and_with_the_module() -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Dense(4, sketch=QUARTER)(x) + Dense(4, sketch=QUARTER)(x)

    variables = initial(Two())
    first, second = gradients(Two(), variables, 1), gradients(Two(), variables, 2)
    one, other = (np.asarray(first[f"RandomizedDense_{i}"]["kernel"]) for i in (0, 1))
    assert not np.allclose(one, other)
    assert not np.allclose(one, second["RandomizedDense_0"]["kernel"])
    again = gradients(Two(), variables, 1)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_gradient_has_the_plain_one_as_its_mean_over_keys() -> None:
    layer = Dense(4, sketch=Sketch("rademacher", size=3))
    variables = initial(layer)
    expected = np.asarray(gradients(nn.Dense(4), variables, None)["kernel"], np.float64)
    each = jax.jit(jax.vmap(lambda seed: gradients(layer, variables, seed)["kernel"]))
    drawn = np.asarray(each(np.arange(2000)), np.float64)
    error = drawn.mean(0) - expected
    assert np.all(np.abs(error) < 4 * drawn.std(0) / np.sqrt(len(drawn)))


@pytest.mark.combinations(1)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_layers_of_a_scan_have_a_key_each_where_the_stream_is_split(
    split: bool, remat: bool
) -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return x, Dense(4, sketch=QUARTER)(x)

    scan = nn.scan(
        nn.remat(Layer) if remat else Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "sketch": split},
        length=2,
    )
    variables = jax.jit(lambda: scan().init(jax.random.key(0), X, None))()

    def loss(variables: Any) -> jax.Array:
        _, y = scan().apply(variables, X, None, rngs={"sketch": jax.random.key(1)})
        return jnp.sum(y * T)  # so that the gradient of a kernel is that of T alone

    first, second = jax.jit(jax.grad(loss))(variables)["params"]["RandomizedDense_0"]["kernel"]
    assert np.allclose(first, second) == (not split)


def test_a_collection_of_another_name_and_valid_rows() -> None:
    layer = Dense(4, sketch=QUARTER, rng_collection="noise")
    variables = initial(layer)
    # Four of them, as many as the sketch has rows.
    valid = jnp.asarray(np.arange(16).reshape(2, 8) % 4 == 1)

    def loss(variables: Any, module: nn.Module, **call: Any) -> jax.Array:
        rngs = {"noise": jax.random.key(1)}
        y = module.apply(variables, X, rngs=rngs, **call)
        return jnp.sum(jnp.where(valid[..., None], (y - T) ** 2, 0))

    slope = jax.grad(loss)
    found, sketched, expected = jax.jit(
        lambda v: (slope(v, layer, valid=valid), slope(v, layer), slope(v, nn.Dense(4)))
    )(variables)
    assert_close(found, expected)
    assert not np.allclose(sketched["params"]["kernel"], expected["params"]["kernel"])


def test_bad_arguments_are_refused() -> None:
    key = jax.random.key(0)
    with pytest.raises(TypeError, match=r"sketch=None must be a lro\.layers\.Sketch"):
        jax.eval_shape(Dense(4).init, key, X)
    own = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    for options in ({"dot_general": own}, {"dot_general_cls": lambda: own}):
        layer = Dense(4, sketch=QUARTER, **options)
        with pytest.raises(ValueError, match="dot_general="):
            jax.eval_shape(layer.init, {"params": key, "sketch": key}, X)


def test_a_flax_layer_that_multiplies_by_other_means_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = Dense(4, sketch=QUARTER)
    variables = initial(module)
    kernel = variables["params"]["kernel"]
    monkeypatch.setattr(nn.Dense, "__call__", lambda layer, x: x @ kernel)
    with pytest.raises(RuntimeError, match="called its attribute dot_general 0 times"):
        module.apply(variables, X, rngs={"sketch": jax.random.key(0)})


class Stack(nn.Module):
    """Two layers and a head, made of one class or the other."""

    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.dense(5, name="up")(x))
        return nn.Dense(4, name="lm_head")(self.dense(4, name="down")(x))


def test_a_module_that_is_intercepted_is_one_made_of_randomized_layers() -> None:
    layers = Stack(functools.partial(Dense, sketch=QUARTER))
    variables = initial(Stack())
    for sketch in (QUARTER, {"up|down": QUARTER}):
        module = Randomized(Stack(), sketch)
        for seed in (None, 1):
            found = gradients(module, variables, seed)
            jax.tree.map(assert_close, found, gradients(layers, variables, seed))
    some = gradients(Randomized(Stack(), {"up": QUARTER}), variables, 1)
    expected = gradients(Stack(), variables, None)
    assert_close(some["down"]["kernel"], expected["down"]["kernel"])
    assert not np.allclose(some["up"]["kernel"], expected["up"]["kernel"])


def test_an_intercepted_module_with_adapters_has_both() -> None:
    adapted = lro.adapters.linen.Adapted(Stack(), lro.adapters.LoRA(rank=1), "up")
    variables = jax.tree.map(lambda a: a + 0.1, adapted.init(jax.random.key(0), X))
    expected = adapted.apply(variables, X)
    randomized = Randomized(adapted, {"down": QUARTER})
    assert_close(randomized.apply(variables, X, **KEY), expected)
    adapters = variables.pop("adapters")
    params = variables["params"]

    def loss(trained: Any, module: Any) -> jax.Array:
        adapters, down = trained
        both = {"params": {**params, "down": down}, "adapters": adapters}
        return jnp.sum(module.apply(both, X, **KEY) ** 2)

    of_module = lambda module: jax.grad(loss)((adapters, params["down"]), module)
    (found, sketched), (exact, plain) = of_module(randomized), of_module(adapted)
    assert_close(found, exact)
    assert_close(sketched["bias"], plain["bias"])
    assert not np.allclose(sketched["kernel"], plain["kernel"])


def test_an_adapter_that_reads_the_kernel_may_be_beside_a_sketched_layer() -> None:
    adapted = lro.adapters.linen.Adapted(ByName(), lro.adapters.DoRA(rank=1))
    variables = initial(adapted)
    randomized = Randomized(adapted, {"up": QUARTER})
    assert_close(randomized.apply(variables, X, **KEY), adapted.apply(variables, X))


def test_variables_are_mapped_by_functions_that_pass_dictionaries_on() -> None:
    double = lambda variables: jax.tree.map(lambda x: 2 * x, variables)
    mapped = nn.map_variables(ByName, "params", trans_in_fn=double)()
    variables = initial(ByName())
    outputs = Randomized(mapped, QUARTER).apply(variables, X, **KEY)
    assert_close(outputs, ByName().apply(double(variables), X))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="up")(x)


Compiled = nn.jit(Inner)


def test_intercepted_layers_of_a_module_that_is_compiled_already() -> None:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Compiled(name="inner")(x)

    variables = Outer().init(jax.random.key(0), X)
    slope = lambda module: jax.grad(
        lambda v: jnp.sum(module.apply(v, X, rngs={"sketch": jax.random.key(1)}) ** 2)
    )(variables)["params"]["inner"]["up"]["kernel"]
    exact = slope(Outer())
    assert not np.allclose(slope(Randomized(Outer(), QUARTER)), exact)
    np.testing.assert_array_equal(slope(Outer()), exact)


def test_intercepted_layers_that_would_not_be_sketched_are_refused() -> None:
    variables = initial(Stack())
    with pytest.raises(ValueError, match=r"sketch='query' matches no nn\.Dense layer; near"):
        gradients(Randomized(Stack(), {"up": QUARTER, "query": QUARTER}), variables, 1)
    with pytest.raises(TypeError, match=r"must be a lro\.layers\.Sketch"):
        Randomized(Stack(), 0.1)  # type: ignore[arg-type]
    own = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    module = Randomized(nn.Dense(4, dot_general=own), {"": QUARTER})
    with pytest.raises(ValueError, match="dot_general="):
        gradients(module, initial(nn.Dense(4)), 1)


@pytest.mark.parametrize("split", [True, False, None])
def test_intercepted_layers_of_a_scan_need_its_stream(split: bool | None) -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return x, nn.Dense(4, name="up")(x)

    split_rngs = {"params": True} if split is None else {"params": True, "sketch": split}
    scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs=split_rngs, length=2)()
    variables = scan.init(jax.random.key(0), X, None)
    module = Randomized(scan, {"up": QUARTER})

    def gradient(module: Any) -> jax.Array:
        # The gradient of a kernel is that of T alone.
        loss = lambda v: jnp.sum(module.apply(v, X, None, rngs=KEY["rngs"])[1] * T)
        return jax.grad(loss)(variables)["params"]["up"]["kernel"]

    if split is None:
        with pytest.raises(ValueError, match="up gets no key: give the scan"):
            gradient(module)
    else:
        found = gradient(module)
        pairs = zip(found, gradient(scan), strict=True)
        assert not any(np.allclose(sketched, exact) for sketched, exact in pairs)
        assert np.allclose(*found) == (not split)


def kernel_gradient(module: Any, variables: Any, **rngs: Any) -> jax.Array:
    loss = lambda v: jnp.sum((module.apply(v, X, **rngs) - T) ** 2)
    return jax.tree.leaves(jax.grad(loss)(variables))[-1]


class Sub(nn.Dense):
    """A layer with the call of nn.Dense."""


class ByName(nn.Module):
    """A layer that is called by the name of its argument."""

    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(4, name="up")(inputs=x)


@pytest.mark.parametrize("dense", [nn.Dense, Sub])
def test_an_intercepted_layer_may_be_a_subclass_called_by_the_name_of_its_argument(
    dense: Any,
) -> None:
    variables = initial(ByName(dense))
    found = kernel_gradient(Randomized(ByName(dense), QUARTER), variables, **KEY)
    layers = ByName(functools.partial(Dense, sketch=QUARTER))
    assert_close(found, kernel_gradient(layers, variables, **KEY))


def test_a_single_key_is_also_that_of_the_sketches() -> None:
    variables = initial(ByName())
    module = Randomized(ByName(), QUARTER)
    expected = kernel_gradient(module, variables, **KEY)
    assert_close(kernel_gradient(module, variables, rngs=jax.random.key(1)), expected)


def test_a_compiled_module_is_traced_once_for_a_module_and_sketch() -> None:
    traces: list[int] = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            traces.append(1)
            return nn.Dense(4, name="up")(x)

    compiled = nn.jit(Counted)()
    variables = compiled.init(jax.random.key(0), X)
    randomized = [Randomized(compiled, {"up": s}) for s in (QUARTER, Sketch(size=8))]
    traces.clear()
    for _ in range(3):
        for module in randomized:
            module.apply(variables, X, **KEY)
    assert len(traces) == 2


def test_a_wrapped_module_returns_its_first_outputs() -> None:
    outputs, variables = Randomized(Inner(), QUARTER).init_with_output(jax.random.key(0), X)
    assert_close(outputs, Inner().apply(variables, X))


def test_what_has_nothing_to_sketch_is_refused() -> None:
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4, name="lm_head")(x)

    head = Head()
    with pytest.raises(ValueError, match="only output heads"):
        Randomized(head, QUARTER).apply(initial(head), X, **KEY)
    tanh = nn.Sequential([nn.tanh])
    with pytest.raises(ValueError, match=r"called no nn\.Dense"):
        Randomized(tanh, QUARTER).apply({}, X, **KEY)
    with pytest.raises(ValueError, match=r"sketch=\{\} has no pattern"):
        Randomized(head, {})
    with pytest.raises(ValueError, match="is no regular expression"):
        Randomized(head, {"(": QUARTER})
    with pytest.raises(TypeError, match=r"module=3 must be a Linen module"):
        Randomized(3, QUARTER)


class Blocks(nn.Module):
    """Two blocks of one class, and calls of another kind."""

    block: Any = Compiled

    def setup(self) -> None:
        self.first, self.second = self.block(), self.block()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.first(x) + self.second(x)

    def only(self, x: jax.Array, name: str) -> jax.Array:
        return {"first": self.first, "second": self.second, "tanh": nn.tanh}[name](x)


def sketched_blocks(module: Any, variables: Any, seed: int = 1) -> dict[str, jax.Array]:
    """The gradient of each block's kernel, by that of T alone."""
    rngs = {"sketch": jax.random.key(seed)}
    slope = jax.grad(lambda v: jnp.sum(module.apply(v, X, rngs=rngs) * T))
    return {name: each["up"]["kernel"] for name, each in slope(variables)["params"].items()}


@pytest.mark.parametrize(
    "sketch",
    [
        pytest.param(QUARTER, marks=pytest.mark.full),
        pytest.param({"first": QUARTER}, marks=pytest.mark.full),
        {"second": QUARTER},
        {"first": QUARTER, "second": Sketch(size=2)},
    ],
    ids=str,
)
def test_compiled_blocks_of_one_class_have_the_sketches_of_blocks_that_are_not(sketch: Any) -> None:
    variables = initial(Blocks())
    found = sketched_blocks(Randomized(Blocks(), sketch), variables)
    exact = sketched_blocks(Blocks(), variables)
    for name in ("first", "second"):
        is_sketched = not isinstance(sketch, dict) or name in sketch
        assert np.allclose(found[name], exact[name]) != is_sketched
    assert not np.allclose(found["first"], found["second"])  # a key, or a sketch, of its own
    _, updates = Randomized(Blocks(), sketch).apply(variables, X, mutable=True, **KEY)
    jax.tree.map(np.testing.assert_array_equal, updates, variables)


class Scanned(nn.Module):
    """A scan over two layers of two blocks each."""

    block: Any = Compiled

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = lambda blocks, x, _: (blocks(x)[..., :3], None)
        splits = {"params": True, "sketch": True}
        run = nn.scan(layer, variable_axes={"params": 0}, split_rngs=splits, length=2)
        return run(Blocks(self.block, name="blocks"), x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("module", [Blocks, Scanned])
@pytest.mark.parametrize("name", ["first", pytest.param("second", marks=pytest.mark.full)])
def test_compiled_blocks_that_see_parameters_alone_have_their_own_sketches(
    name: str, module: Any
) -> None:
    model = module(nn.jit(Inner, variables=["params"]))
    variables = initial(model)
    randomized = Randomized(model, {name: QUARTER})

    def blocks(model: Any) -> dict[str, Any]:
        params = jax.grad(lambda v: jnp.sum(model.apply(v, X, **KEY) ** 2))(variables)["params"]
        return params.get("blocks", params)

    found, exact = blocks(randomized), blocks(model)
    assert {
        n for n in exact if not np.allclose(*(x[n]["up"]["kernel"] for x in (found, exact)))
    } == {name}
    _, updates = randomized.apply(variables, X, mutable=["params"], **KEY)
    jax.tree.map(np.testing.assert_array_equal, updates, variables)


def test_compiled_blocks_of_one_pattern_are_traced_once() -> None:
    traces: list[int] = []

    class Counted(Inner):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            traces.append(1)
            return nn.Dense(4, name="up")(x)

    blocks = Blocks(nn.jit(Counted))
    variables = blocks.init(jax.random.key(0), X)
    for sketch, number in (
        (QUARTER, 1),
        ({"first|second": QUARTER}, 1),
        ({"first": QUARTER}, 2),
        ({"first|second": QUARTER, "second": QUARTER}, 2),  # the last is found too
    ):
        traces.clear()
        module = Randomized(blocks, sketch)
        for _ in range(2):
            module.apply(variables, X, **KEY)
        assert len(traces) == number


def test_a_compiled_block_is_traced_again_within_another_interceptor() -> None:
    def negated(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        return -y if isinstance(context.module, nn.Dense) else y

    variables = initial(Blocks())
    randomized = Randomized(Blocks(), QUARTER)
    before = randomized.apply(variables, X, **KEY)
    with nn.intercept_methods(negated):
        within = randomized.apply(variables, X, **KEY)
    assert_close(within, -before)
    assert_close(randomized.apply(variables, X, **KEY), before)


class Headed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="last")(Blocks(name="blocks")(x))


@pytest.mark.parametrize("order", [(0, 1, 0), pytest.param((1, 0, 1), marks=pytest.mark.full)])
def test_a_randomized_module_may_be_randomized_again(order: tuple[int, ...]) -> None:
    variables = initial(Headed())
    inner = Randomized(Headed(), {"last": QUARTER})
    nested = inner, Randomized(inner, {"first": QUARTER})

    def gradient(module: Any) -> dict[str, Any]:
        params = jax.grad(lambda v: jnp.sum(module.apply(v, X, **KEY) ** 2))(variables)["params"]
        blocks = {name: each["up"]["kernel"] for name, each in params["blocks"].items()}
        return {**blocks, "last": params["last"]["kernel"]}

    exact = gradient(Headed())
    for number in order:
        found = gradient(nested[number])
        sketched = {name for name in exact if not np.allclose(found[name], exact[name])}
        assert sketched == ({"last", "first"} if number else {"last"})


def test_its_sketches_cannot_be_changed_but_replaced() -> None:
    sketches = {"first": QUARTER}
    randomized = Randomized(Blocks(), sketches)
    variables = initial(Blocks())
    expected = sketched_blocks(randomized, variables)
    sketches["second"] = QUARTER
    jax.tree.map(np.testing.assert_array_equal, sketched_blocks(randomized, variables), expected)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'sketch'"):
        randomized.sketch = QUARTER  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        randomized.sketch["second"] = QUARTER  # type: ignore[index]
    replaced = dataclasses.replace(randomized, sketch={"second": QUARTER})
    exact = sketched_blocks(Blocks(), variables)
    assert np.allclose(sketched_blocks(replaced, variables)["first"], exact["first"])
    again = copy.deepcopy(randomized)
    jax.tree.map(assert_close, sketched_blocks(again, variables), expected)
    again = pickle.loads(pickle.dumps(Randomized(Inner(), {"": QUARTER})))
    assert again.sketch == {"": QUARTER}


def test_each_call_has_to_find_its_layers() -> None:
    variables = initial(Blocks())
    randomized = Randomized(Blocks(), {"first": QUARTER})
    call = lambda name: randomized.apply(variables, X, name, method="only", **KEY)
    for _ in range(2):
        randomized.apply(variables, X, **KEY)
        call("first")
        with pytest.raises(ValueError, match=r"sketch='first' matches no nn\.Dense layer"):
            call("second")
        with pytest.raises(ValueError, match=r"called no nn\.Dense"):
            call("tanh")
