"""The monitor changes nothing, and its numbers are right."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from lowrank_optax.training import (
    decay_mask,
    measurements,
    monitor_weight_decay,
)
from lowrank_optax.training.decay_measurements import leaf_sums, rotation_angle

RNG = np.random.default_rng(0)
NORMAL = lambda *shape: RNG.normal(size=shape).astype(np.float32)
PARAMS = {
    "blocks": {
        "norm": {"scale": np.ones((2, 4), np.float32)},
        "up": {"kernel": NORMAL(2, 4, 6), "bias": NORMAL(2, 6)},
    },
    "embed": {"embedding": NORMAL(5, 4)},
}
UPDATES = jax.tree.map(lambda p: np.float32(1e-2) * NORMAL(*p.shape), PARAMS)
RATE, DECAY = 0.02, 0.3


def measure(params: Any = PARAMS, updates: Any = UPDATES, **options: Any) -> Any:
    tx = monitor_weight_decay(**({"learning_rate": RATE, "weight_decay": DECAY} | options))
    step = jax.jit(lambda updates, params: tx.update(updates, tx.init(params), params)[1])
    return measurements(step(updates, params))


def expected(w: Any, d: Any) -> dict[str, float]:
    """In float64, the angle by its cosine."""
    w, d = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in xs]) for xs in (w, d))
    norm, update = np.linalg.norm(w), np.linalg.norm(d)
    cosine = w @ (w + d) / norm / np.linalg.norm(w + d)
    return {
        "weight_norm": norm,
        "weight_rms": np.sqrt(np.mean(w**2)),
        "update_rms": np.sqrt(np.mean(d**2)),
        "relative_update": update / norm,
        "rotation": np.arccos(cosine),
        "effective_learning_rate": RATE / norm**2,
        "relative_learning_rate": RATE / norm,
        "decay_share": RATE * DECAY * norm / update,
        "rounding_loss": 0.0,
        "decay_lost": 0.0,
        "equilibrium_norm": np.sqrt(RATE * w.size / 2 / DECAY),
        "learning_rate": RATE,
        "weight_decay": DECAY,
    }


def bits(x: Any) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


def assert_numbers(numbers: dict[str, Any], wanted: dict[str, float]) -> None:
    actual = {name: numbers[name] for name in wanted}
    assert actual == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_numbers_of_groups_and_layers_are_those_of_their_weights() -> None:
    numbers = measure()
    up, d = PARAMS["blocks"]["up"], UPDATES["blocks"]["up"]
    assert list(numbers) == [
        "all",
        *("norms", "norms/0", "norms/1"),
        *("biases", "biases/0", "biases/1"),
        *("matrices", "matrices/0", "matrices/1"),
        "embeddings",
    ]
    assert_numbers(numbers["all"], expected(jax.tree.leaves(PARAMS), jax.tree.leaves(UPDATES)))
    assert_numbers(numbers["matrices"], expected([up["kernel"]], [d["kernel"]]))
    for layer in range(2):
        assert_numbers(
            numbers[f"matrices/{layer}"], expected([up["kernel"][layer]], [d["kernel"][layer]])
        )
        assert_numbers(
            numbers[f"biases/{layer}"], expected([up["bias"][layer]], [d["bias"][layer]])
        )


def test_layers_may_be_left_to_their_groups() -> None:
    assert list(measure(per_layer=False)) == ["all", "norms", "biases", "matrices", "embeddings"]


def test_groups_may_be_given_by_a_function_of_paths() -> None:
    rule = lambda path: None if "norm" in path else path.split("/")[0]
    numbers = measure(groups=rule, per_layer=False)
    assert list(numbers) == ["all", "blocks", "embed"]
    up, d = PARAMS["blocks"]["up"], UPDATES["blocks"]["up"]
    assert_numbers(numbers["blocks"], expected(jax.tree.leaves(up), jax.tree.leaves(d)))
    kept = [*jax.tree.leaves(up), PARAMS["embed"]["embedding"]]
    moved = [*jax.tree.leaves(d), UPDATES["embed"]["embedding"]]
    assert_numbers(numbers["all"], expected(kept, moved))


@pytest.mark.parametrize(
    "mask", [decay_mask(), {"blocks": {"norm": False, "up": True}, "embed": 1}]
)
def test_what_does_not_decay_has_no_equilibrium_and_no_share(mask: Any) -> None:
    numbers = measure(weight_decay_mask=mask)
    assert numbers["norms"]["decay_share"] == 0
    for name in ("equilibrium_norm", "equilibrium_rotation", "norm_ratio", "rotation_ratio"):
        assert numbers["norms"][name] is None
        assert numbers["all"][name] is None
        assert numbers["matrices"][name] > 0
    assert 0 < numbers["all"]["decay_share"] < measure()["all"]["decay_share"]


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-4, 1e-6])
def test_the_angle_in_float32_is_that_of_float64(size: float) -> None:
    w = RNG.normal(size=3000)
    d = size * RNG.normal(size=3000)
    w32, d32 = w.astype(np.float32), d.astype(np.float32)
    w, d = np.asarray(w32, np.float64), np.asarray(d32, np.float64)
    across = np.linalg.norm(d - w * (w @ d) / (w @ w))
    exact = np.arctan2(across, np.linalg.norm(w) + w @ d / np.linalg.norm(w))
    angle = jax.jit(lambda w, d: rotation_angle(*leaf_sums(w, d, False, True)[0, :3]))
    assert_close(angle(w32, d32), np.float32(exact), 800)
    if size == 1e-4:  # where the cosine of float32 knows nothing any more
        cosine = w32 @ (w32 + d32) / np.linalg.norm(w32) / np.linalg.norm(w32 + d32)
        assert abs(np.arccos(np.minimum(cosine, np.float32(1))) / exact - 1) > 0.1


def test_updates_are_the_same_and_types_are_constant() -> None:
    monitor = monitor_weight_decay(learning_rate=RATE, weight_decay=DECAY)
    state = monitor.init(PARAMS)
    updates = jax.tree.map(np.copy, UPDATES)
    updates["embed"]["embedding"][0] = np.nan, np.inf, -0.0, 1e-42
    for update in (monitor.update, jax.jit(monitor.update)):
        found, after = update(updates, state, PARAMS)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), found, updates)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_on_a_cpu_copies_no_weights(every: int) -> None:
    """SGD's momentum is the update, so that nothing but sums needs memory."""
    params = {name: jax.ShapeDtypeStruct((4, 64, 128), jnp.float32) for name in ("a", "b", "c")}
    monitor = monitor_weight_decay(every=every, learning_rate=RATE, weight_decay=DECAY)
    tx = optax.chain(optax.sgd(RATE, 0.9), monitor)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(tx.init, params), params
    )
    one = 4 * 64 * 128 * 4
    # A branch has the updates as arrays.
    limit = one / 4 if every == 1 else 3.25 * one
    assert lowered.compile().memory_analysis().temp_size_in_bytes < limit


@pytest.mark.slow
def test_a_scan_gives_the_history_that_a_loop_does() -> None:
    rate = optax.linear_schedule(0.1, 0.0, 4)
    tx = optax.chain(
        optax.adamw(rate, weight_decay=DECAY),
        monitor_weight_decay(every=2, learning_rate=rate, weight_decay=DECAY),
    )

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(UPDATES, state, params)
        return (optax.apply_updates(params, updates), state), state

    step = jax.jit(step)
    carry = (PARAMS, jax.jit(tx.init)(PARAMS))
    history = measurements(jax.jit(lambda carry: jax.lax.scan(step, carry, None, 5)[1])(carry))
    for index in range(5):
        carry, state = step(carry, None)
        for group, numbers in measurements(state).items():
            for name, number in numbers.items():
                number = np.nan if number is None else number
                np.testing.assert_allclose(
                    history[group][name][index], number, rtol=2e-5, atol=1e-6
                )
    rates = history["all"]["learning_rate"]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.05, 0.05, 0.0], atol=1e-7)  # every other step
    # A rate of zero: no nan but where there is no equilibrium.
    last = measurements(state)["all"]
    assert last["effective_learning_rate"] == last["decay_share"] == last["rotation"] == 0
    assert last["equilibrium_norm"] is None


def test_the_learning_rate_may_come_from_injected_hyperparams() -> None:
    inner = optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 10))
    tx = optax.chain(inner, monitor_weight_decay(weight_decay=DECAY))
    state, update = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
    for _ in range(3):
        rate = state[0].hyperparams["learning_rate"]
        _, state = update(UPDATES, state, PARAMS, learning_rate=rate)
    assert measurements(state)["all"]["learning_rate"] == pytest.approx(float(rate))


def test_the_monitor_inside_injected_hyperparams_takes_theirs() -> None:
    def make(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        adamw = optax.adamw(learning_rate, weight_decay=weight_decay)
        monitor = monitor_weight_decay(learning_rate=learning_rate, weight_decay=weight_decay)
        return optax.chain(adamw, monitor)

    tx = optax.inject_hyperparams(make)(optax.linear_schedule(0.1, 0.0, 10), DECAY)
    state, update = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
    for _ in range(2):
        _, state = update(UPDATES, state, PARAMS)
    numbers = measurements(state)["all"]
    assert numbers["learning_rate"] == pytest.approx(0.09)
    assert numbers["weight_decay"] == pytest.approx(DECAY)


def test_unknown_rates_leave_the_rest() -> None:
    numbers = measure(learning_rate=None, weight_decay=None)["all"]
    for name in ("learning_rate", "weight_decay", "effective_learning_rate", "decay_share"):
        assert numbers[name] is None
    assert numbers["rotation"] == pytest.approx(measure()["all"]["rotation"], rel=1e-5)
    numbers = measure(weight_decay=None)["all"]
    assert numbers["decay_share"] is None
    assert numbers["effective_learning_rate"] > 0


def test_without_decay_there_is_no_prediction() -> None:
    numbers = measure(weight_decay=0.0)["matrices"]
    assert numbers["equilibrium_norm"] is None
    assert numbers["equilibrium_rotation"] is None
    assert numbers["rotation_ratio"] is None
    assert numbers["decay_share"] == 0.0


def test_weights_of_zero_and_empty_leaves_have_finite_numbers() -> None:
    zeros = lambda *shape: np.zeros(shape, np.float32)
    params = {"kernel": zeros(2, 2), "none": zeros(0, 3), "count": np.int32(3)}
    numbers = measure(params, params | {"kernel": zeros(2, 2) + 1})["all"]
    assert numbers["rotation"] == numbers["relative_update"] == 0.0
    assert all(x is None or np.isfinite(x) for x in numbers.values())
    assert measure({}, {})["all"]["weight_norm"] == 0.0


def test_weights_that_diverged_are_seen() -> None:
    params = jax.tree.map(np.copy, PARAMS)
    for leaf in jax.tree.leaves(params):
        leaf[..., 0] = np.nan
    numbers = measure(params)
    assert np.isnan(numbers["all"]["weight_norm"])
    only = PARAMS | {"embed": params["embed"]}
    assert np.isfinite(measure(only)["matrices"]["weight_norm"])


def test_masked_and_multi_steps_measure_what_they_let_through() -> None:
    is_embedding = lambda tree: {"blocks": False, "embed": True}
    tx = optax.masked(monitor_weight_decay(learning_rate=RATE), is_embedding)
    run = jax.jit(lambda updates, params: tx.update(updates, tx.init(params), params)[1])
    numbers = measurements(run(UPDATES, PARAMS))
    assert list(numbers) == ["all", "embeddings"]
    both = optax.chain(optax.sgd(RATE), monitor_weight_decay(learning_rate=RATE))
    tx = optax.MultiSteps(both, 2)
    state, update = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
    for _ in range(2):
        _, state = update(UPDATES, state, PARAMS)
    numbers = measurements(state)["all"]
    wanted = expected(jax.tree.leaves(PARAMS), [-RATE * u for u in jax.tree.leaves(UPDATES)])
    assert numbers["rotation"] == pytest.approx(wanted["rotation"], rel=1e-3)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_sharded_parameters_are_measured_whole(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    specs = {
        "blocks": {
            "norm": {"scale": PartitionSpec("x", "y")},
            "up": {"kernel": PartitionSpec("x", None, "y"), "bias": PartitionSpec(None, "y")},
        },
        "embed": {"embedding": PartitionSpec(None, "x")},
    }
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params, updates = (jax.tree.map(place, tree, specs) for tree in (PARAMS, UPDATES))
    with jax.set_mesh(mesh):
        sharded = measure(params, updates)
    for group, numbers in measure().items():
        assert sharded[group] == pytest.approx(numbers, rel=1e-5)


def test_the_state_is_read_from_an_nnx_optimizer() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.adamw(0.1), monitor_weight_decay(learning_rate=0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
    for _ in range(2):
        before = np.asarray(model.kernel[...])
        update(optimizer, model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    numbers = measurements(optimizer.opt_state)
    assert list(numbers) == ["all", "biases", "matrices"]
    assert numbers["matrices"]["weight_norm"] == pytest.approx(np.linalg.norm(before), rel=1e-5)


def test_bad_arguments_are_named() -> None:
    for arguments, error, words in (
        ({"every": 0}, ValueError, "every=0"),
        ({"every": 2.0}, TypeError, "every=2.0"),
        ({"groups": "matrices"}, TypeError, "groups='matrices'"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate=-1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0"),
        ({"optimizer": "lion"}, ValueError, "optimizer='lion'"),
        ({"momentum": 1}, ValueError, "momentum=1"),
    ):
        with pytest.raises(error, match=words):
            monitor_weight_decay(**arguments)


def test_what_is_missing_at_an_update_is_named() -> None:
    tx = monitor_weight_decay()
    with pytest.raises(ValueError, match="needs params"):
        tx.update(UPDATES, tx.init(PARAMS))
    with pytest.raises(TypeError, match="groups gave 3"):
        monitor_weight_decay(groups=lambda path: 3).init(PARAMS)
    make = lambda every: monitor_weight_decay(every=every)
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(make)(every=2).init(PARAMS)
