"""Rules read off Flax layers: the matrix they see is the one that the layer multiplies by."""

from collections.abc import Callable
import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.matrices import (
    WeightDimensionNumbers,
    resolve_dimension_numbers,
    to_matrix,
    weight_dimension_numbers,
)
from tests.matrices.layer_products import assert_is_product, init, normal

flax = pytest.importorskip("flax")
from flax import linen as nn  # noqa: E402
from flax import nnx  # noqa: E402

MATRIX = WeightDimensionNumbers(-2, -1)
HEADS, OUT = WeightDimensionNumbers(-3, (-2, -1)), WeightDimensionNumbers((-3, -2), -1)


# Layer, the shape of one batch of examples, and the spec its kernel should have. Convolutions are
# as large as their input, so that the whole input makes one output.
NNX_LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...], WeightDimensionNumbers]] = {
    "Linear": (functools.partial(nnx.Linear, 4, 3), (5, 4), MATRIX),
    "LinearGeneral to heads": (functools.partial(nnx.LinearGeneral, 4, (2, 3)), (5, 4), HEADS),
    "LinearGeneral from heads": (
        functools.partial(nnx.LinearGeneral, (2, 3), 4, axis=(-2, -1)), (5, 2, 3), OUT,
    ),
    "LinearGeneral, both": (
        functools.partial(nnx.LinearGeneral, (2, 3), (4, 5), axis=(1, 2)), (6, 2, 3),
        WeightDimensionNumbers((-4, -3), (-2, -1)),
    ),
    "LinearGeneral, batch": (
        functools.partial(nnx.LinearGeneral, 4, 3, batch_axis={0: 2}), (2, 5, 4), MATRIX,
    ),
    "Einsum, output around": (
        functools.partial(nnx.Einsum, "nta, hab -> nthb", (8, 2, 4)), (3, 5, 2),
        WeightDimensionNumbers(-2, (-3, -1)),
    ),
    "Einsum, from heads": (
        functools.partial(nnx.Einsum, "BTNH,NHD->BTD", (2, 3, 4)), (5, 6, 2, 3), OUT,
    ),
    "Einsum, experts": (
        functools.partial(nnx.Einsum, "etd,edf->etf", (3, 4, 5)), (3, 6, 4), MATRIX,
    ),
    "Einsum, experts, with a bias": (
        functools.partial(nnx.Einsum, "etd,edf->etf", (3, 4, 5), (3, 1, 5)), (3, 6, 4), MATRIX,
    ),
    "Einsum, ellipsis of examples": (
        functools.partial(nnx.Einsum, "...d,df->...f", (4, 5)), (2, 3, 4), MATRIX,
    ),
    "Einsum, ellipsis of experts": (
        functools.partial(nnx.Einsum, "...td,...df->...tf", (2, 3, 4, 5)), (2, 3, 6, 4), MATRIX,
    ),
    "Conv, 1-D": (
        functools.partial(nnx.Conv, 4, 5, 3, padding="VALID"), (2, 3, 4), OUT,
    ),
    "Conv, 2-D": (
        functools.partial(nnx.Conv, 4, 5, (3, 2), padding="VALID"), (6, 3, 2, 4),
        WeightDimensionNumbers((-4, -3, -2), -1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NNX_LAYERS)
def test_nnx_layer_multiplies_by_the_matrix_of_its_kernel(name: str) -> None:
    make, shape, spec = NNX_LAYERS[name]
    layer, x = make(kernel_init=init, rngs=nnx.Rngs(0)), normal(*shape)
    specs = weight_dimension_numbers(layer)
    assert specs["kernel"] == spec
    assert specs.get("bias") is None
    assert_is_product(layer(x), x, layer.kernel[...], specs["kernel"])


@pytest.mark.parametrize("name", NNX_LAYERS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_matrices_of_nnx_layers_stacked_on_any_axis_are_those_of_the_layers(
    name: str, axis: int
) -> None:
    make, _, spec = NNX_LAYERS[name]
    make_stack = nnx.vmap(
        lambda rngs: make(kernel_init=init, rngs=rngs),
        out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}),
    )
    # Eleven is the size of no axis of the layers.
    layers = nnx.eval_shape(lambda: nnx.split_rngs(splits=11)(make_stack)(nnx.Rngs(0)))
    kernel = normal(*layers.kernel.shape)
    one = np.asarray(to_matrix(np.take(kernel, 3, axis), spec))
    matrices = np.asarray(to_matrix(kernel, weight_dimension_numbers(layers)["kernel"]))
    stack_axis = min(axis % kernel.ndim, one.ndim - 2)  # a layer's own batch axes are its first
    np.testing.assert_array_equal(np.take(matrices, 3, stack_axis), one)


def attention_model(rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(
        num_heads=2, in_features=6, num_kv_heads=1, normalize_qk=True, decode=False, rngs=rngs
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_nnx_attention_projections_are_matrices_of_all_heads(stacked: bool) -> None:
    make = nnx.split_rngs(splits=3)(nnx.vmap(attention_model)) if stacked else attention_model
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    specs = weight_dimension_numbers(model)
    kernels = {name: specs[name].pop("kernel") for name in ("query", "key", "value", "out")}
    assert kernels == {"query": HEADS, "key": HEADS, "value": HEADS, "out": OUT}
    assert jax.tree.leaves(specs) == []  # biases and norms


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("linen", [False, True])
def test_transposed_convolution_multiplies_by_the_matrix_of_its_kernel(
    transpose_kernel: bool, linen: bool
) -> None:
    x = normal(2, 3, 4)
    options = {"transpose_kernel": transpose_kernel, "padding": "VALID", "kernel_init": init}
    if linen:
        layer = nn.ConvTranspose(5, (3,), **options)
        layer = layer.bind(layer.init(jax.random.key(0), x))
        kernel = layer.variables["params"]["kernel"]
    else:
        layer = nnx.ConvTranspose(4, 5, 3, **options, rngs=nnx.Rngs(0))
        kernel = layer.kernel[...]
    spec = weight_dimension_numbers(layer)["kernel"]
    assert spec == (WeightDimensionNumbers((-3, -1), -2) if transpose_kernel else OUT)
    # At the middle of its five outputs the whole kernel meets the whole input.
    seen = x[:, ::-1] if transpose_kernel else x
    assert_is_product(layer(x)[:, 2], seen, kernel, spec)


@pytest.mark.parametrize("einsum", ["ab,bcd->ac", "ab,ab->a", "ab,cd->abcd", "abb,bc->ac"])
def test_einsum_kernels_that_are_no_matrices_are_left_alone(einsum: str) -> None:
    kernel = einsum.split("->")[0].split(",")[1]
    layer = nnx.Einsum(einsum, (2,) * len(kernel), rngs=nnx.Rngs(0))
    expected = MATRIX if einsum == "abb,bc->ac" else None
    assert weight_dimension_numbers(layer)["kernel"] == expected


def test_convolutions_in_groups_are_matrices_only_if_included() -> None:
    model = nnx.Dict(conv=nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=nnx.Rngs(0)))
    assert weight_dimension_numbers(model)["conv"]["kernel"] is None
    assert weight_dimension_numbers(model, include="conv")["conv"]["kernel"] == OUT


class Mix(nnx.Module):
    """A module of the user's own, with bare parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.project = nnx.Param(rngs.params.normal((4, 4)))
        self.shift = nnx.Param(jnp.zeros(4))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
        self.norm, self.mix = nnx.LayerNorm(4, rngs=rngs), Mix(rngs)


def stack_by_vmap(rngs: nnx.Rngs) -> Block:
    return nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)


def stack_by_scan(rngs: nnx.Rngs) -> Block:
    make = nnx.scan(lambda carry, rngs: (carry, Block(rngs)), in_axes=(nnx.Carry, 0))
    return nnx.split_rngs(splits=3)(make)(jnp.zeros(()), rngs)[1]


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, make_blocks: Callable[..., Any] = Block) -> None:
        self.embed = nnx.Embed(9, 4, rngs=rngs)
        self.blocks = make_blocks(rngs)
        self.table = nnx.Param(jnp.zeros((7, 4)))
        self.lm_head = nnx.Linear(4, 9, use_bias=False, rngs=rngs)


def abstract_model(make_blocks: Callable[..., Any] = Block) -> Model:
    return nnx.eval_shape(lambda: Model(nnx.Rngs(0), make_blocks))


@pytest.mark.parametrize("make", [Block, stack_by_vmap, stack_by_scan])
def test_every_leaf_of_a_model_stacked_or_not(make: Callable[..., Any]) -> None:
    """Also the bare parameters of a stacked module, whose stack axis its neighbours show."""
    specs = weight_dimension_numbers(abstract_model(make))
    linear = {"bias": None, "kernel": MATRIX}
    assert specs == {
        "embed": {"embedding": None},
        "blocks": {
            "up": linear,
            "down": linear,
            "norm": {"bias": None, "scale": None},
            "mix": {"project": MATRIX, "shift": None},
        },
        "table": MATRIX,
        "lm_head": {"kernel": None},
    }


def test_bare_parameters_of_a_stack_without_norms_follow_the_layers_beside_them() -> None:
    class Normless(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up, self.mix = nnx.Linear(4, 6, use_bias=False, rngs=rngs), Mix(rngs)

    make = lambda rngs: nnx.split_rngs(splits=3)(nnx.vmap(Normless))(rngs)
    specs = weight_dimension_numbers(abstract_model(make))
    assert specs["blocks"]["mix"] == {"project": MATRIX, "shift": None}
    assert specs["table"] == MATRIX


def test_specs_of_a_model_are_a_rule_for_its_parameters() -> None:
    model = abstract_model(stack_by_vmap)
    specs = weight_dimension_numbers(model)
    state = nnx.state(model, nnx.Param)
    chosen = resolve_dimension_numbers(specs, state)
    assert chosen == resolve_dimension_numbers(specs, nnx.as_pure(state))
    assert chosen.count(MATRIX) == 4
    specs["table"] = None  # a tree to edit
    assert resolve_dimension_numbers(specs, state).count(MATRIX) == 3
    assert weight_dimension_numbers(state) == weight_dimension_numbers(nnx.to_pure_dict(state))


def test_a_shared_module_or_parameter_appears_once_where_the_state_has_it() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Dict(b=nnx.Linear(4, 4, rngs=rngs), c=nnx.Linear(4, 4, rngs=rngs))
    model.a, model.c.kernel = model.b, model.b.kernel
    assert weight_dimension_numbers(model) == {
        "a": {"bias": None, "kernel": MATRIX}, "c": {"bias": None}
    }  # fmt: skip


def test_lora_factors_are_matrices_only_if_included() -> None:
    model = nnx.LoRALinear(4, 6, lora_rank=2, rngs=nnx.Rngs(0))
    specs = weight_dimension_numbers(model)
    assert specs["kernel"] == MATRIX
    assert specs["lora"] == {"lora_a": None, "lora_b": None}
    included = weight_dimension_numbers(model, include="lora_b")
    assert included["lora"] == {"lora_a": None, "lora_b": MATRIX}


def test_the_type_of_a_layer_says_more_than_its_name_unless_it_is_a_head() -> None:
    model = nnx.Module()
    for name in ("token_embed", "normalizer", "lm_head"):
        setattr(model, name, nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0)))
    specs = weight_dimension_numbers(model)
    assert {name: specs[name]["kernel"] for name in specs} == {
        "token_embed": MATRIX, "normalizer": MATRIX, "lm_head": None
    }  # fmt: skip


def test_include_and_exclude_have_the_last_word() -> None:
    model = abstract_model()
    specs = weight_dimension_numbers(model, include="embed|head", exclude="^blocks/(up|mix)|table")
    assert specs["embed"]["embedding"] == specs["lm_head"]["kernel"] == MATRIX
    assert specs["blocks"]["up"]["kernel"] is specs["blocks"]["mix"]["project"] is None
    assert specs["table"] is None
    assert specs["blocks"]["down"]["kernel"] == MATRIX
    both = weight_dimension_numbers(model, include="embed", exclude="embed")
    assert both["embed"]["embedding"] is None


@pytest.mark.parametrize("given", ["model", "params"])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_its_near_misses(argument: str, given: str) -> None:
    model = abstract_model()
    tree = model if given == "model" else nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=f"{argument}='embeder' .* near it are: .*embed"):
        weight_dimension_numbers(tree, **{argument: "embeder"})
    with pytest.raises(ValueError, match=rf"{argument}='\(' is no regular expression"):
        weight_dimension_numbers(tree, **{argument: "("})


def test_including_what_cannot_be_seen_as_a_matrix_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'norm/scale' of shape \(3,\), whose inputs and outputs"):
        weight_dimension_numbers({"norm": {"scale": jnp.ones(3)}}, include="scale")


def test_a_kernel_that_does_not_fit_its_layer_is_left_alone() -> None:
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((4, 2)))
    assert weight_dimension_numbers(layer)["kernel"] is None


@pytest.mark.slow
def test_matrices_work_where_flax_cannot_be_imported() -> None:
    program = """
import sys
sys.modules["flax"] = None
import jax.numpy as jnp, optax
from lowrank_optax.matrices import weight_dimension_numbers
from lowrank_optax.modules.selection_table import selection_table
params = {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
specs = weight_dimension_numbers(params, exclude="bias")
print(selection_table(params, specs, optax.adam(1e-3)).rows[1].view, "flax.nnx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "2 × 3 False\n", done.stderr
