"""What is saved for the backward pass is counted exactly, and named as the program names it."""

import contextlib
import functools
import io
from typing import Any

from flax import linen, nnx
import jax
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
import jax.numpy as jnp
import pytest

from lowrank_optax.activations.coded_backward import CODES, apply_few_bit
from lowrank_optax.activations.step_function import Codebook
from lowrank_optax.planning import (
    SavedResidualsReport,
    compare_saved_residuals,
    saved_residuals,
)

TOKENS, WIDTH, HIDDEN, LAYERS = 24, 8, 32, 3


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


X = shape(TOKENS, WIDTH)
PARAMS = {"up": shape(WIDTH, HIDDEN), "down": shape(HIDDEN, WIDTH)}
STACK = {"up": shape(LAYERS, WIDTH, HIDDEN), "down": shape(LAYERS, HIDDEN, WIDTH)}


# From 0.12 on, JAX writes the derivative of tanh with a primitive of its own.
OF_A_SQUARE = any(
    equation.primitive.name == "one_minus_square"
    for equation in jax.make_jaxpr(jax.grad(jnp.tanh))(1.0).eqns
)


def codebook(bits: int) -> Codebook:
    """Of as many codes as its bits have, whatever they stand for."""
    size = 2**bits
    levels = tuple(i / (size - 1) for i in range(size))
    return Codebook(tuple(map(float, range(1, size))), tuple(range(size)), levels, bits)


def mlp(params: Any, x: jax.Array, fn: Any = jnp.tanh) -> jax.Array:
    return jnp.sum(fn(x @ params["up"]) @ params["down"])


def scanned(params: Any, x: jax.Array, fn: Any = jnp.tanh, remat: Any = None) -> jax.Array:
    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return x + fn(x @ layer["up"]) @ layer["down"], None

    if remat is not None:
        body = jax.checkpoint(body, prevent_cse=False, policy=remat)
    return jnp.sum(jax.lax.scan(body, x, params)[0])


def counted(loss: Any, *args: Any, **options: Any) -> SavedResidualsReport:
    return saved_residuals(loss, *args, compiled=False, **options)


def listed(report: SavedResidualsReport) -> list[tuple[str, tuple[int, ...], str, int]]:
    return sorted((row.name, row.shape, row.dtype, row.bytes) for row in report.arrays)


def test_the_arrays_of_an_mlp_are_those_that_its_derivative_needs() -> None:
    """The derivative of tanh, as JAX writes it, is 1 - tanh², or 1 - tanh times 1 + tanh."""
    report = counted(mlp, PARAMS, X)
    bytes_ = 4 * TOKENS * HIDDEN
    size = (TOKENS, HIDDEN)
    assert listed(report) == [
        ("one_minus_square in mlp" if OF_A_SQUARE else "sub in mlp", size, "float32", bytes_),
        ("tanh in mlp", size, "float32", bytes_),
    ]
    assert sorted(row.name for row in report.inputs) == ["params/down", "x"]
    assert report.total_bytes == 2 * bytes_
    assert all("test_saved_residuals.py" in row.source for row in report.arrays)


def test_of_relu_backward_keeps_a_byte_of_each_element_and_its_output() -> None:
    report = counted(functools.partial(mlp, fn=jax.nn.relu), PARAMS, X)
    kept = {row.dtype: row.bytes for row in report.arrays}
    assert kept == {"float32": 4 * TOKENS * HIDDEN, "bool": TOKENS * HIDDEN}
    assert sorted(row.name for row in report.arrays) == ["gt in mlp", "relu/max in mlp"]
    # That derivative is 0 elsewhere, which is a constant.
    assert "constant" in [row.name for row in report.inputs]


def test_gelu_keeps_arrays_of_the_hidden_size_and_a_product_its_input() -> None:
    in_bfloat16 = lambda x: shape(*x.shape, dtype=jnp.bfloat16)
    params, x = jax.tree.map(in_bfloat16, (PARAMS, X))
    loss = functools.partial(mlp, fn=jax.nn.gelu)
    frozen = lambda up, down, x: loss({"up": up, "down": down}, x)
    of_gelu, size = 4 if OF_A_SQUARE else 5, 2 * TOKENS * HIDDEN
    assert counted(frozen, params["up"], params["down"], x).total_bytes == of_gelu * size
    assert counted(loss, params, x).total_bytes == (of_gelu + 1) * size


def test_a_frozen_product_keeps_nothing_of_its_input() -> None:
    frozen = lambda up, down, x: mlp({"up": up, "down": down}, x, jnp.sin)
    report = counted(frozen, PARAMS["up"], PARAMS["down"], X)
    assert [row.name for row in report.arrays] == ["cos in mlp"]
    both = counted(frozen, PARAMS["up"], PARAMS["down"], X, argnums=(0, -2))
    assert sorted(row.name for row in both.arrays) == ["cos in mlp", "sin in mlp"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_of_few_bits_the_codes_alone_are_kept(bits: int) -> None:
    fn = functools.partial(apply_few_bit, jax.nn.gelu, codebook(bits), "auto")
    frozen = lambda up, down, x: mlp({"up": up, "down": down}, x, fn)
    report = counted(frozen, PARAMS["up"], PARAMS["down"], X)
    assert {row.name for row in report.arrays} == {CODES}
    assert report.total_bytes == TOKENS * HIDDEN * bits // 8
    trained = counted(functools.partial(mlp, fn=fn), PARAMS, X)
    rest = trained.total_bytes - trained.bytes_by_name()[CODES]
    assert rest == 4 * TOKENS * HIDDEN  # the input of the trained product


def test_names_are_found_in_the_body_of_a_scan() -> None:
    fn = functools.partial(apply_few_bit, jax.nn.gelu, codebook(4), "uint4")
    report = counted(functools.partial(scanned, fn=fn), STACK, X)
    codes = [row for row in report.arrays if row.name == CODES]
    assert [(row.shape, row.dtype) for row in codes] == [((LAYERS, TOKENS, HIDDEN), "uint4")]
    names = report.bytes_by_name()
    assert names[CODES] == LAYERS * TOKENS * HIDDEN // 2
    # The layers' inputs, one after the other, and those of the second products.
    assert names["scan carry in scanned"] == 4 * LAYERS * TOKENS * WIDTH
    assert report.total_bytes == sum(names.values())
    assert len(names) == 3
    assert [row.name for row in report.inputs] == ["params/down", "params/up"]


def test_remat_keeps_the_inputs_and_what_its_policy_says() -> None:
    policies = jax.checkpoint_policies
    named = lambda x: jnp.tanh(checkpoint_name(x, "hidden"))
    loss = functools.partial(scanned, fn=named)
    carry, hidden = 4 * LAYERS * TOKENS * WIDTH, 4 * LAYERS * TOKENS * HIDDEN
    full = counted(functools.partial(loss, remat=policies.nothing_saveable), STACK, X)
    assert full.bytes_by_name() == {"scan carry in scanned": carry}
    by_name = counted(
        functools.partial(loss, remat=policies.save_only_these_names("hidden")), STACK, X
    )
    assert by_name.bytes_by_name() == {"hidden": hidden, "scan carry in scanned": carry}
    # Of the two products in a layer backward needs the first.
    dots = counted(functools.partial(loss, remat=policies.dots_saveable), STACK, X)
    assert dots.total_bytes == carry + hidden


def test_codes_survive_remat_where_the_policy_names_them() -> None:
    fn = functools.partial(apply_few_bit, jax.nn.gelu, codebook(4), "auto")
    policy = jax.checkpoint_policies.save_only_these_names(CODES)
    report = counted(functools.partial(scanned, fn=fn, remat=policy), STACK, X)
    assert report.bytes_by_name()[CODES] == LAYERS * TOKENS * HIDDEN // 2


@pytest.mark.parametrize("loss", [mlp, scanned, jax.jit(mlp), jax.checkpoint(mlp)])
def test_it_is_what_jax_keeps(loss: Any) -> None:
    params = STACK if loss is scanned else PARAMS
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), (params, X))
    report = counted(loss, params, X)
    leaves = jax.tree.leaves(jax.vjp(lambda p: loss(p, ones[1]), ones[0])[1])
    rows = report.arrays + report.inputs
    assert sorted(row.shape for row in rows) == sorted(leaf.shape for leaf in leaves)
    assert sum(row.bytes for row in rows) == sum(leaf.nbytes for leaf in leaves)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        print_saved_residuals(lambda p: loss(p, ones[1]), ones[0])
    lines = shown.getvalue().splitlines()
    made = [line for line in lines if "argument" not in line and "constant" not in line]
    assert len(made) == len(report.arrays)


def test_an_auxiliary_result_changes_nothing() -> None:
    with_aux = lambda params, x: (mlp(params, x), {"x": x, "n": 3})
    report = saved_residuals(with_aux, PARAMS, X, has_aux=True)
    assert listed(report) == listed(counted(mlp, PARAMS, X))
    assert report.temporary_bytes is not None


def test_four_bits_count_as_half_a_byte_and_keys_as_their_words() -> None:
    @jax.custom_vjp
    def keep(x: jax.Array) -> jax.Array:
        return x

    def forward(x: jax.Array) -> tuple[jax.Array, Any]:
        return x, (x.astype(jnp.int4), x[:5].astype(jnp.uint4), jax.random.key(x[0].astype(int)))

    keep.defvjp(forward, lambda _, g: (g,))
    report = counted(lambda x: jnp.sum(keep(x)), shape(100))
    assert {row.dtype: row.bytes for row in report.arrays} == {
        "int4": 50,
        "uint4": 3,
        "key<fry>": 8,
    }


def test_a_copy_in_another_dtype_is_counted_and_a_reshaped_input_is_not() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x.reshape(-1, 4) @ w.astype(jnp.float32)))

    report = counted(loss, shape(4, 4, dtype=jnp.bfloat16), X, argnums=(0, 1))
    assert "w as float32" in report.bytes_by_name()
    assert [row.name for row in report.inputs] == ["x"]


def test_arrays_that_the_loss_is_closed_over_are_inputs() -> None:
    weight = jnp.ones((WIDTH, WIDTH))
    report = counted(lambda x: jnp.sum(x @ weight), X)
    assert report.arrays == ()
    assert [row.name for row in report.inputs] == ["constant"]


def test_a_name_is_found_in_a_branch() -> None:

    def named(x: jax.Array) -> jax.Array:
        y = checkpoint_name(x + 1, "chosen")
        return jnp.sum(y * y)

    loss = lambda x, flag: jax.lax.cond(flag, jnp.sum, named, x)
    report = counted(loss, X, shape(dtype=jnp.bool_))
    assert "chosen" in report.bytes_by_name()


def test_linen_modules_are_named() -> None:
    model = linen.Sequential([linen.Dense(HIDDEN), jnp.tanh, linen.Dense(1)])
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    report = counted(lambda v, x: jnp.sum(jnp.asarray(model.apply(v, x))), variables, X)
    assert any("layers_" in row.source or "Sequential" in row.source for row in report.arrays)
    assert "v/params/layers_2/kernel" in [row.name for row in report.inputs]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(jnp.sin(self.up(x))))


def net_loss(model: Net, x: jax.Array) -> jax.Array:
    return jnp.sum(model(x))


def test_an_nnx_model_is_split_as_its_gradient_would() -> None:
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    report = counted(net_loss, abstract, X)
    # The derivative of the sine, the mask of dropout, and the second product's input.
    assert sorted(row.bytes for row in report.arrays) == [
        TOKENS * HIDDEN,
        4 * TOKENS * HIDDEN,
        4 * TOKENS * HIDDEN,
    ]
    assert {row.name for row in report.inputs} == {"constant", "model/down/kernel", "x"}
    concrete = Net(nnx.Rngs(0))
    before = nnx.state(concrete)
    assert listed(counted(net_loss, concrete, X)) == listed(report)
    same = lambda a, b: a is b
    assert jax.tree.all(jax.tree.map(same, before, nnx.state(concrete)))


def test_what_of_an_nnx_model_is_trained_can_be_chosen() -> None:
    class Trained(nnx.Param):
        pass

    def make() -> Net:
        net = Net(nnx.Rngs(0))
        net.dropout.rate = 0.0
        net.up.kernel = Trained(net.up.kernel[...])
        return net

    report = counted(net_loss, nnx.eval_shape(make), X, wrt=Trained)
    assert [row.name.split()[0] for row in report.arrays] == ["cos"]


def test_a_model_that_is_not_differentiated_is_only_read() -> None:
    teacher = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    loss = lambda scale, teacher, x: jnp.sum(scale * teacher(x))
    report = counted(loss, shape(), teacher, X)
    assert [row.shape for row in report.arrays] == [(TOKENS, WIDTH)]


def test_nothing_is_computed() -> None:
    large = shape(1 << 20, 1 << 22)
    report = counted(lambda x: jnp.sum(jnp.sin(x)), large)
    assert report.total_bytes == 1 << 44


def test_temporaries_are_the_compilers_on_any_device() -> None:
    report = saved_residuals(mlp, PARAMS, X)
    step = jax.jit(jax.value_and_grad(mlp)).lower(PARAMS, X).compile()
    analysis: Any = step.memory_analysis()
    assert report.temporary_bytes == analysis.temp_size_in_bytes
    there = saved_residuals(mlp, PARAMS, X, device=jax.devices("cpu")[0])
    assert there.temporary_bytes == report.temporary_bytes
    assert counted(mlp, PARAMS, X).temporary_bytes is None


def test_alike_arrays_are_one_row_of_the_table_with_their_count() -> None:
    def loss(x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.sin(x)
        return jnp.sum(x)

    report = counted(loss, X)
    (row,) = report.rows
    assert (row.name, row.count, row.bytes) == ("cos in loss", 3, 3 * 4 * TOKENS * WIDTH)
    lines = str(report).splitlines()
    assert lines[0].split() == ["saved", "source", "shape", "dtype", "count", "bytes"]
    assert lines[-1].split() == ["total", "3", "2,304"]


def test_rows_are_sorted_by_bytes() -> None:
    report = counted(lambda p, x: mlp(p, jnp.sin(x)), PARAMS, X, argnums=(0, 1))
    sizes = [row.bytes for row in report.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_models_and_losses_stand_side_by_side() -> None:
    fn = functools.partial(apply_few_bit, jnp.sin, codebook(4), "auto")
    losses = {"plain": functools.partial(mlp, fn=jnp.sin), "4 bits": functools.partial(mlp, fn=fn)}
    table = compare_saved_residuals(losses, PARAMS, X)
    assert {k: r.total_bytes for k, r in table.reports.items()} == {
        "plain": 8 * TOKENS * HIDDEN,
        "4 bits": 9 * TOKENS * HIDDEN // 2,
    }
    lines = [line.split() for line in str(table).splitlines()]
    assert lines[0] == ["saved", "plain", "4", "bits"]
    assert [CODES, "–", f"{TOKENS * HIDDEN // 2}"] in lines
    assert lines[-1][:2] == ["compiled", "temporaries"]
    models = {"one": PARAMS, "wider": {"up": shape(WIDTH, 64), "down": shape(64, WIDTH)}}
    wide = compare_saved_residuals(models, X, loss=mlp, compiled=False).reports
    assert wide["wider"].total_bytes == 2 * wide["one"].total_bytes


def test_bad_arguments_are_refused() -> None:
    no_function: Any = 3
    with pytest.raises(TypeError, match="loss=3 must be a function"):
        saved_residuals(no_function, X)
    with pytest.raises(ValueError, match=r"must return a scalar.*\(24, 8\)"):
        saved_residuals(jnp.sin, X)
    with pytest.raises(ValueError, match="argnums=2 must be positions of the 2 arguments"):
        saved_residuals(mlp, PARAMS, X, argnums=2)
    with pytest.raises(ValueError, match="variants"):
        compare_saved_residuals({}, X)
