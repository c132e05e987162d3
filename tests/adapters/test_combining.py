"""Several adapters merged into one."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.adapters.nnx_models import Scanned, Unrolled, randomized, tokens

MODELS = {"scanned": Scanned, "unrolled": Unrolled}


def adapted(kind=Scanned, methods=None, where="up|down"):
    model = kind(3, nnx.Rngs(0))
    methods = methods or {"a": lro.adapters.LoRA(rank=2, alpha=6), "b": lro.adapters.LoRA(rank=2)}
    for number, (name, method) in enumerate(methods.items()):
        lro.adapters.attach(model, method, where, rngs=number + 1, name=name)
    randomized(model)
    return model


def factors(model, name, path="blocks/up"):
    """Raw factors [L, d_in, r], [L, r, d_out] in float64, and the scale."""
    layer = model.blocks.up if path.endswith("up") else model.blocks.down
    arrays, method = layer.adapters[name].arrays, layer.adapters[name].method
    a, b = (np.asarray(arrays[k][...], np.float64) for k in "AB")
    return a, b, method.scale_of(method.rank)


def change(model, name):
    a, b, scale = factors(model, name)
    return scale * a @ b


def summed(model, weights):
    return sum(w * change(model, name) for name, w in weights.items())


@pytest.mark.parametrize("kind", ["scanned", pytest.param("unrolled", marks=pytest.mark.full)])
def test_concatenation_and_a_large_svd_are_the_weighted_sum(kind):
    weights = {"a": 0.7, "b": -1.5}
    for how, options in (("concatenate", {}), ("svd", {"rank": 4})):
        model = adapted(MODELS[kind])
        lro.adapters.activate(model, "a", "b", strengths=weights)
        expected = model(tokens())
        lro.adapters.merge_adapters(model, weights, how, name="new", **options)
        np.testing.assert_allclose(model(tokens()), expected, atol=2e-5)
        lro.adapters.detach(model, "a")
        lro.adapters.detach(model, "b")
        np.testing.assert_allclose(model(tokens()), expected, atol=2e-5)


def test_the_svd_is_the_nearest_matrix_of_its_rank():
    weights = {"a": 1.0, "b": 0.5}
    model = adapted()
    exact = summed(model, weights)
    lro.adapters.merge_adapters(model, weights, "svd", name="new")
    u, s, v = np.linalg.svd(exact, full_matrices=False)
    best = (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]
    np.testing.assert_allclose(change(model, "new"), best, atol=2e-5)


def test_linear_adds_factors_of_balanced_scale():
    model = adapted()
    (a1, b1, s1), (a2, b2, s2) = factors(model, "a"), factors(model, "b")
    lro.adapters.merge_adapters(model, {"a": 0.5, "b": -2.0}, "linear", name="new")
    a = np.sqrt(0.5 * s1) * a1 - np.sqrt(2 * s2) * a2
    b = np.sqrt(0.5 * s1) * b1 + np.sqrt(2 * s2) * b2
    np.testing.assert_allclose(change(model, "new"), a @ b, atol=2e-5)


def reference_ties(arrays, weights, density, sign):
    """Loops over entries, in float64."""
    kept = []
    for x in arrays:
        order = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(density * x.size)]
        flat = np.zeros(x.size)
        flat[order] = x.ravel()[order]
        kept.append(flat)
    out = np.zeros(arrays[0].size)
    for i in range(out.size):
        entries = [x[i] for x in kept]
        vote = sum(entries) if sign == "total" else sum(np.sign(entries))
        elected = 1 if vote >= 0 else -1
        agree = [w * x for w, x in zip(weights, entries, strict=True) if np.sign(x) == elected]
        out[i] = sum(agree) / max(len(agree), 1)
    return out.reshape(arrays[0].shape)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_of_factors_and_of_changes(sign):
    names, weights = ("a", "b", "c"), (1.0, 0.5, 2.0)
    methods = {
        name: lro.adapters.LoRA(rank=2, alpha=a) for name, a in zip(names, (2, 4, 6), strict=True)
    }
    model = adapted(methods=methods)
    raw = [factors(model, name) for name in names]
    given = dict(zip(names, weights, strict=True))
    options = {"density": 0.6, "sign": sign}
    lro.adapters.merge_adapters(model, given, "ties", name="factors", **options)
    lro.adapters.merge_adapters(model, given, "ties_svd", name="svd", rank=6, **options)
    for layer in range(3):
        halves = [np.sqrt(w * s) for w, (*_, s) in zip(weights, raw, strict=True)]
        a, b = (reference_ties([x[i][layer] for x in raw], halves, 0.6, sign) for i in range(2))
        np.testing.assert_allclose(change(model, "factors")[layer], a @ b, atol=3e-5)
        deltas = [(s * a @ b)[layer] for a, b, s in raw]
        exact = reference_ties(deltas, weights, 0.6, sign)
        np.testing.assert_allclose(change(model, "svd")[layer], exact, atol=3e-5)


@pytest.mark.full
def test_dare_drops_entries_and_keeps_the_mean():
    model = adapted(methods={"a": lro.adapters.LoRA(rank=2)})
    mean, draws = 0, 60
    exact = change(model, "a")
    for seed in range(draws):
        lro.adapters.merge_adapters(
            model,
            {"a": 1.0},
            "dare_svd",
            name="new",
            density=0.5,
            rank=6,
            key=jax.random.key(seed),
        )
        new = change(model, "new")
        ratio = new / exact
        assert np.all((np.abs(ratio) < 1e-3) | (np.abs(ratio - 2) < 1e-3))
        mean = mean + new / draws
        lro.adapters.detach(model, "new")
    # Each entry is 0 or 2, of standard deviation 1: five of those of the mean.
    assert np.max(np.abs(mean / exact - 1)) < 5 / np.sqrt(draws)


@pytest.mark.parametrize("how", ["linear", "ties", "dare"])
def test_scales_of_any_sign(how):
    """A scale of zero, or the lack of an adapter in a layer of a stack, takes no part."""
    options = {} if how == "linear" else {"density": 1.0}
    options |= {"key": jax.random.key(0)} if how == "dare" else {}
    methods = {name: lro.adapters.LoRA(rank=2, alpha=a) for name, a in (("a", -6), ("b", 2))}
    model = adapted(methods=methods | {"c": lro.adapters.LoRA(rank=2, alpha=0)})
    partial = lro.adapters.LoRA(rank=(2, 2, 1))
    lro.adapters.attach(model, partial, "up", rngs=9, name="d")
    arrays = model.blocks.up.adapters["d"].arrays
    arrays["rank_scale"].set_value(arrays["rank_scale"][...].at[2].set(0))  # as PEFT's files
    a1, b1, _ = factors(model, "a")
    weights = dict.fromkeys("acd", 1.0)
    lro.adapters.merge_adapters(model, weights, how, name="new", **options)
    # In the last layer the first adapter is alone.
    expected = -6 / 2 * a1[2] @ b1[2]
    np.testing.assert_allclose(change(model, "new")[2], expected, atol=3e-5)
    assert np.isfinite(change(model, "new")).all()


def test_a_density_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"density=0.05 leaves none of the 12 entries"):
        lro.adapters.merge_adapters(
            adapted(), {"a": 1.0, "b": 1.0}, "ties", name="new", density=0.05
        )


def test_layers_with_some_of_the_adapters():
    model = Scanned(3, nnx.Rngs(0))
    lro.adapters.attach(model, lro.adapters.LoRA(rank=1), "up|down", rngs=1, name="a")
    lro.adapters.attach(model, lro.adapters.LoTR(rank=2), "up|head", rngs=2, name="b")
    randomized(model)
    expected = model(tokens())
    lro.adapters.merge_adapters(model, {"a": 1.0, "b": 1.0}, "concatenate", name="new")
    np.testing.assert_allclose(model(tokens()), expected, atol=2e-5)
    assert model.head.adapters["new"].arrays["A"].shape[-1] == 2
    assert model.blocks.up.adapters["new"].arrays["A"].shape[-1] == 3


def test_a_method_that_changed_the_base_is_merged_as_its_change():
    model = adapted(methods={"a": lro.adapters.PiSSA(rank=2), "b": lro.adapters.LoRA(rank=2)})
    expected = model(tokens())
    lro.adapters.merge_adapters(model, {"a": 1.0, "b": 1.0}, "concatenate", name="new")
    np.testing.assert_allclose(model(tokens()), expected, atol=5e-5)
    lro.adapters.detach(model, "a")
    np.testing.assert_allclose(model(tokens()), expected, atol=5e-5)


REFUSED = {
    "how": ({"how": "cat"}, "how='cat' must be one of 'concatenate'"),
    "weights": ({"weights": {}}, "weights={} must give each adapter's name"),
    "infinite": ({"weights": {"a": np.inf}}, "a finite number"),
    "unknown": ({"weights": {"z": 1.0}}, "no adapter named 'z'"),
    "name": ({"how": "concatenate", "name": "b"}, "has an adapter named 'b' already"),
    "rank unused": ({"how": "linear", "rank": 2}, "rank=2 has no meaning for how='linear'"),
    "rank": ({"rank": 0}, "rank=0 must be an int of at least 1"),
    "rank above": ({"rank": 7}, r"rank=7 is above the sides \(12, 6\)"),
    "density unused": ({"density": 0.5}, "density=0.5 has no meaning for how='svd'"),
    "density missing": ({"how": "ties"}, "density=None must be above 0"),
    "density": ({"how": "ties", "density": 1.5}, "density=1.5 must be above 0 and at most 1"),
    "sign": ({"how": "ties", "density": 0.5, "sign": "most"}, "sign='most' must be"),
    "key": ({"how": "dare", "density": 0.5}, "key=None: how='dare' draws entries"),
    "key unused": ({"key": jax.random.key(0)}, "key has no meaning for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_nothing_is_changed(case):
    options, message = REFUSED[case]
    given = {"weights": {"a": 1.0, "b": 1.0}, "how": "svd", "name": "new", **options}
    model = adapted()
    before = nnx.state(model)
    with pytest.raises(ValueError, match=message):
        lro.adapters.merge_adapters(model, given.pop("weights"), given.pop("how"), **given)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)


def test_factors_are_added_under_jit_too():
    def merged(model):
        lro.adapters.merge_adapters(model, {"a": 0.5, "b": 2.0}, "linear", name="new")
        return nnx.state(model.blocks.up.adapters["new"], lro.adapters.trainable)

    expected = merged(adapted())
    jax.tree.map(np.testing.assert_allclose, nnx.jit(merged)(adapted()), expected)


def test_adapters_that_cannot_be_merged():
    both = {"a": 1.0, "b": 1.0}
    unlike = {"a": lro.adapters.LoRA(rank=2), "b": lro.adapters.LoRA(rank=3)}
    with pytest.raises(ValueError, match=r"which need one rank, and those of .* have 2, 3"):
        lro.adapters.merge_adapters(adapted(methods=unlike), both, "linear", name="new")
    unlike = {"a": lro.adapters.LoRA(rank=(2, 2, 1)), "b": lro.adapters.LoRA(rank=2)}
    with pytest.raises(ValueError, match=r"which need one rank, and those of .* have 1, 2"):
        lro.adapters.merge_adapters(adapted(methods=unlike), both, "linear", name="new")
    full = {"a": lro.adapters.LoRA(rank=2), "b": lro.adapters.DoRA(rank=2)}
    pissa = {"a": lro.adapters.PiSSA(rank=2), "b": lro.adapters.LoRA(rank=2)}
    with pytest.raises(ValueError, match=r"need one rank, and those of .* have 2, 4"):
        lro.adapters.merge_adapters(adapted(methods=pissa), both, "linear", name="new")
    with pytest.raises(TypeError, match=r"'b' of .*DoRA"):
        lro.adapters.merge_adapters(adapted(methods=full), both, "svd", name="new")
    model = adapted()
    lro.adapters.merge(model, "a")
    with pytest.raises(ValueError, match=r"'a' of .* is merged into the weight"):
        lro.adapters.merge_adapters(model, both, "svd", name="new")
    model = adapted()
    lro.adapters.activate(model, "a")
    lro.adapters.also_train(model, "embed", "a")
    with pytest.raises(ValueError, match=r"'a' has trained values of embed/embedding"):
        lro.adapters.merge_adapters(model, both, "svd", name="new")


@pytest.mark.parametrize(("method", "rank"), [(lro.adapters.PiSSA, 2), (lro.adapters.LaMDA, 99)])
def test_equal_ranks_given_one_by_one_are_one_rank(method, rank):
    # PiSSA's change has twice the rank, and LaMDA's at most the sides.
    found = []
    for ranks in (rank, (rank,) * 3):
        model = adapted(methods={"a": method(rank=ranks), "b": method(rank=rank)}, where="up")
        lro.adapters.merge_adapters(model, {"a": 0.5, "b": 2.0}, "linear", name="new")
        found.append(change(model, "new"))
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("how", ["concatenate", "svd", "linear", "ties", "ties_svd"])
def test_agrees_with_the_peft_package(how):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 12, bias=False))
    config = lambda alpha: peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"])
    theirs = peft.get_peft_model(base, config(6), adapter_name="one")
    theirs.add_adapter("two", config(-3))
    model = nnx.Sequential(nnx.Linear(6, 12, use_bias=False, rngs=nnx.Rngs(0)))
    layer = theirs.base_model.model[0]
    for name, alpha in (("one", 6), ("two", -3)):
        method = lro.adapters.LoRA(rank=2, alpha=alpha)
        lro.adapters.attach(model, method, "layers", rngs=1, name=name)
        with torch.no_grad():
            layer.lora_B[name].weight.normal_()
        arrays = model.layers[0].adapters[name].arrays
        for ours, module in (("A", layer.lora_A), ("B", layer.lora_B)):
            arrays[ours].set_value(jnp.asarray(module[name].weight.detach().numpy().T))
    kind = {"concatenate": "cat"}.get(how, how)
    density = {"density": 0.6} if how.startswith("ties") else {}
    theirs.add_weighted_adapter(["one", "two"], [0.5, -1.5], "new", kind, **density)
    lro.adapters.merge_adapters(model, {"one": 0.5, "two": -1.5}, how, name="new", **density)
    expected = layer.get_delta_weight("new").detach().numpy().T
    method, p = model.layers[0].adapters["new"].method, model.layers[0].adapters["new"].p()
    np.testing.assert_allclose(method.delta(p, jnp.zeros((6, 12))), expected, atol=1e-5)
