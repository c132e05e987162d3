"""Policies from tables: what they save is counted by name, and names that are not there refused."""

import dataclasses
import math
from typing import Any

from close import assert_close
from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.activations import policy, swiglu
from lowrank_optax.models import Decoder
from lowrank_optax.models.remat import INTERMEDIATES
from lowrank_optax.planning import saved_residuals
from tests.models.decoders import CONFIG, TOKENS, like, random_decoder

LAYERS, ROWS, WIDTH = 3, 16, 8
SHAPE = (LAYERS, ROWS, WIDTH)
WEIGHTS = np.random.default_rng(0).normal(size=(3, LAYERS, WIDTH, WIDTH)).astype(np.float32) / 3
X = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)


def loss(weights: Any, x: Any, table: Any = None, bits: int | None = None) -> jax.Array:
    """A stack of gated layers, run by a scan; under ``jax.checkpoint`` if there is a table."""

    def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
        gate = checkpoint_name(x @ given[0], "gate")
        up = checkpoint_name(x @ given[1], "up")
        y = jax.nn.silu(gate) * up if bits is None else swiglu(gate, up, bits, ("gate", "up"))
        hidden = checkpoint_name(y, "hidden")
        return x + checkpoint_name(hidden @ given[2], "output"), None

    if table is not None:
        layer = jax.checkpoint(layer, policy=policy(table), prevent_cse=False)
    return jnp.sum(jnp.square(jax.lax.scan(layer, x, tuple(weights))[0]))


def saved(table: Any, bits: int | None = None) -> Any:
    return saved_residuals(lambda w: loss(w, X, table, bits), WEIGHTS, compiled=False)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({}, "table={} must name an intermediate"),
        ({"gate": "keep"}, r"table\['gate'\]='keep' must be 'save', 'recompute', 'offload', or a"),
        ({"gate": 0}, r"table\['gate'\]=0 must be"),
        ({"gate": 9}, r"table\['gate'\]=9 must be"),
        ({"gate": True}, r"table\['gate'\]=True must be"),
        ({"gate": None}, r"table\['gate'\]=None must be"),
        ([("gate", "save")], "must be a mapping"),
        ({1: "save"}, "must be a mapping from names"),
    ],
)
def test_wrong_tables_are_refused(table: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        policy(table)


def test_equal_tables_are_equal_policies_so_that_compiled_programs_are_found_again() -> None:
    table = {"gate": "save", "up": 4}
    turned = {"up": 4, "gate": "save"}
    assert policy(table) == policy(turned)
    assert hash(policy(table)) == hash(policy(turned))
    assert policy(table).table == table
    assert policy({"gate": "save"}) != policy({"gate": "offload"})


def test_check_counts_what_each_name_found_through_scans_and_remat() -> None:
    table = {"gate": "save", "hidden": "recompute"}
    assert policy(table).check(loss, WEIGHTS, X) == {"gate": LAYERS, "hidden": LAYERS}
    with_remat = lambda w, x: loss(w, x, {"up": "offload"})
    assert policy(table).check(with_remat, WEIGHTS, X) == {"gate": LAYERS, "hidden": LAYERS}
    shapes = jax.ShapeDtypeStruct(WEIGHTS.shape, jnp.float32), X
    assert policy({"up": "save"}).check(loss, *shapes) == {"up": LAYERS}


def test_check_takes_integers_and_keys_among_the_arguments() -> None:
    def drawn(x: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
        return checkpoint_name(x[index] * jax.random.normal(key, (WIDTH,)), "row")

    assert policy({"row": "save"}).check(drawn, X, jnp.int32(2), jax.random.key(0)) == {"row": 1}


def test_a_name_that_is_never_attached_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="never attaches 'gates'; it attaches 'gate', 'hidden'"):
        policy({"up": "save", "gates": "offload"}).check(loss, WEIGHTS, X)
    with pytest.raises(ValueError, match="it attaches no name"):
        policy({"up": "save"}).check(jnp.sin, X)


def test_bits_need_codes_of_that_many_bits() -> None:
    table = policy({"gate": 4, "up": 4})
    with pytest.raises(ValueError, match="never attaches codes of 4 bits named 'gate'"):
        table.check(loss, WEIGHTS, X)
    in_bits = lambda bits: lambda w, x: loss(w, x, bits=bits)
    with pytest.raises(ValueError, match=r"codes of 4 bits named 'gate'; .*'gate_3_bits'"):
        table.check(in_bits(3), WEIGHTS, X)
    # Codes and scales.
    assert table.check(in_bits(4), WEIGHTS, X) == {"gate": 2 * LAYERS, "up": 2 * LAYERS}
    with pytest.raises(ValueError, match="names='ab' must be two names"):
        swiglu(X, X, 4, "ab")


ARRAY = 4 * math.prod(SHAPE)


@pytest.mark.parametrize(
    ("table", "arrays", "offloaded"),
    [
        ({"hidden": "recompute"}, {}, {}),
        ({"gate": "save"}, {"gate": ARRAY}, {}),
        ({"gate": "save", "up": "recompute"}, {"gate": ARRAY}, {}),
        ({"gate": "save", "up": "offload"}, {"gate": ARRAY}, {"up": ARRAY}),
        # Nothing in the backward pass reads it: the next layer's input is saved by the scan.
        ({"hidden": "save", "output": "save"}, {"hidden": ARRAY}, {}),
    ],
)
def test_saved_residuals_are_those_of_the_table(table: Any, arrays: Any, offloaded: Any) -> None:
    report = saved(table)
    named = {name: size for name, size in report.bytes_by_name().items() if " in " not in name}
    assert named == arrays
    assert report.bytes_by_name()["scan carry in loss"] == ARRAY
    assert {row.name: row.bytes for row in report.offloaded} == offloaded
    assert ("on the host" in str(report)) == bool(offloaded)


def test_codes_are_saved_in_their_bits_and_a_scale_for_each_block() -> None:
    report = saved({"gate": 4, "up": 4, "hidden": "save"}, bits=4)
    one = ARRAY // 8 + 2 * LAYERS * math.ceil(ROWS * WIDTH / 64)
    named = report.bytes_by_name()
    assert named["gate_4_bits"] == named["up_4_bits"] == one
    assert not {"gate", "up"} & set(named)


@pytest.mark.parametrize(
    ("table", "bits", "computed_again"),
    [
        (None, None, 0),
        ({"hidden": "recompute"}, None, 2),
        ({"gate": "save", "up": "save"}, None, 0),
        ({"gate": "save", "up": "offload"}, None, 0),
        ({"gate": "save"}, None, 1),
        ({"hidden": "save"}, None, 2),
        ({"gate": 4, "up": 4, "hidden": "save"}, 4, 0),
        # The gradient of the third product needs the hidden array, and that gate and up.
        ({"gate": 4, "up": 4, "hidden": "recompute"}, 4, 2),
    ],
)
def test_the_backward_pass_computes_only_those_products_again_that_it_needs(
    table: Any, bits: int | None, computed_again: int
) -> None:
    program = jax.make_jaxpr(jax.grad(lambda w: loss(w, X, table, bits)))(WEIGHTS)
    assert str(program).count("dot_general[") == 9 + computed_again


def test_exact_strategies_have_equal_gradients_and_codes_those_of_swiglu() -> None:
    tables = [None, {"gate": "save", "up": "offload"}]
    codes = [None, {"gate": 4, "up": 4, "hidden": "save"}]

    @jax.jit
    def gradients(weights: jax.Array) -> Any:
        of = lambda table, bits=None: jax.grad(loss)(weights, X, table, bits)
        return [of(table) for table in tables], [of(table, 4) for table in codes]

    exact, coded = gradients(WEIGHTS)
    assert_close(exact[1], exact[0], 200)
    assert_close(coded[1], coded[0], 200)
    difference = np.linalg.norm(coded[0] - exact[0]) / np.linalg.norm(exact[0])
    assert 1e-4 < difference < 0.2


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_decoder()


def decoder_loss(model: Decoder) -> jax.Array:
    return jnp.mean(jnp.square(model(TOKENS)))


def bytes_of_names() -> dict[str, int]:
    """By count: rows times width, in every layer."""
    query = CONFIG.num_attention_heads * CONFIG.head_dim
    key = CONFIG.num_key_value_heads * CONFIG.head_dim
    mlp = CONFIG.intermediate_size
    widths = (query, key, key, query, CONFIG.hidden_size, mlp, mlp, mlp)
    sizes = [4 * CONFIG.num_hidden_layers * TOKENS.size * width for width in widths]
    return dict(zip(INTERMEDIATES, sizes, strict=True))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_decoder_saves_what_the_table_names(model: Decoder, scan_layers: bool) -> None:
    other = like(model, scan_layers, remat=dict.fromkeys(INTERMEDIATES, "save"))
    found = policy(dict.fromkeys(INTERMEDIATES, "save")).check(decoder_loss, other)
    assert found == dict.fromkeys(INTERMEDIATES, CONFIG.num_hidden_layers)
    named = saved_residuals(decoder_loss, other, compiled=False).bytes_by_name()
    assert {name: named[name] for name in INTERMEDIATES} == bytes_of_names()


def test_a_decoder_keeps_offloads_and_codes(model: Decoder) -> None:
    table = {"mlp_gate": 4, "mlp_up": 4, "mlp_hidden": "offload", "attention_output": "save"}
    report = saved_residuals(decoder_loss, like(model, remat=table), compiled=False)
    sizes, named = bytes_of_names(), report.bytes_by_name()
    names = set(named) & {*INTERMEDIATES, "mlp_gate_4_bits", "mlp_up_4_bits"}
    assert names == {"attention_output", "mlp_gate_4_bits", "mlp_up_4_bits"}
    scales = 2 * CONFIG.num_hidden_layers * math.ceil(TOKENS.size * CONFIG.intermediate_size / 64)
    assert named["mlp_gate_4_bits"] == sizes["mlp_gate"] // 8 + scales
    assert [(x.name, x.bytes) for x in report.offloaded] == [("mlp_hidden", sizes["mlp_hidden"])]


@pytest.mark.full
def test_no_exact_table_changes_a_decoders_gradients(model: Decoder) -> None:
    table = dict.fromkeys(INTERMEDIATES, "save") | {"mlp_up": "offload", "mlp_gate": "recompute"}

    def gradient(model: Decoder) -> Any:
        graphdef, state = nnx.split(model)
        found = jax.jit(jax.grad(lambda s: decoder_loss(nnx.merge(graphdef, s))))(state)
        return nnx.to_pure_dict(found)

    assert_close(gradient(like(model, remat=table)), gradient(model), 200)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"remat": {"mlp_gates": "save"}}, "remat names 'mlp_gates', .*mlp_gate, mlp_up"),
        ({"remat": {"mlp_gate": "none"}}, "'none' must be 'save'"),
        ({"remat": {"mlp_gate": 4, "mlp_hidden": "save"}}, "mlp_gate and mlp_up alone, both"),
        ({"remat": {"mlp_gate": 4, "mlp_up": 3, "mlp_hidden": "save"}}, "both in the same number"),
        ({"remat": {"attention_key": 4}}, "mlp_gate and mlp_up alone"),
        ({"remat": {"mlp_gate": 4, "mlp_up": 4}}, "must say what becomes of mlp_hidden"),
        ({"remat": {"mlp_gate": "save"}, "activation_bits": 4}, "activation_bits=4 and a table"),
        ({"remat": lro.activations.policy({"other": "save"})}, "remat names 'other'"),
    ],
)
def test_a_decoder_refuses_tables_that_are_not_its_own(options: Any, error: str) -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    with pytest.raises(ValueError, match=error):
        Decoder(config, rngs=nnx.Rngs(0), **options)
