"""LoTR on stacks of weights: the formula, parameter counts, starts, ranks, refusals."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import AdapterParams, parameter_count
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import compiled, gradient, layer_output, on_host, switched_off, times

LoTR = compiled(lro.adapters.LoTR)
KEY = jax.random.key(0)
SHARES = ("both", "input", "output")
INITIALS = ("scaled", "orthonormal", "normal1", "tucker", "tucker_residual")


def weights_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def moved(params: AdapterParams, seed: int = 5) -> AdapterParams:
    """The same adapter with other values of what is trained."""
    rng = np.random.default_rng(seed)
    change = lambda x: (x + 0.3 * rng.normal(size=x.shape)).astype(x.dtype)
    return params._replace(trainable=jax.tree.map(change, params.trainable))


def deltas_in_float64(params: AdapterParams, scale: float, share: str = "both") -> np.ndarray:
    """``s A G_s Bᵀ`` of each layer, by loops."""
    p = {name: np.asarray(x, np.float64) for name, x in params.trainable.items()}
    layers = p[{"both": "core", "input": "B", "output": "A"}[share]].shape[0]
    of = lambda name, s: p[name] if p[name].ndim == 2 else p[name][s]
    core = lambda s: p["core"][s] if share == "both" else np.eye(p["A"].shape[-1])
    return np.stack(
        [scale * np.einsum("ia,ab,jb->ij", of("A", s), core(s), of("B", s)) for s in range(layers)]
    )


def sizes_of(params: AdapterParams, base: np.ndarray, scale: float, share: str) -> np.ndarray:
    """Of each layer's weight, sums with all terms made positive: what rounding is relative to."""
    positive = params._replace(trainable=jax.tree.map(np.abs, params.trainable))
    return np.abs(base) + deltas_in_float64(positive, scale, share)


def test_the_worked_example() -> None:
    arrays = {"A": [[1], [2]], "B": [[1], [-1]], "core": [[[3]], [[-1]]]}
    params = AdapterParams({name: np.array(x, np.float32) for name, x in arrays.items()}, {})
    deltas = LoTR(rank=1, alpha=1).deltas(params, np.zeros((2, 2, 2), np.float32))
    expected = [[[3, -3], [6, -6]], [[-1, 1], [-2, 2]]]
    assert_close(deltas, expected)


@pytest.mark.combinations(1)
@pytest.mark.parametrize("initial", ["scaled", "tucker_residual"])
@pytest.mark.parametrize("share", SHARES)
def test_output_delta_merge_and_lora_are_the_formula(initial: Any, share: Any) -> None:
    weights, x = weights_of((3, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=3, initial=initial, share=share)
    start = method.init(KEY, weights)
    params = moved(start)
    base = weights if start.base is None else start.base
    expected, sizes = deltas_in_float64(params, 1.5, share), sizes_of(params, base, 1.5, share)
    assert_close(method.deltas(params, base), expected, size=sizes, dtype=np.float32)
    for layer in range(3):
        p = method.layer_arrays(params, layer)
        exact = np.asarray(base[layer], np.float64) + expected[layer]
        output = layer_output(method, p, Rows(x), x @ base[layer], weight=base[layer])
        size = np.abs(x) @ sizes[layer]
        assert_close(output, np.asarray(x, np.float64) @ exact, size=size, dtype=np.float32)
        merged = method.merged(p, base[layer])
        assert_close(merged.weight, exact, size=sizes[layer], dtype=np.float32)
        assert_close(method.unmerged(p, merged.weight), base[layer], size=sizes[layer])
        first, second = method.to_lora(p)
        change = exact - np.asarray(weights[layer], np.float64)
        np.testing.assert_allclose(first @ second, change, atol=2e-5)


@pytest.mark.parametrize(
    ("initial", "zero"), [*((i, "core") for i in INITIALS[:4]), ("scaled", "A"), ("tucker", "B")]
)
def test_the_start_is_the_model_bit_for_bit(initial: Any, zero: Any) -> None:
    weights, x = weights_of((3, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, initial=initial, zero=zero)
    params = method.init(KEY, weights)
    for layer in range(3):
        p, y = method.layer_arrays(params, layer), x @ weights[layer]
        np.testing.assert_array_equal(layer_output(method, p, Rows(x), y, weight=weights[layer]), y)


@pytest.mark.parametrize("share", SHARES)
def test_the_residual_start_computes_the_models_function_and_gives_the_weight_back(
    share: Any,
) -> None:
    weights, x = weights_of((3, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=5, initial="tucker_residual", share=share, power_iterations=None)
    params = method.init(KEY, weights)
    assert method.changes_base
    assert params.base is not None
    assert np.linalg.norm(params.base - weights) > 1
    trained = moved(params)
    sizes = sizes_of(params, params.base, 2.5, share)
    for layer in range(3):
        base, y = params.base[layer], x @ weights[layer]
        p, size = method.layer_arrays(params, layer), np.abs(x) @ sizes[layer]
        output = layer_output(method, p, Rows(x), x @ base, weight=base)
        assert_close(output, y, size=size)
        p = method.layer_arrays(trained, layer)
        assert_close(switched_off(method, p, Rows(x), x @ base), y, size=size)
        assert_close(method.original(p, base), weights[layer], size=sizes[layer])


def test_only_the_cores_have_a_gradient_at_the_start_and_it_is_the_closed_form() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=3)
    params = method.init(KEY, weights)

    def loss(trainable: Any) -> jax.Array:
        p = method.layer_arrays(AdapterParams(trainable, {}), 0)
        return jnp.sum(layer_output(method, p, Rows(x), x @ weights[0], weight=weights[0]) ** 2)

    slopes = gradient(loss, params.trainable)
    assert not slopes["A"].any()
    assert not slopes["B"].any()
    a, b = (np.asarray(params.trainable[name], np.float64) for name in "AB")
    g = 2 * np.asarray(x @ weights[0], np.float64)
    assert_close(
        slopes["core"][0],
        1.5 * (x @ a).T @ (g @ b),
        size=(abs(x) @ abs(a)).T @ (2 * abs(x) @ abs(weights[0]) @ abs(b)),
    )


def test_the_gradient_of_the_input_is_the_whole_layers() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=3)
    params = moved(method.init(KEY, weights))
    p, w = method.layer_arrays(params, 0), weights[0]
    slopes = gradient(lambda x: jnp.sum(layer_output(method, p, Rows(x), x @ w, weight=w)), x)
    exact = np.asarray(w, np.float64) + deltas_in_float64(params, 1.5)[0]
    np.testing.assert_allclose(slopes, np.ones((4, 5)) @ exact.T, atol=2e-5)


def counts(d: int, layers: int, rank: int) -> int:
    method = lro.adapters.LoTR(rank=rank)
    stack = jax.ShapeDtypeStruct((layers, d, d), jnp.float32)
    return parameter_count(jax.eval_shape(method.init, KEY, stack).trainable)


def test_parameters_are_as_many_as_the_papers_tables_say() -> None:
    # RoBERTa-base, queries and values in one group; the table adds 1536 of the head's output.
    worked = {1: 1_560, 8: 13_824, 16: 30_720, 32: 73_728, 64: 196_608}
    table = {1: 3_096, 8: 15_360, 16: 32_256, 32: 75_264}
    for rank, count in worked.items():
        assert counts(768, 24, rank) == count == 1536 * rank + 24 * rank**2
    assert {rank: counts(768, 24, rank) + 1536 for rank in table} == table
    lora = lro.adapters.LoRA(rank=2).init
    shapes = jax.eval_shape(lora, KEY, jax.ShapeDtypeStruct((24, 768, 768), jnp.float32))
    assert parameter_count(shapes.trainable) == 73_728 == counts(768, 24, 32)


@pytest.mark.parametrize(
    ("share", "count"),
    [("both", 7 * 3 + 5 * 9 + 4 * 3), ("input", 7 * 3 + 5 * 4 * 3), ("output", 5 * 7 * 3 + 4 * 3)],
)
def test_what_is_shared_is_counted_once(share: Any, count: int) -> None:
    stack = jax.ShapeDtypeStruct((5, 7, 4), jnp.float32)
    params = jax.eval_shape(lro.adapters.LoTR(rank=3, share=share).init, KEY, stack)
    assert parameter_count(params.trainable) == count


def test_all_updates_together_have_the_rank() -> None:
    weights = weights_of((6, 9, 8))
    method = LoTR(rank=3)
    deltas = method.deltas(moved(method.init(KEY, weights)), weights)
    joint = np.concatenate(list(np.asarray(deltas, np.float64)), axis=1)
    other = np.concatenate(list(np.asarray(deltas, np.float64).transpose(0, 2, 1)), axis=1)
    for matrix in (joint, other, *deltas):
        assert np.linalg.matrix_rank(matrix, tol=1e-4) == 3


@pytest.mark.slow
def test_a_rank_above_the_sides_is_allowed() -> None:
    weights = weights_of((2, 3, 4))
    for initial in INITIALS:
        method = LoTR(rank=6, initial=initial)
        params = moved(method.init(KEY, weights))
        np.testing.assert_allclose(
            method.deltas(params, weights), deltas_in_float64(params, 1.0), atol=2e-5
        )


def test_one_layer_is_a_lora_with_an_inner_core() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method, lora = LoTR(rank=2, alpha=3), compiled(lro.adapters.LoRA)(rank=2, alpha=3)
    p = method.layer_arrays(moved(method.init(KEY, weights)), 0)
    y = x @ weights[0]
    for core in (np.eye(2, dtype=np.float32), p["core"]):
        as_lora = {"A": p["A"] @ core, "B": p["B"].T}
        np.testing.assert_allclose(
            layer_output(method, {**p, "core": core}, Rows(x), y, weight=weights[0]),
            layer_output(lora, as_lora, Rows(x), y, weight=weights[0]),
            atol=2e-5,
        )


def test_other_bases_of_the_same_subspace_give_the_same_output() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2)
    p = method.layer_arrays(moved(method.init(KEY, weights)), 0)
    turn_in, turn_out = (
        np.array(x, np.float32) for x in ([[1, 2], [-1, 0.5]], [[0.7, 0.1], [0.3, -1]])
    )
    core = np.linalg.inv(turn_in) @ p["core"] @ np.linalg.inv(turn_out).T
    turned = {"A": p["A"] @ turn_in, "core": core, "B": p["B"] @ turn_out}
    outputs = [
        layer_output(method, q, Rows(x), x @ weights[0], weight=weights[0]) for q in (p, turned)
    ]
    np.testing.assert_allclose(*outputs, atol=2e-5)


@pytest.mark.parametrize("share", SHARES)
def test_beyond_a_layers_own_rank_nothing_has_a_part(share: Any) -> None:
    weights = weights_of((2, 6, 5))
    method = LoTR(rank=(1, 3), alpha=6, share=share)
    params = moved(method.init(KEY, weights))
    own = {"both": "core", "input": "B", "output": "A"}[share]
    loss = lambda t: jnp.sum(method.deltas(params._replace(trainable=t), weights) ** 2)
    slopes = gradient(loss, params.trainable)[own]
    assert not slopes[0, ..., 1:].any()
    assert slopes[0, 0, 0] != 0
    assert slopes[1].all()
    for layer, rank in enumerate(method.rank):
        cut = {k: x[..., :rank] for k, x in method.layer_arrays(params, layer).items()}
        if share == "both":
            cut["core"] = cut["core"][:rank]
        del cut["rank_scale"]
        alone = LoTR(rank=rank, alpha=6, share=share).delta(cut, weights[layer])
        np.testing.assert_allclose(method.deltas(params, weights)[layer], alone, atol=2e-5)


@pytest.mark.slow
def test_layers_added_later_start_at_zero_and_leave_the_others_as_they_are() -> None:
    weights = weights_of((4, 6, 5))
    for method in (LoTR(rank=2), LoTR(rank=2, group_by="kind_and_block", block_size=2)):
        params = moved(method.init(KEY, weights[:3]))
        longer = on_host(method.with_layers(params))
        deltas = method.deltas(longer, weights)
        assert_close(deltas[:3], method.deltas(params, weights[:3]))
        assert not deltas[3:].any()
        added = lambda t, m=method, p=longer: m.deltas(p._replace(trainable=t), weights)[3:].sum()
        assert gradient(added, longer.trainable)["core"][3:].all()
    with pytest.raises(ValueError, match="own rank"):
        LoTR(rank=(1, 2)).with_layers(params)


def test_arrays_are_float32_on_a_bfloat16_model_and_outputs_are_not() -> None:
    weights, x = (weights_of(shape).astype(jnp.bfloat16) for shape in ((2, 6, 5), (4, 6)))
    LoTR, shapes_of = lro.adapters.LoTR, jax.eval_shape
    for initial in INITIALS:
        method = LoTR(rank=2, initial=initial)
        params = shapes_of(method.init, KEY, weights)
        assert {a.dtype for a in params.trainable.values()} == {jnp.dtype("float32")}
        assert params.base is None or params.base.dtype == jnp.bfloat16

        def output(params: AdapterParams, method: Any = method) -> jax.Array:
            p = method.layer_arrays(params, 1)
            return layer_output(method, p, Rows(x), times(x, weights[1]), weight=weights[1])

        assert shapes_of(output, params).dtype == jnp.bfloat16
    narrow = shapes_of(LoTR(rank=2, param_dtype=jnp.bfloat16).init, KEY, weights)
    assert {a.dtype for a in narrow.trainable.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("initial", "spread"), [("scaled", 1 / 20), ("normal1", 1.0)])
def test_deviations_of_the_random_starts(initial: Any, spread: float) -> None:
    params = LoTR(rank=40, initial=initial).init(KEY, np.zeros((1, 400, 400)))
    for name in "AB":
        np.testing.assert_allclose(params.trainable[name].std(), spread, rtol=0.03)


@pytest.mark.parametrize("initial", ["orthonormal", "tucker"])
def test_columns_are_orthonormal_where_they_are_said_to_be(initial: Any) -> None:
    params = LoTR(rank=3, initial=initial).init(KEY, weights_of((2, 8, 7)))
    for name in "AB":
        x = params.trainable[name]
        np.testing.assert_allclose(x.T @ x, np.eye(3), atol=1e-5)


def test_bad_options_are_refused_by_name() -> None:
    for options, words in (
        ({"group_by": "name"}, "group_by='name'"),
        ({"share": "left"}, "share='left'"),
        ({"initial": "svd"}, "initial='svd'"),
        ({"zero": "C"}, "zero='C'"),
        ({"zero": "A", "share": "input"}, "share='both'"),
        ({"zero": "B", "initial": "tucker_residual"}, "tucker_residual"),
        ({"initial": "tucker_residual", "dropout": 0.1}, "dropout=0.1"),
        ({"block_size": 0}, "block_size=0"),
        ({"power_iterations": -1}, "power_iterations=-1"),
        ({"rank": 0}, "rank=0"),
    ):
        with pytest.raises(ValueError, match=words):
            LoTR(**options)


def test_members_of_other_sizes_are_refused() -> None:
    stacks = [jax.ShapeDtypeStruct((1, 4, n), jnp.float32) for n in (3, 5)]
    with pytest.raises(ValueError, match=r"share B have sizes \[3, 5\]"):
        lro.adapters.LoTR(rank=1).init_shared(KEY, stacks)
    one_side = lro.adapters.LoTR(rank=1, share="input").init_shared(KEY, stacks)
    assert set(one_side.trainable) == {"A"}
