"""`state_shardings`: each array of a state where its parameter's sharding puts it."""

from collections.abc import Callable
from pathlib import Path
import re
from typing import Any

from flax import nnx
from harness.trees import Tree, assert_close, normal_like
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax
from orbax.checkpoint import v1 as ocp
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices.paths import path_string
from lowrank_optax.models import Decoder, DecoderConfig
from lowrank_optax.sharding import state_shardings

AXES = lro.WeightDimensionNumbers
# Shape, partition, and which axes are the matrix.
LEAVES = {
    "wide": ((8, 16), P("x", "y"), AXES(0, 1)),
    "tall": ((16, 8), P("x", "y"), AXES(0, 1)),
    "layers": ((2, 8, 16), P("y", "x", None), AXES(-2, -1)),
    "heads": ((8, 4, 4), P(None, "x", None), AXES(0, (1, 2))),
    "bias": ((8,), P("x"), None),
}
PARAMS = {name: jax.ShapeDtypeStruct(leaf[0], jnp.float32) for name, leaf in LEAVES.items()}
NUMBERS = {name: leaf[2] for name, leaf in LEAVES.items()}

MOMENTS = {
    "wide": P(None, "y"),
    "tall": P("x", None),
    "layers": P("y", None, None),
    "heads": P(None, "x"),
    "bias": P("x"),
}
BASIS = {"wide": P(), "tall": P(), "layers": P("y"), "heads": P()}
MATRIX = {"wide": P("x", "y"), "tall": P("x", "y"), "layers": P("y", "x"), "heads": P(None, "x")}
ROWS = {"wide": P("x"), "tall": P("x"), "layers": P("y", "x"), "heads": P()}
EACH = BASIS  # one number, or a few, for each matrix
COUNTS = {**EACH, "bias": P()}
EXPECTED = {
    "galore": {
        "count": P(),
        "basis": BASIS,
        "next_refresh": EACH,
        "inner/count": P(),
        "inner/mu": MOMENTS,
        "inner/nu": MOMENTS,
    },
    "fira": {"residual": EACH, "inner/mu": MOMENTS},
    "apollo": {"basis": P(), "next_refresh": P(), "residual": EACH, "inner/mu": MOMENTS},
    "online_subspace_descent": {
        "basis/basis": BASIS,
        "basis/optimizer/0/mu": BASIS,
        "inner/mu": MOMENTS,
    },
    "dct_adamw": {
        "basis": EACH,
        "residual/codes": MATRIX,
        "residual/low": ROWS,
        "residual/step": ROWS,
        "inner/count": COUNTS,
        "inner/nu": MOMENTS,
    },
    "adarankgrad": {
        "basis/basis": BASIS,
        "basis/rank": EACH,
        "statistics/captured": EACH,
        "inner/mu": MOMENTS,
    },
    "ldadam": {"basis": BASIS, "residual": MATRIX, "inner/mu": MOMENTS, "inner/nu": MOMENTS},
}


def make(name: str) -> optax.GradientTransformation:
    options = {"error_feedback": 8} if name == "dct_adamw" else {}
    recipe: Callable[..., optax.GradientTransformation] = getattr(lro, name)
    return recipe(1e-2, rank=2, weight_dimension_numbers=NUMBERS, **options)


def make_mesh(axis_type: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def shardings_on(mesh: Mesh) -> Tree:
    return {name: NamedSharding(mesh, leaf[1]) for name, leaf in LEAVES.items()}


def by_path(shardings: Tree) -> dict[str, NamedSharding]:
    return {path_string(path): x for path, x in jax.tree.leaves_with_path(shardings)}


def assert_like(actual: Tree, expected: Tree, state: Tree) -> None:
    """Every array lies as expected, whether or not its partition names axes that are not cut."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected) == jax.tree.structure(state)
    leaves = map(jax.tree.leaves, (actual, expected, state))
    for x, y, array in zip(*leaves, strict=True):
        assert x.is_equivalent_to(y, array.ndim)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_array_lies_where_its_parameter_puts_it(name: str, axis_type: AxisType) -> None:
    mesh, tx = make_mesh(axis_type), make(name)
    found = by_path(state_shardings(tx, PARAMS, shardings_on(mesh))[0])
    arrays = by_path(jax.eval_shape(tx.init, PARAMS)[0])
    for field, expected in EXPECTED[name].items():
        leaves = {"": expected} if isinstance(expected, P) else expected
        for leaf, partition in leaves.items():
            path = "/".join(filter(None, (field, leaf)))
            assert found[path].mesh == mesh
            wanted = NamedSharding(mesh, partition)
            assert found[path].is_equivalent_to(wanted, arrays[path].ndim), (path, found[path])


@pytest.mark.parametrize("name", EXPECTED)
def test_shardings_are_those_of_init_on_explicit_axes(name: str) -> None:
    mesh, tx = make_mesh(AxisType.Explicit), make(name)
    where = shardings_on(mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(jax.device_put(normal_like(PARAMS, 1), where))
    assert_like(
        jax.tree.map(lambda x: x.sharding, state), state_shardings(tx, PARAMS, where), state
    )


def test_arrays_and_their_shapes_give_the_same() -> None:
    mesh, tx = make_mesh(), make("galore")
    arrays = jax.device_put(normal_like(PARAMS, 1), shardings_on(mesh))
    where = jax.tree.map(lambda x: x.sharding, arrays)
    assert state_shardings(tx, arrays, where) == state_shardings(tx, PARAMS, where)


def test_an_active_mesh_of_automatic_axes_changes_nothing() -> None:
    mesh, tx = make_mesh(), make("ldadam")
    outside = state_shardings(tx, PARAMS, shardings_on(mesh))
    with jax.set_mesh(mesh):
        assert state_shardings(tx, PARAMS, shardings_on(mesh)) == outside


def test_one_sharding_serves_a_whole_subtree() -> None:
    mesh = make_mesh()
    params = {"block": {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}, "bias": jnp.ones(8)}
    first, none = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    prefix = {"block": first, "bias": none}
    whole = {"block": {"up": first, "down": first}, "bias": none}
    tx = lro.galore(1e-2, rank=2)
    assert state_shardings(tx, params, prefix) == state_shardings(tx, params, whole)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {name: name != "bias" for name in LEAVES}),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "theirs": optax.lion(1e-3)},
        {name: "theirs" if name == "bias" else "ours" for name in LEAVES},
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


def injected() -> optax.GradientTransformation:
    static = ("rank", "weight_dimension_numbers", "refresh_every", "seed", "side")
    factory = optax.inject_hyperparams(lro.galore, (*static, "accumulate_steps"))
    return factory(1e-2, rank=2, weight_dimension_numbers=lambda _: NUMBERS)


@pytest.mark.parametrize("wrapper", [*WRAPPED, "inject_hyperparams"])
def test_wrapped_optimizers_keep_the_shardings_of_what_they_wrap(wrapper: str) -> None:
    # A rule by shape, since masks leave holes in trees of dimension numbers.
    tx = lro.galore(1e-2, rank=2, weight_dimension_numbers=numbers_of_shapes)
    tx = injected() if wrapper == "inject_hyperparams" else WRAPPED[wrapper](tx)
    mesh = make_mesh()
    shardings = state_shardings(tx, PARAMS, shardings_on(mesh))
    state = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    arrays = by_path(state)
    seen = set()
    for path, sharding in by_path(shardings).items():
        found = re.search(r"(?:^|/)(mu|basis|next_refresh|acc_grads)/(\w+)$", path)
        if found is not None:
            field, leaf = found.groups()
            rule = {"mu": MOMENTS, "acc_grads": {n: x[1] for n, x in LEAVES.items()}}
            wanted = NamedSharding(mesh, rule.get(field, BASIS)[leaf])
            assert sharding.is_equivalent_to(wanted, arrays[path].ndim), path
            seen.add((field, leaf))
    assert {("mu", "layers"), ("basis", "heads"), ("next_refresh", "wide")} <= seen


def numbers_of_shapes(params: Tree) -> Tree:
    numbers = {leaf[0]: leaf[2] for leaf in LEAVES.values()}
    return jax.tree.map(lambda x: numbers[x.shape], params)


def test_transformations_of_optax_are_taken_too() -> None:
    mesh, where = make_mesh(), shardings_on(make_mesh())
    adam, _ = state_shardings(optax.adam(1e-3), PARAMS, where)
    for name in LEAVES:
        assert adam.mu[name].is_equivalent_to(where[name], len(LEAVES[name][0]))
    factored = state_shardings(optax.adafactor(1e-3, min_dim_size_to_factor=8), PARAMS, where)[0]
    assert factored.v_row["wide"].is_equivalent_to(NamedSharding(mesh, P("x")), 1)
    assert factored.v_col["wide"].is_equivalent_to(NamedSharding(mesh, P("y")), 1)


def test_the_state_of_a_decoder_is_made_where_it_belongs() -> None:
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    mesh = make_mesh()
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    tx = lro.galore(1e-2, rank=2, weight_dimension_numbers=lro.weight_dimension_numbers(model))
    last = lambda x: P(*[None] * (x.ndim - 1), "x") if x.shape[-1] % 4 == 0 else P()
    where = jax.tree.map(lambda x: NamedSharding(mesh, last(x)), params)
    shardings = state_shardings(tx, params, where)
    state = jax.jit(tx.init, in_shardings=(where,), out_shardings=shardings).eval_shape(params)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    kernels = {path: x for path, x in by_path(shardings[0].inner.mu).items() if "up" in path}
    assert kernels
    for sharding in kernels.values():  # [layers, rank, intermediate]
        assert sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "x")), 3)


def test_orbax_restores_a_state_onto_another_mesh(tmp_path: Path) -> None:
    tx = make("galore")
    state = jax.jit(tx.init)(normal_like(PARAMS, 1))
    ocp.save(tmp_path / "state", state)
    shardings = state_shardings(tx, PARAMS, shardings_on(make_mesh()))
    typed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    restored = ocp.load(tmp_path / "state", jax.tree.map(typed, state, shardings))
    assert_close(restored, state, 0)
    assert_like(jax.tree.map(lambda x: x.sharding, restored), shardings, state)


def refused(mesh: Mesh) -> dict[str, tuple[Any, type[Exception], str]]:
    """A bad ``param_shardings``, and what is said about it."""
    good, other = shardings_on(mesh), jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    return {
        "a PartitionSpec": ({**good, "wide": P("x")}, TypeError, "'wide'.*NamedSharding"),
        "None": ({**good, "bias": None}, TypeError, "'bias'"),
        "one device": (
            {**good, "bias": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
            TypeError,
            "'bias'",
        ),
        "another mesh": ({**good, "bias": NamedSharding(other, P())}, ValueError, "one mesh"),
        "uneven": (
            {**good, "layers": NamedSharding(mesh, P("x"))},
            ValueError,
            r"'layers'.*\(2, 8, 16\)",
        ),
        "a leaf missing": ({"wide": good["wide"]}, ValueError, "structure of params"),
    }


@pytest.mark.parametrize("case", refused(make_mesh()))
def test_bad_shardings_are_refused_by_name(case: str) -> None:
    shardings, error, message = refused(make_mesh())[case]
    with pytest.raises(error, match=message):
        state_shardings(optax.adam(1e-3), PARAMS, shardings)


def test_what_is_no_transformation_is_refused() -> None:
    with pytest.raises(TypeError, match="tx="):
        state_shardings(lambda params: params, PARAMS, shardings_on(make_mesh()))


def test_an_init_whose_shardings_do_not_follow_says_so() -> None:
    # The concatenation of all leaves has no sharding that follows from theirs.
    tx = optax.flatten(optax.adam(1e-3))
    with pytest.raises(Exception, match="not supported") as caught:
        state_shardings(tx, PARAMS, shardings_on(make_mesh()))
    assert "does not follow" in " ".join(caught.value.__notes__)
