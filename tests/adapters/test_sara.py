"""SaRA: values and positions of the smallest entries, and nothing else of the weight's size."""

import itertools

from close import assert_close
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import AdapterParams
from lowrank_optax.adapters.operands import Lookup, Rows
from lowrank_optax.matrices.polar import polar_factor
from tests.adapters.compiled import compiled, gradient, layer_output
from tests.adapters.nnx_models import Scanned, Unrolled, call, loss_of, tokens, weights

SaRA = compiled(lro.adapters.SaRA)
RNG = np.random.default_rng(0)
WEIGHTS, X = (RNG.normal(size=s).astype(np.float32) for s in ((3, 6, 5), (7, 6)))
WEIGHTS[1] *= 0.5
THETA = 0.4
KEY = jax.random.key(0)
BITS = {jnp.float32: np.uint32, jnp.bfloat16: np.uint16}
METHODS = {"fraction": {"fraction": 0.3}, "threshold": {"threshold": THETA}}


def made(options, w=WEIGHTS):
    """The adapter, and its arrays; a threshold selects outside of jit."""
    return SaRA(**options), lro.adapters.SaRA(**options).init(KEY, jnp.asarray(w))


def moved(params):
    """Other values; padding is no entry, whatever is there."""
    draw = lambda x: np.asarray(x) + RNG.normal(size=x.shape).astype(np.float32)
    return params._replace(trainable=jax.tree.map(draw, params.trainable))


def expected_weight(w, values, indices):
    out = np.array(w).ravel()
    for value, index in zip(values, indices, strict=True):
        if index < out.size:
            out[index] = value
    return out.reshape(w.shape)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_selected_entries_are_the_smallest_in_the_order_of_positions(options):
    _, params = made(options)
    values, indices = params.trainable["values"], np.asarray(params.frozen["indices"])
    assert indices.dtype == np.int32
    for w, own, where in zip(WEIGHTS, np.asarray(values), indices, strict=True):
        magnitude = np.abs(w).ravel()
        if "fraction" in options:
            mask = magnitude <= np.sort(magnitude)[round(0.3 * 30) - 1]
        else:
            mask = magnitude < np.float32(THETA)
        count = mask.sum()
        np.testing.assert_array_equal(where[:count], np.flatnonzero(mask))
        np.testing.assert_array_equal(own[:count], w.ravel()[mask])
        assert np.unique(where).size == where.size
        assert (where[count:] >= w.size).all()
        assert not own[count:].any()


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_it_multiplies_by_the_weight_with_the_values_in_it(options):
    method, params = made(options)
    params = moved(params)
    for layer, w in enumerate(WEIGHTS):
        p = method.layer_arrays(params, layer)
        new = expected_weight(w, p["values"], p["indices"])
        y = layer_output(method, p, Rows(X), X @ w, weight=w)
        np.testing.assert_allclose(y, X @ new, atol=1e-5)
        merged = method.merged(p, w)
        np.testing.assert_allclose(merged.weight, new, atol=1e-6)
        assert merged.rounding_error == 0
        np.testing.assert_allclose(method.unmerged(p, merged.weight), w, atol=1e-6)
        rows = layer_output(method, p, Lookup(np.array([5, 0]), jnp.float32), w[[5, 0]], weight=w)
        np.testing.assert_allclose(rows, new[[5, 0]], atol=1e-6)
    together = method.deltas(params, WEIGHTS)
    np.testing.assert_allclose(together[2], method.delta(p, w), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (Scanned, jnp.bfloat16),
        pytest.param(Scanned, jnp.float32, marks=pytest.mark.full),
        pytest.param(Unrolled, jnp.float32, marks=pytest.mark.full),
    ],
)
def test_it_starts_bit_for_bit_at_the_model(model, dtype):
    model = model(2, nnx.Rngs(0), dtype)
    before = call(model, tokens())
    lro.adapters.attach(model, lro.adapters.SaRA(threshold=0.1), ".*", rngs=0)
    np.testing.assert_array_equal(call(model, tokens()), before)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merging_leaves_the_other_entries_as_they_are(dtype):
    w = jnp.asarray(WEIGHTS[0], dtype).at[2, 3].set(jnp.inf).at[1, 1].set(jnp.nan)
    w = w.at[:2, 0].set(-0.0)
    method, params = made({"fraction": 1 / 30}, w[None])  # the first of the two zeros
    p = method.layer_arrays(moved(params), 0)
    merged = method.merged(p, w).weight
    bits = lambda x: np.asarray(x).view(BITS[dtype])
    changed = bits(merged) != bits(w)
    assert np.flatnonzero(changed) == [0]
    assert_close(merged[0, 0], p["values"][0], 1, dtype=dtype)


def merged_and_unmerged(host, kernel, method):
    """A kernel [6, 5] after three rounds, with other values in each, and the merged ones."""
    draw = lambda x: jnp.asarray(RNG.normal(size=x.shape), x.dtype)
    merged = []
    if host == "pytree":
        params = {"kernel": kernel}
        adapter = lro.adapters.pytree.init(KEY, params, method, ".*")
        for _ in range(3):
            adapter = adapter.replace(jax.tree.map(draw, adapter.trainable))
            merged.append(lro.adapters.pytree.merge(params, adapter)["kernel"])
            params = lro.adapters.pytree.unmerge({"kernel": merged[-1]}, adapter)
        return params["kernel"], merged
    if host == "linen":
        x, module = jnp.ones((1, 6)), nn.Dense(5, use_bias=False, param_dtype=kernel.dtype)
        adapted = lro.adapters.linen.Adapted(module, method, ".*")
        variables = adapted.attach({"params": {"kernel": kernel}}, KEY, x)
        for _ in range(3):
            variables["adapters"] = jax.tree.map(draw, variables["adapters"])
            variables, _ = adapted.merge(variables)
            merged.append(variables["params"]["kernel"])
            variables = adapted.unmerge(variables)
        return variables["params"]["kernel"], merged
    model = nnx.Linear(6, 5, use_bias=False, param_dtype=kernel.dtype, rngs=nnx.Rngs(0))
    model.kernel.set_value(kernel)
    lro.adapters.attach(model, method, ".*", rngs=0)
    values = model.adapters["default"].arrays["values"]
    for _ in range(3):
        values.set_value(draw(values[...]))
        lro.adapters.merge(model)
        merged.append(model.kernel[...])
        lro.adapters.unmerge(model)
        lro.adapters.check_base(model)
    return model.kernel[...], merged


@pytest.mark.combinations(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("host", ["nnx", "linen", "pytree"])
def test_unmerging_gives_every_bit_of_the_weight_back(host, dtype):
    kernel = jnp.asarray(WEIGHTS[0], dtype).at[0, 0].set(0).at[5, 4].set(-0.0).at[5, 0].set(-0.0)
    before = np.asarray(kernel).view(BITS[dtype])
    # One of the zeros is not selected by the fraction.
    for options in ({"fraction": 2 / 30}, METHODS["threshold"]):
        after, merged = merged_and_unmerged(host, kernel, lro.adapters.SaRA(**options))
        np.testing.assert_array_equal(np.asarray(after).view(BITS[dtype]), before)
        assert all((x != kernel).any() for x in merged)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merging_writes_the_values_rounded_once(dtype):
    w = 100 * jnp.asarray(WEIGHTS[:1], dtype)
    method, params = made({"fraction": 1.0}, w)
    values = np.asarray(RNG.normal(size=(30,)), np.float32)
    p = method.layer_arrays(params, 0) | {"values": values}
    merged = method.merged(p, w[0])
    np.testing.assert_array_equal(merged.weight.ravel(), values.astype(dtype))
    assert (merged.rounding_error == 0) == (dtype == jnp.float32)
    # Beside another change of the weight both are in it.
    beside = method.merged(p, 2 * w[0]).weight
    np.testing.assert_allclose(
        beside.astype(np.float32).ravel(),
        np.asarray(w[0], np.float32).ravel() + values,
        rtol=2 * float(jnp.finfo(dtype).eps),
        atol=1e-4,
    )
    np.testing.assert_allclose(
        method.unmerged(p, beside).astype(np.float32),
        np.asarray(2 * w[0], np.float32),
        rtol=0,
        atol=400 * float(jnp.finfo(dtype).eps),
    )


def test_merged_beside_others_or_at_a_strength_it_adds_its_change():
    lora = lro.adapters.LoRA(rank=2, initial="random")
    model = nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0))
    before, x = model.kernel[...], jnp.asarray(X)
    lro.adapters.attach(model, lro.adapters.SaRA(fraction=0.3), ".*", rngs=0)
    lro.adapters.attach(model, lora, ".*", rngs=1, name="lora")
    values = model.adapters["default"].arrays["values"]
    values.set_value(values[...] + 0.5)
    for strengths, names in (
        ({"default": 1.0}, (None,)),
        ({"default": 1.0}, ("default", "lora")),
        ({"default": 1.0}, ("lora", "default")),
        ({"default": 0.5}, (None,)),
        ({"default": 0.5}, ("default", "lora")),
    ):
        lro.adapters.activate(model, "default", "lora", strengths=strengths)
        expected = model(x)
        for name in names:
            lro.adapters.merge(model, name)
            assert_close(model(x), expected, 20)
        for name in names:  # not in the reverse order
            lro.adapters.unmerge(model, name)
            assert_close(model(x), expected, 40)
        assert_close(model.kernel[...], before, 20)


@pytest.mark.parametrize("jit", [False, True])
def test_a_step_may_donate_the_values(jit):
    init = lro.adapters.SaRA(fraction=0.5).init
    params = (jax.jit(init) if jit else init)(KEY, jnp.asarray(WEIGHTS))
    jax.jit(lambda tree: jax.tree.map(jnp.cos, tree), donate_argnums=0)(params.trainable)
    selected = np.take_along_axis(WEIGHTS.reshape(3, -1), np.asarray(params.frozen["indices"]), 1)
    np.testing.assert_array_equal(params.frozen["initial"], selected)


def test_the_gradient_of_values_is_that_of_the_weight_at_the_positions():
    method, params = made(METHODS["threshold"])
    p, w = method.layer_arrays(moved(params), 0), WEIGHTS[0]
    new = expected_weight(w, p["values"], p["indices"])
    loss = lambda values, x: jnp.sin(
        layer_output(method, p | {"values": values}, Rows(x), x @ w, weight=w)
    ).sum()
    of_values, of_x = gradient(loss, p["values"], X, argnums=(0, 1))
    dense, dense_x = gradient(lambda p, x: jnp.sin(x @ p).sum(), new, X, argnums=(0, 1))
    inside = p["indices"] < w.size
    np.testing.assert_allclose(
        of_values[inside], dense.ravel()[p["indices"][inside]], rtol=0, atol=1e-5
    )
    assert inside.sum() < inside.size
    assert not of_values[~inside].any()
    np.testing.assert_allclose(of_x, dense_x, atol=1e-5)


def scanned_gradient(layers, side=256, batch=2):
    """A compiled gradient of the values of a stack of square layers that a scan runs."""
    method, count = lro.adapters.SaRA(fraction=0.1), round(0.1 * side * side)
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    frozen = {"indices": shape(layers, count, dtype=jnp.int32), "initial": shape(layers, count)}

    def loss(values, frozen, stack, x):
        def layer(x, arrays):
            values, frozen, w = arrays
            p = frozen | {"values": values}
            return jnp.sin(layer_output(method, p, Rows(x), x @ w, weight=w)), None

        return jax.lax.scan(layer, x, (values, frozen, stack))[0].sum()

    args = shape(layers, count), frozen, shape(layers, side, side), shape(batch, side)
    return jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()


def test_temporaries_of_a_scanned_stack_do_not_grow_with_its_layers():
    two, eight = (scanned_gradient(n).temp_size_in_bytes for n in (2, 8))
    matrix, inputs = 4 * 256 * 256, 4 * 2 * 256
    # What is saved for a layer are its inputs and those of the sine, beside a few bytes.
    assert eight - two <= 6 * 2 * inputs + 1024
    assert eight < 5 * matrix
    assert scanned_gradient(2).output_size_in_bytes < 4 * 2 * (0.1 * 256 * 256 + 8)


def test_state_of_an_optimizer_is_of_the_selected_entries():
    model = Scanned(2, nnx.Rngs(0))
    lro.adapters.attach(model, lro.adapters.SaRA(fraction=0.25), rngs=0)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=lro.adapters.trainable)
    selected = 2 * (18 + 18)
    arrays = jax.tree.leaves(nnx.state(optimizer.opt_state))
    assert sum(x.nbytes for x in arrays) == 2 * 4 * selected + 4
    assert lro.adapters.summary(model).trained == selected


@pytest.mark.full
def test_a_stack_padded_to_its_largest_layer_trains_as_its_layers_do():
    stacked, single = Scanned(2, nnx.Rngs(0)), Unrolled(2, nnx.Rngs(0))
    for name in ("up", "down"):
        kernel = getattr(stacked.blocks, name).kernel
        kernel.set_value(kernel[...] * jnp.array([1.0, 0.3])[:, None, None])
        for i, block in enumerate(single.blocks):
            getattr(block, name).kernel.set_value(kernel[...][i])
    single.embed.embedding.set_value(stacked.embed.embedding[...])
    single.head.kernel.set_value(stacked.head.kernel[...])
    results = []
    for model in (stacked, single):
        lro.adapters.attach(model, lro.adapters.SaRA(threshold=0.1), "up|down", rngs=0)
        tx = lro.adapters.sara_reselection(optax.adamw(0.01), 2, threshold=0.1)
        optimizer = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable)

        @nnx.jit
        def step(model, optimizer):
            wrt = nnx.DiffState(0, lro.adapters.trainable)
            optimizer.update(model, nnx.grad(loss_of, argnums=wrt)(model, tokens()))

        for _ in range(4):
            step(model, optimizer)
        lro.adapters.merge(model)
        results.append(weights(model))
    for i in range(2):
        for name in ("up", "down"):
            one, other = results[0][f"blocks/{name}/kernel"][i], results[1]
            np.testing.assert_allclose(one, other[f"blocks/{i}/{name}/kernel"], atol=1e-5)
    counts = [b.up.adapters["default"].variables()["values"][...].size for b in single.blocks]
    assert counts[0] != counts[1]


def fitted(start, tx, steps, tree_of, weight_of):
    """Weights [6, 5] after steps of a transformation towards a target."""
    target = RNG_TARGET
    loss = lambda tree: jnp.square(X @ weight_of(tree) - target).mean()
    tree = tree_of(start)
    state = tx.init(tree)

    @jax.jit
    def step(tree, state):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    for _ in range(steps):
        tree, state = step(tree, state)
    return np.asarray(weight_of(tree)), state


RNG_TARGET = np.random.default_rng(9).normal(size=(7, 5)).astype(np.float32)


def compact(options):
    """`fitted`'s last arguments for the adapter."""
    method, w = lro.adapters.SaRA(**options), jnp.asarray(WEIGHTS[0])
    params = method.init(KEY, w[None])
    own = lambda tree: {**{k: v[0] for k, v in params.frozen.items()}, **tree}
    return (
        lambda _: {"values": params.trainable["values"][0]},
        lambda tree: method.merged(own(tree), w).weight,
    )


DENSE = (lambda w: {"w": jnp.asarray(w)}, lambda tree: tree["w"])


@pytest.mark.slow
def test_with_all_entries_selected_it_is_adamw_on_the_weight():
    adamw = optax.adamw(0.05, weight_decay=0.1)
    expected, _ = fitted(WEIGHTS[0], adamw, 20, *DENSE)
    whole, _ = fitted(WEIGHTS[0], lro.adapters.sara(adamw, threshold=100.0), 20, *DENSE)
    np.testing.assert_array_equal(whole, expected)
    for options in ({"threshold": 100.0}, {"fraction": 1}):
        values, _ = fitted(WEIGHTS[0], adamw, 20, *compact(options))
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_the_compact_and_the_dense_form_train_alike_and_reselect_alike():
    adamw, start = optax.adamw(0.1, weight_decay=0.1), WEIGHTS[0]
    dense_tx = lro.adapters.sara(adamw, threshold=THETA, reselect_after=4)
    by_value = lro.adapters.sara_reselection(adamw, 4, threshold=THETA)
    mask = np.abs(start) < THETA
    at_four = None
    for steps in (4, 5, 12):
        dense, state = fitted(start, dense_tx, steps, *DENSE)
        values, own = fitted(start, by_value, steps, *compact({"threshold": THETA}))
        np.testing.assert_allclose(values, dense, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(dense[~mask], start[~mask])
        trained = np.asarray(state.trained["w"])
        np.testing.assert_array_equal(trained[mask], own.trained["values"])
        if at_four is None:
            at_four = dense
            np.testing.assert_array_equal(trained, mask)
            continue
        np.testing.assert_array_equal(trained, mask & (np.abs(at_four) < THETA))
        frozen = mask & ~trained
        assert frozen.any()
        assert trained.any()
        np.testing.assert_array_equal(dense[frozen], at_four[frozen])
        assert (dense[trained] != at_four[trained]).all()


def test_the_nuclear_norms_gradient_is_the_polar_factor_at_the_positions():
    method = SaRA(fraction=0.5)
    for w in (np.diag([3.0, -2.0]), np.diag([3.0, 0.0]), np.zeros((2, 2))):
        u, s, v = np.linalg.svd(w)
        np.testing.assert_allclose(
            polar_factor(jnp.asarray(w, jnp.float32)), u @ np.diag(s > 0) @ v, atol=1e-6
        )
    for shape in ((12, 12), (20, 7), (2, 7, 20)):
        x = RNG.normal(size=shape)
        u, _, v = np.linalg.svd(x, full_matrices=False)
        np.testing.assert_allclose(polar_factor(jnp.asarray(1e-20 * x)), u @ v, atol=1e-5)
    method, params = made(METHODS["threshold"])
    p = method.layer_arrays(params, 0)
    inside = p["indices"] < 30
    masked = np.where(np.abs(WEIGHTS[0]) < THETA, WEIGHTS[0], 0)
    u, _, v = np.linalg.svd(masked, full_matrices=False)
    slopes = method.nuclear_norm_gradient(p, WEIGHTS[0])
    np.testing.assert_allclose(slopes[inside], (u @ v).ravel()[p["indices"][inside]], atol=1e-5)
    assert not slopes[~inside].any()


def test_a_restored_adapter_is_refused_on_another_base(tmp_path):
    method = lro.adapters.SaRA(threshold=0.2)
    model = lro.adapters.attach(Scanned(2, nnx.Rngs(0)), method, rngs=0)
    values = model.blocks.up.adapters["default"].arrays["values"]
    values.set_value(values[...] + 0.5)
    own = nnx.Any(lro.adapters.AdapterParam, lro.adapters.AdapterConstant)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "sara", nnx.to_pure_dict(nnx.state(model, own)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "sara")

    def with_restored(base):
        lro.adapters.attach(base, method, rngs=0)
        state = nnx.state(base, own)
        nnx.replace_by_pure_dict(state, restored)
        nnx.update(base, state)
        return base

    again = with_restored(Scanned(2, nnx.Rngs(0)))
    lro.adapters.check_base(again)
    np.testing.assert_array_equal(call(again, tokens()), call(model, tokens()))
    other = with_restored(Scanned(2, nnx.Rngs(1)))
    with pytest.raises(ValueError, match=r"of blocks/down was made of another weight: \d+ of"):
        lro.adapters.check_base(other)
    wider = with_restored(Scanned(2, nnx.Rngs(0), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"select of these weights are bfloat16\[2, \d+\], and"):
        lro.adapters.check_base(wider)
    one_bit = Scanned(2, nnx.Rngs(0))
    kernel = one_bit.blocks.down.kernel
    first = model.blocks.down.adapters["default"].arrays["indices"][...][1, 0]
    at = (1, *np.unravel_index(int(first), (12, 6)))
    kernel.set_value(kernel[...].at[at].set(jnp.nextafter(kernel[...][at], 0.0)))
    with pytest.raises(ValueError, match=r"of blocks/down was .*: 1 of \d+ entries to select"):
        lro.adapters.check_base(with_restored(one_bit))


def test_on_an_explicit_mesh_the_change_is_sharded_as_the_weight():
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Explicit,))
    split, stack = jax.P(None, "m"), RNG.normal(size=(2, 6, 8)).astype(np.float32)
    method = lro.adapters.SaRA(fraction=0.3)

    def run(stack, **out):
        params = method.init(KEY, stack)
        values = {"values": params.trainable["values"] + 1}

        def loss(values, w):
            p = method.layer_arrays(params._replace(trainable=values), 0)
            y = jnp.matmul(X, w, **out)
            return jnp.sin(layer_output(method, p, Rows(jnp.asarray(X)), y, weight=w)).sum()

        return jax.jit(jax.value_and_grad(loss))(values, stack[0])

    expected, slopes = run(jnp.asarray(stack))
    with jax.set_mesh(mesh):
        placed = jax.device_put(stack, jax.NamedSharding(mesh, jax.P(None, *split)))
        value, others = run(placed, out_sharding=split)
    assert_close(value, expected, 100)
    assert_close(others["values"], slopes["values"], 100)
    params = method.init(KEY, jnp.asarray(stack))
    p = method.layer_arrays(moved(params), 0)
    with jax.set_mesh(mesh):
        merged = method.merged(p, placed[0]).weight
        assert merged.sharding.spec == split
        np.testing.assert_array_equal(method.unmerged(p, merged), stack[0])


def test_bad_options_and_weights_are_refused():
    kind = lro.adapters.SaRA
    for options, error, message in (
        ({}, ValueError, "give exactly one of them"),
        ({"fraction": 0.1, "threshold": 0.1}, ValueError, "give exactly one of them"),
        ({"fraction": 0.0}, ValueError, r"fraction=0.0 must be finite and above 0"),
        ({"fraction": 1.5}, ValueError, "fraction=1.5 must be at most 1"),
        ({"threshold": float("inf")}, ValueError, "threshold=inf must be finite"),
        ({"threshold": float("nan")}, ValueError, "threshold=nan must be finite"),
        ({"threshold": -1}, ValueError, "threshold=-1 must be finite and above 0"),
        ({"threshold": "0.1"}, TypeError, "threshold='0.1' must be a number"),
        ({"fraction": True}, TypeError, "fraction=True must be a number"),
    ):
        with pytest.raises(error, match=message):
            kind(**options)
    with pytest.raises(TypeError, match="these are int8: dequantize"):
        kind(fraction=0.1).init(KEY, jnp.ones((1, 2, 2), jnp.int8))
    with pytest.raises(TypeError, match="is a shape alone"):
        kind(fraction=0.1).init(KEY, jax.ShapeDtypeStruct((1, 2, 2), jnp.float32))
    with pytest.raises(TypeError, match="they are traced: attach it outside of jit"):
        jax.jit(kind(threshold=0.1).init)(KEY, WEIGHTS)
    with pytest.raises(ValueError, match="do not fit into int32"):
        jax.eval_shape(
            kind(fraction=1e-6).init, KEY, jax.ShapeDtypeStruct((1, 2**16, 2**15), jnp.float32)
        )
    model = Scanned(2, nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank_pattern means blocks/up, and SaRA has no rank"):
        lro.adapters.attach(model, kind(fraction=0.1), rngs=0, rank_pattern={"up": 2})
    with pytest.raises(TypeError, match="SaRA makes no change of low rank"):
        kind(fraction=0.1).to_lora({})


def test_a_threshold_that_selects_nothing_warns_and_changes_nothing():
    with pytest.warns(UserWarning, match=r"selects no entry of weights \(3, 6, 5\)"):
        method, params = made({"threshold": 1e-9})
    p = method.layer_arrays(moved(params), 0)
    np.testing.assert_array_equal(method.merged(p, WEIGHTS[0]).weight, WEIGHTS[0])
    assert isinstance(params, AdapterParams)


def test_a_selection_of_a_half_precision_model_is_that_of_its_stored_values():
    w = jnp.asarray(WEIGHTS, jnp.bfloat16)
    _, params = made(METHODS["threshold"], w)
    assert params.trainable["values"].dtype == jnp.float32
    assert params.frozen["initial"].dtype == jnp.bfloat16
    inside = np.asarray(params.frozen["indices"]) < 30
    below = np.abs(np.asarray(w, np.float32)) < np.float32(THETA)
    np.testing.assert_array_equal(inside.sum(-1), below.sum((-2, -1)))


def test_the_threshold_is_strict_and_not_rounded_to_half_precision():
    w = jnp.array([[[0.5, -0.5], [0.498046875, 0.25]]], jnp.bfloat16)  # neighbours in bfloat16
    for theta, expected in ((0.5, [2, 3]), (0.499, [2, 3]), (0.2501, [3])):
        _, params = made({"threshold": theta}, w)
        np.testing.assert_array_equal(params.frozen["indices"][0], expected)


@pytest.mark.full
def test_small_weights_matter_less_than_random_ones():
    """The paper's first claim in miniature: a network fitted to a teacher, then pruned."""
    rng = np.random.default_rng(0)
    shapes = list(itertools.pairwise((16, 64, 64, 8)))
    drawn = lambda: [rng.normal(size=s).astype(np.float32) / np.sqrt(s[0]) for s in shapes]
    data, params, teacher = rng.normal(size=(512, 16)).astype(np.float32), drawn(), drawn()

    def net(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    wanted = net(teacher, data)
    error = lambda params: jnp.linalg.norm(net(params, data) - wanted) / jnp.linalg.norm(wanted)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, 1000))

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            loss = lambda p: jnp.square(net(p, data) - wanted).mean()
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=1000)[0][0]

    fitted_params = [np.asarray(w) for w in fit(params)]
    start = float(error(fitted_params))
    for fraction in (0.1, 0.2):
        size = sum(w.size for w in fitted_params)
        magnitude = np.concatenate([np.abs(w).ravel() for w in fitted_params])
        theta = np.sort(magnitude)[round(fraction * size)]
        small = [np.where(np.abs(w) < theta, 0, w) for w in fitted_params]
        random = [np.where(rng.random(w.shape) < fraction, 0, w) for w in fitted_params]
        pruned, at_random = float(error(small)), float(error(random))
        assert start < pruned < at_random / 3


def test_merging_leaves_the_bits_of_subnormal_entries_that_are_not_selected():
    weight = jnp.array([[0.0, 0.0], [1e-40, 1.0]])
    method = lro.adapters.SaRA(fraction=0.5)
    params = method.init(jax.random.key(0), weight[None])
    merged = method.merged(method.layer_arrays(params, 0), weight).weight
    assert np.array_equal(np.asarray(merged).view(np.uint32), np.asarray(weight).view(np.uint32))
