"""Adapters for functions of any tree of parameters."""

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices import WeightDimensionNumbers
from tests.adapters.methods import MERGEABLE, cases

pytree = lro.adapters.pytree
LORA = lro.adapters.LoRA(rank=2, alpha=6, initial="random")
LAST = WeightDimensionNumbers(-2, -1)


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _params():
    return {"up": {"kernel": _normal(0, 3, 4, 6)}, "down": {"kernel": _normal(1, 3, 6, 4)}}


def _run(params, x):
    """Three layers in a scan."""

    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    return jax.lax.scan(layer, x, params)[0]


_jitted = jax.jit(_run)
X = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)


def _moved(tree):
    return jax.tree.map(lambda a: np.asarray(a) + 0.1 * np.asarray(_normal(a.size, *a.shape)), tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(MERGEABLE))
def test_sums_and_factors_and_the_merged_parameters_give_the_same(name):
    params, method = _params(), MERGEABLE[name]
    adapter = pytree.init(jax.random.key(1), params, method, "up|down", LAST)
    by_effective = jax.jit(lambda params, t: pytree.effective(params, adapter.replace(t)))
    start = _jitted(by_effective(params, adapter.trainable), X)
    assert_close(start, _jitted(params, X), 100)
    trained = _moved(adapter.trainable)
    by = {
        "effective": lambda a: _run(pytree.effective(params, a), X),
        "factored": lambda a: _run(pytree.factored(params, a), X),
        "apply": lambda a: pytree.apply(_run, params, a, X),
    }
    # What collects statistics of its inputs is trained by factors alone.
    names = ["factored"] if method.statistics else list(by)
    of = lambda name: jax.value_and_grad(lambda t: (by[name](adapter.replace(t)) ** 2).sum())
    # One program: what they share is traced and compiled once.
    found = jax.jit(lambda t: [of(name)(t) for name in names])(trained)
    (value, gradient), *rest = found
    for other, others in rest:
        assert_close(other, value, 800)
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    moved = adapter.replace(trained)
    merged = jax.jit(pytree.merge)(params, moved)
    assert_close(np.square(_jitted(merged, X)).sum(), value, 800)
    unmerged = jax.jit(pytree.unmerge)(merged, moved)
    for a, b in zip(jax.tree.leaves(unmerged), jax.tree.leaves(params), strict=True):
        assert_close(a, b, 100)


def test_a_lora_starts_bit_for_bit_at_the_function():
    params = _params()
    adapter = pytree.init(jax.random.key(1), params, lro.adapters.LoRA(rank=2), "up", LAST)
    whole = pytree.effective(params, adapter)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    factored = jax.jit(lambda p, a: _run(pytree.factored(p, a), X))
    assert_close(factored(params, adapter), _jitted(params, X))


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        ((2, 3, 1), (0, 1, 2)),
        ((2, 3, 3), (2, 0, 1)),
        ((3, 2, 1, 2), (3, 1, 0, 2)),
    ],
)
def test_axes_of_any_order_are_changed_as_numpy_does(sizes, order):
    summed, kept, batch = order[0], order[1], sorted(order[2:])
    params = [np.ones(sizes, np.float32), {"b": np.ones(3, np.float32)}]
    spec = [WeightDimensionNumbers(summed, kept), None]
    adapter = pytree.init(jax.random.key(0), params, LORA, None, spec)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), adapter.trainable["0"])
    change = 3 * p["A"] @ p["B"]  # [*batch, summed, kept]
    axes = [*batch, summed, kept]
    expected = 1 + change.transpose(np.argsort(axes))
    merged = pytree.merge(params, adapter)
    np.testing.assert_allclose(merged[0], expected, rtol=1e-5, atol=1e-5)
    assert merged[1]["b"] is params[1]["b"]
    ((first, second),) = jax.device_get(pytree.to_lora(adapter)).values()
    np.testing.assert_allclose(first @ second, change, rtol=1e-4, atol=1e-5)


def test_apply_keeps_no_weight_for_backward_that_effective_keeps():
    from jax._src.ad_checkpoint import saved_residuals

    params = {"w": jnp.ones((64, 64))}
    adapter = pytree.init(jax.random.key(0), params, LORA)
    f = lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"]
    x = jnp.ones((2, 64))
    with_apply = lambda t: pytree.apply(f, params, adapter.replace(t), x).sum()
    with_sum = lambda t: f(pytree.effective(params, adapter.replace(t)), x).sum()

    def made(loss):
        found = saved_residuals(loss, adapter.trainable)
        return [a for a, source in found if a.shape == (64, 64) and "constant" not in source]

    assert not made(with_apply)
    assert made(with_sum)


def test_no_matrix_of_the_weights_size_is_made_by_factors():
    params = {"w": jnp.ones((64, 64))}
    adapter = pytree.init(jax.random.key(0), params, LORA)
    f = lambda t, x: (x @ pytree.factored(params, adapter.replace(t))["w"]).sum()
    text = str(jax.make_jaxpr(jax.grad(f))(adapter.trainable, jnp.ones((2, 64))))
    made = [line for line in text.splitlines() if ":f32[64,64] =" in line]
    assert not [line for line in made if "transpose" not in line]


def test_a_factored_weight_is_no_array():
    params = _params()
    adapter = pytree.init(jax.random.key(0), params, LORA, "up", LAST)
    leaf = pytree.factored(params, adapter)["up"]["kernel"]
    assert (leaf.shape, leaf.ndim, leaf.dtype) == ((3, 4, 6), 3, jnp.float32)
    assert leaf[1].shape == (4, 6)
    with pytest.raises(TypeError, match="is no array"):
        jnp.asarray(leaf)
    with pytest.raises(TypeError):
        leaf + 1
    with pytest.raises(TypeError):
        jnp.einsum("bd,lde->lbe", X, leaf)
    with pytest.raises(TypeError, match="same leading axes"):
        X @ leaf
    together = jnp.stack([X] * 3) @ leaf
    np.testing.assert_allclose(together[1], X @ leaf[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(X) @ leaf[1], X @ leaf[1])


def test_weights_with_outputs_first_are_used_transposed():
    params = {"w": _normal(2, 5, 4)}
    adapter = pytree.init(jax.random.key(0), params, LORA, None, WeightDimensionNumbers(1, 0))
    leaf = pytree.factored(params, adapter)["w"]
    expected = X @ pytree.effective(params, adapter)["w"].T
    np.testing.assert_allclose(X @ leaf.T, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="inputs come last"):
        jnp.ones((1, 5)) @ leaf


def test_leaves_are_chosen_by_the_rule_by_names_or_by_pattern():
    params = {
        "embed": {"embedding": jnp.ones((9, 4))},
        "up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    }
    at = lambda where: [x.name for x in pytree.init(jax.random.key(0), params, LORA, where).leaves]
    assert at(None) == ["up/kernel"]
    assert at("embed") == ["embed/embedding"]
    assert at(lambda path, leaf: leaf.shape[0] == 4) == ["up/kernel"]
    with pytest.raises(ValueError, match="near it are: "):
        at("upp")
    with pytest.raises(TypeError, match="must be an adapter"):
        pytree.init(jax.random.key(0), params, None)
    with pytest.raises(ValueError, match="rank_pattern='x' matches no layer"):
        pytree.init(jax.random.key(0), params, LORA, rank_pattern={"x": 1})
    adapter = pytree.init(jax.random.key(0), params, LORA)
    with pytest.raises(ValueError, match="no leaf up/kernel"):
        pytree.effective({"down": jnp.ones((2, 2))}, adapter)


def test_weights_whose_axes_are_not_known_are_not_left_out_in_silence():
    params = {"in": jnp.ones((4, 8)), "mid": jnp.ones((3, 8, 8)), "mid_bias": jnp.ones((2, 3, 8))}
    init = lambda *args: pytree.init(jax.random.key(0), params, LORA, *args).leaves
    for where in ("in|mid", ["in", "mid"], "mid", lambda path, leaf: True):
        with pytest.raises(ValueError, match=r"matches mid \(3, 8, 8\), of which names"):
            init(where)
    with pytest.warns(UserWarning, match=r"no adapter is attached to mid \(3, 8, 8\)"):
        assert [x.name for x in init()] == ["in"]
    axes = {"in": LAST, "mid": LAST, "mid_bias": None}
    assert [x.name for x in init("in|mid", axes)] == ["in", "mid"]


def test_dropout_is_refused_since_no_call_has_a_key():
    with pytest.raises(ValueError, match=r"dropout=0\.1 of LoRA would do nothing here"):
        pytree.init(jax.random.key(0), _params(), lro.adapters.LoRA(dropout=0.1), None, LAST)


def test_shared_factors_are_one_array_and_the_summary_counts_them_once():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}
    adapter = pytree.init(jax.random.key(0), params, lro.adapters.LoTR(rank=2))
    assert pytree.summary(params, adapter).trained == 2 * (4 + 6) + 2 * 2 * 2
    (group,) = adapter.trainable["adapter_groups"]
    assert set(adapter.trainable["adapter_groups"][group]) == {"A", "B"}


def test_several_axes_of_inputs_cannot_be_factored():
    params = {"w": jnp.ones((2, 3, 4))}
    spec = WeightDimensionNumbers((0, 1), 2)
    adapter = pytree.init(jax.random.key(0), params, LORA, None, spec)
    assert pytree.effective(params, adapter)["w"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match="Use `effective`"):
        pytree.factored(params, adapter)
