"""Updates in slices give what whole leaves give, and say where they cannot."""

import functools
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.slices import CannotCutError

STACKED = lambda params: jax.tree.map(
    lambda x: lro.WeightDimensionNumbers(-2, -1) if x.ndim > 2 else None, params
)
RANK = {"rank": 4, "weight_dimension_numbers": STACKED}
SMALL = {"min_size": 100, "block_size": 32}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "low_bit-8": lambda: lro.low_bit(optax.adamw(1e-2), **SMALL),
    "low_bit-4": lambda: lro.low_bit(optax.adamw(1e-2), 4, **SMALL),
    "in_float32": lambda: lro.in_float32(optax.adamw(1e-2)),
    "cautious": lambda: lro.cautious_adamw(1e-2, weight_dimension_numbers=STACKED),
    "galore": lambda: lro.galore(1e-2, refresh_every=2, **RANK),
    "galore-8": lambda: lro.low_bit(
        lro.galore(1e-2, refresh_every=2, basis_bits=16, **RANK), **SMALL
    ),
    "staggered": lambda: lro.low_bit(
        lro.galore(1e-2, refresh_every=lro.refresh.every(3, stagger=True), **RANK), **SMALL
    ),
    "reset": lambda: lro.galore(1e-2, refresh_every=2, on_refresh="reset", **RANK),
    "accumulated": lambda: lro.galore(1e-2, refresh_every=1, accumulate_steps=2, **RANK),
    "apollo": lambda: lro.apollo(1e-2, refresh_every=2, **RANK),
    "fira": lambda: lro.fira(1e-2, refresh_every=2, **RANK),
    "ldadam": lambda: lro.ldadam(1e-2, **RANK),
    "dct_adamw": lambda: lro.dct_adamw(1e-2, **RANK),
    "adarankgrad": lambda: lro.adarankgrad(1e-2, refresh_every=2, **RANK),
    "online": lambda: lro.online_subspace_descent(1e-2, **RANK),
}
# An odd vocabulary; layers of experts; a matrix of odd rows; leaves too small to cut.
SHAPES = {
    "embed": (67, 16),
    "layers": {"up": (6, 16, 32), "down": (6, 33, 16), "norm": (6, 16)},
    "experts": (4, 3, 8, 16),
    "bias": (7,),
    "scalar": (),
}


def normal(seed: int, dtype: Any = jnp.float32) -> Any:
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.standard_normal(s), dtype) for s in shapes])


def trained(step: Any, tx: Any, dtype: Any = jnp.float32, steps: int = 3) -> Any:
    params = normal(0, dtype)
    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, normal(1 + i, dtype))
    return params, state


@functools.cache
def trained_whole(name: str) -> Any:
    """What each number of slices is compared with."""
    tx = OPTIMIZERS[name]()
    return trained(updating(lro.in_slices(tx, slices="off")), tx)


def updating(tx: Any) -> Any:
    @jax.jit
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def applying(tx: Any, slices: int) -> Any:
    return jax.jit(lambda *args: lro.apply_in_slices(tx, *args, slices=slices))


IN_FULL = ["in_float32", "galore", "reset", "accumulated", "dct_adamw", "adarankgrad", "online"]
IN_FULL += ["low_bit-8", "apollo", "staggered"]  # the first two are cut into five below
EACH = [pytest.param(name, marks=[pytest.mark.full] * (name in IN_FULL)) for name in OPTIMIZERS]


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_slices_change_nothing(name: str) -> None:
    tx = OPTIMIZERS[name]()
    whole = trained_whole(name)
    sliced = trained(updating(lro.in_slices(tx, slices=4)), tx)
    assert jax.tree.structure(sliced) == jax.tree.structure(whole)
    assert_close(sliced, whole, units=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["low_bit-4", *(pytest.param(name, marks=pytest.mark.full) for name in ("galore-8", "fira"))],
)
def test_a_whole_step_in_slices_is_an_update_and_its_application(name: str) -> None:
    tx = OPTIMIZERS[name]()
    assert_close(trained(applying(tx, 3), tx), trained_whole(name), units=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "slices", [5, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 6, 100))]
)
def test_the_number_of_slices_does_not_matter(slices: int) -> None:
    for name in ("low_bit-8", "apollo"):
        tx = OPTIMIZERS[name]()
        whole = trained(updating(lro.in_slices(tx, slices="off")), tx, jnp.bfloat16)
        sliced = trained(updating(lro.in_slices(tx, slices=slices)), tx, jnp.bfloat16)
        assert_close(sliced[0], whole[0], units=2)


def test_a_bad_layer_stays_alone() -> None:
    tx = lro.in_slices(OPTIMIZERS["galore-8"](), slices=6)
    params, gradients = normal(0), normal(1)
    poisoned = {**gradients, "layers": {**gradients["layers"]}}
    poisoned["layers"]["up"] = poisoned["layers"]["up"].at[3, 2, 1].set(jnp.nan)
    update = jax.jit(tx.update)
    clean, _ = update(gradients, tx.init(params), params)
    updates, _ = update(poisoned, tx.init(params), params)
    others = np.array([0, 1, 2, 4, 5])
    for name, x in clean["layers"].items():
        taken = others if name == "up" else np.arange(6)
        np.testing.assert_array_equal(updates["layers"][name][taken], x[taken])
    assert not np.isfinite(np.asarray(updates["layers"]["up"][3])).all()


def test_steps_are_counted_once_and_schedules_see_them() -> None:
    seen = lambda count: 1.0 * count
    tx = lro.in_slices(
        optax.chain(optax.scale_by_adam(eps=0), optax.scale_by_schedule(seen)), slices=6
    )
    params, state = normal(0), tx.init(normal(0))
    for i in range(3):
        updates, state = jax.jit(tx.update)(normal(1), state, params)
        # Adam's first steps on one gradient are its signs.
        assert_close(jnp.abs(updates["layers"]["up"]), jnp.full((6, 16, 32), float(i)), size=3.0)
    assert [part.count for part in state] == [3, 3]


def test_a_refresh_of_one_layer_runs_one_branch() -> None:
    found: list[int] = []
    rule = lro.subspaces.randomized_svd(2)

    def refresh(key: Any, matrix: Any, basis: Any, momentum: Any, view: Any) -> Any:
        jax.debug.callback(lambda: found.append(1))
        return rule.refresh(key, matrix, basis, momentum, view)

    counted = rule._replace(refresh=refresh)
    tx = lro.scale_by_projection(
        optax.scale_by_adam(), counted, refresh_every=5, weight_dimension_numbers=STACKED
    )
    sliced, params = lro.in_slices(tx, slices=6), {"up": normal(0)["layers"]["up"]}
    _, state = jax.jit(sliced.update)(params, sliced.init(params))
    jax.effects_barrier()
    assert len(found) == 6
    due = state._replace(next_refresh={"up": state.next_refresh["up"].at[2].set(1)})
    jax.jit(sliced.update)(params, due)
    jax.effects_barrier()
    assert len(found) == 7


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        ("clip_by_global_norm", optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))),
        ("scale_by_trust_ratio", optax.lamb(1e-3)),
        ("clip_by_block_rms", optax.masked(optax.clip_by_block_rms(1.0), {"a": True})),
        ("scale_by_novograd", optax.novograd(1e-3)),
        ("normalize_by_update_norm", optax.normalize_by_update_norm()),
        ("adafactor", optax.inject_hyperparams(optax.adafactor)(learning_rate=1e-3)),
        (
            "clip_by_global_norm",
            optax.MultiSteps(
                optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), 2
            ).gradient_transformation(),
        ),
        ("prodigy", optax.partition({"a": optax.contrib.prodigy()}, lambda tree: tree)),
    ],
)
def test_what_looks_at_whole_leaves_is_refused_by_name(name: str, tx: Any) -> None:
    with pytest.raises(ValueError, match=name):
        lro.in_slices(tx)


def test_an_unknown_sum_over_leaves_is_found_in_its_program() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        total = sum(jnp.sum(x) for x in jax.tree.leaves(updates))
        return jax.tree.map(lambda x: x * total, updates), state

    tx = lro.in_slices(optax.GradientTransformation(lambda params: (), update), slices=2)
    with pytest.raises(ValueError, match="depends on others"):
        tx.update(normal(0), ())
    # Inside our own transformations, where nobody asked for slices, it runs whole.
    inner = optax.chain(optax.GradientTransformation(lambda params: (), update), optax.adam(0.1))
    own = lro.low_bit(inner, **SMALL)
    own.update(normal(0), own.init(normal(0)))


class Summed:
    """An update that is an object."""

    def __call__(self, updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda x: x * optax.tree.norm(updates), updates), state


@pytest.mark.parametrize("update", [Summed(), jax.jit(Summed()), Summed().__call__])
def test_an_update_of_any_kind_is_looked_at(update: Any) -> None:
    tx = lro.in_slices(optax.GradientTransformation(lambda params: (), update), slices=2)
    with pytest.raises(ValueError, match="depends on others"):
        tx.update(normal(0)["layers"], ())


def test_an_unknown_mean_over_layers_is_found_by_trying() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda x: x - jnp.mean(x, axis=0), updates), state

    tx = lro.in_slices(optax.GradientTransformation(lambda params: (), update), slices=2)
    with pytest.raises(ValueError, match="no leaf"):
        tx.update(normal(0)["layers"], ())


def test_a_norm_of_the_whole_tree_may_come_before() -> None:
    clip, adam = optax.clip_by_global_norm(0.1), optax.adam(1e-2)
    together = optax.chain(clip, adam)
    sliced = lro.in_slices(adam, slices=3, before=[clip])
    assert_close(trained(updating(sliced), sliced), trained(updating(together), together))


def test_equal_layers_are_rounded_apart_and_right_on_average() -> None:
    tx = lro.in_slices(lro.round_updates(), slices=4)
    params = {"w": jnp.ones((4, 50, 100), jnp.bfloat16), "v": jnp.ones((4, 50, 100), jnp.bfloat16)}
    change = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-9), params)  # a quarter of a step
    updates, _ = jax.jit(tx.update)(change, tx.init(params), params)
    drawn = np.concatenate([np.asarray(x > 0).reshape(4, -1) for x in updates.values()])
    assert len({tuple(row) for row in drawn}) == 8
    assert abs(drawn.mean() - 0.25) < 0.01  # five standard deviations


def test_weights_in_8_bits_are_updated_in_slices() -> None:
    tx = lro.update_int8_weights(optax.adam(optax.linear_schedule(0.05, 0.0, 100)))
    target = normal(3)["layers"]["up"]
    params = lro.to_int8_weights({"up": jnp.zeros_like(target)}, min_size=100)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        gradients = jax.grad(lambda p: jnp.sum((p["up"] - target) ** 2))(
            lro.from_int8_weights(params)
        )
        return lro.apply_in_slices(tx, params, state, gradients, slices=3), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=100))((params, tx.init(params)))
    error = jnp.abs(lro.from_int8_weights(params)["up"] - target)
    assert jnp.mean(error) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slices": 0}, "slices=0 must be"),
        ({"slices": "on"}, "slices='on' must be"),
        ({"budget_bytes": 0.5}, "budget_bytes=0.5 must be"),
        ({"slices": 2, "budget_bytes": 10}, "give one of them"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.in_slices(optax.sgd(1.0), **arguments)


def test_nothing_to_cut_is_refused_where_a_number_was_asked_for() -> None:
    tx = lro.in_slices(optax.sgd(1.0), slices=2)
    with pytest.raises(CannotCutError, match="slices=2 can cut no leaf"):
        tx.update({"bias": jnp.ones(3)}, tx.init({"bias": jnp.ones(3)}))


def test_composed_with_wrappers_of_optax() -> None:
    tx = lro.low_bit(optax.scale_by_adam(), **SMALL)
    wrapped = {
        "masked": optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
        "partition": optax.partition(
            {"stacked": tx, "rest": optax.sgd(1.0)},
            lambda p: jax.tree.map(lambda x: "stacked" if x.ndim > 2 else "rest", p),
        ),
        "multi": optax.MultiSteps(tx, 2).gradient_transformation(),
        "injected": optax.inject_hyperparams(lro.galore, static_args=list(RANK))(1e-2, **RANK),
    }
    for outer in wrapped.values():
        whole = trained(updating(lro.in_slices(outer, slices="off")), outer)
        assert_close(trained(updating(lro.in_slices(outer, slices=3)), outer), whole, units=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low_bit-8", "galore"])
def test_models_side_by_side(name: str) -> None:
    """Under vmap: each model gets what it gets alone."""
    tx = lro.in_slices(OPTIMIZERS[name](), slices=3)
    models = [{"up": normal(seed)["layers"]["up"]} for seed in (1, 2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *models)
    step = lambda params: tx.update(params, tx.init(params), params)
    alone = [jax.jit(step)(params) for params in models]
    together = jax.jit(jax.vmap(step))(stacked)
    assert_close(together, jax.tree.map(lambda *xs: jnp.stack(xs), *alone), units=300)


@pytest.mark.slow
def test_in_the_optimizer_of_nnx() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Param(normal(0)["layers"]["up"])

    found = []
    for slices in ("off", 3):
        model = Model()
        tx = lro.in_slices(lro.low_bit(optax.adam(1e-2), **SMALL), slices=slices)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model: Model, optimizer: nnx.Optimizer) -> None:
            loss = lambda model: jnp.sum(jnp.square(model.up[...]))
            optimizer.update(model, nnx.grad(loss)(model))

        for _ in range(2):
            step(model, optimizer)
        found.append(model.up[...])
    assert_close(found[1], found[0], units=300)
