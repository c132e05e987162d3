"""Rules read off Linen layers: the matrix they see is the one that the layer multiplies by."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lowrank_optax.matrices import WeightDimensionNumbers, weight_dimension_numbers
from tests.matrices.layer_products import assert_is_product, init, normal

flax = pytest.importorskip("flax")
from flax import linen as nn  # noqa: E402

MATRIX = WeightDimensionNumbers(-2, -1)
HEADS, OUT = WeightDimensionNumbers(-3, (-2, -1)), WeightDimensionNumbers((-3, -2), -1)

LINEN_LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...], WeightDimensionNumbers]] = {
    "Dense": (functools.partial(nn.Dense, 3), (5, 4), MATRIX),
    "DenseGeneral to heads": (functools.partial(nn.DenseGeneral, (2, 3)), (5, 4), HEADS),
    "DenseGeneral from heads": (
        functools.partial(nn.DenseGeneral, 4, axis=(-2, -1)), (5, 2, 3), OUT,
    ),
    "DenseGeneral, batch": (
        functools.partial(nn.DenseGeneral, 3, batch_dims=(0,)), (2, 5, 4), MATRIX,
    ),
    "Einsum": (
        functools.partial(nn.Einsum, (8, 2, 4), "nta,hab->nthb"), (3, 5, 2),
        WeightDimensionNumbers(-2, (-3, -1)),
    ),
    "Conv": (
        functools.partial(nn.Conv, 5, (3, 2), padding="VALID"), (6, 3, 2, 4),
        WeightDimensionNumbers((-4, -3, -2), -1),
    ),
    "ConvLocal": (functools.partial(nn.ConvLocal, 5, (3,), padding="VALID"), (6, 3, 4), MATRIX),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEN_LAYERS)
def test_linen_layer_multiplies_by_the_matrix_of_its_kernel(name: str) -> None:
    make, shape, spec = LINEN_LAYERS[name]
    layer, x = make(kernel_init=init), normal(*shape)
    bound = layer.bind(layer.init(jax.random.key(0), x))
    specs = weight_dimension_numbers(bound)
    assert specs == {"kernel": spec, "bias": None}
    seen = x.swapaxes(1, 2) if name == "ConvLocal" else x  # its rows are channels × window
    assert_is_product(bound(x), seen, bound.variables["params"]["kernel"], specs["kernel"])


class LinenBlock(nn.Module):
    """Made in `setup`, so that a bound module has its submodules."""

    def setup(self) -> None:
        self.pair = [nn.Dense(6), nn.Dense(4)]
        self.norm = nn.LayerNorm()

    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return self.norm(self.pair[1](self.pair[0](x))), None


class CompactBlock(nn.Module):
    """Made while it runs, so that names must do."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = nn.MultiHeadDotProductAttention(2)(x)
        return nn.LayerNorm()(nn.Dense(4)(nn.Dense(6)(x))), None


class LinenModel(nn.Module):
    passed_in: nn.Module
    axis: int = 0

    def setup(self) -> None:
        scan = functools.partial(
            nn.scan, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=11
        )
        self.embed = nn.Embed(9, 4)
        self.blocks = scan(LinenBlock)()
        self.compact_blocks = scan(CompactBlock)()
        self.rematerialised = nn.remat(LinenBlock)()
        self.attention = nn.MultiHeadDotProductAttention(2)
        self.lm_head = nn.Dense(9)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, _ = self.blocks(self.embed(tokens), None)
        x, _ = self.compact_blocks(x, None)
        x, _ = self.rematerialised(x)
        return self.lm_head(self.passed_in(self.attention(x)))


def bound_model(axis: int = 0) -> LinenModel:
    model, tokens = LinenModel(nn.Dense(4), axis), jnp.zeros((1, 2), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return model.bind(variables)


def without_nones(specs: Any) -> dict[str, WeightDimensionNumbers]:
    is_spec = lambda x: isinstance(x, WeightDimensionNumbers)
    flat = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in flat}


def test_every_matrix_of_a_bound_linen_model() -> None:
    heads = {f"{name}/kernel": HEADS for name in ("query", "key", "value")} | {"out/kernel": OUT}
    assert without_nones(weight_dimension_numbers(bound_model())) == {
        "blocks/pair_0/kernel": MATRIX,
        "blocks/pair_1/kernel": MATRIX,
        "compact_blocks/Dense_0/kernel": MATRIX,
        "compact_blocks/Dense_1/kernel": MATRIX,
        **{f"compact_blocks/MultiHeadDotProductAttention_0/{k}": v for k, v in heads.items()},
        "rematerialised/pair_0/kernel": MATRIX,
        "rematerialised/pair_1/kernel": MATRIX,
        **{f"attention/{k}": v for k, v in heads.items()},
        "passed_in/kernel": MATRIX,
    }


def test_linen_layers_scanned_over_another_axis_are_known_by_their_bias() -> None:
    specs = without_nones(weight_dimension_numbers(bound_model(axis=1)))
    assert specs["blocks/pair_0/kernel"] == WeightDimensionNumbers(-3, -1)
    assert specs["blocks/pair_1/kernel"] == WeightDimensionNumbers(-3, -1)


def test_the_parameters_alone_give_what_the_bound_linen_model_gives() -> None:
    model = bound_model()
    assert weight_dimension_numbers(model.variables["params"]) == weight_dimension_numbers(model)
    frozen = flax.core.freeze(model.variables["params"])
    assert without_nones(weight_dimension_numbers(frozen)) == without_nones(
        weight_dimension_numbers(model)
    )


def test_a_submodule_of_a_bound_linen_model_has_its_own_tree() -> None:
    model = bound_model()
    assert weight_dimension_numbers(model.blocks) == weight_dimension_numbers(model)["blocks"]


def test_an_unbound_linen_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Dense is not bound.*module\.bind\(variables\)"):
        weight_dimension_numbers(nn.Dense(3))


def test_linen_partitioning_boxes_do_not_hide_the_layers() -> None:
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    layer = nn.Dense(3, kernel_init=init)
    bound = layer.bind(layer.init(jax.random.key(0), jnp.ones((2, 4))))
    assert weight_dimension_numbers(bound) == {"bias": None, "kernel": MATRIX}
