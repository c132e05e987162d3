"""Randomized layers in whole NNX models: what changes, what stays, and how it is undone."""

from pathlib import Path
import pickle
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from flax import nnx

import lowrank_optax as lro
from lowrank_optax.activations.replacing import quantize_model, restore_model
from lowrank_optax.layers import RandomizedLinear, Sketch, randomize, restore_linears
from lowrank_optax.models import Decoder, decoder_config
from lowrank_optax.modules.wrap import wrap

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9), np.int32)
QUARTER = Sketch("rows", fraction=0.25)


def decoder(**options: Any) -> Decoder:
    config = decoder_config(
        "llama-tiny",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return Decoder(config, rngs=nnx.Rngs(0), **options)


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


value_and_grad = nnx.jit(nnx.value_and_grad(loss))
forward = nnx.jit(lambda model, tokens: model(tokens))


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(tree))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


class Net(nnx.Module):
    """Layers of several kinds, one of them shared, one of a class of its own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.again = self.up
        self.down = Named(6, 4, rngs=rngs)
        self.lm_head = nnx.Linear(4, 8, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.lm_head(self.down(jnp.tanh(self.up(self.embed(tokens)))))


class Named(nnx.Linear):
    """A subclass with a call that is nnx.Linear's."""

    def name(self) -> str:
        return "mine"


class Doubled(nnx.Linear):
    """A subclass with a call of its own."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return 2 * super().__call__(inputs, out_sharding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan_layers", "remat", "dtype"),
    [
        (True, "full", jnp.float32),
        pytest.param(False, None, jnp.bfloat16, marks=pytest.mark.full),
        pytest.param(True, None, jnp.bfloat16, marks=pytest.mark.full),
        pytest.param(False, "full", jnp.float32, marks=pytest.mark.full),
    ],
)
def test_a_decoder_has_the_same_loss_and_other_gradients_of_its_kernels_each_step(
    scan_layers: bool, remat: Any, dtype: Any
) -> None:
    model = decoder(scan_layers=scan_layers, remat=remat, dtype=dtype)
    value, exact = value_and_grad(model, TOKENS)
    logits = forward(model, TOKENS)
    randomize(model, QUARTER, rngs=1)
    results = [value_and_grad(model, TOKENS) for _ in range(2)]
    (first, one), (second, other) = results
    assert_close([first, second], [value, value], 100, dtype=dtype)
    counts = flat(nnx.state(model, nnx.RngCount))
    assert counts
    assert all(np.all(count == 2) for count in counts.values())
    exact, one, other = flat(exact), flat(one), flat(other)
    assert exact.keys() == one.keys()  # no parameter more, no path changed
    for path, gradient in exact.items():
        if path.startswith("blocks") and path.endswith("kernel"):
            assert np.any(one[path] != gradient), path
            assert np.any(one[path] != other[path]), path
        else:  # norms, embedding and head come before any noise, or beside it
            assert_close(one[path], gradient, 400, dtype=dtype)
    assert_close(forward(model, TOKENS), logits, 100, dtype=dtype)


@pytest.mark.slow
def test_remat_computes_again_with_the_same_key() -> None:
    gradients = []
    for remat in (None, "full"):
        model = decoder(remat=remat)
        randomize(model, QUARTER, rngs=1)
        gradients.append(flat(value_and_grad(model, TOKENS)[1]))
    for path, gradient in gradients[0].items():
        assert_close(gradients[1][path], gradient, 100)


def test_layers_of_a_stack_and_of_a_model_have_keys_of_their_own() -> None:
    model = decoder()
    randomize(model, QUARTER, rngs=1)
    keys = [
        np.asarray(jax.random.key_data(k)) for k in jax.tree.leaves(nnx.state(model, nnx.RngKey))
    ]
    every = np.concatenate(keys)
    assert every.shape == (14, 2)  # 7 layers in each of 2 blocks
    assert len(np.unique(every, axis=0)) == 14


@pytest.mark.slow
def test_the_gradient_of_a_stack_has_the_exact_one_as_its_mean() -> None:
    model = decoder()
    _, exact = value_and_grad(model, TOKENS)
    randomize(model, QUARTER, rngs=1)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def call(rest: Any, _: Any) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        gradient = nnx.grad(loss)(model, TOKENS)
        return nnx.state(model, nnx.Not(nnx.Param)), gradient["blocks"]["mlp"]["down"]["kernel"]

    _, drawn = jax.jit(lambda rest: jax.lax.scan(call, rest, length=1000))(rest)
    drawn = np.asarray(drawn[...], np.float64)
    error = drawn.mean(0) - np.asarray(exact["blocks"]["mlp"]["down"]["kernel"][...])
    assert np.all(np.abs(error) < 5 * drawn.std(0) / np.sqrt(len(drawn)))  # of 768 numbers


def test_restored_the_model_is_the_one_it_was() -> None:
    for model in (decoder(), decoder(scan_layers=False), Net(nnx.Rngs(0))):
        graphdef, state = nnx.split(model)
        randomize(model, QUARTER, rngs=1)
        assert nnx.split(model)[0] != graphdef
        assert restore_linears(model) is model
        restored, values = nnx.split(model)
        assert restored == graphdef
        assert jax.tree.structure(values) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, values, state)
        assert not lro.layers.randomized_layers(model).rows


def test_restored_a_layer_that_is_the_whole_model_has_its_adapters_as_a_plain_one_has() -> None:
    plain, randomized = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    made = RandomizedLinear(8, 8, sketch=QUARTER, rngs=nnx.Rngs(0))
    randomize(randomized, {"": QUARTER}, rngs=1)
    x = jnp.ones((2, 8))
    for layer in (plain, randomized, made):
        # Its methods, not the same in each class, make the arrays known that adapters share.
        lro.adapters.attach(layer, lro.adapters.VeRA(rank=2), lambda *_: True, rngs=nnx.Rngs(1))
    for layer in (randomized, made):
        assert nnx.graphdef(restore_linears(layer)) == nnx.graphdef(plain)
        np.testing.assert_array_equal(layer(x), plain(x))
        lro.adapters.detach(layer)
        assert type(layer) is nnx.Linear


def test_a_layer_stays_the_object_it_is_and_shared_ones_are_one() -> None:
    model = Net(nnx.Rngs(0))
    up, kernel = model.up, model.up.kernel
    rows = randomize(model, QUARTER, rngs=1).rows
    assert model.up is up
    assert model.again is up
    assert up.kernel is kernel
    assert isinstance(up, RandomizedLinear)
    assert [row.path for row in rows] in (["again", "down"], ["down", "up"], ["up", "down"])
    assert isinstance(model.down, RandomizedLinear)
    assert isinstance(model.down, Named)
    assert model.down.name() == "mine"
    assert type(model.lm_head) is nnx.Linear  # no head by default
    assert type(restore_linears(model).down) is Named


def test_patterns_choose_the_layers_and_their_sketches_the_first_counting() -> None:
    half, gaussian = Sketch(fraction=0.5), Sketch("gaussian", size=3)
    model = decoder()
    rows = randomize(model, {"mlp/down": half, "mlp": QUARTER, "lm_head": gaussian}, rngs=1).rows
    assert {row.path: row.sketch for row in rows} == {
        "blocks/mlp/down": half,
        "blocks/mlp/gate": QUARTER,
        "blocks/mlp/up": QUARTER,
        "lm_head": gaussian,
    }
    model = decoder()
    rows = randomize(model, {"down|up": half, "query": half}, where="mlp|query", rngs=1).rows
    assert [row.path.split("/")[-1] for row in rows] == ["query", "down", "up"]
    model = decoder()
    by_filter = lambda path, layer: isinstance(layer, nnx.Linear) and layer.in_features == 24
    rows = randomize(model, half, where=by_filter, rngs=1).rows
    assert [(row.path, row.weight) for row in rows] == [("blocks/mlp/down", "2 × (24 × 16)")]


@pytest.mark.slow
def test_randomized_again_a_layer_has_its_new_sketch_and_its_old_stream() -> None:
    model = decoder()
    randomize(model, QUARTER, rngs=1)
    value_and_grad(model, TOKENS)
    before = nnx.state(model, nnx.RngState)
    half = Sketch("rows", fraction=0.5)
    randomize(model, half, where="mlp", rngs=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(*map(_data, (a, b))),
        before,
        nnx.state(model, nnx.RngState),
    )
    assert model.blocks.mlp.up.sketch == half
    assert model.blocks.attention.query.sketch == QUARTER


def _data(x: Any) -> np.ndarray:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def test_the_summary_prints_what_is_saved() -> None:
    model = Net(nnx.Rngs(0))
    sketch = Sketch("gaussian", fraction=0.125, min_size=16, max_size=256)
    table = randomize(model, {"down": sketch, "up|again": Sketch(size=64)}, rngs=1)
    assert str(table).splitlines()[0].split() == ["path", "weight", "sketch", "saved"]
    assert "down   6 × 4   gaussian    12.5% of rows, 16 at least, 256 at most" in str(table)
    assert "stratified  64 rows" in str(table)


def kept_bytes(model: nnx.Module, wrt: Any) -> int:
    graphdef, trained, rest = nnx.split(model, wrt, ...)
    call = lambda trained: loss(nnx.merge(graphdef, trained, rest, copy=True), TOKENS)
    backward = jax.eval_shape(lambda trained: jax.vjp(call, trained)[1], trained)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_what_is_kept_is_less_by_the_inputs_that_were_kept_for_kernels() -> None:
    model = decoder(scan_layers=False)
    plain = kept_bytes(model, nnx.Param)
    randomize(model, Sketch("rows", size=4), where="mlp/down", rngs=1)
    streams = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.RngKey)))
    # Of the input of `down`, 16 rows of 24 numbers in each of 2 layers, nothing else has need.
    assert kept_bytes(model, nnx.Param) == plain - 2 * (16 - 4) * 24 * 4 + streams


@pytest.mark.slow
def test_under_adapters_the_frozen_layers_keep_nothing_and_gradients_are_exact() -> None:
    model = decoder(scan_layers=False)
    lora = lro.adapters.LoRA(rank=2)
    lro.adapters.attach(model, lora, where="mlp|query", rngs=3)
    trained = nnx.DiffState(0, lro.adapters.trainable)
    gradient = nnx.jit(nnx.grad(loss, argnums=trained))
    expected = flat(gradient(model, TOKENS))
    plain = kept_bytes(model, lro.adapters.trainable)
    lro.adapters.detach(model)
    randomize(model, QUARTER, rngs=1)
    lro.adapters.attach(model, lora, where="mlp|query", rngs=3)
    found = flat(gradient(model, TOKENS))
    assert_close(found, expected, 100)
    assert kept_bytes(model, lro.adapters.trainable) <= plain
    restore_linears(model)  # below the adapters, which stay
    assert_close(flat(gradient(model, TOKENS)), expected, 100)
    lro.adapters.detach(model)
    assert type(model.blocks[0].mlp.up) is nnx.Linear


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    optimizer = optax.adam(1e-2)

    def start() -> tuple[Net, nnx.Optimizer]:
        model = Net(nnx.Rngs(0))
        randomize(model, QUARTER, rngs=1)
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradient = nnx.value_and_grad(loss)(model, TOKENS % 8)
        optimizer.update(model, gradient)
        return value

    model, state = start()
    for _ in range(2):
        step(model, state)
    ocp.save(tmp_path / "saved", nnx.state((model, state)))
    expected = np.array([step(model, state) for _ in range(3)])
    again = start()
    nnx.update(again, ocp.load(tmp_path / "saved", nnx.state(again)))
    assert_close(np.array([step(*again) for _ in range(3)]), expected, 100)
    assert expected[-1] < expected[0]


def test_bad_arguments_are_refused_before_anything_is_changed() -> None:
    model = Net(nnx.Rngs(0))
    graphdef, _ = nnx.split(model)
    for sketch in (0.1, None, {"up": 0.1}):
        with pytest.raises(TypeError, match=r"must be a lro\.layers\.Sketch"):
            randomize(model, sketch, rngs=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"where='upp' matches no linear layer; near"):
        randomize(model, QUARTER, where="upp", rngs=0)
    with pytest.raises(ValueError, match="sketch='query' matches no linear layer"):
        randomize(model, {"down": QUARTER, "query": QUARTER}, rngs=0)
    with pytest.raises(ValueError, match="where='embed' matches no linear layer"):
        randomize(model, QUARTER, where="embed", rngs=0)
    assert nnx.split(model)[0] == graphdef
    with pytest.raises(ValueError, match="finds no linear layer except heads"):
        randomize(nnx.Dict(lm_head=nnx.Linear(2, 2, rngs=nnx.Rngs(0))), QUARTER, rngs=0)


def test_layers_that_it_would_break_are_refused() -> None:
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="own has a call of its own, of Doubled"):
        randomize(nnx.Dict(own=Doubled(2, 2, rngs=rngs)), QUARTER, rngs=0)
    adapted = nnx.Dict(up=nnx.Linear(2, 2, rngs=rngs))
    lro.adapters.attach(adapted, lro.adapters.LoRA(rank=1), rngs=0)
    with pytest.raises(ValueError, match="up has adapters"):
        randomize(adapted, QUARTER, rngs=0)
    own = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    with pytest.raises(ValueError, match=r"dot_general=.* of up"):
        randomize(nnx.Dict(up=nnx.Linear(2, 2, rngs=rngs, dot_general=own)), QUARTER, rngs=0)
    make = nnx.vmap(lambda rngs: nnx.Linear(2, 3, rngs=rngs), in_axes=0, out_axes=1)
    stacked = nnx.Dict(up=make(nnx.Rngs(0).split(4)))
    with pytest.raises(ValueError, match="stack layers along the first axis"):
        randomize(stacked, QUARTER, rngs=0)


@pytest.mark.slow
def test_beside_few_bit_nonlinearities_both_take_effect_and_are_undone() -> None:
    model = decoder()
    graphdef, _ = nnx.split(model)
    value, _ = value_and_grad(model, TOKENS)
    randomize(model, QUARTER, where="mlp", rngs=1)
    quantize_model(model, bits=4, where="blocks/mlp")
    (first, one), (second, other) = (value_and_grad(model, TOKENS) for _ in range(2))
    assert_close([first, second], [value, value], 100)
    up = lambda gradient: np.asarray(gradient["blocks"]["mlp"]["up"]["kernel"][...])
    assert np.any(up(one) != up(other))
    restore_model(model)
    assert nnx.split(restore_linears(model))[0] == graphdef


def _negative(call: Any, layer: Any, *args: Any, **kwargs: Any) -> jax.Array:
    return -call(*args, **kwargs)


def test_layers_are_restored_below_another_wrap_and_it_stays() -> None:
    x = np.ones((8, 3), np.float32)
    for layer in (
        Named(3, 4, rngs=nnx.Rngs(0)),
        RandomizedLinear(3, 4, sketch=QUARTER, rngs=nnx.Rngs(0)),
    ):
        plain = -nnx.Linear.__call__(layer, x)
        own = nnx.Linear if isinstance(layer, RandomizedLinear) else Named
        randomize(layer, QUARTER, where=".*", rngs=1)
        wrap(layer, "other", _negative)
        np.testing.assert_array_equal(layer(x), plain)
        assert not isinstance(restore_linears(layer), RandomizedLinear)
        np.testing.assert_array_equal(layer(x), plain)
        wrap(layer, "other", None)
        assert type(layer) is own


def test_a_randomized_model_is_pickled_as_a_plain_one_is() -> None:
    layer = Named(3, 4, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(layer)
    randomize(layer, Sketch(fraction=0.5), where=".*", rngs=1)
    lro.adapters.attach(layer, lro.adapters.LoRA(rank=1), ".*", rngs=0)
    other = pickle.loads(pickle.dumps(layer))
    assert nnx.graphdef(other) == nnx.graphdef(layer)
    assert nnx.graphdef(restore_linears(lro.adapters.detach(other))) == graphdef


class WithOffset(RandomizedLinear):
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return super().__call__(*args, **kwargs) + 1


def test_a_randomized_layer_with_its_own_call_is_not_restored() -> None:
    model = Net(nnx.Rngs(0))
    randomize(model, {"down": QUARTER}, rngs=1)
    model.own = WithOffset(4, 4, sketch=QUARTER, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="own is of the class WithOffset"):
        restore_linears(model)
    assert isinstance(model.down, RandomizedLinear)


def test_no_sketches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sketch=\{\} has no pattern"):
        randomize(Net(nnx.Rngs(0)), {}, rngs=1)
