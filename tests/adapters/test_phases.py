"""The second phase: what is frozen costs neither its gradient nor its state any more."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import byte_count

D, WIDTH, RANK, ROWS, LAYERS = 12, 20, 4, 32, 2
X = np.random.default_rng(0).normal(size=(ROWS, D)).astype(np.float32)


class Model(nnx.Module):
    """Two scanned layers, each of a wide and a narrow projection."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = lambda d_in, d_out: nnx.vmap(
            lambda rngs: nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs), axis_size=LAYERS
        )(rngs.split(LAYERS))
        self.up, self.down = make(D, WIDTH), make(WIDTH, D)

    def __call__(self, x: jax.Array) -> jax.Array:
        layer = lambda x, up, down: x + down(jnp.tanh(up(x)))
        return nnx.scan(layer, in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)(x, self.up, self.down)


def adapted(method: lro.adapters.Adapter) -> Model:
    model = Model(nnx.Rngs(0))
    return lro.adapters.attach(model, method, where="up|down", rngs=1)  # type: ignore[return-value]


def loss(model: Model) -> jax.Array:
    return jnp.mean(jnp.square(model(X) - 1))


def step_of() -> Callable[[Model, nnx.Optimizer], jax.Array]:
    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
        wrt = nnx.DiffState(0, lro.adapters.trainable)
        value, gradients = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, gradients)
        return value

    return step


def next_phase(model: Model, optimizer: nnx.Optimizer, tx: Any, names: Any) -> nnx.Optimizer:
    lro.adapters.freeze_arrays(model, names)
    new = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable)
    nnx.update(new, lro.adapters.carry_state(nnx.state(new), nnx.state(optimizer)))
    return new


def backward_flops(model: Model) -> float:
    wrt = nnx.DiffState(0, lro.adapters.trainable)
    gradient = nnx.jit(lambda model: nnx.grad(loss, argnums=wrt)(model))
    return gradient.lower(model).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_after_lamdas_freezing_the_gradient_of_b_and_its_moments_are_gone() -> None:
    model = adapted(lro.adapters.LaMDA(rank=RANK, core_init="sigma"))
    tx = lro.adapters.lamda_freezing(optax.adamw(1e-2, weight_decay=0.0), 10, 0.3)
    optimizer, step = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable), step_of()
    losses = [float(step(model, optimizer)) for _ in range(4)]
    b = model.up.adapters["default"].arrays["B"][...]
    flops, size = backward_flops(model), byte_count(nnx.state(optimizer))

    optimizer = next_phase(model, optimizer, tx, "B")
    assert int(optimizer.opt_state.count[...]) == 4
    step = step_of()
    losses += [float(step(model, optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(model.up.adapters["default"].arrays["B"][...], b)

    moments = 2 * 4 * LAYERS * RANK * (WIDTH + D)
    assert size - byte_count(nnx.state(optimizer)) == moments
    # dB = (x A S)ᵀ g of a narrow and a wide projection; the compiler counts a scan's body once.
    assert flops - backward_flops(model) >= 2 * ROWS * RANK * (WIDTH + D)


@pytest.mark.slow
def test_phases_give_what_one_phase_gives() -> None:
    """Freezing by the masked optimizer alone and by phases: the same parameters."""
    tx = lro.adapters.lamda_freezing(optax.adam(1e-2), 10, 0.3)
    found = []
    for in_phases in (False, True):
        model = adapted(lro.adapters.LaMDA(rank=RANK))
        optimizer, step = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable), step_of()
        for t in range(6):
            if in_phases and t == 3:  # 0.3 of 10 steps
                optimizer, step = next_phase(model, optimizer, tx, "B"), step_of()
            step(model, optimizer)
        found.append(nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *found)


@pytest.mark.slow
def test_after_afloras_freezing_the_gradients_of_the_factors_are_gone() -> None:
    model = adapted(lro.adapters.AFLoRA(rank=RANK))
    run = {"total_steps": 40, "warmup_steps": 10, "final_steps": 20}
    tx = lro.adapters.aflora_freezing(optax.adamw(1e-2, weight_decay=0.1), **run)
    optimizer, step = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable), step_of()
    assert lro.adapters.frozen_leaves(nnx.state(optimizer)) == ()
    for _ in range(22):
        step(model, optimizer)
    frozen = lro.adapters.frozen_leaves(nnx.state(optimizer))
    assert sorted(frozen) == [
        f"{layer}/adapters/default/arrays/{name}" for layer in ("down", "up") for name in "AB"
    ]
    flops, size = backward_flops(model), byte_count(nnx.state(optimizer))
    chosen = lambda path, _: "/".join(map(str, path)) in frozen
    before = nnx.to_pure_dict(nnx.state(model, lro.adapters.trainable))
    optimizer, step = next_phase(model, optimizer, tx, chosen), step_of()
    step(model, optimizer)

    after = nnx.to_pure_dict(nnx.state(model))
    for layer in ("up", "down"):
        old, new = (t[layer]["adapters"]["default"]["arrays"] for t in (before, after))
        for name in "AB":
            np.testing.assert_array_equal(old[name], new[name])
        for name in "db":
            assert np.any(old[name] != new[name])
    factors = LAYERS * RANK * (D + WIDTH) * 2
    flags = 2 * 2 * LAYERS
    assert size - byte_count(nnx.state(optimizer)) == 4 * (2 + 3) * factors + flags
    # dA = xᵀ (g Bᵀ) is gone at each of the four adapters; xᵀ of N rows, d_in by r.
    assert flops - backward_flops(model) >= 2 * ROWS * RANK * (D + WIDTH)


def test_states_are_carried_by_their_paths() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(0.1)))
    params = {"S": jnp.ones(2), "B": {"B": jnp.ones(3)}}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state)
    fewer = {"S": params["S"]}
    carried = lro.adapters.carry_state(jax.eval_shape(tx.init, fewer), state)
    assert jax.tree.structure(carried) == jax.tree.structure(tx.init(fewer))
    adam, schedule = carried[1]
    assert adam.count == schedule.count == 3
    np.testing.assert_array_equal(adam.mu["S"], state[1][0].mu["S"])
    np.testing.assert_array_equal(adam.nu["S"], state[1][0].nu["S"])
    jax.eval_shape(tx.update, fewer, carried)


def test_states_that_do_not_belong_together_are_refused() -> None:
    params = {"S": jnp.ones(2), "B": jnp.ones(3)}
    state = optax.adam(0.1).init({"S": jnp.ones(2)})
    with pytest.raises(ValueError, match="0/mu/B of the new state is not in the old one"):
        lro.adapters.carry_state(optax.adam(0.1).init(params), state)
    with pytest.raises(ValueError, match=r"0/mu/S is float32\(3,\) in the new state"):
        lro.adapters.carry_state(optax.adam(0.1).init({"S": jnp.ones(3)}), state)
