"""The table tells what is selected and what an optimizer keeps, byte by byte."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices import WeightDimensionNumbers, weight_dimension_numbers
from lowrank_optax.modules.selection_table import SelectionRow, selection_table

PARAMS = {
    "blocks": {
        "norm": {"scale": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)},
        "up": {"kernel": jax.ShapeDtypeStruct((4, 8, 24), jnp.bfloat16)},
    },
    "embed": jax.ShapeDtypeStruct((10, 8), jnp.float32),
    "step_size": jax.ShapeDtypeStruct((), jnp.float32),
}
BYTES = {"blocks/norm/scale": 64, "blocks/up/kernel": 1536, "embed": 320, "step_size": 4}


def state_bytes(transformation: optax.GradientTransformation, params: Any) -> int:
    state = jax.eval_shape(transformation.init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_rows_without_a_transformation_tell_views_and_the_parameters_own_bytes() -> None:
    table = selection_table(PARAMS)
    assert table.rows == [
        SelectionRow("blocks/norm/scale", (4, 8), "–", "–", None, 64),
        SelectionRow("blocks/up/kernel", (4, 8, 24), "4 × (8 × 24)", "matrix", None, 1536),
        SelectionRow("embed", (10, 8), "–", "–", None, 320),
        SelectionRow("step_size", (), "–", "–", None, 4),
    ]
    assert (table.other_bytes, table.total_bytes) == (0, sum(BYTES.values()))


def test_the_view_is_that_of_the_rule() -> None:
    rule = {"blocks": {"norm": None, "up": WeightDimensionNumbers((0, 2), 1)}, "embed": None}
    table = selection_table(PARAMS, rule | {"step_size": None})
    assert [row.view for row in table.rows] == ["–", "96 × 8", "–", "–"]
    with pytest.raises(ValueError, match="says nothing of the parameter 'embed'"):
        selection_table(PARAMS, {"blocks": None})


def test_adamw_keeps_two_moments_of_every_leaf_and_a_count() -> None:
    schedule = optax.linear_schedule(1e-3, 0.0, 10)
    table = selection_table(PARAMS, transformation=optax.adamw(schedule))
    assert {row.path: row.bytes for row in table.rows} == {k: 2 * v for k, v in BYTES.items()}
    assert {row.method for row in table.rows} == {"adam"}
    assert table.other_bytes == 2 * 4  # the counts of Adam and of the schedule
    assert table.total_bytes == state_bytes(optax.adamw(schedule), PARAMS)


def test_muon_and_the_adam_beside_it_are_told_apart() -> None:
    matrices = optax.contrib.MuonDimensionNumbers(1, 2)
    specs = {"blocks": {"norm": {"scale": None}, "up": {"kernel": matrices}}, "embed": None}
    specs["step_size"] = None
    tx = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=specs)
    table = selection_table(PARAMS, specs, tx)
    assert [row.method for row in table.rows] == ["adam", "muon", "adam", "adam"]
    assert table.rows[1].view == "4 × (8 × 24)"
    assert table.rows[1].bytes == BYTES["blocks/up/kernel"]  # one moment
    assert table.total_bytes == state_bytes(tx, PARAMS)


def test_galore_shows_its_rank_and_what_it_keeps() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), lro.galore(1e-3, rank=3))
    table = selection_table(PARAMS, transformation=tx)
    assert [row.rank for row in table.rows] == [None, 3, None, None]
    assert [row.method for row in table.rows] == ["adam", "projection + adam", "adam", "adam"]
    basis, moments, next_refresh = 4 * 8 * 3, 2 * 4 * 3 * 24, 4
    assert table.rows[1].bytes == 4 * (basis + moments + next_refresh)
    assert table.total_bytes == state_bytes(tx, PARAMS)


def test_galore_of_optax_shows_its_rank_too() -> None:
    params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 4))}
    table = selection_table(params, transformation=optax.contrib.galore(1e-3, rank=2))
    assert [(row.method, row.rank) for row in table.rows] == [("adam", None), ("galore + adam", 2)]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("adam", tx)),
        lambda tx: optax.masked(tx, {"blocks": True, "embed": False, "step_size": True}),
        lambda tx: optax.partition(
            {"a": tx, "b": optax.sgd(0.1)}, {"blocks": "a", "embed": "b", "step_size": "a"}
        ),
        lambda tx: optax.contrib.schedule_free(tx, 1e-3),
        lambda tx: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        lambda tx: optax.chain(optax.trace(0.9), tx),
    ],
)
def test_every_byte_of_a_wrapped_state_is_found(wrap: Any) -> None:
    tx = wrap(optax.adam(1e-3))
    table = selection_table(PARAMS, transformation=tx)
    moments = {row.path: row.bytes for row in table.rows if row.path.startswith("blocks")}
    assert all(bytes_ >= 2 * BYTES[path] for path, bytes_ in moments.items())
    assert table.other_bytes < 100
    assert table.total_bytes == state_bytes(tx, PARAMS)


def test_methods_are_named_from_the_outermost_in() -> None:
    tx = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2)
    rows = selection_table(PARAMS, transformation=tx).rows
    assert {row.method for row in rows} == {"multisteps + trace"}
    stateless = selection_table(PARAMS, transformation=optax.sgd(0.1))
    assert {(row.method, row.bytes) for row in stateless.rows} == {("–", 0)}


def test_a_parameter_whose_path_ends_in_anothers_keeps_its_own_bytes() -> None:
    params = {"kernel": jnp.zeros((2, 3)), "up": {"kernel": jnp.zeros((4, 5))}}
    table = selection_table(params, transformation=optax.adam(1e-3))
    assert [row.bytes for row in table.rows] == [2 * 24, 2 * 80]


def test_lists_bare_arrays_and_empty_trees_have_tables() -> None:
    adam = optax.scale_by_adam()
    table = selection_table([jnp.zeros(2), jnp.zeros(3)], None, adam)
    assert [row.bytes for row in table.rows] == [16, 24]
    assert selection_table(jnp.zeros((2, 3))).rows[0].view == "2 × 3"
    assert selection_table({}, None, adam).total_bytes == 4


def test_an_nnx_model_is_its_parameters() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.eval_shape(lambda: nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False))
    specs = weight_dimension_numbers(model)
    tx = lro.galore(1e-3, rank=3, weight_dimension_numbers=specs)
    table = selection_table(model, specs, tx)
    views = {row.path: row.view for row in table.rows if row.rank == 3}
    assert views == {f"{name}/kernel": "8 × 8" for name in ("key", "out", "query", "value")}
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert table.rows == selection_table(pure, specs, tx).rows


def test_a_parameter_called_value_keeps_its_name_with_variables_and_without() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Dict(attention=nnx.Dict(value=nnx.Param(jnp.zeros((2, 3)))))
    for params in (model, {"attention": {"value": jnp.zeros((2, 3))}}):
        assert [row.path for row in selection_table(params).rows] == ["attention/value"]


def test_a_bound_linen_model_is_its_parameters() -> None:
    nn = pytest.importorskip("flax.linen")
    bound = nn.Dense(3).bind({"params": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}})
    assert [row.path for row in selection_table(bound).rows] == ["bias", "kernel"]


def test_what_is_no_transformation_is_refused() -> None:
    with pytest.raises(TypeError, match="transformation='adam' must be an optax transformation"):
        selection_table(PARAMS, None, "adam")


def test_the_text_is_aligned_whole_and_the_same_on_any_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    params = {"a": {"kernel[0]": jnp.zeros((512, 1376))}, "b" * 150: jnp.zeros(3)}
    table = selection_table(params)
    *_, last = lines = str(table).splitlines()
    assert lines[0].split() == ["path", "shape", "view", "method", "rank", "bytes"]
    assert "a/kernel[0]" in lines[1] and lines[1].endswith("2,818,048")  # noqa: PT018
    assert "b" * 150 in lines[2]
    assert last.split() == ["total", "2,818,060"]
    assert len({len(line) for line in lines}) == 1
    assert repr(table) == str(table)


def test_a_narrow_rich_console_folds_and_loses_nothing() -> None:
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(file=io.StringIO(), width=40)
    console.print(selection_table({"attention": {"kernel": jnp.zeros((512, 1376))}}))
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 40


def test_ranks_are_found_in_the_state_of_every_kind_of_rule():
    params = {"kernel": jnp.zeros((16, 64))}
    for tx in (lro.adarankgrad(0.1, 4), lro.online_subspace_descent(0.1, 4), lro.dct_adamw(0.1, 4)):
        (row,) = lro.selection_table(params, transformation=tx).rows
        assert row.rank == 4
    (row,) = lro.selection_table(params, transformation=lro.apollo(0.1, 4)).rows
    assert row.rank is None  # nothing of a random basis is kept for a leaf
    assert row.bytes == 4 * (2 * 4 * 64 + 1)


def test_the_last_row_is_the_peak_of_an_update() -> None:
    params = {"up": jnp.zeros((64, 96)), "bias": jax.ShapeDtypeStruct((96,), jnp.bfloat16)}
    tx = optax.adamw(1e-3)
    shapes = jax.eval_shape(lambda x: x, params | {"bias": jnp.zeros(96, jnp.bfloat16)})
    state = jax.eval_shape(tx.init, shapes)
    update = jax.jit(lambda *args: tx.update(*args), donate_argnums=(0, 1))
    memory = update.lower(shapes, state, shapes).compile().memory_analysis()
    arrays = 4 * (4 * 64 * 96 + 2 * 96) + 4  # parameters, gradients, two moments and a count
    assert memory.argument_size_in_bytes == arrays
    peak = arrays + memory.temp_size_in_bytes + memory.output_size_in_bytes
    peak -= memory.alias_size_in_bytes
    table = selection_table(params, transformation=tx, compiled=True)
    assert table.compiled_peak_bytes == peak
    assert table.total_bytes == state_bytes(tx, shapes)
    assert str(table).splitlines()[-1].split() == ["compiled", "peak", f"{peak:,}"]
    without = selection_table(params, transformation=tx)
    assert without.compiled_peak_bytes is None
    assert str(without).splitlines()[-1].startswith("total")


def test_the_peak_counts_parameters_that_the_update_does_not_read() -> None:
    table = selection_table(PARAMS, transformation=optax.sgd(0.1), compiled=True)
    assert table.compiled_peak_bytes >= 2 * sum(BYTES.values())


def test_the_peak_counts_updates_that_are_larger_than_their_gradients() -> None:
    params = {"up": jax.ShapeDtypeStruct((64, 96), jnp.bfloat16)}
    peaks = [
        selection_table(params, transformation=tx, compiled=True).compiled_peak_bytes
        for tx in (optax.sgd(0.1), lro.in_float32(optax.sgd(0.1)))
    ]
    assert peaks[1] >= peaks[0] + 2 * 64 * 96


@pytest.mark.slow
def test_what_low_bit_saves_of_large_leaves_comes_off_the_peak() -> None:
    params = {
        name: jax.ShapeDtypeStruct((12, 512, 512), jnp.float32)
        for name in ("query", "key", "up", "down", "gate", "out")
    }
    tables = [
        selection_table(params, transformation=tx, compiled=True)
        for tx in (optax.adamw(1e-3), lro.low_bit(optax.adamw(1e-3)))
    ]
    saved = tables[0].total_bytes - tables[1].total_bytes
    lower = tables[0].compiled_peak_bytes - tables[1].compiled_peak_bytes
    slice_bytes = 24 * 2**20  # temporaries of a slice, a leaf here takes 12 MiB
    assert saved > 100 * 2**20
    assert saved - slice_bytes < lower <= saved


def test_a_peak_without_a_transformation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compiled=True .* transformation is None"):
        selection_table(PARAMS, compiled=True)


def test_an_nnx_model_has_a_peak() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    tx = optax.adamw(1e-3)
    table = selection_table(model, transformation=tx, compiled=True)
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert table.compiled_peak_bytes is not None
    same = selection_table(pure, transformation=tx, compiled=True)
    assert table.compiled_peak_bytes == same.compiled_peak_bytes
