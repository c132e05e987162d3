"""Adapted Linen models: stacks, lifted transformations, sharing, dropout, names, merging."""

import functools

from close import assert_close
from flax import linen as nn
from flax.training.train_state import TrainState
import jax
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.adapters.methods import METHODS, cases

Adapted = lro.adapters.linen.Adapted
LORA = lro.adapters.LoRA(rank=2, alpha=4)
LOTR = lro.adapters.LoTR(rank=2, alpha=4)
X = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4, name="down")(nn.gelu(nn.Dense(6, name="up")(x))), None


class Net(nn.Module):
    """Two blocks: in a loop, or in a scan around what is named."""

    kind: str = "scan"

    @nn.compact
    def __call__(self, x):
        if self.kind == "loop":
            for i in range(2):
                x, _ = Block(name=f"blocks_{i}")(x, None)
            return x
        block = nn.remat(Block) if self.kind == "remat" else Block
        block = nn.jit(block) if self.kind == "jit" else block
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(block, length=2, **options)(name="blocks")(x, None)[0]


class Jitted(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class SetupNet(nn.Module):
    """Layers made in ``setup``, one of them run as an ensemble by ``nn.vmap``."""

    def setup(self):
        self.first = nn.Dense(4)
        every = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        self.ensemble = nn.vmap(nn.Dense, in_axes=None, axis_size=3, **every)(5)

    def __call__(self, x):
        return self.ensemble(nn.relu(self.first(x)))


def _moved(tree, by=0.1):
    noise = lambda a: np.float32(by) * np.random.default_rng(a.size).normal(size=a.shape)
    return jax.tree.map(lambda a: (a + noise(a)).astype(a.dtype), tree)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, variables, **options):
    return model.apply(variables, X, **options)


@functools.cache
def _attached(module, method, where=None):
    """Variables are NumPy's, so that arithmetic of tests compiles nothing."""
    adapted = Adapted(module, method, where)
    base = jax.jit(module.init)(jax.random.key(0), X)
    variables = adapted.attach(base, jax.random.key(1), X)
    return adapted, *jax.device_get((base, variables))


@functools.cache
def _of_loop(method):
    loop = Adapted(Net("loop"), method)
    loss = lambda a, params: (
        loop.apply({"params": params, "adapters": {"default": a}}, X) ** 2
    ).sum()
    return jax.jit(jax.value_and_grad(loss))


def _unstacked(tree):
    """The tree of a scan's two blocks as that of a loop; what is shared stays as it is."""
    cut = lambda i: jax.tree.map(lambda a: a[i], tree["blocks"])
    rest = {k: v for k, v in tree.items() if k != "blocks"}
    return rest | {f"blocks_{i}": cut(i) for i in range(2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param("scan", LORA, id="scan-lora"),
        pytest.param("scan", LOTR, id="scan-lotr", marks=pytest.mark.full),
        pytest.param("remat", LORA, id="remat-lora", marks=pytest.mark.full),
        pytest.param("remat", LOTR, id="remat-lotr"),
        pytest.param("jit", LORA, id="jit-lora", marks=pytest.mark.full),
        pytest.param("jit", LOTR, id="jit-lotr"),
    ],
)
def test_a_scan_equals_the_loop_and_both_start_at_the_model(kind, method):
    adapted, base, variables = _attached(Net(kind), method)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of_scan(adapters):
        y = adapted.apply({**variables, "adapters": adapters}, X)
        return (y**2).sum(), y

    (_, start), _ = of_scan(variables["adapters"])
    assert_close(start, _run(adapted.module, base))
    trained = _moved(variables["adapters"])
    (value, _), gradient = of_scan(trained)
    unstacked = _unstacked(trained["default"])
    other, expected = _of_loop(method)(unstacked, _unstacked(base["params"]))
    assert_close(value, other, 100)
    gradient = _unstacked(gradient["default"])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_jitted_layer_is_not_run_with_shared_arrays_of_another_call():
    adapted, _, variables = _attached(Net("jit"), LOTR)
    other = {**variables, "adapters": _moved(variables["adapters"])}
    first, second = adapted.apply(variables, X), adapted.apply(other, X)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.slow
def test_a_model_that_flax_has_jitted_before_is_traced_again():
    random = lambda alpha: lro.adapters.LoRA(rank=1, alpha=alpha, initial="random")
    adapted, base, variables = _attached(Jitted(), random(1.0))
    y = np.asarray(adapted.module.apply(base, X))
    once = adapted.apply(variables, X) - y
    twice = Adapted(Jitted(), random(2.0)).apply(variables, X) - y
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-5)
    assert np.abs(once).max() > 1e-3


@pytest.mark.slow
def test_the_gradient_of_a_shared_factor_is_the_sum_of_the_layers():
    adapted, _, variables = _attached(Net("loop"), LOTR, "up")
    trained = _moved(variables["adapters"])["default"]
    (group,) = trained["adapter_groups"]
    shared = trained["adapter_groups"][group]
    loss = lambda t: (adapted.apply({**variables, "adapters": {"default": t}}, X) ** 2).sum()
    summed = jax.jit(jax.grad(loss))(trained)["adapter_groups"][group]["A"]
    # The same with a LoRA of (A, G_s Bᵀ) for each layer, whose A are copies.
    lora = Adapted(Net("loop"), lro.adapters.LoRA(rank=2, alpha=4), "up")
    copies = {
        block: {"up": {"A": shared["A"], "B": trained[block]["up"]["core"] @ shared["B"].T}}
        for block in ("blocks_0", "blocks_1")
    }
    with_copies = {"params": variables["params"]}
    loss = lambda t: (lora.apply({**with_copies, "adapters": {"default": t}}, X) ** 2).sum()
    each = [np.asarray(layer["up"]["A"]) for layer in jax.jit(jax.grad(loss))(copies).values()]
    np.testing.assert_allclose(summed, each[0] + each[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(METHODS))
def test_merge_unmerge_and_detach(name):
    method = METHODS[name]
    adapted, base, variables = _attached(Net("scan"), method)
    start = _run(adapted, variables)
    np.testing.assert_allclose(start, _run(adapted.module, base), atol=1e-5)
    variables = {**variables, "adapters": _moved(variables["adapters"])}
    detached = adapted.detach(variables)
    assert jax.tree.structure(detached) == jax.tree.structure(base)
    for a, b in zip(jax.tree.leaves(detached), jax.tree.leaves(base), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    if not method.has_delta:
        with pytest.raises(TypeError, match="depends on the layer's input"):
            adapted.merge(variables)
        return
    y = _run(adapted, variables)
    merged, report = adapted.merge(variables)
    assert len(report.rows) == 2
    plain = _run(adapted.module, {"params": merged["params"]})
    np.testing.assert_allclose(plain, y, atol=1e-5)
    np.testing.assert_allclose(_run(adapted, merged), y, atol=1e-5)
    again = adapted.unmerge(merged)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    np.testing.assert_allclose(_run(adapted, again), y, atol=1e-5)
    with pytest.raises(ValueError, match="not merged yet"):
        adapted.merge(merged)


def test_arrays_of_a_merged_adapter_count_once_and_are_taken_out_as_they_were():
    adapted, _, variables = _attached(Net("loop"), LORA)
    merged, _ = adapted.merge({**variables, "adapters": _moved(variables["adapters"])})
    with pytest.raises(ValueError, match="'default' is merged into these params, and there are"):
        adapted.apply({**merged, "adapters": variables["adapters"]}, X)
    of_adapter = merged["merged_adapters"]["default"]
    of_adapter = {**of_adapter, "adapters": _moved(of_adapter["adapters"], 1e-3)}
    changed = {**merged, "merged_adapters": {"default": of_adapter}}
    stronger = adapted.activate("default", strengths={"default": 2.0})
    for model, of in ((adapted, changed), (stronger, merged)):
        with pytest.raises(ValueError, match=r"'default' of blocks_0/.* have changed since it was"):
            model.unmerge(of)


def test_an_adapter_of_strength_zero_changes_no_weight():
    adapted, base, variables = _attached(Net("loop"), LORA)
    variables = {**variables, "adapters": _moved(variables["adapters"])}
    merged, _ = adapted.activate("default", strengths={"default": 0.0}).merge(variables)
    jax.tree.map(np.testing.assert_array_equal, merged["params"], base["params"])


def test_variables_without_arrays_are_refused_unless_the_adapter_is_switched_off():
    adapted, base, _ = _attached(Net("loop"), LORA)
    with pytest.raises(ValueError, match="no arrays of the adapter 'default': make them"):
        adapted.apply(base, X)
    assert_close(_run(adapted.deactivate(), base), _run(adapted.module, base))


def test_a_gradient_by_a_frozen_weight_is_warned_of():
    adapted, _, variables = _attached(Net("scan"), LORA)
    with pytest.warns(UserWarning, match="frozen weight .* collection 'adapters' alone"):
        jax.eval_shape(jax.grad(lambda v: adapted.apply(v, X).sum()), variables)


@pytest.mark.slow
def test_setup_modules_and_layers_in_a_vmap():
    adapted, base, variables = _attached(SetupNet(), LORA)
    arrays = variables["adapters"]["default"]
    assert arrays["ensemble"]["A"].shape == (3, 4, 2)
    assert arrays["first"]["A"].shape == (4, 2)
    assert_close(_run(adapted, variables), _run(adapted.module, base))
    variables = {**variables, "adapters": _moved(variables["adapters"])}
    merged, _ = adapted.merge(variables)
    result = _run(adapted.module, {"params": merged["params"]})
    np.testing.assert_allclose(result, _run(adapted, variables), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_needs_a_key_and_layers_of_a_scan_drop_apart():
    method = lro.adapters.LoRA(rank=2, dropout=0.5, initial="random")
    adapted, _, variables = _attached(Net("scan"), method)
    plain = _run(adapted, variables)
    drop = lambda seed: np.asarray(_run(adapted, variables, rngs={"dropout": jax.random.key(seed)}))
    assert np.abs(drop(0) - plain).max() > 1e-3
    assert np.abs(drop(0) - drop(1)).max() > 1e-3
    np.testing.assert_array_equal(drop(0), drop(0))


def test_several_adapters_are_switched_and_weighted():
    random = lro.adapters.LoRA(rank=1, initial="random")
    module = nn.Dense(4)
    adapted = Adapted(Adapted(module, random, ".*", name="a"), random, ".*", name="b")
    variables = adapted.init(jax.random.key(0), X)
    assert set(variables["adapters"]) == {"a", "b"}
    y = np.asarray(_run(module, {"params": variables["params"]}))
    change = lambda model: np.asarray(_run(model, variables)) - y
    a, b = change(adapted.activate("a")), change(adapted.deactivate("a"))
    np.testing.assert_allclose(change(adapted), a + b, atol=1e-5)
    weighted = adapted.activate("a", "b", strengths={"a": 2.0, "b": -1.0})
    np.testing.assert_allclose(change(weighted), 2 * a - b, atol=1e-5)
    assert_close(change(adapted.deactivate()), 0, size=np.abs(y).max())
    merged, _ = adapted.merge(variables, "a")
    np.testing.assert_allclose(_run(adapted.deactivate("b"), merged), y + a, atol=1e-5)


def test_a_train_state_trains_only_the_adapters():
    adapted, base, variables = _attached(Net("scan"), LORA)
    state = TrainState.create(
        apply_fn=adapted.apply, params=variables["adapters"], tx=optax.adam(0.05)
    )

    @jax.jit
    def step(state, frozen):
        loss = lambda p: (state.apply_fn({**frozen, "adapters": p}, X) ** 2).mean()
        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    frozen = {"params": base["params"]}
    losses = []
    for _ in range(4):
        state, value = step(state, frozen)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(variables["adapters"])


def test_shapes_suffice_to_attach_and_patterns_set_ranks():
    net = Net("loop")
    adapted = Adapted(net, LORA, "up", rank_pattern={"_1": 3}, alpha_pattern={"_1": 6.0})
    _, base, _ = _attached(net, LORA)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    arrays = adapted.attach(base, jax.random.key(1), shape)["adapters"]["default"]
    assert arrays["blocks_0"]["up"]["A"].shape == (4, 2)
    assert arrays["blocks_1"]["up"]["A"].shape == (4, 3)
    assert "down" not in arrays["blocks_0"]


@pytest.mark.slow
def test_mutable_collections_come_back_without_adapters():
    adapted, _, variables = _attached(Net("scan"), LORA)
    apply = lambda v: adapted.apply(v, X, mutable=["params", "intermediates"])
    _, updates = jax.eval_shape(apply, variables)
    assert jax.tree.structure(updates["params"]) == jax.tree.structure(variables["params"])
    output, fresh = adapted.init_with_output(jax.random.key(0), X)
    assert_close(output, _run(adapted, fresh))


def test_the_summary_counts_shared_arrays_once():
    adapted, _, variables = _attached(Net("scan"), LOTR, "up")
    table = adapted.summary(jax.eval_shape(lambda: variables))
    assert table.rows[0].path == "blocks/up"
    assert table.rows[0].weight == "2 × (4 × 6)"
    assert table.trained == 2 * 4 + 2 * 6 + 2 * 2 * 2


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("upp", {}, "near it are"),
        ("up", {"rank_pattern": {"down": 3}}, "rank_pattern='down' matches no layer"),
    ],
)
def test_patterns_that_match_nothing_are_refused(where, options, message):
    _, base, _ = _attached(Net("loop"), LORA)
    adapted = Adapted(Net("loop"), LORA, where, **options)
    with pytest.raises(ValueError, match=message):
        adapted.attach(base, jax.random.key(0), X)


def test_parameters_without_their_collection_are_refused_as_such():
    _, base, _ = _attached(Net("loop"), LORA)
    with pytest.raises(ValueError, match="variables has no collection 'params': it has "):
        Adapted(Net("loop"), LORA, "up").attach(base["params"], jax.random.key(0), X)


def test_bad_arguments_are_refused_where_they_are_given():
    with pytest.raises(TypeError, match="must be an adapter"):
        Adapted(Net("loop"), "lora")
    adapted = Adapted(Net("loop"), LORA)
    with pytest.raises(ValueError, match="already"):
        Adapted(adapted, LORA)
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        adapted.activate("x")
    with pytest.raises(RuntimeError, match="trace"):
        adapted.merge({"params": {}})
    _, _, variables = _attached(Net("loop"), LORA)
    with pytest.raises(ValueError, match="not in params"):
        adapted.apply({"params": {}, "adapters": variables["adapters"]}, X)
