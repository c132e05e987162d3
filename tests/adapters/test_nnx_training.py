"""Training adapters: what moves, what does not, what is kept for it, and what is saved."""

from pathlib import Path
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from tests.adapters.nnx_models import (
    Scanned,
    Unrolled,
    call,
    gradients,
    loss_of,
    randomized,
    tokens,
    weights,
)

LoRA, trainable = lro.adapters.LoRA, lro.adapters.trainable


@nnx.jit
def train_step(model: Any, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    """One step on `loss_of`."""
    with_gradient = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, trainable))
    loss, grads = with_gradient(model, x)
    optimizer.update(model, grads)
    return loss


def adapted(depth: int = 2, method: Any = None, dtype: Any = jnp.float32) -> Any:
    model = Scanned(depth, nnx.Rngs(0), dtype)
    return lro.adapters.attach(model, method or LoRA(rank=2, alpha=3), rngs=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.adam(0.05), id="adam", marks=pytest.mark.full),
        pytest.param(optax.MultiSteps(optax.adam(0.05), 2), id="MultiSteps"),
        pytest.param(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5, momentum=0.9)),
            id="clipped momentum",
            marks=pytest.mark.full,
        ),
    ],
)
def test_steps_lower_the_loss_and_move_the_adapter_alone(tx: Any) -> None:
    model = adapted()
    own = weights(model)
    optimizer = nnx.Optimizer(model, tx, wrt=trainable)
    losses = [float(train_step(model, optimizer, tokens())) for _ in range(8)]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, weights(model), own)


def test_frozen_weights_have_no_optimizer_state() -> None:
    model = adapted()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=trainable)
    shapes = {x.shape for x in jax.tree.leaves(nnx.state(optimizer.opt_state)) if x.ndim}
    assert shapes == {(2, 6, 2), (2, 2, 12), (2, 12, 2), (2, 2, 6)}


@pytest.mark.slow
def test_gradients_flow_through_frozen_weights_to_layers_below() -> None:
    model = Unrolled(2, nnx.Rngs(0))
    lro.adapters.attach(model, LoRA(rank=2, initial="random"), "blocks/0", rngs=0)
    assert all(np.any(g) for g in jax.tree.leaves(gradients(model, tokens())))


def test_no_gradient_of_a_weights_shape_is_computed() -> None:
    model = Unrolled(1, nnx.Rngs(0))
    lro.adapters.attach(model, LoRA(rank=2), rngs=0)
    graphdef, trained, rest = nnx.split(model, trainable, ...)
    loss = lambda trained, rest: loss_of(nnx.merge(graphdef, trained, rest), tokens())
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(trained, rest))
    with pytest.warns(UserWarning, match="frozen weight"):
        both = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1), allow_int=True))(trained, rest))
    up = "f32[6,12] = "  # written where one is computed
    assert up in both
    assert up not in jaxpr


@pytest.mark.slow
def test_a_training_step_needs_no_memory_of_the_size_of_the_stacked_weights() -> None:
    depth, width = 8, 128

    class Model(nnx.Module):
        def __init__(self) -> None:
            make = lambda rngs: nnx.Linear(width, width, rngs=rngs)
            self.layers = nnx.vmap(make)(nnx.Rngs(0).split(depth))

        def __call__(self, x: jax.Array) -> jax.Array:
            run = lambda layer, x: jnp.tanh(layer(x))
            return nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)

    def bytes_made(model: Any, wrt: Any) -> int:
        graphdef, *states = nnx.split(model, wrt, ...)
        trained, rest = map(nnx.as_pure, states)

        def loss(trained: Any, x: jax.Array, rest: Any) -> jax.Array:
            return loss_of(nnx.merge(graphdef, trained, rest), x)

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = grad.lower(trained, jnp.ones((4, width)), rest).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    plain = bytes_made(Model(), lambda path, x: False)
    model = lro.adapters.attach(Model(), LoRA(rank=2), ".*", rngs=0)
    # Less than two layers' weights beside what the plain model needs for its input's gradient.
    assert bytes_made(model, trainable) < plain + 2 * width * width * 4
    with pytest.warns(UserWarning, match="frozen weight"):
        everything = bytes_made(model, nnx.Param)
    assert everything > plain + 2 * width * width * 4


@pytest.mark.slow
def test_donated_buffers_are_used() -> None:
    model = adapted()
    graphdef, *states = nnx.split(model, trainable, ...)
    trained, rest = map(nnx.as_pure, states)

    def step(trained: Any, rest: Any) -> Any:
        loss = lambda trained: loss_of(nnx.merge(graphdef, trained, rest), tokens())
        return jax.tree.map(lambda p, g: p - 0.1 * g, trained, jax.grad(loss)(trained))

    kept = jax.tree.map(jnp.copy, trained)
    expected = jax.jit(step)(kept, rest)
    after = jax.jit(step, donate_argnums=0)(trained, rest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(trained))


@pytest.mark.slow
def test_a_bfloat16_model_trains_adapters_in_float32() -> None:
    model = adapted(dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=trainable)
    losses = [float(train_step(model, optimizer, tokens())) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert nnx.eval_shape(lambda model: model(tokens()), model).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, trainable))} == {jnp.dtype("float32")}


def test_parameters_of_the_model_can_be_trained_beside_and_get_their_types_back() -> None:
    model = adapted()
    graphdef = nnx.graphdef(Scanned(2, nnx.Rngs(0)))
    assert lro.adapters.also_train(model, "^head") == ["head/bias", "head/kernel"]
    with pytest.raises(ValueError, match=r"where='haed' matches no parameter; near it are: .*head"):
        lro.adapters.also_train(model, "haed")
    own = weights(model)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=trainable)
    train_step(model, optimizer, tokens())
    moved = {path for path, x in weights(model).items() if np.any(x != own[path])}
    assert moved == {"head/bias", "head/kernel"}
    assert isinstance(model.head.kernel, nnx.Param)
    lro.adapters.detach(model)
    assert nnx.graphdef(model) == graphdef


def test_a_parameter_of_a_users_own_type_keeps_it_while_it_is_also_trained() -> None:
    class Kernel(nnx.Param):
        """A user's."""

    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    model.kernel = Kernel(model.kernel[...])
    graphdef = nnx.graphdef(model)
    lro.adapters.attach(model, LoRA(rank=1), ".*", rngs=0)
    lro.adapters.also_train(model, "kernel")
    lro.adapters.also_train(model, "kernel")
    assert set(nnx.state(model, Kernel)) == {"kernel"}
    assert set(nnx.state(model, trainable)) == {"kernel", "adapters"}
    lro.adapters.detach(model)
    assert nnx.graphdef(model) == graphdef


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "arrays/B$",
        *(  # both also in test_phases.py
            pytest.param(names, marks=pytest.mark.full)
            for names in ("B", lambda path, x: path[-1] == "B")
        ),
    ],
)
def test_arrays_that_are_frozen_lose_their_gradient_and_state(names: Any) -> None:
    model = randomized(adapted())
    after = call(model, tokens())
    frozen = lro.adapters.freeze_arrays(model, names)
    assert frozen == [f"blocks/{n}/adapters/default/arrays/B" for n in ("down", "up")]
    assert_close(call(model, tokens()), after)
    grads = gradients(model, tokens())["blocks"]
    assert {n: list(grads[n]["adapters"]["default"]["arrays"]) for n in grads} == {
        "down": ["A"],
        "up": ["A"],
    }
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=trainable)
    assert len([x for x in jax.tree.leaves(nnx.state(optimizer.opt_state)) if x.ndim]) == 4
    train_step(model, optimizer, tokens())
    with pytest.raises(ValueError, match="matches no trained array"):
        lro.adapters.freeze_arrays(model, names)
    lro.adapters.merge(model)


@pytest.mark.parametrize("what", [trainable, ...])
def test_orbax_saves_and_restores_adapters_or_the_whole_model(tmp_path: Path, what: Any) -> None:
    method = LoRA(rank=2, alpha=3, dropout=0.1)
    model, other = adapted(method=method), adapted(method=method)
    expected = randomized(model).eval() or call(model, tokens())
    not_keys = nnx.Not(nnx.RngState) if what is ... else what
    state = nnx.to_pure_dict(nnx.state(model, not_keys))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapter", state)
        checkpointer.wait_until_finished()
        target = nnx.state(other, not_keys)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(target))
        restored = checkpointer.restore(tmp_path / "adapter", abstract)
    nnx.replace_by_pure_dict(target, restored)
    nnx.update(other, target)
    same = np.testing.assert_array_equal
    jax.tree.map(same, nnx.to_pure_dict(nnx.state(other, not_keys)), state)
    other.eval()
    assert_close(call(other, tokens()), expected)


@pytest.mark.slow
def test_a_step_may_use_the_base_as_its_reference_and_donate_the_model() -> None:
    model = adapted()
    lro.adapters.also_train(model, "^head")
    with lro.adapters.disabled(model):
        before = call(model, tokens())
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=trainable)

    def loss(model: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        with lro.adapters.disabled(model):
            reference = model(x)
        return jnp.mean((model(x) - reference - 1) ** 2), reference

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        of = nnx.DiffState(0, trainable)
        (value, reference), grads = nnx.value_and_grad(loss, argnums=of, has_aux=True)(model, x)
        optimizer.update(model, grads)
        return value, reference

    losses = []
    for _ in range(4):
        value, reference = step(model, optimizer, tokens())
        losses.append(float(value))
        assert_close(reference, before)
    assert losses[-1] < losses[0]
    with lro.adapters.disabled(model):
        np.testing.assert_array_equal(call(model, tokens()), before)
