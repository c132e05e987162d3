"""The update inside the backward pass: the ordinary step, computed in another order."""

from collections import OrderedDict
from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from close import assert_close
from flax import nnx
from harness import Row
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_transformations import ROWS

import lowrank_optax as lro
from lowrank_optax.models import Decoder, DecoderConfig
from lowrank_optax.training import LayeredFunctions

LAYERS, WIDTH, HIDDEN, WORDS = 3, 8, 12, 16
Tree = Any


def embed(params: Tree, batch: jax.Array, key: Any) -> jax.Array:
    return dropped(params["embed"][batch[:, :-1]], key)


def block(layer: Tree, x: jax.Array, batch: jax.Array, key: Any) -> jax.Array:
    inner = jnp.tanh((x * layer["scale"]) @ layer["up"]["kernel"])
    return x + jnp.tanh(dropped(inner, key)) @ layer["down"]["kernel"]


def head(params: Tree, x: jax.Array, batch: jax.Array, key: Any) -> Any:
    weight = params["head"]["kernel"] if "head" in params else params["embed"].T
    logits = (x @ weight).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(loss), {"largest": jnp.max(loss)}


def dropped(x: jax.Array, key: Any) -> jax.Array:
    return x if key is None else x * 2 * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)


FUNCTIONS = LayeredFunctions(embed, block, head)


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 3, jnp.float32)


PARAMS = {
    "embed": drawn(0, WORDS, WIDTH),
    "blocks": {
        "scale": drawn(1, LAYERS, WIDTH),
        "up": {"kernel": drawn(2, LAYERS, WIDTH, HIDDEN)},
        "down": {"kernel": drawn(3, LAYERS, HIDDEN, WIDTH)},
    },
    "head": {"kernel": drawn(4, WIDTH, WORDS)},
    "spare": drawn(5, 4),  # which nothing uses, but which decays
}
TIED = {name: x for name, x in PARAMS.items() if name != "head"}
LISTED = PARAMS | {
    "blocks": [jax.tree.map(lambda x, i=i: x[i], PARAMS["blocks"]) for i in range(LAYERS)]
}
KEY = jax.random.key(0)
BATCH = jnp.asarray(np.random.default_rng(6).integers(0, WORDS, (4, 7)))
STACKED = lambda params: jax.tree.map(
    lambda x: lro.WeightDimensionNumbers(-2, -1) if x.ndim > 2 else None, params
)


def reference(params: Tree, batch: jax.Array, key: Any, micro_batches: int = 1) -> jax.Array:
    """The loss, one layer and one micro-batch after the other, with the documented keys."""
    fold = lambda key, *numbers: (
        key
        if key is None or not numbers
        else fold(jax.random.fold_in(key, numbers[0]), *numbers[1:])
    )
    losses = []
    for i in range(micro_batches):
        part = batch[i::micro_batches]
        x = embed(params, part, fold(key, 0, i))
        for layer in range(LAYERS):
            blocks = params["blocks"]
            is_list = isinstance(blocks, list)
            own = blocks[layer] if is_list else jax.tree.map(lambda x: x[layer], blocks)  # noqa: B023
            x = block(own, x, part, fold(key, 1, layer, i))
        losses.append(head(params, x, part, fold(key, 2, i))[0])
    return sum(losses) / micro_batches


def ordinary(tx: Any, micro_batches: int = 1) -> Callable[..., Any]:
    def step(params: Tree, state: Tree, batch: jax.Array, key: Any) -> Any:
        loss, gradients = jax.value_and_grad(reference)(params, batch, key, micro_batches)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step)


def run(step: Callable[..., Any], params: Tree, state: Tree, steps: range) -> Any:
    losses = []
    for i in steps:
        params, state, loss, *_ = step(params, state, BATCH, jax.random.key(i))
        losses.append(loss)
    return params, state, np.asarray(losses)


def compare(params: Tree, tx: Any, ordinary_tx: Any = None, steps: int = 3, **options: Any) -> None:
    """Some steps of both kinds give the same losses, parameters and states."""
    update = lro.update_in_backward(FUNCTIONS, tx, **options)
    other = tx if ordinary_tx is None else ordinary_tx
    found = run(jax.jit(update.step), params, update.init(params), range(steps))
    step = ordinary(other, options.get("micro_batches", 1))
    expected = run(step, params, other.init(params), range(steps))
    assert_close(found[2], expected[2], 100)
    assert_close(found[0], expected[0], 800)
    if ordinary_tx is None:
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert types(found[1]) == types(expected[1])


def decayed_adamw() -> Any:
    rate = optax.linear_schedule(1e-2, 1e-3, 4)
    mask = lambda params: jax.tree.map(lambda x: x.ndim != 2, params)
    return optax.adamw(rate, weight_decay=0.1, mask=mask)


OPTIMIZERS = {
    "adamw": decayed_adamw,
    "galore": lambda: lro.galore(1e-2, rank=2, refresh_every=2, weight_dimension_numbers=STACKED),
    "partition": lambda: optax.partition(
        {"a": optax.inject_hyperparams(optax.lion)(1e-3), "b": optax.sgd(1e-2, 0.9)},
        lambda params: jax.tree.map(lambda x: "a" if x.ndim > 2 else "b", params),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_ordinary_one(name: str) -> None:
    compare(PARAMS, OPTIMIZERS[name]())


# Of these a number belongs to the whole tree or to a whole stack.
REFUSED = {
    "adagrad_norm": "scale_by_adagrad_norm",
    "adagrad_norm_by_columns": "spans layers",
    "monitor_weight_decay": "monitor_weight_decay computes",
    "monitor_weight_decay_every_third_step": "monitor_weight_decay computes",
    "aflora_freezing": "aflora_freezing",
    "lamda_freezing": "spans layers",
    "sara": "spans layers",
}


def side_by_side(tx: Any, steps: int) -> Any:
    """Parameters and losses of steps of both kinds, and whether their codes are the same."""
    update, other = lro.update_in_backward(FUNCTIONS, tx), ordinary(tx)
    start = PARAMS, tx.init(PARAMS)
    codes = lambda state: [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint8]

    def step(carry: Any, key: jax.Array) -> Any:
        (*here, loss, _), (*there, expected) = (
            step(*before, BATCH, key)
            for step, before in zip((update.step, other), carry, strict=True)
        )
        same = jax.tree.map(jnp.array_equal, codes(here[1]), codes(there[1]))
        outputs = (here[0], loss), (there[0], expected), jnp.all(jnp.asarray(same))
        return (tuple(here), tuple(there)), outputs

    keys = jax.random.split(KEY, steps)
    return jax.jit(lambda start: jax.lax.scan(step, (start, start), keys)[1])(start)


LONG = [pytest.param(make, id=name) for name, make in OPTIMIZERS.items()]
LONG += [pytest.param(row, id=row.name) for row in ROWS if row.name not in REFUSED]


@pytest.mark.full
@pytest.mark.parametrize("row", LONG)
def test_two_hundred_steps_have_the_losses_of_the_ordinary_step(row: Any) -> None:
    """Until rounding flips a code of 8 bits: the moment is off by its quantum from then on.

    So is that of the ordinary step if one weight starts an ulp away: after 37 to 137 steps one code
    of AdamW's is another, and losses come to differ by up to 2.2e-3.
    """
    (params, losses), (expected_params, expected), same = side_by_side(made(row), steps=200)
    first = lambda tree: jax.tree.map(lambda x: x[:5], tree)
    assert_close(first(params), first(expected_params), 800)
    same = np.logical_and.accumulate(same)
    assert same[:30].all()
    np.testing.assert_allclose(losses[same], expected[same], rtol=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=5e-3)
    assert losses[-1] < losses[0]


def made(row: Any) -> Any:
    """A row's transformation of a stack's matrices; others as they are."""
    if not isinstance(row, Row):
        return row()
    matrices = {"weight_dimension_numbers": STACKED}
    return row.make(**matrices) if row.takes("weight_dimension_numbers") else row.make()


@pytest.mark.full
@pytest.mark.parametrize("row", [x for x in ROWS if x.name in REFUSED], ids=lambda row: row.name)
def test_other_optimizers_are_refused_by_name(row: Row) -> None:
    tx = made(row)
    with pytest.raises(ValueError, match=REFUSED[row.name]):
        jax.eval_shape(
            lro.update_in_backward(FUNCTIONS, tx).step, PARAMS, tx.init(PARAMS), BATCH, None
        )


@pytest.mark.parametrize("params", [TIED, LISTED], ids=["tied", "list"])
def test_other_models_give_the_ordinary_step(params: Tree) -> None:
    compare(params, optax.sgd(0.1, 0.9))


def with_stacks(tree: Tree) -> Tree:
    """The tree with each list of blocks stacked."""
    is_list = lambda x: isinstance(x, list)
    stack = lambda x: jax.tree.map(lambda *blocks: jnp.stack(blocks), *x) if is_list(x) else x
    return jax.tree.map(stack, tree, is_leaf=is_list)


BY_LEAF = {
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "novograd": lambda: optax.chain(
        optax.zero_nans(), optax.inject_hyperparams(optax.novograd)(1e-2)
    ),
    "low_bit lamb": lambda: lro.low_bit(optax.lamb(1e-2), min_size=32, block_size=8),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(0.1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "lars in a partition": lambda: optax.partition(
        {"matrix": optax.lars(1e-2), "vector": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params),
    ),
}


@pytest.mark.parametrize(
    "name",
    ["lamb", "adafactor", *(pytest.param(x, marks=pytest.mark.full) for x in list(BY_LEAF)[2:])],
)
def test_each_slice_is_a_leaf_of_the_unrolled_model(name: str) -> None:
    tx = BY_LEAF[name]()
    update = lro.update_in_backward(FUNCTIONS, tx, each="slice")
    found = run(jax.jit(update.step), PARAMS, update.init(PARAMS), range(3))
    unrolled = run(ordinary(tx), LISTED, tx.init(LISTED), range(3))
    assert_close(found[2], unrolled[2], 100)
    assert_close(found[0], with_stacks(unrolled[0]), 800)
    assert_close(found[1], with_stacks(unrolled[1]), 800)


def test_each_slice_selects_matrices_by_the_shape_of_a_layer() -> None:
    """Stacks of unknown axes are no matrices, their layers are."""
    galore = lro.galore(1e-2, rank=2)
    tx = lro.low_bit(galore, min_size=32, block_size=8)
    update = lro.update_in_backward(FUNCTIONS, tx, each="slice")
    found = run(jax.jit(update.step), PARAMS, update.init(PARAMS), range(2))
    unrolled = run(ordinary(tx), LISTED, tx.init(LISTED), range(2))
    assert_close(found[0], with_stacks(unrolled[0]), 800)


@pytest.mark.full
def test_each_slice_changes_nothing_of_a_list() -> None:
    compare(LISTED, optax.lamb(1e-2), each="slice")


@pytest.mark.parametrize("each", [None, pytest.param("slice", marks=pytest.mark.full)])
def test_zero_nans_says_which_leaf_had_one(each: Any) -> None:
    def rooted(layer: Tree, x: jax.Array, batch: Any, key: Any) -> jax.Array:
        kernel = layer["kernel"]
        return x + jnp.tanh(x @ kernel) * jnp.mean(jnp.sqrt(kernel**2)) + x @ layer["other"]

    kernel = drawn(7, LAYERS, WIDTH, WIDTH).at[1, 2, 3].set(0.0)  # where the root has no gradient
    params = TIED | {"blocks": {"kernel": kernel, "other": kernel}}
    tx = optax.chain(optax.zero_nans(), optax.sgd(0.1))
    functions = LayeredFunctions(embed, rooted, head)
    update = lro.update_in_backward(functions, tx, each=each)
    new, state, _, _ = jax.jit(update.step)(params, update.init(params), BATCH, None)
    gradients = jax.jit(jax.grad(update.loss, has_aux=True))(params, BATCH, None)[0]
    updates, expected = tx.update(gradients, tx.init(params), params)
    if each is None:
        assert_close(state, expected)
    flags = state[0].found_nan["blocks"]
    by_layer = [False, True, False]
    assert np.asarray(flags["kernel"]).tolist() == (True if each is None else by_layer)
    assert not np.any(flags["other"])
    assert_close(new, optax.apply_updates(params, updates), 100)


class Named(NamedTuple):
    scale: Any
    up: Any
    down: Any


def test_trees_of_other_kinds_give_the_ordinary_step() -> None:
    """An ordered dictionary is not flattened by its names; a named tuple is no list of blocks."""
    named = lambda layer, *others: block(layer._asdict(), *others)
    functions = LayeredFunctions(
        lambda params, batch, key: params["table"][batch[:, :-1]] @ params["last"],
        named,
        lambda params, x, batch, key: head({"embed": params["embed"]}, x, batch, key),
    )
    square = drawn(8, WORDS, WIDTH)
    params = OrderedDict(
        table=square, last=drawn(9, WIDTH, WIDTH), blocks=Named(**PARAMS["blocks"]), embed=-square
    )
    tx = optax.sgd(0.1)
    update = lro.update_in_backward(functions, tx)
    arguments = params, update.init(params), BATCH, None
    new = jax.jit(update.step)(*arguments)[0]
    assert jax.tree.structure(new) == jax.tree.structure(params)

    @jax.jit
    @jax.grad
    def gradient(params: Tree) -> jax.Array:
        x = functions.embed(params, BATCH, None)
        for i in range(LAYERS):
            x = named(jax.tree.map(lambda x: x[i], params["blocks"]), x, BATCH, None)  # noqa: B023
        return functions.head(params, x, BATCH, None)[0]

    expected = jax.tree.map(lambda x, g: x - 0.1 * g, params, gradient(params))
    assert_close(new, expected, 100)


def test_the_global_norm_is_clipped_as_by_optax() -> None:
    tx = optax.sgd(0.1, 0.9)
    clipped = optax.chain(optax.clip_by_global_norm(0.2), tx)
    compare(PARAMS, tx, clipped, clip="global", max_norm=0.2)


@pytest.mark.full
@pytest.mark.parametrize("params", [TIED, LISTED], ids=["tied", "list"])
def test_the_global_norm_of_other_models_is_clipped(params: Tree) -> None:
    tx = optax.sgd(0.1, 0.9)
    clipped = optax.chain(optax.clip_by_global_norm(0.2), tx)
    compare(params, tx, clipped, clip="global", max_norm=0.2)


def test_clipping_by_block_bounds_each_part() -> None:
    step = lro.update_in_backward(FUNCTIONS, optax.sgd(1.0), clip="block", max_norm=0.15).step
    new, _, _, metrics = jax.jit(step)(PARAMS, optax.sgd(1.0).init(PARAMS), BATCH, None)
    change = jax.tree.map(lambda x, y: np.asarray(x - y, np.float64), PARAMS, new)
    norm = lambda tree: np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))
    bound = 0.15 / np.sqrt(LAYERS + 2)
    of_blocks = [norm(jax.tree.map(lambda x: x[i], change["blocks"])) for i in range(LAYERS)]  # noqa: B023
    expected = np.minimum(np.asarray(metrics["block_gradient_norms"]), bound)
    assert bound in expected  # so that something is clipped
    np.testing.assert_allclose(of_blocks, expected, rtol=1e-5)
    np.testing.assert_allclose(norm(change["head"]), bound, rtol=1e-5)
    assert norm(change) <= 0.15 * (1 + 1e-5)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_micro_batches_give_the_mean_gradient(count: int) -> None:
    compare(PARAMS, optax.sgd(0.1, 0.9), micro_batches=count)


def test_norms_and_metrics_are_reported() -> None:
    update = lro.update_in_backward(FUNCTIONS, optax.sgd(0.1))
    _, _, loss, metrics = jax.jit(update.step)(PARAMS, update.init(PARAMS), BATCH, None)
    gradients = jax.jit(jax.grad(reference))(PARAMS, BATCH, None)
    squares = jax.tree.map(lambda x: jnp.sum(x**2, range(1, x.ndim)), gradients["blocks"])
    assert_close(metrics["block_gradient_norms"], jnp.sqrt(sum(jax.tree.leaves(squares))))
    assert_close(metrics["gradient_norm"], optax.tree.norm(gradients))
    evaluated, others = update.loss(PARAMS, BATCH, None)
    assert_close((evaluated, others["largest"]), (loss, metrics["largest"]))


def test_a_checkpoint_of_one_step_resumes_in_the_other() -> None:
    tx = decayed_adamw()
    update = lro.update_in_backward(FUNCTIONS, tx)
    steps = [jax.jit(update.step), ordinary(tx)]
    results = []
    for first, second in (steps, reversed(steps)):
        params, state, _ = run(first, PARAMS, tx.init(PARAMS), range(2))
        results.append(run(second, params, state, range(2, 4)))
    assert_close(results[0], results[1], 800)


def test_a_gradient_that_is_not_finite_stays_in_its_layer() -> None:
    def rooted(layer: Tree, x: jax.Array, batch: Any, key: Any) -> jax.Array:
        return x + jnp.sqrt(layer["root"]) * 0.5 + jnp.tanh(x @ layer["kernel"])

    roots = jnp.ones((LAYERS, WIDTH)).at[1].set(0.0)
    params = TIED | {"blocks": {"root": roots, "kernel": drawn(7, LAYERS, WIDTH, WIDTH)}}
    update = lro.update_in_backward(LayeredFunctions(embed, rooted, head), optax.sgd(0.1))
    new, _, loss, metrics = jax.jit(update.step)(params, update.init(params), BATCH, None)
    finite = np.isfinite(np.asarray(new["blocks"]["root"])).all(-1)
    np.testing.assert_array_equal(finite, [True, False, True])
    np.testing.assert_array_equal(np.isfinite(metrics["block_gradient_norms"]), finite)
    assert np.isfinite(loss)
    assert np.isfinite(np.asarray(new["blocks"]["kernel"])).all()


CONFIG = DecoderConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def decoder_loss(model: Decoder, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    weight, axis = model.head()
    logits = jnp.tensordot(hidden, weight, (2, axis))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_decoder_in_bfloat16_with_stochastic_rounding(scan_layers: bool) -> None:
    model = Decoder(
        CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, scan_layers=scan_layers, remat="full"
    )
    graph, params = nnx.split(model)
    params = nnx.as_pure(params)
    tx = optax.chain(lro.in_float32(optax.adamw(1e-2)), lro.round_updates())
    update = lro.update_in_backward(model, tx, loss=decoder_loss)
    pair = BATCH[:, :-1], BATCH[:, 1:]

    @jax.jit
    def step(params: Tree, state: Tree) -> Any:
        def loss(params: Tree) -> jax.Array:
            model = nnx.merge(graph, params)
            logits = model(pair[0])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, pair[1]))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    expected, expected_state, expected_loss = step(params, tx.init(params))
    found, state, loss, _ = jax.jit(update.step)(params, update.init(params), pair)
    assert_close(loss, expected_loss, 100)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    # The same random numbers round up: where sums are off by rounding, a few may not.
    same = jax.tree.map(lambda x, y: np.mean(np.asarray(x == y)), found, expected)
    assert min(jax.tree.leaves(same)) > 0.9
    moments = lambda state: state[0][0]
    assert_close(moments(state), moments(expected_state), 800)


class Dropping(nnx.Module):
    def __init__(self, mlp: nnx.Module, dropout: nnx.Dropout) -> None:
        self.mlp, self.dropout = mlp, dropout

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.mlp(x))


@pytest.mark.full
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_module_draws_from_the_key_of_the_step(scan_layers: bool) -> None:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=scan_layers)
    rngs = nnx.Rngs(dropout=0)
    if scan_layers:
        make = nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
        dropout = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        model.blocks.mlp = Dropping(model.blocks.mlp, dropout)
    else:
        for each in model.blocks:
            each.mlp = Dropping(each.mlp, nnx.Dropout(0.5, rngs=rngs))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    tx = optax.sgd(1.0)
    update = lro.update_in_backward(model, tx, loss=decoder_loss)
    arguments = (BATCH[:, :-1], BATCH[:, 1:]), jax.random.key(1)
    new, _, loss, _ = jax.jit(update.step)(params, update.init(params), *arguments)
    gradients = jax.jit(jax.grad(update.loss, has_aux=True))(params, *arguments)[0]
    assert_close(new, optax.apply_updates(params, jax.tree.map(jnp.negative, gradients)), 100)
    others = update.loss(params, arguments[0], jax.random.key(2))[0]
    assert abs(float(loss - others)) > 1e-6


class Table(nnx.Module):
    """A model with whole numbers that are no parameters."""

    def __init__(self) -> None:
        self.hashes = nnx.Variable(jnp.arange(WORDS, dtype=jnp.uint32))
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(i)) for i in range(2)])

    def before_blocks(self, tokens: jax.Array) -> jax.Array:
        return jax.nn.one_hot(self.hashes[tokens], WIDTH)

    def through_block(self, block: nnx.Module, x: jax.Array) -> jax.Array:
        return block(x)

    def after_blocks(self, x: jax.Array) -> jax.Array:
        return x


def test_a_key_changes_no_variable_but_random_streams() -> None:
    model = Table()
    update = lro.update_in_backward(
        model, optax.sgd(0.1), loss=lambda model, hidden, targets: jnp.mean(hidden**2)
    )
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    with_key, without = (update.loss(params, (BATCH, BATCH), key)[0] for key in (KEY, None))
    assert_close(with_key, without)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), "micro_batches="),
        (lambda: optax.apply_if_finite(optax.adam(0.1), 2), "apply_if_finite computes"),
        (lambda: optax.contrib.sophia(0.1), "sophia"),
        (lambda: optax.contrib.prodigy(0.1), "prodigy computes"),
        (lambda: optax.lbfgs(), "linesearch computes"),
        (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), "sam computes"),
        (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "clip='global'"),
        (lambda: optax.inject_hyperparams(optax.lamb)(0.1), "lamb.*whole leaf.*each='slice'"),
    ],
)
def test_what_needs_all_gradients_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.update_in_backward(FUNCTIONS, make())


def over_layers() -> optax.GradientTransformation:
    centre = lambda x: x - jnp.mean(x, 0, keepdims=True)
    return optax.stateless(lambda updates, params: jax.tree.map(centre, updates))


def over_leaves() -> optax.GradientTransformation:
    total = lambda updates: sum(jnp.sum(x) for x in jax.tree.leaves(updates))
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda x: x * total(updates), updates)
    )


@pytest.mark.parametrize(
    ("make", "params", "message"),
    [
        (over_layers, PARAMS, "'blocks/down/kernel'.* spans layers"),
        (over_leaves, PARAMS, "depends on others"),
        (over_leaves, LISTED, "depends on others"),
        (lambda: lro.adagrad_norm(0.1), LISTED, "scale_by_adagrad_norm"),
    ],
)
def test_unknown_transformations_are_refused_before_compilation(
    make: Any, params: Tree, message: str
) -> None:
    update = lro.update_in_backward(FUNCTIONS, make())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(update.step, params, update.init(params), BATCH, None)


def test_each_slice_is_for_what_works_leaf_by_leaf() -> None:
    clipped = optax.chain(optax.centralize(), optax.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match="clip='global'"):
        lro.update_in_backward(FUNCTIONS, clipped, each="slice")
    update = lro.update_in_backward(FUNCTIONS, over_leaves(), each="slice")
    with pytest.raises(ValueError, match="depends on others"):
        jax.eval_shape(update.step, PARAMS, update.init(PARAMS), BATCH, None)
    tx = optax.novograd(0.1)
    update = lro.update_in_backward(FUNCTIONS, tx, each="slice")
    with pytest.raises(ValueError, match="other shapes than update"):
        jax.eval_shape(update.step, PARAMS, tx.init(PARAMS), BATCH, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"each": "layer"}, "each='layer' must be"),
        ({"clip": "layer", "max_norm": 1.0}, "clip='layer' must be"),
        ({"clip": "block"}, "together"),
        ({"clip": "block", "max_norm": 0.0}, "max_norm=0.0 must be positive"),
        ({"micro_batches": 0}, "micro_batches=0 must be"),
        ({"loss": head}, "head returns the loss"),
    ],
)
def test_wrong_arguments_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.update_in_backward(FUNCTIONS, optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("functions", "params", "options", "message"),
    [
        (FUNCTIONS, PARAMS, {"micro_batches": 3}, "no equal parts for micro_batches=3"),
        (FUNCTIONS, PARAMS | {"spare": jnp.arange(3)}, {}, "'spare' is int32"),
        (FUNCTIONS._replace(block=lambda w, x, b, k: x[..., :1]), PARAMS, {}, "a block's output"),
        (FUNCTIONS._replace(head=lambda p, x, b, k: x), PARAMS, {}, "the loss must be a scalar"),
        (FUNCTIONS, PARAMS | {"blocks": {"a": jnp.ones(3), "b": jnp.ones(2)}}, {}, "stacked"),
        (FUNCTIONS, PARAMS | {"blocks": {"a": jnp.ones((0, 3))}}, {}, "stacked"),
        (
            FUNCTIONS._replace(head=lambda p, x, b, k: (jnp.sum(x), {"gradient_norm": 1.0})),
            PARAMS,
            {},
            "named 'gradient_norm'",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(
    functions: Any, params: Tree, options: Any, message: str
) -> None:
    update = lro.update_in_backward(functions, optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(update.step, params, update.init(params), BATCH, None)


def test_modules_without_blocks_are_refused() -> None:
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="Linear has no 'blocks'"):
        lro.update_in_backward(linear, optax.sgd(0.1), loss=decoder_loss)
    with pytest.raises(TypeError, match="must be a LayeredFunctions"):
        lro.update_in_backward(head, optax.sgd(0.1))
    with pytest.raises(TypeError, match="loss=None must be a function"):
        lro.update_in_backward(Decoder(CONFIG, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    every_second = Decoder(
        dataclasses.replace(CONFIG, num_hidden_layers=2),
        rngs=nnx.Rngs(0),
        remat="full",
        remat_every=2,
    )
    with pytest.raises(ValueError, match="remat_every=2, and update_in_backward saves the input"):
        lro.update_in_backward(every_second, optax.sgd(0.1), loss=decoder_loss)
