"""Attaching to models and taking away again: what is chosen, what is refused, what is left."""

from collections.abc import Callable
import copy
import pickle
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters import folding
from tests.adapters.nnx_models import Scanned, Unrolled, call, randomized, tokens, weights

LoRA = lro.adapters.LoRA
MODELS: dict[str, Callable[..., Any]] = {"unrolled": Unrolled, "scanned": Scanned}


def chosen(model: Any, where: Any) -> list[str]:
    lro.adapters.attach(model, LoRA(rank=1), where, rngs=0)
    return sorted(row.path for row in lro.adapters.summary(model).rows)


@pytest.mark.slow
def test_layers_are_chosen_by_patterns_types_filters_and_functions() -> None:
    for where, expected in (
        (None, ["blocks/0/down", "blocks/0/up"]),
        ("up$", ["blocks/0/up"]),
        (["up$", "^embed"], ["blocks/0/up", "embed"]),
        (nnx.Embed, ["embed"]),
        (nnx.PathContains("down"), ["blocks/0/down"]),
        (nnx.Any(nnx.Embed, nnx.PathContains("up")), ["blocks/0/up", "embed"]),
        (lambda path, layer: "head" in path, ["head"]),
        (".*", ["blocks/0/down", "blocks/0/up", "embed", "head"]),
    ):
        assert chosen(Unrolled(1, nnx.Rngs(0)), where) == expected


def test_a_bad_argument_is_refused_and_nothing_is_attached() -> None:
    model = Scanned(3, nnx.Rngs(0))
    before = nnx.graphdef(model)
    for options, error, message in (
        ({"where": "quary|upp"}, ValueError, r"matches no layer.*near it are: .*up"),
        ({"where": ["down", "upp"]}, ValueError, r"where='upp' matches no layer.*: .*up"),
        ({"where": "(up"}, ValueError, "where"),
        ({"where": 3}, TypeError, "where=3"),
        ({"method": "lora"}, TypeError, "method='lora'"),
        ({"name": "a/b"}, ValueError, "name='a/b'"),
        ({"name": "items"}, ValueError, "name='items'"),
        ({"rank_pattern": {"query": 3}}, ValueError, "rank_pattern.*query"),
        ({"alpha_pattern": {"query": 3}}, ValueError, "alpha_pattern.*query"),
        ({"rank_pattern": {"up": (1, 2)}}, ValueError, "2 ranks for a stack of 3"),
    ):
        every = {"method": LoRA(rank=1), "where": ".*", "rngs": 0} | options
        with pytest.raises(error, match=message):
            lro.adapters.attach(model, **every)
        assert nnx.graphdef(model) == before


def test_a_name_is_used_once_in_a_layer() -> None:
    model = Unrolled(1, nnx.Rngs(0))
    lro.adapters.attach(model, LoRA(rank=1), "up", rngs=0)
    with pytest.raises(ValueError, match="blocks/0/up has an adapter named 'default' already"):
        lro.adapters.attach(model, LoRA(rank=1), rngs=0)
    lro.adapters.attach(model, LoRA(rank=1), "down", rngs=0)
    lro.adapters.attach(model, LoRA(rank=1), "up", rngs=0, name="other")


def test_models_without_adapters_say_so() -> None:
    model = Unrolled(1, nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"model is a dict, and must be an NNX model"):
        lro.adapters.attach(nnx.to_pure_dict(nnx.state(model)), LoRA(rank=1), rngs=0)  # pyrefly: ignore
    with pytest.raises(ValueError, match=r"has no adapter: lro\.adapters\.attach"):
        lro.adapters.detach(model)
    lro.adapters.attach(model, LoRA(rank=1), "up", rngs=0)
    with pytest.raises(ValueError, match="no adapter named 'defualt': it has 'default'"):
        lro.adapters.merge(model, "defualt")


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=3, dropout=0.1), lro.adapters.LoTR(rank=2)])
def test_attaching_leaves_the_output_and_detaching_the_model_as_they_were(
    kind: str, method: Any
) -> None:
    model = MODELS[kind](2, nnx.Rngs(0))
    graphdef, own, before = nnx.graphdef(model), weights(model), call(model, tokens())
    assert lro.adapters.attach(model, method, rngs=1) is model
    assert nnx.graphdef(model) != graphdef
    assert_close(call(model, tokens()), before)
    lro.adapters.detach(model)
    assert nnx.graphdef(model) == graphdef
    jax.tree.map(np.testing.assert_array_equal, weights(model), own)


def test_a_layer_stays_of_its_class_while_adapted() -> None:
    model = Unrolled(1, nnx.Rngs(0))
    layer = model.blocks[0].up
    kernel = layer.kernel
    lro.adapters.attach(model, LoRA(rank=1), rngs=0)
    assert model.blocks[0].up is layer
    assert isinstance(layer, nnx.Linear)
    assert type(layer).__name__ == "Linear"
    assert layer.kernel is kernel
    other = Unrolled(1, nnx.Rngs(5))
    lro.adapters.attach(other, LoRA(rank=1), rngs=1)
    assert nnx.graphdef(other) == nnx.graphdef(model)


@pytest.mark.slow
def test_a_layer_used_twice_has_one_adapter() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.second = self.first

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(jnp.sin(self.first(x)))

    model, x = Twice(), np.linspace(-1, 1, 4, dtype=np.float32)
    lro.adapters.attach(model, LoRA(rank=1, alpha=2), rngs=0)
    assert model.first is model.second
    assert len(jax.tree.leaves(nnx.state(model, lro.adapters.trainable))) == 2
    after = call(randomized(model), x)
    lro.adapters.merge(model)
    np.testing.assert_allclose(call(model, x), after, atol=1e-5)


@pytest.mark.slow
def test_ranks_and_alphas_by_pattern_and_by_layer_of_a_stack() -> None:
    model = Scanned(3, nnx.Rngs(0))
    lro.adapters.attach(
        model,
        LoRA(rank=2, alpha=4),
        rngs=0,
        rank_pattern={"up": (1, 3, 2)},
        alpha_pattern={"down$": 8.0},
    )
    up, down = (getattr(model.blocks, n).adapters["default"] for n in ("up", "down"))
    assert up.arrays["A"].shape == (3, 6, 3)
    assert (down.method.rank, down.method.alpha) == (2, 8.0)
    after = call(randomized(model), tokens())
    ranked = up.method.deltas(
        lro.adapters.AdapterParams(
            {k: up.arrays[k][...] for k in "AB"}, {"rank_scale": up.arrays["rank_scale"][...]}
        ),
        model.blocks.up.kernel[...],
    )
    assert [int(np.linalg.matrix_rank(d)) for d in np.asarray(ranked)] == [1, 3, 2]
    lro.adapters.merge(model)
    assert_close(call(model, tokens()), after, 100)


def test_an_abstract_model_can_be_adapted() -> None:
    def make() -> Any:
        model = Scanned(2, nnx.Rngs(0))
        return lro.adapters.attach(model, LoRA(rank=2, dropout=0.1), rngs=nnx.Rngs(0))

    abstract, concrete = nnx.eval_shape(make), make()
    assert nnx.graphdef(abstract) == nnx.graphdef(concrete)
    shapes = lambda model: [x.shape for x in jax.tree.leaves(nnx.state(model))]
    assert shapes(abstract) == shapes(concrete)
    assert str(lro.adapters.summary(abstract)) == str(lro.adapters.summary(concrete))


def test_other_names_and_seeds_draw_other_numbers_and_the_same_seed_the_same() -> None:
    def first(seed: int) -> np.ndarray:
        model = Unrolled(2, nnx.Rngs(0))
        lro.adapters.attach(model, LoRA(rank=1), rngs=seed)
        a, b = (model.blocks[i].up.adapters["default"].arrays["A"][...] for i in range(2))
        assert np.all(np.asarray(a) != b)
        return np.asarray(a)

    np.testing.assert_array_equal(first(0), first(0))
    assert np.all(first(0) != first(1))


@pytest.mark.slow
def test_a_stack_along_another_axis_than_the_first_is_refused() -> None:
    make = lambda rngs: nnx.Linear(4, 3, use_bias=False, rngs=rngs)
    model = nnx.vmap(make, out_axes=1)(nnx.Rngs(0).split(5))
    with pytest.raises(ValueError, match="stack layers along their first axis"):
        lro.adapters.attach(model, LoRA(rank=1), ".*", rngs=0)


def test_the_summary_counts_what_is_there() -> None:
    model = Scanned(3, nnx.Rngs(0))
    lro.adapters.attach(model, LoRA(rank=2), "up", rngs=0)
    lro.adapters.attach(model, lro.adapters.LoTR(rank=2), "down", rngs=0, name="second")
    lro.adapters.also_train(model, "head/bias", name="default")
    summary = lro.adapters.summary(model)
    state = nnx.state(model, lro.adapters.trainable)
    assert summary.trained == sum(x.size for x in jax.tree.leaves(state))
    assert summary.model == sum(x.size for x in weights(model).values())
    up, down = (next(r for r in summary.rows if r.path == f"blocks/{n}") for n in ("up", "down"))
    assert up[:5] == ("blocks/up", "3 × (6 × 12)", "default", "LoRA", 2)
    assert up.trained == 3 * 2 * (6 + 12)
    assert (down.trained, down.adapter) == (3 * 2 * 2, "second")
    assert [r.trained for r in summary.rows if r.method == "shared"] == [2 * (12 + 6)]
    assert [r.trained for r in summary.rows if r.method == "also trained"] == [11]
    assert f"of {summary.model:,} trained" in str(summary)
    lro.adapters.activate(model, strengths={"second": 0.5})
    lro.adapters.merge(model, "default")
    assert {r.state for r in lro.adapters.summary(model).rows} >= {"merged", "active × 0.5"}


class Scale(nnx.Param):
    """A type of parameters of a model's own."""


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_adapted_models_are_copied_and_pickled_as_plain_ones_are(again: Any) -> None:
    model = Unrolled(1, nnx.Rngs(0))
    model.head.bias = Scale(model.head.bias[...])
    graphdef = nnx.graphdef(model)
    for name, method in (
        ("a", LoRA(rank=1)),
        ("b", LoRA(rank=2)),
        ("c", lro.adapters.LoTR(rank=1)),
    ):
        lro.adapters.attach(model, method, "blocks", rngs=0, name=name)
    lro.adapters.also_train(model, "head/bias", name="b")
    lro.adapters.merge(randomized(model), "a")
    other = again(model)
    assert nnx.graphdef(other) == nnx.graphdef(model)
    np.testing.assert_array_equal(call(other, tokens()), call(model, tokens()))
    assert nnx.graphdef(lro.adapters.detach(other)) == graphdef


def test_merging_holds_the_weights_of_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nnx.List([nnx.LinearGeneral(64, (8, 32), rngs=nnx.Rngs(i)) for i in range(4)])
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2, initial="random"), where=".*", rngs=0)
    held, fold = [], folding._folded
    size = lambda: sum(x.nbytes for x in jax.live_arrays())

    def measured(*args: Any) -> Any:
        held.append(size())
        return fold(*args)

    monkeypatch.setattr(folding, "_folded", measured)
    before, weight = size(), 4 * 64 * 8 * 32
    lro.adapters.merge(model)
    # The weight as a matrix, and small things; the same for every layer.
    assert max(held) - before < 1.5 * weight
