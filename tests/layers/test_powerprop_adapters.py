"""Adapters on layers that multiply by other weights than their parameters."""

import functools
from typing import Any, ClassVar

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen as nn
from flax import nnx

import lowrank_optax as lro
from lowrank_optax.modules.spec import has_other_weights

X = np.random.default_rng(0).standard_normal((5, 3), np.float32)
KEY = jax.random.key(0)
LORA = lro.adapters.LoRA(rank=2, alpha=3, initial="random")
READERS = [lro.adapters.PiSSA(rank=2), lro.adapters.DoRA(rank=2), lro.adapters.SVFit(rank=2)]
OTHER = "may multiply by another weight than the parameter"
Adapted = lro.adapters.linen.Adapted


def is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2


class Scaled(nnx.Linear):
    """A layer whose weights are not its parameters, as a user may write it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ jnp.exp(self.kernel[...])


class Cast(nnx.Linear):
    """A layer with its own call, which says that it multiplies by its parameter."""

    plain_weights: ClassVar[bool] = True

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(jnp.asarray(x, jnp.float32))


class Sketched(lro.layers.RandomizedLinear):
    """A subclass with its own call of a layer that multiplies by its parameter."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ jnp.exp(self.kernel[...])


def rounded(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """A product with another weight, as of a quantized one."""
    return jax.lax.dot_general(x, jnp.round(4 * kernel) / 4, *args, **options)


def says_so(*args: Any, **options: Any) -> jax.Array:
    """A product with the weight itself."""
    return jax.lax.dot_general(*args, **options)


vars(says_so)["plain_weights"] = True
PRECISE = functools.partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)


def plain() -> nnx.Linear:
    return nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def randomized() -> Any:
    return lro.layers.RandomizedLinear(
        3, 4, sketch=lro.layers.Sketch(fraction=0.5), rngs=nnx.Rngs(0)
    )


def wrapped_in_a_sketch() -> Any:
    layer = plain()
    lro.layers.randomize(layer, lro.layers.Sketch(fraction=0.5), ".*", rngs=1)
    return layer


POWERPROP = {
    "layer": lambda: lro.layers.PowerpropLinear(3, 4, alpha=2.0, rngs=nnx.Rngs(0)),
    "module": lambda: lro.layers.PowerpropModule(plain(), 2.0),
    "module by shapes": lambda: lro.layers.PowerpropModule(plain(), 2.0, is_matrix),
}
COMPUTED = POWERPROP | {
    "own call": lambda: Scaled(3, 4, rngs=nnx.Rngs(0)),
    "own call of a subclass of a plain one": lambda: Sketched(
        3, 4, sketch=lro.layers.Sketch(fraction=0.5), rngs=nnx.Rngs(0)
    ),
    "own product": lambda: nnx.Linear(3, 4, dot_general=rounded, rngs=nnx.Rngs(0)),
    "norm of the weights": lambda: nnx.WeightNorm(plain(), rngs=nnx.Rngs(0)),
}
PLAIN = {
    "randomized": randomized,
    "wrapped": wrapped_in_a_sketch,
    "says so": lambda: Cast(3, 4, rngs=nnx.Rngs(0)),
    "precise": lambda: nnx.Linear(3, 4, dot_general=PRECISE, rngs=nnx.Rngs(0)),
}


def adapter_of(model: Any) -> Any:
    return getattr(model, "module", model).adapters["default"]


def change(arrays: Any) -> np.ndarray:
    a, b = (np.asarray(arrays[name][...], np.float64) for name in "AB")
    return 1.5 * a @ b


def values(model: Any) -> Any:
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", POWERPROP)
def test_lora_is_added_to_the_output_and_merged_once_the_parameters_are_the_weights(
    name: str,
) -> None:
    model = POWERPROP[name]()
    before = np.asarray(model(X), np.float64)
    lro.adapters.attach(model, LORA, ".*", rngs=0)
    outputs = model(X)
    expected = before + X.astype(np.float64) @ change(adapter_of(model).arrays)
    assert not np.allclose(expected, before, atol=0.1)
    assert_close(outputs, expected, 100, dtype=np.float32)
    parameters = values(model)
    with pytest.raises(TypeError, match=rf"merging changes .*{OTHER}.*change_alpha\(1\.0\)"):
        lro.adapters.merge(model)
    assert adapter_of(model).active
    jax.tree.map(np.testing.assert_array_equal, values(model), parameters)
    model.change_alpha(1.0)
    lro.adapters.merge(model)
    assert_close(model(X), expected, 100, dtype=np.float32)
    lro.adapters.unmerge(model)
    assert_close(lro.adapters.detach(model)(X), before, 100, dtype=np.float32)


@pytest.mark.parametrize("method", READERS[:2], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", COMPUTED)
def test_methods_that_read_the_weight_are_refused_where_it_is_another(
    name: str, method: Any
) -> None:
    model = nnx.Sequential(plain(), COMPUTED[name]())
    parameters = values(model)
    kind = type(method).__name__
    with pytest.raises(TypeError, match=f"layers/1.*: {kind} reads .*{OTHER}"):
        lro.adapters.attach(model, method, ".*", rngs=0)
    jax.tree.map(np.testing.assert_array_equal, values(model), parameters)
    lro.adapters.attach(model, method, "layers/0", rngs=0)


@pytest.mark.parametrize("name", COMPUTED)
def test_nothing_is_merged_if_one_layer_is_refused(name: str) -> None:
    model = nnx.Sequential(plain(), COMPUTED[name]())
    lro.adapters.attach(model, LORA, ".*", rngs=0)
    parameters = values(model)
    with pytest.raises(TypeError, match=f"layers/1.*: merging changes .*{OTHER}"):
        lro.adapters.merge(model)
    jax.tree.map(np.testing.assert_array_equal, values(model), parameters)


@pytest.mark.combinations(1)
@pytest.mark.parametrize("method", [*READERS, LORA], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", PLAIN)
def test_layers_that_multiply_by_their_parameter_are_merged_with_any_method(
    name: str, method: Any
) -> None:
    layer = PLAIN[name]()
    before = layer(X)
    lro.adapters.attach(layer, method, ".*", rngs=0)
    outputs = layer(X)
    if method is not LORA:
        assert_close(outputs, before, 100)
    lro.adapters.merge(layer)
    assert_close(layer(X), outputs, 100)
    lro.adapters.unmerge(layer)
    assert_close(lro.adapters.detach(layer)(X), before, 100)


def test_a_product_may_say_that_it_is_with_the_weight_itself() -> None:
    general = nnx.LinearGeneral(3, 4, dot_general=says_so, rngs=nnx.Rngs(0))
    assert not has_other_weights(general)
    general.dot_general = lambda *args: says_so(*args)
    assert has_other_weights(general)
    cast = lambda product: Cast(3, 4, dot_general=product, rngs=nnx.Rngs(0))
    assert not has_other_weights(cast(says_so))
    assert has_other_weights(cast(rounded))  # the class speaks for its own call alone
    own = lambda *args, **options: jax.lax.conv_general_dilated(*args, **options)
    assert has_other_weights(nn.Conv(4, (3,), conv_general_dilated_cls=lambda: own))
    assert not has_other_weights(nn.Conv(4, (3,)))
    einsum = lambda **options: nnx.Einsum("ab,bc->ac", (3, 4), rngs=nnx.Rngs(0), **options)
    assert not has_other_weights(einsum())
    own = lambda *args, **options: jnp.einsum(*args, **options)
    assert has_other_weights(einsum(einsum_op=own))
    promote = lambda *args, **options: nn.dtypes.promote_dtype(*args, **options)
    for layer in (einsum(promote_dtype=promote), nn.Dense(4, promote_dtype=promote)):
        assert has_other_weights(layer)
    vars(promote)["plain_weights"] = True
    assert not has_other_weights(nn.Dense(4, promote_dtype=promote))


def test_a_merged_or_changed_weight_is_restored_only_as_the_parameter() -> None:
    for method, undo in ((LORA, lro.adapters.unmerge), (READERS[0], lro.adapters.detach)):
        layer = plain()
        before = layer.kernel[...]
        lro.adapters.attach(layer, method, ".*", rngs=0)
        if method is LORA:
            lro.adapters.merge(layer)
        outputs = layer(X)
        model = lro.layers.PowerpropModule(layer, 2.0, "^kernel$")
        assert_close(model(X), outputs, 100)
        theta = layer.kernel[...]
        with pytest.raises(TypeError, match=f"module: .*{OTHER}"):
            undo(model)
        np.testing.assert_array_equal(layer.kernel[...], theta)
        model.change_alpha(1.0)
        undo(model)
        assert_close(layer.kernel[...], before, 100)


def test_a_change_that_depends_on_the_weight_follows_the_exponent() -> None:
    layer = lro.layers.PowerpropLinear(3, 4, alpha=1.0, rngs=nnx.Rngs(0))
    method = lro.adapters.DoRA(rank=2, initial="random")
    outputs = lro.adapters.attach(layer, method, ".*", rngs=0)(X)
    layer.change_alpha(2.0)
    with pytest.raises(TypeError, match=f"DoRA reads .*{OTHER}"):
        layer(X)
    layer.change_alpha(1.0)
    assert_close(layer(X), outputs, 100)
    model = lro.layers.PowerpropModule(layer, 2.0, "^kernel$")  # the layer gets its weight
    assert_close(model(X), outputs, 100)
    dense = lro.layers.linen.PowerpropDense
    adapted = Adapted(dense(4, alpha=1.0), method, ".*")
    variables = adapted.init(KEY, X)
    with pytest.raises(TypeError, match=f"DoRA reads .*{OTHER}"):
        Adapted(dense(4, alpha=2.0), method, ".*").apply(variables, X)


def test_the_values_of_a_computed_weight_are_not_given_out() -> None:
    with pytest.raises(TypeError, match=OTHER):
        lro.adapters.weight_spectra(nnx.Sequential(POWERPROP["layer"]()), ".*")


class MyDense(nn.Dense):
    """A Linen layer with its own call."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * super().__call__(x / 2)


LINEN: dict[str, Any] = {
    "layer": lambda alpha: lro.layers.linen.PowerpropDense(4, alpha=alpha),
    "module": lambda alpha: lro.layers.linen.PowerpropModule(nn.Dense(4), alpha),
    "module by shapes": lambda alpha: lro.layers.linen.PowerpropModule(
        nn.Dense(4), alpha, is_matrix
    ),
}
LINEN_COMPUTED = {name: make(2.0) for name, make in LINEN.items()} | {
    "own call": MyDense(4),
    "own product": nn.Dense(4, dot_general_cls=lambda: rounded),
    "norm of the weights": nn.WeightNorm(nn.Dense(4)),
}


def linen_arrays(variables: Any) -> Any:
    leaves = variables["adapters"]["default"]
    while "A" not in leaves:
        (leaves,) = leaves.values()
    return leaves


@pytest.mark.parametrize("name", [*LINEN_COMPUTED, "randomized"])
def test_in_linen_lora_is_added_to_the_output_once(name: str) -> None:
    sketched = lro.layers.linen.RandomizedDense(4, sketch=lro.layers.Sketch(fraction=0.5))
    module = LINEN_COMPUTED.get(name, sketched)
    adapted = Adapted(module, LORA, ".*")
    variables = module.init(KEY, X)
    before = np.asarray(module.apply(variables, X), np.float64)
    variables = adapted.attach(variables, KEY, X)
    expected = before + X.astype(np.float64) @ change(linen_arrays(variables))
    assert not np.allclose(expected, before, atol=0.1)
    rngs = {"sketch": KEY}
    assert_close(adapted.apply(variables, X, rngs=rngs), expected, 100, dtype=np.float32)
    if name == "randomized":
        merged, _ = adapted.merge(variables)
        assert_close(adapted.apply(merged, X, rngs=rngs), expected, 100, dtype=np.float32)
        return
    with pytest.raises(TypeError, match=f"merging.*{OTHER}.*powerprop"):
        adapted.merge(variables)


@pytest.mark.parametrize("method", READERS[:2], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", LINEN_COMPUTED)
def test_in_linen_methods_that_read_the_weight_are_refused_where_it_is_another(
    name: str, method: Any
) -> None:
    model = nn.Sequential([nn.Dense(3), LINEN_COMPUTED[name]])
    variables = jax.eval_shape(model.init, KEY, X)
    kind = type(method).__name__
    with pytest.raises(TypeError, match=f"layers_1.*: {kind} reads .*{OTHER}"):
        Adapted(model, method, ".*").attach(variables, KEY, X)


@pytest.mark.parametrize("name", LINEN)
def test_in_linen_adapters_are_merged_once_the_parameters_are_the_weights(name: str) -> None:
    adapted = Adapted(LINEN[name](2.0), LORA, ".*")
    variables = adapted.init(KEY, X)
    expected = adapted.apply(variables, X)
    variables["params"] = lro.layers.powerprop(variables["params"], 2.0)
    plain = Adapted(LINEN[name](1.0), LORA, ".*")
    plain.trace(X)
    merged, _ = plain.merge(variables)
    assert_close(plain.apply(merged, X), expected, 100)
    assert_close(plain.detach(merged)["params"], merged["params"])
