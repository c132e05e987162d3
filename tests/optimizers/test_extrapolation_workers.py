"""Data-parallel workers, each with its own last gradient: on devices, and in turn on one."""

import functools
from typing import Any

from harness.trees import assert_close, assert_equal, assert_same_types, is_zero
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import lowrank_optax as lro

WORKERS, STEPS, RATE, INNER = 8, 4, 0.3, 0.2
KERNEL = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)
PARAMS = {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(np.zeros(3, np.float32))}
BATCHES = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 4 * WORKERS, 4)), jnp.float32)
VARIANTS = ("past_local", "past_global", "same", "fresh", "noise", "none")


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.tanh(x @ params["kernel"] + params["bias"]) ** 2, -1))


def more(variant: str, batch: Any) -> dict[str, Any]:
    return {"independent": (jnp.flip(batch, -1),)} if variant == "fresh" else {}


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def descend(step: Any, state: Any, params: Any = PARAMS) -> tuple[Any, Any]:
    """Weights after some steps of gradient descent, and the state."""
    for batch in BATCHES:
        _, gradient, state = step(params, state, batch)
        params = jax.tree.map(lambda w, g: w - RATE * g, params, gradient)
    return params, state


gradient_of = jax.jit(jax.grad(loss_fn))


@functools.cache
def by_hand() -> tuple[Any, Any]:
    """``past_local`` with a loop over workers."""
    last = [jax.tree.map(np.zeros_like, PARAMS)] * WORKERS
    params = jax.tree.map(np.asarray, PARAMS)
    for batch in np.asarray(BATCHES):
        parts = batch.reshape(WORKERS, -1, 4)
        ahead = lambda g, w=params: jax.tree.map(lambda w, g: w - INNER * g, w, g)
        gradients = [gradient_of(ahead(g), x) for g, x in zip(last, parts, strict=True)]
        last = jax.tree.map(np.asarray, gradients)
        mean = jax.tree.map(lambda *g: np.mean(g, 0), *last)
        params = jax.tree.map(lambda w, g: w - RATE * g, params, mean)
    return params, jax.tree.map(lambda *g: np.stack(g), *last)


def sharded(f: Any, mesh: Mesh, check: bool = True, axis: Any = "data", **options: Any) -> Any:
    """The step under ``shard_map``, and its state in place."""
    specs = f.state_specs()
    call = lambda w, s, x: f(w, s, x, **more(f.variant, x))
    step = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(P(), specs, P(axis)),
        out_specs=(P(), P(), specs),
        check_vma=check,
        **options,
    )
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    init = jax.jit(f.init, static_argnums=1, out_shardings=places)
    return jax.jit(step), init


@functools.cache
def in_turn(variant: str, groups: int = WORKERS, **options: Any) -> tuple[Any, Any]:
    """Weights and state of workers that run in turn on one device."""
    f = lro.extrapolated_value_and_grad(loss_fn, variant, INNER, local_groups=groups, **options)

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        parts = batch.reshape(groups, -1, 4)
        return f(params, state, parts, **more(variant, parts))

    return descend(jax.jit(step), f.init(PARAMS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "check"),
    [
        *((variant, True) for variant in VARIANTS),
        ("past_local", False),
        pytest.param("same", False, marks=pytest.mark.full),
    ],
)
def test_eight_devices_do_what_eight_workers_in_turn_do(variant: str, check: bool) -> None:
    """The noise too: it belongs to the worker, not to the device."""
    mesh = make_mesh((8,), ("data",))
    f = lro.extrapolated_value_and_grad(loss_fn, variant, INNER, axis_name="data")
    step, init = sharded(f, mesh, check)
    start = init(PARAMS, WORKERS)
    params, state = descend(step, start)
    assert_same_types(state, start)
    expected, turned = in_turn(variant)
    assert_close(params, expected, 100)
    assert_close(state.previous_gradient, turned.previous_gradient, 100)
    for leaf in jax.tree.leaves(state.previous_gradient):
        spec = P("data") if variant == "past_local" else P()
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


def test_past_local_is_as_written_down() -> None:
    expected, last = by_hand()
    params, state = in_turn("past_local")
    assert_close(params, expected, 100)
    assert_close(state.previous_gradient, last, 100)
    apart = in_turn("past_global")[0]
    assert not np.allclose(params["kernel"], apart["kernel"], atol=1e-4)


@pytest.mark.slow
def test_two_workers_on_each_of_four_devices() -> None:
    for variant in ("past_local", "noise"):
        f = lro.extrapolated_value_and_grad(
            loss_fn, variant, INNER, axis_name="data", local_groups=2
        )
        step, init = sharded(f, make_mesh((4, 2), ("data", "model")))
        parts = lambda w, s, x, step=step: step(w, s, x.reshape(WORKERS, -1, 4))
        params, state = descend(parts, init(PARAMS, WORKERS))
        expected, turned = in_turn(variant)
        assert_close(params, expected, 100)
        assert_close(state.previous_gradient, turned.previous_gradient, 100)


@pytest.mark.slow
def test_workers_over_two_axes_and_over_one_of_two() -> None:
    mesh = make_mesh((4, 2), ("data", "model"))
    both = ("data", "model")
    f = lro.extrapolated_value_and_grad(loss_fn, "past_local", INNER, axis_name=both)
    step, init = sharded(f, mesh, axis=both)
    assert_close(descend(step, init(PARAMS, WORKERS))[0], by_hand()[0], 100)
    # With the other axis left to the compiler, weights may be sharded over it.
    f = lro.extrapolated_value_and_grad(loss_fn, "past_local", INNER, axis_name="data")
    step, init = sharded(f, mesh, axis_names={"data"})
    placed = jax.device_put(PARAMS["kernel"], NamedSharding(mesh, P("model", None)))
    params, _ = descend(step, init(PARAMS, 4), {**PARAMS, "kernel": placed})
    assert_close(params, in_turn("past_local", 4)[0], 100)
    specs = f.state_specs({"kernel": P("model", None), "bias": P()})
    assert specs.previous_gradient == {"kernel": P("data", "model", None), "bias": P("data")}


def test_workers_as_an_axis_of_vmap() -> None:
    f = lro.extrapolated_value_and_grad(loss_fn, "past_local", INNER, axis_name="data")
    axes = f.init(PARAMS, WORKERS)._replace(count=None, previous_gradient=0, key=None)
    mapped = jax.vmap(f, in_axes=(None, axes, 0), out_axes=(None, None, axes), axis_name="data")
    step = jax.jit(lambda w, s, batch: mapped(w, s, batch.reshape(WORKERS, -1, 4)))
    params, state = descend(step, f.init(PARAMS, WORKERS))
    expected, last = by_hand()
    assert_close(params, expected, 100)
    assert_close(state.previous_gradient, last, 100)


def test_past_local_on_equal_batches_is_past_global() -> None:
    equal = lambda batch: jnp.broadcast_to(batch[:4], (WORKERS, 4, 4))
    results = []
    for variant in ("past_local", "past_global"):
        f = lro.extrapolated_value_and_grad(loss_fn, variant, INNER, local_groups=WORKERS)
        step = jax.jit(lambda w, s, batch, f=f: f(w, s, equal(batch)))
        results.append(descend(step, f.init(PARAMS))[0])
    assert_close(*results)


def test_past_global_is_the_whole_batch_at_once() -> None:
    f = lro.extrapolated_value_and_grad(loss_fn, "past_global", INNER)
    assert_close(descend(jax.jit(f), f.init(PARAMS))[0], in_turn("past_global")[0], 100)


@pytest.mark.slow
def test_parameters_sharded_over_the_data_axis_train_without_workers() -> None:
    """FSDP, by the compiler: what the error message of the sharded case advises."""
    mesh = make_mesh((4,), ("data",))
    placed = {**PARAMS, "kernel": jax.device_put(PARAMS["kernel"], NamedSharding(mesh, P("data")))}
    for variant in ("past_global", "same"):
        f = lro.extrapolated_value_and_grad(loss_fn, variant, INNER)
        params, _ = descend(jax.jit(f), f.init(placed), placed)
        assert_close(params, descend(jax.jit(f), f.init(PARAMS))[0], 100)


def test_parameters_sharded_over_the_axis_of_workers_are_refused() -> None:
    mesh = make_mesh((4,), ("data",))
    f = lro.extrapolated_value_and_grad(loss_fn, "past_local", INNER, axis_name="data")
    placed = {**PARAMS, "kernel": jax.device_put(PARAMS["kernel"], NamedSharding(mesh, P("data")))}
    with pytest.raises(ValueError, match=r"sharded over the axis of the workers.*kernel"):
        f.init(placed, 4)
    specs = f.state_specs()
    in_specs = ({"kernel": P("data"), "bias": P()}, specs, P("data"))
    step = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=(P(), P(), specs))
    with pytest.raises(ValueError, match=r"sharded over the axis of the workers.*kernel"):
        jax.eval_shape(step, PARAMS, f.init(PARAMS, 4), BATCHES[0])


def test_one_bad_batch_costs_one_worker_its_look_ahead() -> None:
    f = lro.extrapolated_value_and_grad(loss_fn, "past_local", INNER, local_groups=2)
    parts = np.asarray(BATCHES[0]).reshape(2, -1, 4)
    bad = parts.copy()
    bad[0, 0, 0] = np.nan
    state = jax.jit(f)(PARAMS, f.init(PARAMS), bad)[2]
    last = jax.tree.map(np.asarray, state.previous_gradient)
    first, second = (jax.tree.map(lambda g, i=i: g[i], last) for i in (0, 1))
    assert is_zero(first)
    assert_close(second, gradient_of(PARAMS, parts[1]), 100)


def test_noise_differs_between_workers_and_steps_and_repeats_with_the_seed() -> None:
    loss = lambda w, _: (0.0 * jnp.sum(w), w)
    make = functools.partial(
        lro.extrapolated_value_and_grad, loss, "noise", 1.0, local_groups=3, has_aux=True
    )
    w, batch = jnp.zeros(50), jnp.zeros(3)

    def points(seed: int) -> list[np.ndarray]:
        f = make(seed=seed)
        state, call, found = f.init(w), jax.jit(f), []
        for _ in range(2):
            (_, point), _, state = call(w, state, batch)
            found += list(np.asarray(point))
        return found

    ours = points(0)
    correlations = np.corrcoef([*ours, *points(1)])
    assert np.abs(correlations - np.eye(12)).max() < 0.6
    assert_equal(points(0), ours)


def test_what_the_loss_returns_beside_is_each_workers_own() -> None:
    loss = lambda w, x: (jnp.mean((w - x) ** 2), x.sum())
    f = lro.extrapolated_value_and_grad(loss, "past_local", INNER, has_aux=True, local_groups=2)
    w, batch = jnp.ones(3), jnp.arange(6.0).reshape(2, 3)
    (value, sums), _, _ = jax.jit(f)(w, f.init(w), batch)
    assert float(value) == pytest.approx(float(jnp.mean((w - batch) ** 2)))
    np.testing.assert_allclose(sums, [3.0, 12.0])


def test_keyword_arguments_are_shared_by_all_groups() -> None:
    loss = lambda w, x, *, scale: jnp.mean(scale * (w - x) ** 2)
    f = lro.extrapolated_value_and_grad(loss, "past_local", INNER, local_groups=2)
    w, batch = jnp.ones(3), jnp.arange(6.0).reshape(2, 3)
    value = f(w, f.init(w), batch, scale=jnp.arange(3.0))[0]
    assert float(value) == pytest.approx(float(jnp.mean(jnp.arange(3.0) * (w - batch) ** 2)))


def test_mistaken_numbers_of_workers_are_refused() -> None:
    make = functools.partial(lro.extrapolated_value_and_grad, loss_fn, "past_local", INNER)
    with pytest.raises(ValueError, match="workers is missing"):
        make(axis_name="data").init(PARAMS)
    for options, workers in (
        ({"axis_name": "data", "local_groups": 3}, 8),
        ({"local_groups": 4}, 8),
        ({"axis_name": "data"}, 0),
        ({}, 8),
    ):
        with pytest.raises(ValueError, match=f"workers={workers} "):
            make(**options).init(PARAMS, workers)
    many = make(local_groups=8).init(PARAMS)
    for f, batch in ((make(), BATCHES[0]), (make(local_groups=4), BATCHES[0].reshape(4, -1, 4))):
        with pytest.raises(ValueError, match=r"gradients of the shape \(8, 3\) at 'bias'"):
            f(PARAMS, many, batch)
    with pytest.raises(ValueError, match=r"first axis of 8; an array .* shape \(32, 4\)"):
        make(local_groups=8)(PARAMS, many, BATCHES[0])
