"""A method that routes by its input: it is added to outputs and cannot be merged."""

import dataclasses
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import AdapterParams
from lowrank_optax.adapters.operands import Rows
from tests.adapters import methods
from tests.adapters.nnx_models import Scanned, Unrolled, call, randomized, tokens, weights

EXPERTS = 3
X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
CANNOT = "depends on the layer's input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed(lro.adapters.Adapter):
    """Directions ``x A`` weighted by a softmax of ``x R`` before ``B``."""

    axes = {"A": ("in", None), "R": ("in", None), "B": (None, "out")}  # noqa: RUF012

    def init_layers(self, key, weights, shared, *, embedding=False):
        layers, d_in, d_out = weights.shape
        a, r = jax.random.split(key)
        trained = {
            "A": jax.random.normal(a, (layers, d_in, EXPERTS)),
            "R": jax.random.normal(r, (layers, d_in, EXPERTS)),
            "B": jnp.zeros((layers, EXPERTS, d_out)),
        }
        return AdapterParams(trained, {})

    def branch(self, p, x, *, y, weight, bias=None, key=None):
        return Rows((x @ p["A"]) * jax.nn.softmax(x @ p["R"])) @ p["B"]


def expected(p: Any, x: np.ndarray) -> np.ndarray:
    """The output of `Routed`, or of a `FlyLoRA` with two active ranks, by NumPy."""
    p = {name: np.asarray(array, np.float64) for name, array in p.items()}
    u = x @ p["A"]
    if "R" in p:
        weight = np.exp(x @ p["R"])
        return (u * weight / weight.sum(-1, keepdims=True)) @ p["B"]
    score = np.abs(u) + p["balance_bias"]
    return 2 * np.where(score >= np.sort(score)[..., -2:-1], u, 0) @ p["B"]


METHODS = [Routed(), methods.METHODS["FlyLoRA"]]
each_method = pytest.mark.parametrize("method", METHODS, ids=["Routed", "FlyLoRA"])


@each_method
def test_it_is_added_to_a_layers_output_with_its_strength(method: Any) -> None:
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    y = layer(X)
    lro.adapters.attach(layer, method, ".*", rngs=0)
    np.testing.assert_array_equal(layer(X), y)
    randomized(layer)
    p = {name: x[...] for name, x in layer.adapters["default"].arrays.items()}
    np.testing.assert_allclose(layer(X) - y, expected(p, X), atol=1e-5)
    lro.adapters.activate(layer, "default", strengths={"default": 0.5})
    np.testing.assert_allclose(layer(X) - y, 0.5 * expected(p, X), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Unrolled, METHODS[0]),
        (Scanned, METHODS[1]),
        pytest.param(Unrolled, METHODS[1], marks=pytest.mark.full),
        pytest.param(Scanned, METHODS[0], marks=pytest.mark.full),
    ],
)
def test_merging_is_refused_before_any_weight_is_changed(kind: Any, method: Any) -> None:
    model = kind(2, nnx.Rngs(0))
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2), "up", rngs=0)
    lro.adapters.attach(model, method, "down", rngs=1, name="routed")
    randomized(model)
    lro.adapters.activate(model, "default", "routed")
    before, y = weights(model), call(model, tokens())
    with pytest.raises(
        TypeError, match=r"'routed' of .* cannot be merged: its change depends on the"
    ):
        lro.adapters.merge(model)
    assert before.keys() == weights(model).keys()
    for name, value in weights(model).items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_array_equal(call(model, tokens()), y)
    # The others can be merged beside it.
    lro.adapters.merge(model, "default")
    np.testing.assert_allclose(call(model, tokens()), y, atol=1e-5)
    lro.adapters.unmerge(model)
    np.testing.assert_allclose(call(model, tokens()), y, atol=1e-5)


@each_method
def test_functions_that_need_a_matrix_say_so(tmp_path: Any, method: Any) -> None:
    weight = jnp.zeros((6, 4))
    p = method.layer_arrays(method.init(jax.random.key(0), weight[None]), 0)
    for function in (method.delta, method.merged, method.unmerged):
        with pytest.raises(TypeError, match=CANNOT):
            function(p, weight)
    with pytest.raises(TypeError, match=r"makes no change of low rank|no LoRA does"):
        method.to_lora(p)
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    lro.adapters.attach(model, method, ".*", rngs=0)
    with pytest.raises(TypeError, match=r"makes no change of low rank|no LoRA does"):
        lro.adapters.save_peft(model, tmp_path, names={"layers/{}": "{}"})


@each_method
def test_in_linen_it_is_added_and_not_merged(method: Any) -> None:
    model = nn.Dense(4)
    adapted = lro.adapters.linen.Adapted(model, method, ".*")
    base = model.init(jax.random.key(0), X)
    variables = adapted.attach(base, jax.random.key(1), X)
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape)
    trained = jax.tree.map(draw, variables["adapters"])
    variables = {**variables, "adapters": trained}
    p = trained["default"] | variables.get("adapter_constants", {}).get("default", {})
    change = adapted.apply(variables, X) - model.apply(base, X)
    np.testing.assert_allclose(change, expected(p, X), atol=1e-4)
    with pytest.raises(TypeError, match=CANNOT):
        adapted.merge(variables)


@each_method
def test_in_a_pytree_it_multiplies_beside_the_weight_and_has_no_sum(method: Any) -> None:
    pytree, params = lro.adapters.pytree, {"w": jnp.ones((6, 4))}
    adapter = pytree.init(jax.random.key(0), params, method, ".*")
    trained = jax.tree.map(lambda x: jnp.ones_like(x) / x.size, adapter.trainable)
    adapter = adapter.replace(trained)
    change = X @ pytree.factored(params, adapter)["w"] - X @ params["w"]
    (arrays,) = adapter.arrays().values()
    np.testing.assert_allclose(change, expected(arrays, X), atol=1e-5)
    for function in (pytree.effective, pytree.merge, pytree.unmerge):
        with pytest.raises(TypeError, match=CANNOT):
            function(params, adapter)
