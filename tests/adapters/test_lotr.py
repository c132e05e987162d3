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

LoTR = lro.adapters.LoTR
SHARES = ("both", "input", "output")
INITIALS = ("scaled", "orthonormal", "normal1", "tucker", "tucker_residual")


def weights_of(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def moved(params: AdapterParams, seed: int = 5) -> AdapterParams:
    """The same adapter with other values of what is trained."""
    keys = iter(jax.random.split(jax.random.key(seed), 3))
    change = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype)
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


def test_the_worked_example() -> None:
    shared = {"A": jnp.array([[1.0], [2.0]]), "B": jnp.array([[1.0], [-1.0]])}
    core = jnp.array([[[3.0]], [[-1.0]]])
    params = AdapterParams({**shared, "core": core}, {})
    deltas = LoTR(rank=1, alpha=1).deltas(params, jnp.zeros((2, 2, 2)))
    expected = [[[3, -3], [6, -6]], [[-1, 1], [-2, 2]]]
    np.testing.assert_array_equal(deltas, expected)


@pytest.mark.parametrize("initial", ["scaled", "tucker_residual"])
@pytest.mark.parametrize("share", SHARES)
def test_output_delta_merge_and_lora_are_the_formula(initial: Any, share: Any) -> None:
    weights, x = weights_of((3, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=3, initial=initial, share=share)
    start = method.init(jax.random.key(0), weights)
    params = moved(start)
    base = weights if start.base is None else start.base
    expected = deltas_in_float64(params, 1.5, share)
    np.testing.assert_allclose(method.deltas(params, base), expected, atol=2e-5)
    for layer in range(3):
        p = method.layer_arrays(params, layer)
        exact = np.asarray(base[layer], np.float64) + expected[layer]
        output = method.apply(p, Rows(x), x @ base[layer], weight=base[layer])
        np.testing.assert_allclose(output, np.asarray(x, np.float64) @ exact, atol=1e-4)
        merged = method.merged(p, base[layer])
        np.testing.assert_allclose(merged.weight, exact, atol=2e-5)
        np.testing.assert_allclose(method.unmerged(p, merged.weight), base[layer], atol=2e-5)
        first, second = method.to_lora(p)
        change = exact - np.asarray(weights[layer], np.float64)
        np.testing.assert_allclose(first @ second, change, atol=2e-5)


@pytest.mark.parametrize(
    ("initial", "zero"), [*((i, "core") for i in INITIALS[:4]), ("scaled", "A"), ("tucker", "B")]
)
def test_the_start_is_the_model_bit_for_bit(initial: Any, zero: Any) -> None:
    weights, x = weights_of((3, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, initial=initial, zero=zero)
    params = method.init(jax.random.key(0), weights)
    for layer in range(3):
        p, y = method.layer_arrays(params, layer), x @ weights[layer]
        np.testing.assert_array_equal(method.apply(p, Rows(x), y, weight=weights[layer]), y)


@pytest.mark.parametrize("share", SHARES)
def test_the_residual_start_computes_the_models_function_and_gives_the_weight_back(
    share: Any,
) -> None:
    weights, x = weights_of((3, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=5, initial="tucker_residual", share=share, power_iterations=None)
    params = method.init(jax.random.key(0), weights)
    assert method.changes_base
    assert params.base is not None
    assert float(jnp.linalg.norm(params.base - weights)) > 1
    trained = moved(params)
    for layer in range(3):
        base, y = params.base[layer], x @ weights[layer]
        p = method.layer_arrays(params, layer)
        output = method.apply(p, Rows(x), x @ base, weight=base)
        np.testing.assert_allclose(output, y, atol=2e-5)
        p = method.layer_arrays(trained, layer)
        np.testing.assert_allclose(method.before(p, Rows(x), x @ base), y, atol=2e-5)
        np.testing.assert_allclose(method.original(p, base), weights[layer], atol=2e-6)


def test_only_the_cores_have_a_gradient_at_the_start_and_it_is_the_closed_form() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=3)
    params = method.init(jax.random.key(0), weights)

    def loss(trainable: Any) -> jax.Array:
        p = method.layer_arrays(AdapterParams(trainable, {}), 0)
        return jnp.sum(method.apply(p, Rows(x), x @ weights[0], weight=weights[0]) ** 2)

    gradient = jax.grad(loss)(params.trainable)
    assert not gradient["A"].any()
    assert not gradient["B"].any()
    a, b = (np.asarray(params.trainable[name], np.float64) for name in "AB")
    g = 2 * np.asarray(x @ weights[0], np.float64)
    assert_close(gradient["core"][0], 1.5 * (x @ a).T @ (g @ b), 800)


def test_the_gradient_of_the_input_is_the_whole_layers() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2, alpha=3)
    params = moved(method.init(jax.random.key(0), weights))
    p, w = method.layer_arrays(params, 0), weights[0]
    gradient = jax.grad(lambda x: jnp.sum(method.apply(p, Rows(x), x @ w, weight=w)))(x)
    exact = np.asarray(w, np.float64) + deltas_in_float64(params, 1.5)[0]
    np.testing.assert_allclose(gradient, np.ones((4, 5)) @ exact.T, atol=2e-5)


def counts(d: int, layers: int, rank: int) -> int:
    method = LoTR(rank=rank)
    stack = jax.ShapeDtypeStruct((layers, d, d), jnp.float32)
    return parameter_count(jax.eval_shape(method.init, jax.random.key(0), stack).trainable)


def test_parameters_are_as_many_as_the_papers_tables_say() -> None:
    # RoBERTa-base, queries and values in one group; the table adds 1536 of the head's output.
    worked = {1: 1_560, 8: 13_824, 16: 30_720, 32: 73_728, 64: 196_608}
    table = {1: 3_096, 8: 15_360, 16: 32_256, 32: 75_264}
    for rank, count in worked.items():
        assert counts(768, 24, rank) == count == 1536 * rank + 24 * rank**2
    assert {rank: counts(768, 24, rank) + 1536 for rank in table} == table
    lora = lro.adapters.LoRA(rank=2).init(jax.random.key(0), jnp.zeros((24, 768, 768)))
    assert parameter_count(lora.trainable) == 73_728 == counts(768, 24, 32)


@pytest.mark.parametrize(
    ("share", "count"),
    [("both", 7 * 3 + 5 * 9 + 4 * 3), ("input", 7 * 3 + 5 * 4 * 3), ("output", 5 * 7 * 3 + 4 * 3)],
)
def test_what_is_shared_is_counted_once(share: Any, count: int) -> None:
    params = LoTR(rank=3, share=share).init(jax.random.key(0), jnp.zeros((5, 7, 4)))
    assert parameter_count(params.trainable) == count


def test_all_updates_together_have_the_rank() -> None:
    weights = weights_of((6, 9, 8))
    method = LoTR(rank=3)
    deltas = method.deltas(moved(method.init(jax.random.key(0), weights)), weights)
    joint = np.concatenate(list(np.asarray(deltas, np.float64)), axis=1)
    other = np.concatenate(list(np.asarray(deltas, np.float64).transpose(0, 2, 1)), axis=1)
    for matrix in (joint, other, *deltas):
        assert np.linalg.matrix_rank(matrix, tol=1e-4) == 3


def test_a_rank_above_the_sides_is_allowed() -> None:
    weights = weights_of((2, 3, 4))
    for initial in INITIALS:
        method = LoTR(rank=6, initial=initial)
        params = moved(method.init(jax.random.key(0), weights))
        np.testing.assert_allclose(
            method.deltas(params, weights), deltas_in_float64(params, 1.0), atol=2e-5
        )


def test_one_layer_is_a_lora_with_an_inner_core() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method, lora = LoTR(rank=2, alpha=3), lro.adapters.LoRA(rank=2, alpha=3)
    p = method.layer_arrays(moved(method.init(jax.random.key(0), weights)), 0)
    y = x @ weights[0]
    for core in (jnp.eye(2), p["core"]):
        as_lora = {"A": p["A"] @ core, "B": p["B"].T}
        np.testing.assert_allclose(
            method.apply({**p, "core": core}, Rows(x), y, weight=weights[0]),
            lora.apply(as_lora, Rows(x), y, weight=weights[0]),
            atol=2e-5,
        )


def test_other_bases_of_the_same_subspace_give_the_same_output() -> None:
    weights, x = weights_of((1, 6, 5)), weights_of((4, 6), 1)
    method = LoTR(rank=2)
    p = method.layer_arrays(moved(method.init(jax.random.key(0), weights)), 0)
    turn_in, turn_out = jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([[0.7, 0.1], [0.3, -1.0]])
    core = jnp.linalg.inv(turn_in) @ p["core"] @ jnp.linalg.inv(turn_out).T
    turned = {"A": p["A"] @ turn_in, "core": core, "B": p["B"] @ turn_out}
    outputs = [method.apply(q, Rows(x), x @ weights[0], weight=weights[0]) for q in (p, turned)]
    np.testing.assert_allclose(*outputs, atol=2e-5)


@pytest.mark.parametrize("share", SHARES)
def test_beyond_a_layers_own_rank_nothing_has_a_part(share: Any) -> None:
    weights = weights_of((2, 6, 5))
    method = LoTR(rank=(1, 3), alpha=6, share=share)
    params = moved(method.init(jax.random.key(0), weights))
    own = {"both": "core", "input": "B", "output": "A"}[share]
    gradient = jax.grad(
        lambda t: jnp.sum(method.deltas(params._replace(trainable=t), weights) ** 2)
    )(params.trainable)[own]
    assert not gradient[0, ..., 1:].any()
    assert gradient[0, 0, 0] != 0
    assert gradient[1].all()
    for layer, rank in enumerate(method.rank):
        cut = {k: x[..., :rank] for k, x in method.layer_arrays(params, layer).items()}
        if share == "both":
            cut["core"] = cut["core"][:rank]
        del cut["rank_scale"]
        alone = LoTR(rank=rank, alpha=6, share=share).delta(cut, weights[layer])
        np.testing.assert_allclose(method.deltas(params, weights)[layer], alone, atol=2e-5)


def test_layers_added_later_start_at_zero_and_leave_the_others_as_they_are() -> None:
    weights = weights_of((6, 6, 5))
    for method in (LoTR(rank=2), LoTR(rank=2, group_by="kind_and_block", block_size=2)):
        params = moved(method.init(jax.random.key(0), weights[:4]))
        longer = method.with_layers(params, 2)
        deltas = method.deltas(longer, weights)
        np.testing.assert_array_equal(deltas[:4], method.deltas(params, weights[:4]))
        assert not deltas[4:].any()
        gradient = jax.grad(
            lambda t, m=method, p=longer: m.deltas(p._replace(trainable=t), weights)[4:].sum()
        )(longer.trainable)
        assert gradient["core"][4:].all()
    with pytest.raises(ValueError, match="own rank"):
        LoTR(rank=(1, 2)).with_layers(params)


def test_arrays_are_float32_on_a_bfloat16_model_and_outputs_are_not() -> None:
    weights, x = weights_of((2, 6, 5)).astype(jnp.bfloat16), weights_of((4, 6)).astype(jnp.bfloat16)
    for initial in INITIALS:
        method = LoTR(rank=2, initial=initial)
        params = method.init(jax.random.key(0), weights)
        assert {a.dtype for a in params.trainable.values()} == {jnp.dtype("float32")}
        assert params.base is None or params.base.dtype == jnp.bfloat16
        p = method.layer_arrays(params, 1)
        assert method.apply(p, Rows(x), x @ weights[1], weight=weights[1]).dtype == jnp.bfloat16
    narrow = LoTR(rank=2, param_dtype=jnp.bfloat16).init(jax.random.key(0), weights)
    assert {a.dtype for a in narrow.trainable.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("initial", "spread"), [("scaled", 1 / 20), ("normal1", 1.0)])
def test_deviations_of_the_random_starts(initial: Any, spread: float) -> None:
    params = LoTR(rank=40, initial=initial).init(jax.random.key(0), jnp.zeros((1, 400, 400)))
    for name in "AB":
        np.testing.assert_allclose(params.trainable[name].std(), spread, rtol=0.03)


@pytest.mark.parametrize("initial", ["orthonormal", "tucker"])
def test_columns_are_orthonormal_where_they_are_said_to_be(initial: Any) -> None:
    params = LoTR(rank=3, initial=initial).init(jax.random.key(0), weights_of((2, 8, 7)))
    for name in "AB":
        x = params.trainable[name]
        np.testing.assert_allclose(x.T @ x, np.eye(3), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
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
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        LoTR(**options)


def test_members_of_other_sizes_are_refused() -> None:
    stacks = [jax.ShapeDtypeStruct((1, 4, n), jnp.float32) for n in (3, 5)]
    with pytest.raises(ValueError, match=r"share B have sizes \[3, 5\]"):
        LoTR(rank=1).init_shared(jax.random.key(0), stacks)
    assert set(LoTR(rank=1, share="input").init_shared(jax.random.key(0), stacks).trainable) == {
        "A"
    }
