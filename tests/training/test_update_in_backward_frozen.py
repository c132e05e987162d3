"""The update inside the backward pass of models that are partly frozen."""

from collections.abc import Callable, Iterator
from typing import Any

from close import assert_close
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.compat.jax import sub_jaxprs
from lowrank_optax.models import Decoder, DecoderConfig
from lowrank_optax.training import LayeredFunctions
from lowrank_optax.training.layered_models import joined

LAYERS, WIDTH, RANK, WORDS = 3, 8, 2, 16
Tree = Any


def block(layer: Tree, x: jax.Array, batch: jax.Array, key: Any) -> jax.Array:
    change = x @ layer["linear"]["a"] @ layer["linear"]["b"]
    return x + jnp.tanh(x @ layer["linear"]["kernel"] + change) * layer["scale"]


FUNCTIONS = LayeredFunctions(
    embed=lambda params, batch, key: params["embed"][batch],
    block=block,
    head=lambda params, x, batch, key: jnp.mean((x @ params["head"]["kernel"]) ** 2),
)


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


def ordinary_step(loss: Callable[[Tree], jax.Array], tx: Any) -> Callable[..., Any]:
    """A step of the trained parameters that holds all of their gradients."""

    @jax.jit
    def step(params: Tree, state: Tree) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def layer(seed: int, *stack: int) -> Tree:
    adapter = {"a": drawn(seed, *stack, WIDTH, RANK), "b": drawn(seed + 1, *stack, RANK, WIDTH)}
    kernel, scale = drawn(seed + 2, *stack, WIDTH, WIDTH), drawn(seed + 3, *stack, WIDTH)
    return adapter, {"linear": {"kernel": kernel}, "scale": scale}


BATCH = jnp.asarray(np.random.default_rng(6).integers(0, WORDS, (4, 6)))
ADAPTER, BASE = layer(10, LAYERS)
EMBED, HEAD = {"embed": drawn(0, WORDS, WIDTH)}, {"head": {"kernel": drawn(1, WIDTH, 5)}}
LISTED = [layer(20 + 4 * i) for i in range(LAYERS)]
ALL = {"linear": BASE["linear"] | ADAPTER, "scale": BASE["scale"]}
# What is trained, and what is not.
SPLITS = {
    "adapters": ({"blocks": {"linear": ADAPTER}}, {"blocks": BASE} | EMBED | HEAD),
    "adapters, head and a vector": (
        {"blocks": {"linear": ADAPTER, "scale": BASE["scale"]}} | HEAD,
        {"blocks": {"linear": BASE["linear"]}} | EMBED,
    ),
    "embedding": (EMBED, {"blocks": ALL} | HEAD),
    "head": (HEAD, {"blocks": ALL} | EMBED),
    "last of a list": (
        {"blocks": [*[None] * (LAYERS - 1), {"linear": LISTED[-1][0]}]} | HEAD,
        {
            "blocks": [{**b, "linear": b["linear"] | a} for a, b in LISTED[:-1]]
            + [LISTED[-1][1]]
        }
        | EMBED,
    ),
}  # fmt: skip


def numbered(tree: Tree) -> Tree:
    """A list as a dictionary, without what is None."""
    blocks = tree.get("blocks", {})
    if isinstance(blocks, list):
        blocks = {i: x for i, x in enumerate(blocks) if x is not None}
    return flatten_dict(tree | {"blocks": blocks})


def reference(params: Tree, frozen: Tree) -> jax.Array:
    tree = unflatten_dict(numbered(params) | numbered(frozen))
    x = FUNCTIONS.embed(tree, BATCH, None)
    for i in range(LAYERS):
        of_layer = lambda x, i=i: x[i]
        blocks = tree["blocks"]
        x = block(blocks[i] if i in blocks else jax.tree.map(of_layer, blocks), x, BATCH, None)
    return FUNCTIONS.head(tree, x, BATCH, None)


@pytest.mark.parametrize("name", SPLITS)
def test_steps_are_those_of_the_ordinary_step(name: str) -> None:
    params, frozen = SPLITS[name]
    plain = optax.adamw(1e-2, eps=1e-3)
    update = lro.update_in_backward(FUNCTIONS, plain, clip="global", max_norm=0.1, micro_batches=2)
    tx = optax.chain(optax.clip_by_global_norm(0.1), plain)

    ordinary = ordinary_step(lambda params: reference(params, frozen), tx)
    step = jax.jit(update.step)
    found, state, expected, expected_state = params, plain.init(params), params, tx.init(params)
    for _ in range(3):
        found, state, loss, metrics = step(found, state, BATCH, None, frozen)
        expected, expected_state, expected_loss = ordinary(expected, expected_state)
        assert_close(loss, expected_loss, 100)
    assert_close(found, expected, 800)
    trained = np.asarray(metrics["block_gradient_norms"]) > 0
    whole = "blocks" in params and isinstance(params["blocks"], dict)
    np.testing.assert_array_equal(trained, [whole] * (LAYERS - 1) + ["blocks" in params])


def equations(program: Any) -> Iterator[Any]:
    for equation in program.eqns:
        yield equation
        for inner in sub_jaxprs(equation):
            yield from equations(getattr(inner, "jaxpr", inner))


def traced(name: str) -> list[Any]:
    params, frozen = SPLITS[name]
    update = lro.update_in_backward(FUNCTIONS, optax.adam(1e-2))
    program = jax.make_jaxpr(update.step)(params, update.init(params), BATCH, None, frozen)
    return list(equations(program.jaxpr))


def test_no_array_of_a_frozen_stack_is_made() -> None:
    shapes = {x.aval.shape for equation in traced("adapters") for x in equation.outvars}
    assert BASE["linear"]["kernel"].shape not in shapes
    assert EMBED["embed"].shape not in shapes
    assert ADAPTER["a"].shape in shapes


def test_frozen_parts_before_the_first_trained_one_are_not_visited_backwards() -> None:
    assert not [e for e in traced("head") if e.primitive.name == "while"]
    assert [e for e in traced("embedding") if e.primitive.name == "while"]
    products = [e for e in traced("last of a list") if e.primitive.name == "dot_general"]
    # Forward: three in a block and the head; backward: the head's two gradients; of the last
    # block again the forward, the gradients of its three inputs and of its two factors.
    assert len(products) == 3 * LAYERS + 1 + 2 + 3 + 5


CONFIG = DecoderConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    intermediate_size=12,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
)
PAIR = BATCH[:, :-1], BATCH[:, 1:]
WRT = lro.adapters.trainable


def decoder_loss(model: Decoder, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    weight, axis = model.head()
    logits = jnp.tensordot(hidden, weight, (2, axis))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def adapted(method: Any, scan_layers: bool = True) -> tuple[Decoder, Tree, Tree]:
    """A model, what is trained of it, away from where it starts, and what is not."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=scan_layers)
    lro.adapters.attach(model, method, rngs=nnx.Rngs(1))
    _, params, frozen = nnx.split(model, WRT, ...)
    leaves, structure = jax.tree.flatten(nnx.as_pure(params))
    leaves = [x + drawn(i, *x.shape) / 8 for i, x in enumerate(leaves)]
    return model, structure.unflatten(leaves), nnx.as_pure(frozen)


@pytest.mark.parametrize(
    ("method", "scan_layers"),
    [
        (lro.adapters.LoTR(rank=2), True),
        pytest.param(lro.adapters.LoTR(rank=2), False, marks=pytest.mark.full),
        pytest.param(lro.adapters.LoRA(rank=2), True, marks=pytest.mark.full),
        pytest.param(lro.adapters.DoRA(rank=2), False, marks=pytest.mark.full),
        pytest.param(lro.adapters.FlyLoRA(rank=8, active=2), True, marks=pytest.mark.full),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, bool) else f"scan={x}",
)
def test_adapters_get_the_ordinary_step(method: Any, scan_layers: bool) -> None:
    """Those of LoTR are shared by all layers of a shape."""
    model, params, frozen = adapted(method, scan_layers)
    graph = nnx.graphdef(model)
    tx = optax.adamw(1e-2, eps=1e-3)
    # Nothing of the weights is read from the model.
    update = lro.update_in_backward(nnx.eval_shape(lambda: model), tx, loss=decoder_loss, wrt=WRT)

    def reference_loss(params: Tree) -> jax.Array:
        model = nnx.merge(graph, params, frozen)
        return decoder_loss(model, model.hidden(PAIR[0]), PAIR[1])

    ordinary = ordinary_step(reference_loss, tx)
    step = jax.jit(update.step)
    found, state, expected, expected_state = params, tx.init(params), params, tx.init(params)
    for _ in range(3):
        found, state, value, _ = step(found, state, PAIR, None, frozen)
        expected, expected_state, expected_value = ordinary(expected, expected_state)
        assert_close(value, expected_value, 100)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close((found, state), (expected, expected_state), 800)


@pytest.mark.full
def test_dropout_of_adapters_draws_from_the_key_of_the_step() -> None:
    model, params, frozen = adapted(lro.adapters.LoRA(rank=2, dropout=0.5))
    update = lro.update_in_backward(model, optax.sgd(1.0), loss=decoder_loss, wrt=WRT)
    key = jax.random.key(1)
    new, _, value, _ = jax.jit(update.step)(params, update.init(params), PAIR, key, frozen)
    gradients = jax.jit(jax.grad(update.loss, has_aux=True))(params, PAIR, key, frozen)[0]
    assert_close(new, optax.apply_updates(params, jax.tree.map(jnp.negative, gradients)), 100)
    other = update.loss(params, PAIR, jax.random.key(2), frozen)[0]
    assert abs(float(value - other)) > 1e-6


class Blocks(nnx.Module):
    """A model whose blocks are given."""

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks

    def before_blocks(self, x: jax.Array) -> jax.Array:
        return x

    def through_block(self, block: nnx.Module, x: jax.Array) -> jax.Array:
        return block(x)

    def after_blocks(self, x: jax.Array) -> jax.Array:
        return x


def squares(model: Any, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((hidden - targets) ** 2)


X = drawn(7, 4, WIDTH), drawn(8, 4, WIDTH)


def linear(seed: int) -> nnx.Linear:
    return nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(seed))


def test_listed_blocks_may_differ() -> None:
    norm = nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0))
    model = Blocks(nnx.List([linear(0), norm, linear(1), nnx.Sequential(lambda x: jnp.sin(x))]))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    update = lro.update_in_backward(model, optax.sgd(1.0), loss=squares)
    new = jax.jit(update.step)(params, update.init(params), X)[0]

    def loss(model: Any) -> jax.Array:
        x = X[0]
        for each in model.blocks:
            x = each(x)
        return squares(model, x, X[1])

    gradients = nnx.as_pure(nnx.grad(loss)(model))
    assert_close(new, jax.tree.map(lambda x, g: x - g, params, gradients), 100)


class Added(nnx.Module):
    """A block that adds a multiple of one of its input's numbers, times what all blocks share."""

    def __init__(self, factors: Any) -> None:
        self.factors = nnx.Param(jnp.asarray(factors, jnp.bfloat16))


class Shared(Blocks):
    """Its first number is what the blocks add up; the others are the input."""

    def __init__(self) -> None:
        super().__init__(nnx.List([Added([1, 0]), Added([0, -1])]))
        self.shared = nnx.Param(jnp.zeros((), jnp.bfloat16))

    def through_block(self, block: nnx.Module, x: jax.Array) -> jax.Array:
        change = self.shared[...] * jnp.sum(block.factors[...] * x[:, 1:], axis=1)
        return x.at[:, 0].add(change)


def test_what_blocks_share_is_rounded_once_over_micro_batches() -> None:
    """A mean gradient of 1 + ε/2 from one block and of -1 from the other, which cancel to ε/2."""
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    inputs = jnp.array([[0, 1, 1], [0, 1 + eps, 1]], jnp.bfloat16)
    model = Shared()
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    loss = lambda model, hidden, targets: jnp.sum(hidden[:, 0])
    update = lro.update_in_backward(model, optax.sgd(1.0), loss=loss, micro_batches=2)
    new = jax.jit(update.step)(params, update.init(params), (inputs, inputs))[0]
    assert float(new["shared"]) == -eps / 2


def stepped(model: Any, frozen: Any = None, **options: Any) -> Any:
    update = lro.update_in_backward(model, optax.sgd(0.1), loss=squares, **options)
    params = nnx.as_pure(nnx.state(model, options.get("wrt", nnx.Param)))
    return jax.eval_shape(update.step, params, update.init(params), X, None, frozen)


class Recomputed(nnx.Module):
    """A layer in `nnx.remat`, which puts all its variables back in new arrays after the call."""

    def __init__(self, rate: float) -> None:
        self.linear, self.scale = linear(0), nnx.Variable(jnp.float32(2))
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        run = lambda layer, x: layer.dropout(layer.linear(x) * layer.scale[...])
        return nnx.remat(run)(self, x)


def test_a_block_may_recompute_a_part_of_itself() -> None:
    model = Blocks(nnx.List([Recomputed(0.5), linear(1)]))
    frozen = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
    with pytest.raises(ValueError, match="draws random numbers from 'dropout/rngs/count'"):
        stepped(model, frozen)
    model.eval()
    stepped(model, frozen)


def test_what_a_module_cannot_be_is_refused() -> None:
    model = Blocks(nnx.List([linear(0), linear(1)]))
    kernels = {"wrt": nnx.PathContains("kernel")}
    with pytest.raises(ValueError, match=r"'blocks/0/bias' is not trained: .*frozen=nnx\.as_pure"):
        stepped(model, **kernels)
    with pytest.raises(ValueError, match="frozen has no 'blocks/1/bias'"):
        stepped(model, {"blocks": {0: {"bias": jnp.zeros(WIDTH)}}}, **kernels)
    stepped(model, nnx.state(model), **kernels)  # whatever else there is does not matter
    with pytest.raises(ValueError, match="wrt='no' selects no variable of Blocks"):
        lro.update_in_backward(model, optax.sgd(0.1), loss=squares, wrt="no")
    model.blocks.append(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"random numbers from '.*count'.* give the step a"):
        stepped(model)
    model.eval()
    stepped(model)
    model.blocks[-1] = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'mean' changes in a call, as statistics do"):
        stepped(model, nnx.state(model))
    model.blocks[-1] = model.blocks[0]
    with pytest.raises(ValueError, match="blocks/2 has parameters that are another part's too"):
        stepped(model)


@pytest.mark.parametrize(
    ("params", "frozen", "message"),
    [
        (HEAD, {"blocks": ALL} | EMBED | HEAD, "'head/kernel' is in params and in frozen"),
        ({"blocks": {}}, {"blocks": ALL} | EMBED | HEAD, "params has no array"),
        (HEAD, {"blocks": ALL | {"n": jnp.ones(())}} | EMBED, "must be stacked along"),
        (HEAD, {"head": jnp.ones(3), "blocks": ALL}, "params has .* where frozen has"),
        (HEAD | {"blocks": [ADAPTER]}, {"blocks": BASE}, "a list in one of params and frozen"),
        (HEAD | {"blocks": ADAPTER}, {"blocks": [BASE]}, "a list in one of params and frozen"),
        ({"blocks": [ADAPTER]}, {"blocks": [BASE, BASE]}, "list of 1 where frozen has one of 2"),
        ({"x": [HEAD, None]}, {"blocks": ALL, "x": [None]}, "list of 2 where frozen has one of 1"),
    ],
)
def test_trees_that_do_not_fit_together_are_refused(
    params: Tree, frozen: Tree, message: str
) -> None:
    update = lro.update_in_backward(FUNCTIONS, optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(update.step, params, update.init(params), BATCH, None, frozen)


def test_none_stands_for_a_whole_tree_of_the_other() -> None:
    """Also within lists, where either has None, a list or a dictionary."""
    a, b, c = drawn(1, WIDTH), drawn(2, WIDTH), drawn(3, WIDTH)
    trained, frozen = [[a, None], None, {"x": a}, None], [None, [b, {"y": c}], {"y": b}, c]
    expected = [[a, None], [b, {"y": c}], {"x": a, "y": b}, c]
    for first, second in ((trained, frozen), (frozen, trained)):
        found = joined({"lists": first}, {"lists": second})
        assert jax.tree.structure(found) == jax.tree.structure({"lists": expected})
        assert_close(found, {"lists": expected})


def test_arguments_of_modules_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="a step's frozen= is not trained"):
        lro.update_in_backward(FUNCTIONS, optax.sgd(0.1), wrt=nnx.Param)
    update = lro.update_in_backward(FUNCTIONS, optax.sgd(0.1))
    with pytest.raises(TypeError, match="frozen is a list"):
        update.step(HEAD, update.init(HEAD), BATCH, None, [])
