"""The harness refuses what it should: each broken transformation fails the check made for it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import harness
from harness import Check, Convergence, Row, name_of
import jax
import jax.numpy as jnp
import optax
import pytest

Tree = Any
Leafwise = Callable[[jax.Array], jax.Array]
Update = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
Factory = Callable[..., optax.GradientTransformation]


class State(NamedTuple):
    """The state of the broken transformations."""

    count: Any
    basis: Tree = None


class Moments(NamedTuple):
    first: jax.Array
    second: jax.Array


def sgd(init: Callable[[Tree], Tree], update: Update) -> Factory:
    """A factory for gradient descent with this transformation before it."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        tx = optax.GradientTransformation(init, update)
        return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))

    return factory


def leafwise(function: Leafwise) -> Factory:
    """One that treats every leaf alike and has no state."""
    update = lambda updates, state, params: (jax.tree.map(function, updates), state)
    return sgd(lambda params: optax.EmptyState(), update)


def treewise(function: Callable[[Tree], Tree]) -> Factory:
    """One that looks at the whole tree and has no state."""
    update = lambda updates, state, params: (function(updates), state)
    return sgd(lambda params: optax.EmptyState(), update)


def treewise_init(function: Callable[[Tree], Tree]) -> Factory:
    """One that has a state and makes no use of it."""
    return sgd(lambda params: State(function(params)), lambda updates, state, _: (updates, state))


def counted(first: Any) -> Factory:
    """One that counts its steps from this number."""
    update = lambda updates, state, params: (updates, State(state.count + jnp.int32(1)))
    return sgd(lambda params: State(first), update)


def momentum(zeros: Leafwise = jnp.zeros_like, dtype: Any = None) -> Factory:
    """With momentum that is made by `zeros`, and kept in this dtype from the first step on."""

    def update(updates: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        basis = jax.tree.map(lambda b, g: (0.5 * b + g).astype(dtype), state.basis, updates)
        return optax.tree.cast_like(basis, updates), State(state.count + 1, basis)

    init = lambda params: State(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))
    return sgd(init, update)


def basis_of_any_gradient() -> Factory:
    """Takes every third gradient for its basis, whatever is in it."""

    def update(updates: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        refresh = state.count % 3 == 0
        basis = jax.tree.map(lambda b, g: jnp.where(refresh, g, b), state.basis, updates)
        return updates, State(state.count + 1, basis)

    init = lambda params: State(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))
    return sgd(init, update)


def one_buffer_twice() -> Factory:
    def init(params: Tree) -> State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.zeros([], jnp.int32), (zeros, zeros))

    return sgd(init, lambda updates, state, params: (updates, state))


def container_for_each_parameter() -> Factory:
    def add(gradient: jax.Array, first: jax.Array, second: jax.Array) -> Moments:
        return Moments(first + gradient, second + gradient**2)

    def update(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        state = jax.tree.map(lambda g, moments: add(g, *moments), updates, state)
        is_moments = lambda x: isinstance(x, Moments)
        return jax.tree.map(lambda m: m.first, state, is_leaf=is_moments), state

    return sgd(lambda p: jax.tree.map(lambda x: Moments(0 * x, 0 * x), p), update)


def scaled_by_calls() -> Factory:
    """Counts its calls in Python, not in its state."""
    calls = count(1)
    return treewise(lambda updates: optax.tree.scale(next(calls), updates))


def divided_by_global_norm(updates: Tree) -> Tree:
    return optax.tree.scale(1 / (optax.tree.norm(updates) + 1), updates)


def scaled_by_layer_size(updates: Tree) -> Tree:
    """Counts `MaskedNode` among the parameters of a layer."""
    return {name: optax.tree.scale(len(layer), layer) for name, layer in updates.items()}


def cast_to_first(updates: Tree) -> Tree:
    """Needs a first leaf, and gives its dtype to all others."""
    return optax.tree.cast(updates, jax.tree.leaves(updates)[0].dtype)


def other_rate_for_function(
    learning_rate: float, weight_dimension_numbers: Any = None
) -> optax.GradientTransformation:
    return optax.sgd(learning_rate * (1 + callable(weight_dimension_numbers)))


def rounded_when_traced(learning_rate: Any) -> optax.GradientTransformation:
    is_array = isinstance(learning_rate, jax.Array)
    return optax.sgd(learning_rate.astype(jnp.bfloat16) if is_array else learning_rate)


def rate_of_first_step(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.sgd(learning_rate(0) if callable(learning_rate) else learning_rate)


def without_extra_arguments(learning_rate: float) -> optax.GradientTransformation:
    return optax.scale(-learning_rate)


def is_batched(x: jax.Array) -> bool:
    return "Batch" in type(x).__name__


def lists_for_tuples(tree: Tree) -> Tree:
    return list(tree) if isinstance(tree, tuple) else tree


def two_leaves_of_one_name(params: Tree) -> Tree:
    """Orbax stores both as `a.b`, and one is lost."""
    return {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}


def zeros_on_first_device(x: jax.Array) -> jax.Array:
    return jax.device_put(jnp.zeros_like(x), jax.devices()[0])


def half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16)


BROKEN: list[tuple[Check, Factory]] = [
    (harness.check_orbax_round_trip, treewise_init(two_leaves_of_one_name)),
    (harness.check_state_is_arrays, counted(0)),
    (harness.check_state_is_arrays, counted(jnp.asarray(0))),
    (harness.check_state_is_parallel_trees, container_for_each_parameter()),
    (harness.check_state_types_constant, momentum(dtype=jnp.float32)),
    (harness.check_updates_keep_dtype, leafwise(lambda g: g.astype(jnp.float32))),
    (harness.check_float64_is_kept, leafwise(lambda g: g.astype(jnp.float32).astype(g.dtype))),
    (harness.check_float32_is_kept_where_float64_is_enabled, leafwise(lambda g: g * jnp.ones(()))),
    (harness.check_mixed_dtypes_in_one_tree, treewise(cast_to_first)),
    (harness.check_mixed_dtypes_in_one_tree, leafwise(lambda g: g / jnp.asarray(1e-9, g.dtype))),
    (harness.check_cond_between_old_and_new_state, momentum(half, jnp.float32)),
    (harness.check_cond_between_old_and_new_state, scaled_by_calls()),
    (harness.check_jit_equals_eager, scaled_by_calls()),
    (harness.check_no_recompilation_at_the_second_call, counted(jnp.asarray(0))),
    (harness.check_donated_buffers, one_buffer_twice()),
    (harness.check_vmap_equals_a_loop, leafwise(lambda g: g * (1 + is_batched(g)))),
    (
        harness.check_stacked_leaves_equal_separate_leaves,
        leafwise(lambda g: g / (1 + jnp.linalg.norm(g))),
    ),
    (harness.check_masked, treewise(scaled_by_layer_size)),
    (harness.check_partition, treewise(scaled_by_layer_size)),
    (harness.check_dimension_numbers_as_tree_or_function, other_rate_for_function),
    (harness.check_inject_hyperparams, rounded_when_traced),
    (harness.check_inject_hyperparams_in_bfloat16, optax.adam),
    (harness.check_multi_steps, scaled_by_calls()),
    (harness.check_chain_and_named_chain, scaled_by_calls()),
    (harness.check_apply_if_finite, scaled_by_calls()),
    (harness.check_wrappers_in_each_other, treewise(scaled_by_layer_size)),
    (harness.check_wrappers_in_each_other, scaled_by_calls()),
    (harness.check_wrappers_in_each_other, rounded_when_traced),
    (harness.check_sharded_on_an_explicit_mesh, momentum(lambda p: jnp.zeros(p.shape, p.dtype))),
    (harness.check_non_finite_gradient_stays_in_its_leaf, treewise(divided_by_global_norm)),
    (harness.check_non_finite_gradient_stays_in_its_leaf, leafwise(jnp.nan_to_num)),
    (harness.check_non_finite_gradient_never_enters_a_basis, basis_of_any_gradient()),
    (harness.check_zero_gradients, leafwise(lambda g: g / jnp.abs(g).max(initial=0))),
    (harness.check_leaves_of_any_size, leafwise(lambda g: g * (min(g.shape, default=2) > 1))),
    (harness.check_learning_rate_schedule, rate_of_first_step),
    (harness.check_converges, lambda learning_rate: optax.sgd(-learning_rate)),
]


# What no code that rounding flips can explain, in stacked leaves of a row with quantized state.
BEYOND_CODES = {
    "all entries": leafwise(lambda g: g * (1 + 2e-4 * (g.ndim > 2))),
    "one layer of three": leafwise(lambda g: g.at[:1].multiply(1.3) if g.ndim > 2 else g),
}


# What breaks without the harness having to say it.
RAISING: list[tuple[Check, Factory, type[Exception]]] = [
    (harness.check_nnx_optimizer, container_for_each_parameter(), TypeError),
    (harness.check_extra_arguments_accepted, without_extra_arguments, TypeError),
    (harness.check_map_params, treewise_init(lambda p: jax.tree.leaves(p)[0]), IndexError),
    (harness.check_empty_tree, treewise(cast_to_first), IndexError),
    (harness.check_tuple_and_list_parameters, treewise(lists_for_tuples), ValueError),
    (harness.check_sharded_on_an_auto_mesh, momentum(zeros_on_first_device), ValueError),
]


def row_of(factory: Factory) -> Row:
    rate = Convergence(learning_rate=1e-3, steps=10)
    return Row("broken", factory, {"learning_rate": 1e-2}, convergence=rate, basis="basis")


@pytest.mark.distinct
@pytest.mark.parametrize(("check", "factory"), BROKEN, ids=[name_of(x[0]) for x in BROKEN])
def test_broken_transformation_is_refused(check: Check, factory: Factory) -> None:
    with pytest.raises(AssertionError):
        check(row_of(factory))


@pytest.mark.distinct
@pytest.mark.parametrize(
    ("check", "factory", "error"), RAISING, ids=[name_of(x[0]) for x in RAISING]
)
def test_broken_transformation_raises(
    check: Check, factory: Factory, error: type[Exception]
) -> None:
    with pytest.raises(error):
        check(row_of(factory))


@pytest.mark.parametrize("name", BEYOND_CODES)
def test_more_than_flipped_codes_is_refused(name: str) -> None:
    row = replace(row_of(BEYOND_CODES[name]), quantized=True)
    with pytest.raises(AssertionError):
        harness.check_stacked_leaves_equal_separate_leaves(row)


def test_every_check_can_fail() -> None:
    every = {
        check for check in vars(harness).values() if "check_" in getattr(check, "__name__", "")
    }
    assert every == {x[0] for x in BROKEN + RAISING}


def test_row_must_say_whether_it_converges() -> None:
    with pytest.raises(ValueError, match="convergence"):
        Row("silent", optax.sgd, {"learning_rate": 1e-2})
