"""A rule finds the same leaves in whatever tree the parameters are met."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from lowrank_optax.matrices import WeightDimensionNumbers, resolve_dimension_numbers
from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.rules import default_rule

MATRIX, FLIPPED = WeightDimensionNumbers(-2, -1), WeightDimensionNumbers(-1, -2)
HEADS, OUT = WeightDimensionNumbers(-3, (-2, -1)), WeightDimensionNumbers((-3, -2), -1)


def tree(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """``tree(a__kernel=(2, 3))`` is ``{"a": {"kernel": <float32[2, 3]>}}``."""
    params: dict[str, Any] = {}
    for name, shape in shapes.items():
        *parents, leaf = name.split("__")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return params


PARAMS = tree(down__bias=(4,), down__kernel=(6, 4), up__kernel=(4, 6))


def probe(rule: Any, seen: list) -> optax.GradientTransformation:
    """A transformation that notes what the rule makes of the trees it is given."""

    def init(params: Any) -> optax.EmptyState:
        seen.append(resolve_dimension_numbers(rule, params))
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        seen.append(resolve_dimension_numbers(rule, updates))
        return updates, state

    return optax.GradientTransformation(init, update)


def test_one_spec_stands_for_all_leaves_of_two_axes_or_more() -> None:
    assert resolve_dimension_numbers(FLIPPED, PARAMS) == [None, FLIPPED, FLIPPED]


def test_a_prefix_stands_for_a_subtree_and_the_longest_wins() -> None:
    rule = {"down": {"bias": None, "kernel": FLIPPED}, "up": MATRIX}
    assert resolve_dimension_numbers(rule, PARAMS) == [None, FLIPPED, MATRIX]
    assert resolve_dimension_numbers({"down": None, "up": MATRIX}, PARAMS) == [None, None, MATRIX]


@pytest.mark.parametrize("answer", [FLIPPED, {"down": None, "up": FLIPPED}])
def test_a_callable_is_asked_with_the_parameters(answer: Any) -> None:
    asked = []
    rule = lambda params: asked.append(params) or answer
    assert resolve_dimension_numbers(rule, PARAMS)[2] == FLIPPED
    assert asked == [PARAMS]


def test_holes_in_the_rule_are_no_matrices() -> None:
    rule = {"down": optax.MaskedNode(), "up": {"kernel": MATRIX}}
    assert resolve_dimension_numbers(rule, PARAMS) == [None, None, MATRIX]


def test_holes_in_the_parameters_are_no_leaves() -> None:
    rule = {"down": {"bias": None, "kernel": FLIPPED}, "up": {"kernel": MATRIX}}
    holes = {"down": {"bias": optax.MaskedNode(), "kernel": optax.MaskedNode()}} | tree(
        up__kernel=(4, 6)
    )
    assert resolve_dimension_numbers(rule, holes) == [MATRIX]
    assert resolve_dimension_numbers(None, holes) == [MATRIX]
    assert resolve_dimension_numbers(rule, {}) == []


@pytest.mark.parametrize(
    "dims", [optax.contrib.MuonDimensionNumbers, optax.contrib.GaLoreDimensionNumbers]
)
def test_dimension_numbers_of_optax_are_accepted_alone_and_in_trees(dims: type) -> None:
    theirs = dims(reduction_axis=1, output_axis=0)
    assert resolve_dimension_numbers(theirs, PARAMS) == [None, theirs, theirs]
    assert resolve_dimension_numbers({"down": None, "up": theirs}, PARAMS)[2] == theirs


def test_a_rule_works_inside_masked_and_partition() -> None:
    params = jax.tree.map(lambda x: jnp.ones(x.shape), PARAMS)
    rule = {"down": {"bias": None, "kernel": FLIPPED}, "up": {"kernel": MATRIX}}
    only_up = {"down": False, "up": True}
    seen: list = []
    tx = optax.masked(probe(rule, seen), only_up)
    tx.update(params, tx.init(params))
    labels = {"down": {"bias": "rest", "kernel": "matrices"}, "up": {"kernel": "matrices"}}
    tx = optax.partition({"matrices": probe(rule, seen), "rest": optax.identity()}, labels)
    tx.update(params, tx.init(params))
    assert seen == [[MATRIX], [MATRIX], [FLIPPED, MATRIX], [FLIPPED, MATRIX]]


def test_a_rule_finds_an_nnx_model_with_and_without_variables() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
            self.query = nnx.Param(jnp.ones((2, 2)))
            self.value = nnx.Param(jnp.ones((2, 2)))

    model = Net(nnx.Rngs(0))
    layer = {"bias": None, "kernel": MATRIX}
    rule = {"layers": {0: layer, 1: {"bias": None, "kernel": FLIPPED}}}
    rule |= {"query": FLIPPED, "value": MATRIX}
    expected = [None, MATRIX, None, FLIPPED, FLIPPED, MATRIX]
    state = nnx.state(model, nnx.Param)
    for params in (state, nnx.as_pure(state), nnx.to_pure_dict(state)):
        assert resolve_dimension_numbers(rule, params) == expected
    assert default_rule(nnx.to_pure_dict(state))["value"] == MATRIX
    # A rule made from the state with its Variables serves trees without them.
    by_names = default_rule(state)
    assert resolve_dimension_numbers(by_names, nnx.as_pure(state)).count(MATRIX) == 4

    seen: list = []
    optimizer = nnx.Optimizer(model, probe(rule, seen), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param))
    assert seen == [expected] * 3


def test_a_leaf_the_rule_forgets_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="says nothing of the parameter 'up/kernel'"):
        resolve_dimension_numbers({"down": None}, PARAMS)


def test_a_spec_that_does_not_fit_its_leaf_is_an_error_that_names_it() -> None:
    rule = {"down": None, "up": WeightDimensionNumbers(0, 2)}
    with pytest.raises(ValueError, match=r"output_axis=\(2,\) at 'up/kernel'"):
        resolve_dimension_numbers(rule, PARAMS)


def test_a_model_or_its_parameters_in_the_place_of_a_rule_are_refused() -> None:
    nnx, linen = pytest.importorskip("flax.nnx"), pytest.importorskip("flax.linen")
    for model in (nnx.Linear(3, 4, rngs=nnx.Rngs(0)), linen.Dense(3)):
        with pytest.raises(TypeError, match=r"is a model, \w+: pass .*weight_dimension_numbers\("):
            resolve_dimension_numbers(model, PARAMS)
    with pytest.raises(TypeError, match="weight_dimension_numbers holds an array at 'down/bias'"):
        resolve_dimension_numbers(PARAMS, PARAMS)


@pytest.mark.parametrize("rule", [{"down": None, "up": "kernel"}, 3, [(0, 1)]])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(TypeError, match="weight_dimension_numbers holds"):
        resolve_dimension_numbers(rule, PARAMS)


NOT_MATRICES = """
norm/g norm/gain norm/offset norm/a_2 layers/norm/gain embed/tokens/weight embed/tok/weight
embeddings/token_type/weight token_embed/table/weight embedder/tokens/table
lm_head/decoder/kernel head/out/kernel head/hidden/kernel vocab_head/w_out/kernel
mlm_head/transform/kernel head/net/layers/2/kernel BlockTransformer_0/lm_head/kernel
linear_attention_lm/lm_head/kernel TransformerBlockStack_0/logits/kernel
attention_model/classifier/kernel layers/4/lm_head/kernel
embed/embedding pos_embedding token_embedder/embedding unembed/kernel wte transformer/wpe/table
embed/E shared/weight shared/embedding embeddings/word_embeddings/weight tok_embeddings/weight
norm/scale ln_1/weight rms/w RMSNorm_0/scale LayerNorm_0/weight blocks/norm1/weight
norm_mlp/weight model/layers/0/input_layernorm/weight embeddings/LayerNorm/weight dense/bias
rel_pos_bias layer_scale bn/gamma lora_a query/lora_b q_proj/lora_A/default/kernel
up/adapters/default/arrays/A lm_head/kernel head/kernel mlm_head/dense/kernel head_0/kernel
lm_head/Dense_0/kernel head/layers/1/kernel head/layers_0/kernel classifier/out_proj/kernel
classifier/kernel LMHead_0/Dense_0/kernel LMHead/kernel lmhead/kernel
ClassificationHead_0/Dense_0/kernel logits_dense/kernel to_logits/kernel unembed/proj/kernel
embed_out/linear/kernel output/kernel params/output/kernel output_layer/kernel model/output/weight
model/lm_head/weight
"""
MATRICES = """
h_0/CausalSelfAttentionHead_0/Dense_0/kernel timestep_embedder/mlp/0/weight norm_mlp/w1
multi_head_attention/query/kernel attention_head/kernel attention/output/kernel
attention/out/kernel out/kernel overhead/kernel mlp/up/kernel w ahead biased/kernel scaled/kernel
upscale/kernel alarms/kernel PreNorm_0/Dense_0/kernel patch_embed/proj/kernel
time_embedding/linear_1/kernel normalizer_proj/kernel embed_proj/weight
params/PreNorm_1/Attention_0/query/kernel embeddings/encoder/layers/0/up/kernel PreNorm_0/gate/w
moe_head/up/kernel PreNorm_0/mlp/wi/kernel PreNorm_0/mix/kernel patch_embed/stem/kernel
norm_projection/kernel heads/0/down_proj/weight experts/PreNorm_0/fc1/weight
MultiHeadAttention_0/Head_0/Dense_0/kernel blocks_0/sa/head_0/proj/kernel
head/blocks_0/attn/to_q/kernel text_classifier/encoder/mlp/w1/kernel pre_logits/kernel
PreNorm_0/to_qkv/weight PreNorm_0/w1/weight PreNorm_0/c_attn/weight prenorm_ffn/w1/weight
embedding_mlp/c_fc/weight time_embed/mlp/0/weight time_embed/0/weight layernorm_qkv/kernel
LayerNormDenseGeneral_0/kernel LayerNormMLP_0/wi_kernel patch_embedding/kernel embedding/kernel
embedding_hidden_mapping_in/kernel PreNorm_0/w1 transformer/h/0/attn/c_attn/kernel
encoder/block/0/layer/0/SelfAttention/q/kernel bert/encoder/layer/0/attention/output/dense/kernel
text_model/encoder/layers/0/self_attn/k_proj/kernel
"""


@pytest.mark.parametrize("path", NOT_MATRICES.split())
def test_embeddings_norms_biases_heads_and_adapters_are_no_matrices_by_name(path: str) -> None:
    assert named_kind(path) is not None
    names = path.split("/")
    assert resolve_dimension_numbers(None, tree(**{"__".join(names): (4, 3)})) == [None]


@pytest.mark.parametrize("path", MATRICES.split())
def test_other_names_do_not_hide_a_matrix(path: str) -> None:
    names = path.split("/")
    assert resolve_dimension_numbers(None, tree(**{"__".join(names): (4, 3)})) == [MATRIX]


def test_the_rule_asks_which_names_may_be_matrices() -> None:
    params = tree(embed__table=(9, 4), head__kernel=(4, 9))
    specs = default_rule(params, lambda path: path == "head/kernel")
    assert specs["head"]["kernel"] == MATRIX
    assert specs["embed"]["table"] is None


def attention(*stack: int, d: int = 8, kv_heads: int = 2) -> dict[str, Any]:
    return tree(
        query__kernel=(*stack, d, 4, 3),
        key__kernel=(*stack, d, kv_heads, 3),
        value__kernel=(*stack, d, kv_heads, 3),
        out__kernel=(*stack, 4, 3, d),
    )


@pytest.mark.parametrize("stack", [(), (5,)])
def test_attention_kernels_with_axes_of_heads_are_known_by_their_siblings(stack: tuple) -> None:
    params = {"attention": attention(*stack)}
    specs = default_rule(params)["attention"]
    assert [specs[name]["kernel"] for name in ("query", "key", "value", "out")] == [HEADS] * 3 + [
        OUT
    ]
    assert resolve_dimension_numbers(None, params) == [HEADS, OUT, HEADS, HEADS]


def test_attention_kernels_that_could_be_either_are_left_alone() -> None:
    alone = tree(query__kernel=(8, 4, 3))
    stacked = tree(query__kernel=(5, 8, 12), key__kernel=(5, 8, 12), out__kernel=(5, 12, 8))
    both = tree(query__kernel=(4, 4, 3), out__kernel=(4, 3, 4))
    for params in (alone, stacked, both):
        assert set(resolve_dimension_numbers(None, params)) == {None}


def test_stacked_layers_are_known_by_the_second_axis_of_their_norms() -> None:
    blocks = tree(
        attention__query__kernel=(5, 8, 12),
        attention__out__kernel=(5, 12, 8),
        mlp__weight=(5, 8, 6),
        mlp__shift=(5, 8),
        norm__scale=(5, 8),
        heads=(5, 8, 2, 3),
    )
    params = {"blocks": blocks, "project": tree(kernel=(8, 8)), "norm": tree(scale=(8,))}
    specs = default_rule(params)
    assert specs["blocks"]["attention"]["query"]["kernel"] == MATRIX
    assert specs["blocks"]["attention"]["out"]["kernel"] == MATRIX
    assert specs["blocks"]["mlp"] == {"weight": MATRIX, "shift": None}
    assert specs["blocks"]["heads"] is specs["blocks"]["norm"]["scale"] is None
    assert specs["project"]["kernel"] == MATRIX
    params["blocks"]["attention"] = attention(5)
    assert default_rule(params)["blocks"]["attention"]["out"]["kernel"] == OUT


def test_a_two_axis_norm_is_no_sign_of_a_stack_if_a_neighbour_disagrees() -> None:
    params = tree(norm__scale=(5, 8), mix__kernel=(5, 8, 6), other__kernel=(8, 5))
    assert default_rule(params)["mix"]["kernel"] is None
    assert default_rule(params)["other"]["kernel"] == MATRIX


def test_a_stacked_kernel_is_known_by_its_bias() -> None:
    stacked = tree(Dense_0__kernel=(5, 8, 6), Dense_0__bias=(5, 6))
    heads = tree(Dense_0__kernel=(8, 5, 6), Dense_0__bias=(5, 6))
    either = tree(Dense_0__kernel=(5, 5, 6), Dense_0__bias=(5, 6))
    kernel = lambda params: default_rule(params)["Dense_0"]["kernel"]
    assert [kernel(x) for x in (stacked, heads, either)] == [MATRIX, None, None]


@pytest.mark.parametrize(
    ("shape", "bias", "rows"),
    [
        ((3, 4, 5), (5,), (-3, -2)),
        ((3, 3, 4, 5), (5,), (-4, -3, -2)),
        ((2, 3, 3, 4, 5), (5,), (-5, -4, -3, -2)),
        ((7, 3, 4, 5), (7, 5), (-3, -2)),
    ],
)
@pytest.mark.parametrize("name", ["Conv_0", "ConvTranspose_0", "conv1", "down_conv"])
def test_convolutions_are_known_by_name(name: str, shape: tuple, bias: tuple, rows: tuple) -> None:
    params = tree(**{f"{name}__kernel": shape, f"{name}__bias": bias})
    assert default_rule(params)[name]["kernel"] == WeightDimensionNumbers(rows, -1)
    assert default_rule(tree(convert__kernel=(3, 3, 4, 5)))["convert"]["kernel"] is None


def test_a_leaf_of_three_axes_and_unknown_name_is_left_alone() -> None:
    params = tree(mixer__kernel=(3, 4, 5), experts=(2, 4, 5), scalar=(), empty=(0, 3))
    assert default_rule(params) == {
        "mixer": {"kernel": None}, "experts": None, "scalar": None, "empty": MATRIX
    }  # fmt: skip
