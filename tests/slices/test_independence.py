"""What would come out otherwise in slices runs whole, whatever hides it."""

from collections.abc import Callable
from typing import Any

from close import assert_close
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.slices import CannotCutError
from lowrank_optax.slices.call import Call
from lowrank_optax.slices.parts import leaves_of_stack

SMALL = {"min_size": 100, "block_size": 32}
SHAPES = {"embed": (130, 16), "up": (6, 16, 32), "down": (6, 32, 16), "bias": (7,)}


def normal(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(s), dtype) for name, s in SHAPES.items()}


def trained(tx: Any, steps: int = 3, dtype: Any = jnp.float32, of_gradient: Any = None) -> Any:
    params = normal(0, dtype)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        updates, state = update(normal(1 + i, of_gradient or dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same_in_slices(tx: Any, units: float = 300, **kwargs: Any) -> None:
    whole = trained(lro.in_slices(tx, slices="off"), **kwargs)
    assert_close(trained(lro.in_slices(tx, slices=3), **kwargs), whole, units=units)


def each(function: Callable[..., Any]) -> optax.GradientTransformation:
    """A transformation of a function of a leaf's gradient and parameter."""
    update = lambda updates, state, params=None: (jax.tree.map(function, updates, params), state)
    return optax.GradientTransformation(lambda params: (), update)


def over_rms_of_momentum() -> optax.GradientTransformation:
    """Divides by a number of the momentum before this step, which is zero at first."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new = jax.tree.map(lambda m, g: 0.9 * m + g, state, updates)
        scaled = jax.tree.map(lambda m, g: g / (1 + jnp.sqrt(jnp.mean(m * m))), state, updates)
        return scaled, new

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def of_layers(g: jax.Array, p: jax.Array) -> jax.Array:
    return g / (1 + jnp.arange(g.shape[0])).reshape(-1, *[1] * (g.ndim - 1))


def known_layers(g: jax.Array, p: jax.Array) -> jax.Array:
    return g * jnp.cumsum(jnp.ones_like(g), axis=0)


def _largest_of_blocks(g: jax.Array) -> jax.Array:
    flat = jnp.pad(jnp.abs(g).reshape(-1), (0, -g.size % 100)).reshape(-1, 100)
    return jnp.repeat(flat.max(1), 100)[: g.size].reshape(g.shape)


def counted(function: Callable[..., Any]) -> optax.GradientTransformation:
    """A transformation of a function of the number of steps, and a leaf's gradient and weight."""

    def update(updates: Any, count: Any, params: Any = None) -> Any:
        of_leaf = lambda g, p: function(count, g, p)
        return jax.tree.map(of_leaf, updates, params), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


TABLE = jnp.linspace(0.5, 2.0, 200)
DEPENDENT = {
    "rows": each(lambda g, p: g / g.shape[0]),
    "size": each(lambda g, p: g / 2 if g.size > 2000 else g),
    "place": each(of_layers),
    "sum of ones": each(known_layers),
    "norm of weights": each(lambda g, p: g * jnp.sqrt(jnp.sum(p * p))),
    "first layer": each(lambda g, p: g - g[:1]),
    "momentum": over_rms_of_momentum(),
    "one layer": each(lambda g, p: g.at[5].set(0)),
    "last layers": each(lambda g, p: g.at[4:].set(0)),
    "a table": each(lambda g, p: g * TABLE[: g.shape[0]].reshape(-1, *[1] * (g.ndim - 1))),
    "a spike": each(lambda g, p: jnp.where(jnp.max(jnp.abs(g)) > 1e3, 0, g)),
    "flat blocks": each(lambda g, p: g / _largest_of_blocks(g)),
    "number of rows": each(lambda g, p: g / jnp.sum(jnp.ones(g.shape[0]))),
    "number of numbers": each(lambda g, p: g / jnp.linalg.norm(jnp.ones_like(g))),
    "turns": each(
        lambda g, p: g * jax.lax.fori_loop(0, g.shape[0], lambda i, s: s * 0.9, jnp.ones(()))
    ),
    "reduction of its own": each(
        lambda g, p: g / jax.lax.reduce(g, -jnp.inf, jnp.logaddexp, range(g.ndim))
    ),
    "larger side": each(
        lambda g, p: g / jnp.sum(jnp.abs(g[..., : min(g.shape)]), axis=-1, keepdims=True)
    ),
    "start by size": each(lambda g, p: g - g[..., g.shape[0] % 5 : g.shape[0] % 5 + 1]),
    "power by size": each(lambda g, p: g ** (2 if g.shape[0] > 5 else 3)),
    "entry by size": each(lambda g, p: g * TABLE[g.shape[0]]),
    "sorted": each(lambda g, p: jnp.sort(g, axis=0)),
    "rolled": each(lambda g, p: jnp.roll(g, 1, axis=0)),
    "product of layers": each(lambda g, p: jnp.einsum("i...,j...->i...", g, p)),
    "later": counted(lambda count, g, p: jnp.where(count > 50, g / jnp.linalg.norm(g), g)),
    "sometimes": counted(
        lambda count, g, p: jax.lax.cond(count % 9 == 8, lambda: g / jnp.max(g), lambda: g)
    ),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_an_unknown_one_that_sees_whole_leaves_is_not_cut(name: str) -> None:
    with pytest.raises(CannotCutError, match="can cut no leaf"):
        trained(lro.in_slices(DEPENDENT[name], slices=3), steps=1)


MATRIX = np.random.default_rng(7).standard_normal((100, 100)).astype(np.float32)
APART = {
    "elements": each(lambda g, p: jnp.where(p > 0, jnp.sign(g), g * 0.5)),
    "means of rows": each(lambda g, p: g - jnp.mean(g, axis=-1, keepdims=True) if g.ndim else g),
    "products": each(lambda g, p: g @ jnp.ones((g.shape[-1], g.shape[-1])) if g.ndim > 1 else g),
    "gram": each(
        lambda g, p: (
            jnp.einsum("...ij,...ik->...jk", g, p)[..., : g.shape[-2], :]
            if g.ndim > 2 and g.shape[-2] < g.shape[-1]
            else g
        )
    ),
    "count": counted(lambda count, g, p: g / (1 + count)),
    "constant": each(lambda g, p: g @ jnp.asarray(MATRIX[: g.shape[-1], : g.shape[-1]])),
    "sorted columns": each(lambda g, p: jnp.flip(jnp.sort(g, axis=-1), axis=-1)),
}


@pytest.mark.parametrize("name", APART)
def test_an_unknown_one_that_keeps_rows_apart_is_cut(name: str) -> None:
    assert_same_in_slices(APART[name])  # with a number of slices: an error if nothing is cut


@pytest.mark.slow
def test_muon_is_cut_matrix_by_matrix() -> None:
    numbers = optax.contrib.MuonDimensionNumbers
    stacks = lambda tree: jax.tree.map(lambda x: numbers(-2, -1) if x.ndim > 2 else None, tree)
    muon = lambda **kwargs: optax.contrib.muon(0.1, **kwargs)
    assert_same_in_slices(muon(muon_weight_dimension_numbers=stacks))
    single = lambda tree: jax.tree.map(lambda x: numbers(), tree)
    only = {name: name == "embed" for name in SHAPES}
    for tx in (
        optax.masked(optax.contrib.scale_by_muon(weight_dimension_numbers=single), only),
        muon(muon_weight_dimension_numbers=stacks, adaptive=True),
    ):
        whole = trained(tx)
        assert_close(trained(lro.in_slices(tx, budget_bytes=2**13)), whole, units=300)


def of_tree(function: Callable[[int, list[Any], jax.Array], Any]) -> optax.GradientTransformation:
    """A transformation of a leaf's place, all leaves and the number of steps."""

    def update(updates: Any, count: Any, params: Any = None) -> Any:
        leaves, treedef = jax.tree.flatten(updates)
        new = [function(i, leaves, count) for i in range(len(leaves))]
        return treedef.unflatten(new), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def all_but_first(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([i > 0 for i in range(len(leaves))])


IN_TREE = {
    "place": of_tree(lambda i, leaves, count: leaves[i] * 0.5**i),
    "number of leaves": of_tree(lambda i, leaves, count: leaves[i] / len(leaves)),
    "size of all": of_tree(lambda i, leaves, count: leaves[i] / sum(x.size for x in leaves)),
    "in turn": of_tree(
        lambda i, leaves, count: jnp.where(count % len(leaves) == i, leaves[i], 0.0)
    ),
    "at random": of_tree(
        lambda i, leaves, count: (
            leaves[i] * jax.random.bernoulli(jax.random.split(jax.random.key(0), len(leaves))[i])
        )
    ),
    "mask": optax.adamw(0.1, weight_decay=1.0, mask=all_but_first),
    "partition": optax.partition({True: optax.sgd(1.0), False: optax.sgd(0.1)}, all_but_first),
}


@pytest.mark.parametrize("name", IN_TREE)
def test_a_leaf_gets_what_it_gets_among_all(name: str) -> None:
    tx = IN_TREE[name]
    assert_close(trained(lro.in_slices(tx, budget_bytes=2**13)), trained(tx), units=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["place", "mask", "masked"])
def test_neither_does_low_bit_hide_it(name: str) -> None:
    inner = {
        "place": optax.chain(optax.scale_by_adam(), IN_TREE["place"]),
        "mask": IN_TREE["mask"],
        "masked": optax.masked(optax.adam(0.1), all_but_first),
    }[name]
    tx = lro.low_bit(inner, **SMALL)
    whole = trained(lro.in_slices(tx, slices="off"))
    assert_close(trained(lro.in_slices(tx, budget_bytes=2**13)), whole, units=300)


def test_a_gate_on_an_extra_argument() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **kwargs: Any) -> Any:
        gated = lambda g: jnp.where(value > 2, g / jnp.linalg.norm(g), g)
        return jax.tree.map(gated, updates), state

    tx = lro.in_slices(
        optax.GradientTransformationExtraArgs(lambda params: (), update), budget_bytes=2**13
    )
    found, _ = jax.jit(tx.update)(normal(1), (), normal(0), value=5.0)
    norm = float(jnp.linalg.norm(normal(1)["up"]))
    assert_close(found["up"], normal(1)["up"] / norm, units=300)


def test_64_bits() -> None:
    with jax.enable_x64(True):
        assert_same_in_slices(optax.adam(1e-2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["rows", pytest.param("norm of weights", marks=pytest.mark.full), "momentum"]
)
def test_neither_is_it_inside_of_low_bit(name: str) -> None:
    around = lambda inner: lro.low_bit(optax.chain(inner, optax.scale_by_adam()), **SMALL)
    cut = lambda tx: lro.in_slices(tx, budget_bytes=2**13)
    apart = around(each(lambda g, p: g * jnp.sign(p)))
    assert (
        "while"
        in jax.jit(cut(apart).update).lower(normal(1), apart.init(normal(0)), normal(0)).as_text()
    )
    tx = around(DEPENDENT[name])
    whole = trained(lro.in_slices(tx, slices="off"))
    assert_close(trained(cut(tx)), whole, units=300)


def by_rows(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1 and x.shape[0] > 5, tree)


def by_rows_named(tree: Any) -> Any:
    return jax.tree.map(lambda x: "tall" if x.shape[0] > 5 else "flat", tree)


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(optax.sgd(1.0), by_rows),
        optax.adamw(1e-2, weight_decay=0.1, mask=by_rows),
        optax.partition({"tall": optax.sgd(1.0), "flat": optax.sgd(0.1)}, by_rows_named),
    ],
)
def test_masks_and_labels_are_asked_about_whole_leaves(tx: Any) -> None:
    with pytest.raises(CannotCutError, match="can cut no leaf"):
        trained(lro.in_slices(tx, slices=3), steps=1)
    whole = trained(tx)
    assert_close(trained(lro.in_slices(tx, budget_bytes=2**13)), whole, units=300)


def test_labels_that_cannot_be_asked_about_a_part_leave_leaves_whole() -> None:
    label = lambda path, x: "up" if x.shape[1:] == (16, 32) else "others"
    labels = lambda tree: flax.traverse_util.path_aware_map(label, tree)
    inner = lro.low_bit(optax.scale_by_adam(), **SMALL)
    tx = optax.partition({"up": inner, "others": optax.sgd(0.1)}, labels)
    assert_close(trained(lro.in_slices(tx, budget_bytes=2**13)), trained(tx), units=300)


def test_a_refusal_has_its_cause() -> None:
    def init(params: Any) -> Any:
        if rows := {x.shape[0] for x in jax.tree.leaves(params)} - {130, 6, 7}:
            raise ValueError(f"no table of {rows} rows")
        return optax.tree.zeros_like(params)

    tx = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    params = normal(0)
    with pytest.raises(CannotCutError, match="can cut no leaf") as refusal:
        lro.in_slices(tx, slices=3).update(params, tx.init(params), params)
    assert str(refusal.value.__cause__) == "no table of {12} rows"
    call = Call.of(optax.with_extra_args_support(tx), params, tx.init(params), params, None, {})
    with pytest.raises(CannotCutError, match=r"'embed'.* spans layers") as refusal:
        leaves_of_stack(call, [sorted(params).index("embed")])
    assert str(refusal.value.__cause__) == "no table of {260} rows"


@pytest.mark.slow
def test_staggered_refreshes_of_a_group_are_those_of_the_group() -> None:
    galore = lro.galore(
        1e-2,
        rank=4,
        refresh_every=lro.refresh.every(4, stagger=True),
        weight_dimension_numbers=lambda p: jax.tree.map(
            lambda x: lro.WeightDimensionNumbers(-2, -1) if x.ndim > 2 else None, p
        ),
    )
    labels = {"embed": "sgd", "up": "sgd", "down": "galore", "bias": "sgd"}
    tx = optax.partition({"sgd": optax.sgd(1e-2), "galore": galore}, labels)
    state = trained(lro.in_slices(tx, slices=3), steps=6)[1]
    expected = trained(tx, steps=6)[1]
    assert_close(state, expected, units=300)
    due = state.inner_states["galore"].inner_state[0].next_refresh["down"]
    assert due.tolist() == [8] * 6  # alone in its group, it is in phase


def test_a_rule_that_must_find_a_leaf_is_not_left_without_one() -> None:
    def only_up(tree: Any) -> Any:
        if not hasattr(tree["up"], "shape"):
            raise ValueError("nothing is called up")
        spec = lambda path, x: lro.WeightDimensionNumbers(-2, -1) if "up" in str(path) else None
        return jax.tree_util.tree_map_with_path(spec, tree)

    limit = lro.limit_norm_growth(weight_dimension_numbers=only_up)
    tx = optax.chain(lro.low_bit(optax.scale_by_adam(), **SMALL), limit)
    assert_close(trained(lro.in_slices(tx, budget_bytes=2**13)), trained(tx), units=300)


def test_a_state_that_changes_its_dtype_at_the_first_step() -> None:
    kwargs = {"dtype": jnp.bfloat16, "of_gradient": jnp.float32}
    tx = optax.adam(1e-2)
    whole = trained(tx, **kwargs)
    found = trained(lro.in_slices(tx, budget_bytes=2**13), **kwargs)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, whole)
    assert_close(found, whole, units=300)


def test_off_asks_nothing() -> None:
    tx = optax.lamb(1e-2)
    assert_close(trained(lro.in_slices(tx, slices="off")), trained(tx))


@pytest.mark.slow
def test_a_wrapper_that_passes_nothing_on() -> None:
    params = {"a": jnp.ones((4, 64, 64), jnp.bfloat16), "b": jnp.ones((4, 64, 64), jnp.bfloat16)}
    inner = optax.chain(lro.in_float32(optax.sgd(1.0)), lro.round_updates())
    wrapped = optax.GradientTransformation(
        inner.init, lambda updates, state, params=None: inner.update(updates, state, params)
    )
    tx = lro.in_slices(wrapped, budget_bytes=2**15)
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-9, x.dtype), params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    layers = [np.asarray(layer != 0).tobytes() for x in updates.values() for layer in x]
    assert len(set(layers)) == 8


def test_random_bits_are_those_of_the_row() -> None:
    inner = optax.chain(lro.in_float32(optax.sgd(1e-3)), lro.round_updates())
    whole = trained(lro.in_slices(inner, slices="off"), dtype=jnp.bfloat16)
    for slices in (2, 5):
        found = trained(lro.in_slices(inner, slices=slices), dtype=jnp.bfloat16)
        jax.tree.map(np.testing.assert_array_equal, found, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("8 bits", marks=pytest.mark.full), "4 bits", "weights"]
)
def test_so_are_those_of_codes(name: str) -> None:
    params = normal(0)
    if name == "weights":
        inner = lro.update_int8_weights(optax.sgd(1e-2))
        params = lro.to_int8_weights(params, min_size=100)
    else:
        bits = 8 if name == "8 bits" else 4
        inner = lro.low_bit(optax.scale_by_adam(), bits, stochastic_rounding=True, **SMALL)
    found = []
    for slices in ("off", 3):
        tx = lro.in_slices(inner, slices=slices)
        found.append(jax.jit(tx.update)(normal(1), tx.init(params), params))
    assert_close(found[1], found[0], units=300)


def test_names_that_end_one_another() -> None:
    params = {"w": jnp.ones((4, 8, 8)), "mu": {"w": jnp.ones((4, 8, 8))}}
    gradients = {"w": normal(0)["up"][:4, :8, :8], "mu": {"w": normal(1)["up"][:4, :8, :8]}}
    tx = optax.adam(0.1)
    expected = tx.update(gradients, tx.init(params), params)
    sliced = lro.in_slices(tx, slices=2)
    assert_close(jax.jit(sliced.update)(gradients, sliced.init(params), params), expected, units=9)


def test_outside_of_jit_leaves_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("cut")

    monkeypatch.setattr("lowrank_optax.slices.update._each", fail)
    tx = lro.low_bit(optax.scale_by_adam())
    params = {"up": jnp.ones((4, 1024, 1024))}
    tx.update(params, tx.init(params), params)
    with pytest.raises(AssertionError, match="cut"):
        jax.eval_shape(tx.update, params, tx.init(params), params)
