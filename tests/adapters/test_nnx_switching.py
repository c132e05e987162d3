"""Merging, unmerging, and several adapters on one model."""

import dataclasses
from typing import Any, ClassVar
import warnings

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import AdapterParams, Arrays, Weights, product
from lowrank_optax.adapters.operands import Operand
from tests.adapters import methods
from tests.adapters.nnx_models import (
    Scanned,
    Unrolled,
    call,
    gradients,
    randomized,
    tokens,
    weights,
)

LoRA = lro.adapters.LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved(lro.adapters.LowRank):
    """A method that moves a part of the weight into its factors, as PiSSA does."""

    changes_base: ClassVar[bool] = True

    @property
    def reads_weights(self) -> bool:
        return True

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        first = jnp.ones((*weights.shape[:-1], self.max_rank)) / weights.shape[-2]
        second = jnp.ones((weights.shape[0], self.max_rank, weights.shape[-1]))
        start = {"A0": first, "B0": second}
        return AdapterParams(
            {"A": first, "B": second}, start, jnp.asarray(weights) - product(first, second)
        )

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        return p["A"], p["B"]

    def removed_factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        return p["A0"], p["B0"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(lro.adapters.LowRank):
    """A method whose change depends on the weight, as DoRA's does: ``(1 + s) W``."""

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        return AdapterParams({"s": jnp.full(weights.shape[:1], 0.5)}, {})

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError

    def branch(self, p: Arrays, x: Operand, *, y: jax.Array, **_: Any) -> jax.Array:
        return y * p["s"]

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        return p["s"][..., None, None] * weight

    def unmerged(self, p: Arrays, merged: jax.Array) -> jax.Array:
        return merged / (1 + p["s"][..., None, None])


def model_of(kind: str, dtype: Any = jnp.float32) -> Any:
    return {"unrolled": Unrolled, "scanned": Scanned}[kind](2, nnx.Rngs(0), dtype)


METHODS = {**methods.MERGEABLE, "moved": Moved(rank=1)}
IN_STACKS = [
    *(pytest.param("scanned", *case.values, marks=case.marks) for case in methods.cases(METHODS)),
    # What a layer outside of a stack is asked for does not depend on its method, but on sharing.
    *(
        pytest.param("unrolled", name, marks=[pytest.mark.full] * (name not in ("LoRA", "VeRA")))
        for name in METHODS
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), IN_STACKS)
def test_a_merged_model_computes_the_same_and_unmerging_gives_the_weights_back(
    kind: str, name: str
) -> None:
    model = model_of(kind)
    lro.adapters.attach(model, METHODS[name], rngs=0)
    randomized(model)
    own, after = weights(model), call(model, tokens())
    report = lro.adapters.merge(model)
    np.testing.assert_allclose(call(model, tokens()), after, atol=2e-5)
    assert all(float(row.rounding_error) == 0 for row in report.rows)
    assert "relative size" in str(report)
    merged = weights(model)
    lro.adapters.unmerge(model)
    for path, x in weights(model).items():
        assert_close(x, own[path], size=np.abs(own[path]).max() + np.abs(merged[path]).max())
    np.testing.assert_allclose(call(model, tokens()), after, atol=2e-5)


@pytest.mark.slow
def test_in_bfloat16_sums_are_rounded_once_and_the_report_says_by_how_much() -> None:
    model = model_of("scanned", jnp.bfloat16)
    lro.adapters.attach(model, LoRA(rank=2, alpha=3), "up", rngs=0)
    randomized(model)
    arrays = model.blocks.up.adapters["default"].arrays
    a, b = (np.asarray(arrays[k][...], np.float64) for k in "AB")
    before = np.asarray(model.blocks.up.kernel[...], np.float64)
    (row,) = lro.adapters.merge(model).rows
    exact = before + 1.5 * a @ b
    kernel = model.blocks.up.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    error = np.abs(np.asarray(kernel, np.float64) - exact)
    assert bool((error <= 2.0**-8 * np.abs(exact)).all())  # half a bfloat16 ulp, relatively
    np.testing.assert_allclose(row.rounding_error, error.max(), rtol=1e-3)
    size = np.linalg.norm(exact - before) / np.linalg.norm(before)
    assert_close(row.relative_size, size, 800)
    lro.adapters.unmerge(model)
    back = np.asarray(model.blocks.up.kernel[...], np.float64)
    assert bool((np.abs(back - before) <= 2.0**-8 * (np.abs(exact) + np.abs(before))).all())


def test_merging_then_detaching_leaves_the_untouched_structure() -> None:
    model = model_of("scanned")
    graphdef = nnx.graphdef(model)
    lro.adapters.attach(model, LoRA(rank=2, dropout=0.1), rngs=0)
    model.eval()
    after = call(randomized(model), tokens())
    lro.adapters.merge(model)
    lro.adapters.detach(model)
    assert nnx.graphdef(model) == graphdef
    np.testing.assert_allclose(call(model, tokens()), after, atol=2e-5)


def test_a_changed_base_is_given_back_when_detached_and_seen_through_when_switched_off() -> None:
    model = model_of("scanned")
    own, before = weights(model), call(model, tokens())
    lro.adapters.attach(model, Moved(rank=1), rngs=0)
    np.testing.assert_allclose(call(model, tokens()), before, atol=2e-5)
    assert not np.allclose(weights(model)["blocks/up/kernel"], own["blocks/up/kernel"], atol=1e-2)
    randomized(model)
    with lro.adapters.disabled(model):
        np.testing.assert_allclose(call(model, tokens()), before, atol=2e-5)
    assert not np.allclose(call(model, tokens()), before, atol=1e-2)
    lro.adapters.detach(model)
    for path, x in weights(model).items():
        np.testing.assert_allclose(x, own[path], atol=1e-6)


@pytest.mark.slow
def test_several_adapters_are_switched_weighted_and_merged_together() -> None:
    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), np.eye(4, dtype=np.float32)
    y = np.asarray(model(x))
    alone = {}
    for number, name in enumerate("ab"):
        lro.adapters.attach(model, LoRA(rank=2), ".*", rngs=number, name=name)
    randomized(model)
    for name in "ab":
        lro.adapters.activate(model, name)
        alone[name] = model(x) - y
    lro.adapters.activate(model)
    np.testing.assert_allclose(model(x), y + alone["a"] + alone["b"], atol=2e-5)
    lro.adapters.deactivate(model, "a")
    np.testing.assert_allclose(model(x), y + alone["b"], atol=2e-5)
    lro.adapters.activate(model, strengths={"a": -0.5, "b": 2.0})
    weighted = y - 0.5 * alone["a"] + 2 * alone["b"]
    np.testing.assert_allclose(model(x), weighted, atol=2e-5)
    lro.adapters.merge(model)
    np.testing.assert_allclose(model(x), weighted, atol=2e-5)
    lro.adapters.unmerge(model, "b")
    np.testing.assert_allclose(model(x), weighted, atol=2e-5)
    lro.adapters.unmerge(model)
    lro.adapters.detach(model, "a")
    lro.adapters.activate(model)
    np.testing.assert_allclose(model(x), y + alone["b"], atol=2e-5)
    lro.adapters.deactivate(model)
    np.testing.assert_allclose(model(x), y, atol=2e-5)  # it was merged in between


def test_disabled_adapters_come_back_also_after_an_error() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    y = model(jnp.ones(4))
    for name in "ab":
        lro.adapters.attach(model, LoRA(rank=2, initial="random"), ".*", rngs=0, name=name)
    lro.adapters.deactivate(model, "b")
    after = model(jnp.ones(4))

    def fail() -> None:
        with lro.adapters.disabled(model):
            assert bool((model(jnp.ones(4)) == y).all())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert bool((model(jnp.ones(4)) == after).all())


def test_what_cannot_be_switched_or_merged_is_refused() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    for name in "ab":
        lro.adapters.attach(model, LoRA(rank=2), ".*", rngs=0, name=name)
    with pytest.raises(ValueError, match="not among"):
        lro.adapters.activate(model, "a", strengths={"b": 2.0})
    with pytest.raises(ValueError, match="nothing to unmerge"):
        lro.adapters.unmerge(model)
    lro.adapters.merge(model, "a")
    with pytest.raises(ValueError, match="merged already"):
        lro.adapters.merge(model, "a")
    for switch in (lro.adapters.activate, lro.adapters.deactivate):
        with pytest.raises(ValueError, match="unmerge the model first"):
            switch(model, "b")
    lro.adapters.unmerge(model)
    lro.adapters.deactivate(model)
    with pytest.raises(ValueError, match="activate it first"):
        lro.adapters.merge(model, "a")
    with pytest.raises(ValueError, match="nothing to merge"):
        lro.adapters.merge(model)


def test_a_change_that_depends_on_the_weight_is_merged_only_alone() -> None:
    model, x = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), jnp.ones(4)
    y, kernel = model(x), model.kernel[...]
    lro.adapters.attach(model, Scaled(rank=1), ".*", rngs=0)
    lro.adapters.merge(model)
    assert_close(model(x), 1.5 * y, 100)
    lro.adapters.unmerge(model)
    assert_close(model.kernel[...], kernel)
    lro.adapters.attach(model, LoRA(rank=1, initial="random"), ".*", rngs=0, name="second")
    lro.adapters.activate(model, "second")
    change = model(x) - y
    lro.adapters.activate(model)
    assert_close(model(x), 1.5 * y + change, 100)
    with pytest.raises(ValueError, match="only by itself and at strength 1"):
        lro.adapters.merge(model)


def merged_and_fresh(name: str) -> tuple[Any, Any]:
    """A model with a merged adapter, and one to which the same has been attached only."""
    merged, fresh = (
        lro.adapters.attach(model_of("scanned"), METHODS[name], rngs=0) for _ in range(2)
    )
    lro.adapters.merge(randomized(merged))
    return merged, fresh


@pytest.mark.parametrize("name", [pytest.param("LoRA", marks=pytest.mark.full), "LoTR"])
def test_a_state_says_whether_the_change_is_in_the_weights(name: str) -> None:
    merged, fresh = merged_and_fresh(name)
    state, x = nnx.state(merged, nnx.Not(nnx.RngState)), tokens()
    with pytest.raises(ValueError, match="in this state the adapter 'default' is merged, in the"):
        nnx.update(fresh, state)
    again = lro.adapters.attach(model_of("scanned"), METHODS[name], rngs=0)
    of_unmerged = nnx.state(again, nnx.Not(nnx.RngState))
    lro.adapters.merge(again)
    with pytest.raises(ValueError, match="is not merged, in the model it is merged: `unmerge`"):
        nnx.update(again, of_unmerged)
    with pytest.raises(ValueError, match=r"expected 1. leaves, but got"):
        nnx.merge(nnx.graphdef(fresh), state)
    nnx.update(again, state)
    np.testing.assert_allclose(call(again, x), call(merged, x), atol=1e-6)
    lro.adapters.unmerge(again)
    lro.adapters.unmerge(merged)
    np.testing.assert_allclose(call(again, x), call(merged, x), atol=1e-6)
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(merged))


@pytest.mark.parametrize("change", ["own", "shared", "strength"])
def test_arrays_that_changed_while_merged_are_not_taken_out_of_the_weights(change: str) -> None:
    model, _ = merged_and_fresh("LoTR" if change == "shared" else "LoRA")
    before = weights(model)
    adapter = model.blocks.up.adapters["default"]
    if change == "strength":
        adapter.strength = 2.0
    else:
        (group, *_) = model.adapter_groups["default"].values() if change == "shared" else [None]
        array = group["A"] if group is not None else adapter.merged_arrays["A"]
        array[...] = array[...].at[(0,) * array.ndim].add(1e-3)
    with pytest.raises(
        ValueError, match=r"'default' of blocks/.* have changed since it was merged"
    ):
        lro.adapters.unmerge(model)
    assert all(bool((x == before[path]).all()) for path, x in weights(model).items())


@pytest.mark.parametrize("name", [pytest.param("LoRA", marks=pytest.mark.full), "LoTR"])
def test_a_gradient_by_merged_arrays_is_refused(name: str) -> None:
    model, _ = merged_and_fresh(name)
    with pytest.raises(ValueError, match="adapter 'default' is asked for, but it is merged"):
        gradients(model, tokens())
    lro.adapters.attach(model, LoRA(rank=1), rngs=0, name="second")
    wrt = nnx.All(lro.adapters.trainable, nnx.Not(nnx.PathContains("default")))
    grads = gradients(randomized(model), tokens(), wrt)
    assert any(bool(x.any()) for x in jax.tree.leaves(grads))


def test_a_gradient_by_a_frozen_weight_is_warned_of() -> None:
    model = randomized(lro.adapters.attach(model_of("scanned"), LoRA(rank=1), rngs=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, tokens())
    wrt = nnx.Any(nnx.Param)
    with pytest.warns(UserWarning, match=r"frozen weight .*also_train"):
        gradients(model, tokens(), wrt)
    lro.adapters.also_train(model, "kernel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, tokens())


def test_a_state_says_whose_values_stand_in_a_parameter() -> None:
    model, fresh = (lro.adapters.attach(model_of("scanned"), LoRA(), rngs=0) for _ in range(2))
    for each in (model, fresh):
        lro.adapters.also_train(each, "head/bias")
    model.head.bias[...] += 1.0
    lro.adapters.deactivate(model)
    state = nnx.state(model, nnx.Not(nnx.RngState))
    with pytest.raises(ValueError, match=r"head/bias .* adapter 'default' .*deactivate\(model\)"):
        nnx.update(fresh, state)
    lro.adapters.deactivate(fresh)
    nnx.update(fresh, state)
    for each in (model, fresh):
        lro.adapters.activate(each)
    assert_close(fresh.head.bias[...], model.head.bias[...])
    active = nnx.state(model, nnx.Not(nnx.RngState))
    lro.adapters.deactivate(fresh)
    with pytest.raises(ValueError, match=r"head/bias .* base .*lro.adapters.activate\(model, "):
        nnx.update(fresh, active)


BENEATH = {
    "lora": LoRA(rank=2, alpha=5, initial="random"),
    "dora": lro.adapters.DoRA(rank=2, alpha=5, initial="random"),
    "pissa": lro.adapters.PiSSA(rank=2, alpha=5),
}


def one_layer(*methods):
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    for method in methods:
        lro.adapters.attach(model, BENEATH[method], ".*", rngs=0, name=method)
    return model


@pytest.mark.parametrize(
    ("first", "then", "match"),
    [
        (
            "lora",
            "dora",
            "'lora' is merged into its weight, and DoRA depends.*unmerge 'lora' first",
        ),
        (
            "pissa",
            "dora",
            r"'pissa' \(PiSSA\) has changed the weight, and DoRA.*detach 'pissa' first",
        ),
        ("dora", "pissa", r"'dora' \(DoRA\) depends on .*PiSSA would change: detach 'dora' first"),
    ],
)
def test_dora_is_not_beside_what_changes_the_weight(first, then, match):
    model = one_layer(first)
    lro.adapters.merge(model) if first == "lora" else lro.adapters.deactivate(model)
    with pytest.raises(ValueError, match=f"layers/0: the adapter {match}"):
        lro.adapters.attach(model, BENEATH[then], ".*", rngs=0, name=then)
    assert list(model.layers[0].adapters) == [first]


def test_another_adapter_is_not_merged_beneath_an_active_dora():
    model = one_layer("lora", "dora")
    with pytest.raises(ValueError, match="DoRA 'dora' of layers/0 depends on the weight"):
        lro.adapters.merge(model, "lora")
    lro.adapters.deactivate(model, "dora")
    expected = model(jnp.ones((1, 4)))
    lro.adapters.merge(model, "lora")
    assert_close(model(jnp.ones((1, 4))), expected)
