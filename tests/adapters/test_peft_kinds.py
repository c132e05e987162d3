"""Kinds of PEFT's adapters that are folded: their formulas written out, and what is refused."""

import itertools
import json
import math

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax import cli
from lowrank_optax.adapters import UnsupportedConfigError, fold_peft, load_peft, save_peft
from lowrank_optax.adapters.peft.attached_kinds import MiSS, RandLoRA
from lowrank_optax.adapters.peft.kinds import OFT, two_factors
from lowrank_optax.storage.safetensors_files import CheckpointMismatchError
from tests.adapters.peft_files import (
    MLP,
    NAMES,
    OUT,
    SIZES,
    Model,
    Q,
    adapted,
    changed,
    output,
    random_tensors,
    read,
    refused,
    snapshot,
    write,
)

pytest.importorskip("safetensors")

LAYERS = range(3)


def adalora(t, weight, bias, module):
    change = t["lora_A"].T @ np.diag(t["lora_E"][:, 0]) @ t["lora_B"].T
    return weight + 5 / (3 + 1e-5) * change, bias


def loha(t, weight, bias, module):
    first = np.einsum("or,ri->io", t["hada_w1_a"], t["hada_w1_b"])
    second = np.einsum("or,ri->io", t["hada_w2_a"], t["hada_w2_b"])
    return weight + (3 if module == Q else 5) / 2 * first * second, bias


def lokr(t, weight, bias, module):
    first = t["lokr_w1"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    weight = weight.copy()
    (rows, columns), (tall, wide) = first.shape, second.shape
    for i, j, k, n in itertools.product(*map(range, (rows, columns, tall, wide))):
        weight[j * wide + n, i * tall + k] += 5 * first[i, j] * second[k, n]
    return weight, bias


def ia3(t, weight, bias, module):
    scales = t["ia3_l"].reshape(-1)
    if module == MLP:
        return weight * scales[:, None], bias
    return weight * scales, None if bias is None else bias * scales


def oft(t, weight, bias, module):
    weight = weight.copy()
    for block, (x,) in enumerate(t["oft_R.weight"]):  # of 2 rows
        q = np.array([[0, x], [-x, 0]])
        rotation = np.eye(2) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        weight[2 * block : 2 * block + 2] = rotation @ weight[2 * block : 2 * block + 2]
    return weight, bias


def miss(t, weight, bias, module):
    (block,) = t.values()
    return weight + np.stack([block[i % 3] for i in range(len(weight))]), bias


def mini(t, weight, bias, module):
    (block,), weight = t.values(), weight.copy()
    for i, o in np.ndindex(weight.shape):
        weight[i, o] += block[i % 3, o % 2]
    return weight, bias


def bat(t, weight, bias, module):
    (block,), result = t.values(), weight.copy()
    for j, q in np.ndindex(len(weight) // 2, len(weight[0]) // 2):
        at = slice(2 * j, 2 * j + 2), slice(2 * q, 2 * q + 2)
        result[at] += block[q].T @ (weight[at] + np.eye(2))
    return result, bias


def vera(t, weight, bias, module):
    d_in, d_out = weight.shape
    first = t["vera_A"][:, :d_in].T @ np.diag(t["vera_lambda_d"])
    return weight + first @ t["vera_B"][:d_out].T @ np.diag(t["vera_lambda_b"]), bias


def randlora(t, weight, bias, module):
    d, big = min(weight.shape), max(weight.shape)
    scales, gamma = t["randlora_lambda"], t["randlora_gamma"]
    bases, product = len(gamma), np.zeros((big, d))
    for flat in range(3 * bases):  # rows of one base meet columns of the other in another order
        k, j, other, m = flat // bases, flat % bases, flat // 3, flat % 3
        row = scales[k, j] * t["randlora_A"][k, 0, :d] * gamma[j]
        product += np.outer(t["randlora_B"][:big, other, m], row)
    return weight + 7 / 3 * (product.T if weight.shape[0] == d else product), bias


def by_layer(shapes):
    """The shapes of one kind of module, which depend on its sizes, for all modules."""
    return lambda: {
        f"{layer}.{module}.{name}": shape
        for layer in LAYERS
        for module, sizes in SIZES.items()
        for name, shape in shapes(*sizes).items()
    }


def shared(**shapes):
    return {f"base_model.{name}": shape for name, shape in shapes.items()}


R = 3
CASES = {
    "ADALORA": (
        adalora,
        {"init_r": R, "lora_alpha": 5},
        by_layer(lambda i, o: {"lora_A": (R, i), "lora_B": (o, R), "lora_E": (R, 1)}),
    ),
    "LOHA": (
        loha,
        {"r": 2, "alpha": 5, "alpha_pattern": {"q_proj": 3}},
        by_layer(
            lambda i, o: {
                "hada_w1_a": (o, 2),
                "hada_w1_b": (2, i),
                "hada_w2_a": (o, 2),
                "hada_w2_b": (2, i),
            }
        ),
    ),
    "LOKR": (
        lokr,
        {"r": 1, "alpha": 5},
        by_layer(
            lambda i, o: (
                {"lokr_w1": (2, 2)}
                | (
                    {"lokr_w2": (2, 2)}
                    if i == o
                    else {"lokr_w2_a": (o // 2, 1), "lokr_w2_b": (1, i // 2)}
                )
            )
        ),
    ),
    "IA3": (
        ia3,
        {"feedforward_modules": ["mlp"]},
        by_layer(lambda i, o: {"ia3_l": (1, i) if i == o else (o, 1)}),
    ),
    "OFT": (
        oft,
        {"r": 0, "oft_block_size": 2, "peft_version": "0.21.2"},
        by_layer(lambda i, o: {"oft_R.weight": (i // 2, 1)}),
    ),
    "MISS": (miss, {"r": 3}, by_layer(lambda i, o: {"miss_block": (3, o)})),
    "BONE": (miss, {"r": 3}, by_layer(lambda i, o: {"bone_block": (3, o)})),
    "MISS mini": (
        mini,
        {"r": 3, "mini_r": 2, "init_weights": "mini"},
        by_layer(lambda i, o: {"miss_block": (3, 2)}),
    ),
    "BONE bat": (
        bat,
        {"r": 2, "init_weights": "bat"},
        by_layer(lambda i, o: {"bone_block": (o // 2, 2, 2)}),
    ),
    "VERA": (
        vera,
        {"r": 5, "save_projection": True},
        lambda: (
            shared(vera_A=(5, 6), vera_B=(6, 5))
            | by_layer(lambda i, o: {"vera_lambda_d": (5,), "vera_lambda_b": (o,)})()
        ),
    ),
    "RANDLORA": (
        randlora,
        {"r": 3, "randlora_alpha": 7},
        # The most inputs and the most outputs are 6 each.
        lambda: (
            shared(randlora_A=(3, 1, 6), randlora_B=(6, 2, 3))
            | by_layer(lambda i, o: {"randlora_lambda": (3, 2), "randlora_gamma": (2, 4)})()
        ),
    ),
}


def folder_of(path, case):
    """A folder of this kind for all layers of `Model`."""
    _, config, shapes = CASES[case]
    tensors = {
        name if name.startswith("base_model") else f"base_model.model.model.layers.{name}": x
        for name, x in random_tensors(shapes()).items()
    }
    targets = {"peft_type": case.partition(" ")[0], "target_modules": ["q_proj", "o_proj", "mlp"]}
    return write(path, targets | config, tensors)


@pytest.fixture
def folder(tmp_path):
    return lambda case: folder_of(tmp_path / case.replace(" ", "_"), case)


def weights(model, module):
    """Weights ``[layers, d_in, d_out]`` and biases of a module of all layers."""
    names = {Q: "query", OUT: "out", MLP: "mlp"}
    layers = model.layers if isinstance(model.layers, nnx.List) else [model.layers]
    found = [getattr(layer, names[module]) for layer in layers]
    read = lambda x, *shape: np.concatenate([np.asarray(v[...]).reshape(-1, *shape) for v in x])
    biases = [x.bias for x in found if getattr(x, "bias", None) is not None]
    matrices = read([x.kernel for x in found], *SIZES[module])
    return matrices, read(biases, SIZES[module][1]) if biases else None


def with_biases(stacked):
    """A model whose biases are not zero."""
    model, rng = Model(stacked), np.random.default_rng(8)
    for layer in model.layers if isinstance(model.layers, nnx.List) else [model.layers]:
        for x in (layer.query.bias, layer.out.bias):
            x.set_value(jnp.asarray(rng.normal(size=x.shape), jnp.float32))
    return model


@pytest.mark.parametrize(
    ("case", "stacked"), [*((case, True) for case in CASES), ("IA3", False), ("RANDLORA", False)]
)
def test_the_formula_of_a_kind_is_folded_into_every_layer(folder, case, stacked):
    path, formula = folder(case), CASES[case][0]
    tensors = {k: x.astype(np.float64) for k, x in read(path)[1].items()}
    of_all = {k.removeprefix("base_model."): x for k, x in tensors.items() if k.count(".") == 1}
    before, model = with_biases(stacked), with_biases(stacked)
    assert fold_peft(model, path, names=NAMES) is model
    for module in SIZES:
        (old, old_bias), (new, new_bias) = weights(before, module), weights(model, module)
        for layer in LAYERS:
            prefix = f"base_model.model.model.layers.{layer}.{module}."
            own = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
            bias = None if old_bias is None else old_bias[layer].astype(np.float64)
            weight = old[layer].astype(np.float64)
            expected, expected_bias = formula(own | of_all, weight, bias, module)
            assert abs(expected - old[layer]).max() > 0.1
            assert_close(new[layer], expected, 40)
            if bias is not None:
                assert_close(new_bias[layer], expected_bias, 4)
    assert {k for k, x in snapshot(model).items() if x != snapshot(before)[k]} <= {
        k for k in snapshot(before) if k.startswith("layers") and "norm" not in k
    }


def test_weights_are_rounded_once_to_their_dtype(folder):
    path, model = folder("RANDLORA"), Model(True)
    kernel = model.layers.mlp.kernel
    kernel.set_value(kernel[...].astype(jnp.bfloat16))
    before = np.asarray(kernel[...], np.float64)
    fold_peft(model, path, names=NAMES)
    after = np.asarray(kernel[...])
    assert after.dtype == jnp.bfloat16
    tensors = {k: x.astype(np.float64) for k, x in read(path)[1].items()}
    of_all = {k.removeprefix("base_model."): x for k, x in tensors.items() if k.count(".") == 1}
    for layer in LAYERS:
        prefix = f"base_model.model.model.layers.{layer}.mlp."
        own = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
        exact = randlora(own | of_all, before[layer], None, MLP)[0]
        assert (after[layer] == exact.astype(np.float32).astype(jnp.bfloat16)).all()


def test_lora_is_folded_as_it_is_computed_beside_the_weights(tmp_path):
    shapes = {f"{layer}.{Q}.lora_{x}.weight": s for layer in LAYERS for x, s in
              (("A", (2, 4)), ("B", (6, 2)))}  # fmt: skip
    tensors = random_tensors({f"base_model.model.model.layers.{k}": s for k, s in shapes.items()})
    tensors["base_model.model.lm_head.weight"] = np.ones((7, 4), np.float32)
    saved = {"modules_to_save": ["lm_head"], "r": 2, "lora_alpha": 3, "use_rslora": True}
    path = write(tmp_path / "a", {"target_modules": ["q_proj"], **saved}, tensors)
    model, before = fold_peft(Model(True), path, names=NAMES), weights(Model(True), Q)[0]
    for layer in LAYERS:
        name = f"base_model.model.model.layers.{layer}.{Q}.lora_{{}}.weight"
        change = tensors[name.format("A")].T @ tensors[name.format("B")].T.astype(np.float64)
        assert_close(weights(model, Q)[0][layer], before[layer] + 3 / math.sqrt(2) * change, 40)
    assert (np.asarray(model.head.kernel[...]) == 1).all()
    assert not any("adapters" in name for name in snapshot(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "where"),
    [
        (lro.adapters.LoRA(rank=2, alpha=5, initial="random"), "table|picture|query|out|mlp"),
        (lro.adapters.DoRA(rank=2, alpha=5, initial="random"), "picture|query|out"),
        (lro.adapters.PiSSA(rank=2, alpha=5), "query|out"),
    ],
)
def test_what_is_attached_too_is_folded_the_same(tmp_path, method, where):
    model = adapted(True, method, where)
    lro.adapters.also_train(model, "norm/scale|query/bias")
    for x in (model.layers.norm.scale, model.layers.query.bias):
        x.set_value(x[...] + 0.5)
    save_peft(model, tmp_path / "a", names=NAMES, as_lora=False)
    for stacked in (True, False):
        folded = fold_peft(Model(stacked), tmp_path / "a", names=NAMES)
        np.testing.assert_allclose(output(folded), output(model), rtol=0, atol=1e-4)


def test_the_published_examples_are_reproduced():
    weight = np.array([[1, 2], [3, 4]], np.float32)
    block = np.array([[[0.1, 0], [0.2, 0.5]]], np.float32)  # transposed, as PyTorch stores it
    bat = MiSS(r=2, init_weights="bat").folded("x", {"miss_block": block}, weight)
    assert_close(bat - weight, np.array([[0.8, 1.2], [1.5, 2.5]]), 8)
    rows = np.array([[1, 10], [100, 1000]], np.float32)
    y = np.arange(1, 6) @ MiSS(r=2).folded("x", {"miss_block": rows}, np.zeros((5, 2), np.float32))
    assert y.tolist() == [609, 6090]
    tensors = {
        "randlora_A": np.array([[[1, -1]]], np.float32),
        "randlora_B": np.array([[[1], [2]], [[0], [1]], [[-1], [1]]], np.float32),
        "randlora_lambda": np.array([[0.5, 1]], np.float32),
        "randlora_gamma": np.array([[1, 1], [2, 1]], np.float32),
    }
    method, expected = (
        RandLoRA(r=1, randlora_alpha=1),
        np.array([[4.5, -2.5], [2, -1], [1.5, -0.5]]),
    )
    for change in (expected, expected.T):
        zeros = np.zeros(change.shape, np.float32)
        assert method.folded("x", tensors, zeros).tolist() == change.tolist()


@pytest.mark.parametrize("exact", [True, False])
def test_the_two_rotations_of_oft_have_opposite_signs(exact):
    new = {"peft_version": "0.21.2"}
    oft = OFT(oft_block_size=3, use_cayley_neumann=not exact, others=new)
    upper = np.array([[0.01, -0.02, 0.03], [0.02, 0.01, -0.01]], np.float32)
    rotations = oft.rotations(upper, 3)
    a, b, c = upper[0]
    q = np.array([[0, a, b], [-a, 0, c], [-b, -c, 0]])
    assert abs(rotations[0] - np.eye(3) - (-2 if exact else 2) * q).max() < 5e-3
    assert abs(rotations @ rotations.swapaxes(1, 2) - np.eye(3)).max() < (2e-6 if exact else 1e-5)


@pytest.mark.parametrize(
    ("terms", "weights"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 2, 1]), (4, [1, 2, 2, 1])]
)
def test_fewer_terms_of_the_series_are_those_of_peft(terms, weights):
    oft = OFT(oft_block_size=2, num_cayley_neumann_terms=terms, others={"peft_version": "0.18"})
    q = np.array([[0, 0.5], [-0.5, 0]])
    expected = sum(w * np.linalg.matrix_power(q, n) for n, w in enumerate(weights))
    assert_close(oft.rotations(np.array([[0.5]], np.float32), 2)[0], expected, 4)


def test_constrained_rotations_are_projected():
    upper = np.array([[0.3], [0.001]], np.float32)
    oft = OFT(oft_block_size=2, coft=True, eps=0.1, num_cayley_neumann_terms=2,
              others={"peft_version": "0.18"})  # fmt: skip
    at = 0.1 / math.sqrt(2)  # blocks; the norm has both triangles
    expected = [1, 2 * at / math.sqrt(2), 1, 2 * 0.001]
    assert_close(oft.rotations(upper, 2)[:, 0].reshape(-1), np.array(expected), 8)


def test_a_block_is_the_nearest_divisor():
    new = {"peft_version": "0.21.2"}
    sizes = [OFT(oft_block_size=b, others=new).block_size(12) for b in (1, 5, 7, 8, 9, 10, 99)]
    assert sizes == [1, 4, 6, 6, 6, 12, 12]
    assert [OFT(r=r, oft_block_size=0, others=new).block_size(12) for r in (1, 5, 99)] == [12, 3, 1]


def test_two_factors_are_those_of_lycoris():
    for size in range(1, 60):
        below = [d for d in range(1, size + 1) if size % d == 0 and d * d <= size]
        assert two_factors(size, -1) == (below[-1], size // below[-1])
        smaller = [d for d in below if d <= 5][-1]
        expected = (5, size // 5) if size % 5 == 0 else (smaller, size // smaller)
        assert two_factors(size, 5) == expected


@pytest.mark.parametrize(
    ("case", "changes", "error", "match"),
    [
        ("VERA", {"save_projection": False}, UnsupportedConfigError, "save_projection=False .*has"),
        ("RANDLORA", {"save_projection": False}, UnsupportedConfigError, "PyTorch's generator"),
        ("ADALORA", {"use_dora": True}, UnsupportedConfigError, "use_dora=True"),
        ("ADALORA", {"lora_alpha": 0}, ValueError, "lora_alpha must be a positive number, got 0"),
        ("ADALORA", {"init_r": 2}, CheckpointMismatchError, r"lora_A \(3, 4\), not \(2, 4\)"),
        ("LOHA", {"r": 3}, CheckpointMismatchError, r"hada_w1_a \(6, 2\), not \(6, 3\)"),
        ("LOHA", {"rank_pattern": {"v_proj": 2}}, ValueError, "rank_pattern .*'v_proj'"),
        ("LOKR", {"decompose_factor": 0}, ValueError, "decompose_factor must be -1 or a pos"),
        ("LOKR", {"decompose_factor": 3}, CheckpointMismatchError, r"lokr_w1 \(2, 2\), not \(3, "),
        ("LOKR", {"decompose_both": 1}, ValueError, "decompose_both must be true or false, got 1"),
        ("IA3", {"feedforward_modules": None}, ValueError, "feedforward_modules must be a regular"),
        ("IA3", {"feedforward_modules": ["mlp", "fc2"]}, ValueError, "feedforward_modules .*'fc2'"),
        ("IA3", {"feedforward_modules": r".*\.fc2"}, ValueError, "feedforward_modules of .*has '"),
        ("IA3", {"feedforward_modules": []}, CheckpointMismatchError, r"\(1, 4\), not \(4, 1\)"),
        ("OFT", {"r": 2}, ValueError, "one of r=2 and oft_block_size=2 is 0"),
        ("OFT", {"oft_block_size": 1}, CheckpointMismatchError, r"oft_R.weight \(2, 1\), not"),
        ("OFT", {"block_share": True}, CheckpointMismatchError, r"\(2, 1\), not \(1, 1\)"),
        ("OFT", {"eps": 0}, ValueError, "eps must be a positive number, got 0"),
        (
            "MISS",
            {"r": 5},
            ValueError,
            r"r=5 of model\.layers\.0\.\S+ must be at most its 4 inputs",
        ),
        ("MISS", {"init_weights": "bat"}, ValueError, "'bat' must divide its 4 inputs and "),
        ("MISS", {"init_weights": "rows"}, ValueError, "init_weights must be true or false or one"),
        (
            "MISS mini",
            {"mini_r": 4},
            ValueError,
            r"mini_r=4 of \S+q_proj must divide its 6 outputs",
        ),
        ("MISS mini", {"init_weights": True}, CheckpointMismatchError, r"\(3, 2\), not \(3, 6\)"),
        ("VERA", {"r": 4}, CheckpointMismatchError, r"base_model\.vera_A \(5, 6\), not \(4, 6\)"),
        ("RANDLORA", {"target_modules": ["q_proj"]}, CheckpointMismatchError, r"extra \(12\)"),
        ("VERA", {"layer_replication": [[0, 1]]}, UnsupportedConfigError, "layer_replication"),
        ("VERA", {"target_modules": ["qproj"]}, ValueError, "target_modules .*'qproj'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(folder, case, changes, error, match):
    refused(changed(folder(case), **changes), error, match)


@pytest.mark.parametrize("case", ["VERA", "RANDLORA"])
def test_projections_must_be_in_the_file_and_the_same_for_all_layers(folder, case):
    path = folder(case)
    config, tensors = read(path)
    name = f"{case.lower()}_A"
    projection = tensors.pop(f"base_model.{name}")
    write(path, config, tensors)
    refused(path, CheckpointMismatchError, rf"missing \(1\): base_model\.{name}$")
    of_layer = f"base_model.model.model.layers.1.mlp.{name}"
    tensors |= {f"base_model.{name}": projection, of_layer: projection}
    fold_peft(Model(True), write(path, config, tensors), names=NAMES)  # as PEFT repeats RandLoRA's
    write(path, config, tensors | {of_layer: projection + 1})
    refused(path, ValueError, rf"{of_layer} must be the same as base_model\.{name}")


def test_directions_that_adalora_has_dropped_are_not_in_the_file(folder):
    path = folder("ADALORA")
    config, tensors = read(path)
    layer = f"base_model.model.model.layers.1.{Q}"
    for name, axis in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
        tensors[f"{layer}.{name}"] = np.delete(tensors[f"{layer}.{name}"], [0, 2], axis)
    refused(write(path, config, tensors), CheckpointMismatchError, r"lora_A \(1, 4\), not \(3, 4\)")
    pattern = {f"model.layers.1.{Q}.lora_E": [False, True, False]}
    model = Model(True)
    fold_peft(model, write(path, config | {"rank_pattern": pattern}, tensors), names=NAMES)
    t = {
        name: tensors[f"{layer}.{name}"].astype(np.float64)
        for name in ("lora_A", "lora_B", "lora_E")
    }
    expected = adalora(t, weights(Model(True), Q)[0][1], None, Q)[0]  # init_r stays in the scale
    assert_close(weights(model, Q)[0][1], expected, 40)
    refused(changed(path, rank_pattern={"x": [2]}), ValueError, "rank_pattern must be an object")
    pattern |= {"model.layers.9.mlp.lora_E": [True] * 3}
    refused(changed(path, rank_pattern=pattern), ValueError, "rank_pattern .* has 'model.layers.9")


def test_ia3_may_name_feed_forward_layers_that_it_does_not_adapt(folder):
    # PEFT writes the names it has for the architecture where a user gives none.
    config, tensors = read(folder("IA3"))
    path = folder("IA3")
    tensors = {name: x for name, x in tensors.items() if ".mlp." not in name}
    model, both = Model(True), fold_peft(Model(True), path, names=NAMES)
    path = write(path, config | {"target_modules": r".*\.[qo]_proj"}, tensors)
    fold_peft(model, path, names=NAMES)
    for module in (Q, OUT):
        assert_close(weights(model, module), weights(both, module))
    assert_close(weights(model, MLP)[0], weights(Model(True), MLP)[0])


def test_other_layers_than_linear_ones_are_refused(folder, tmp_path):
    for number, (target, name) in enumerate((("patches", "vision"), ("embed_tokens", "model"))):
        tensors = {f"base_model.model.{name}.{target}.miss_block": np.ones((2, 4), np.float32)}
        config = {"peft_type": "MISS", "r": 2, "target_modules": [target]}
        path = write(tmp_path / str(number), config, tensors)
        refused(
            path, UnsupportedConfigError, f"'MISS' of {name}.{target}, which is not a linear layer"
        )


def test_load_peft_says_what_folds_a_kind_that_is_not_trained(folder):
    for case in ("OFT", "LOKR"):
        refused(folder(case), UnsupportedConfigError, f"'{case}' cannot .*fold_peft", load_peft)


def test_parameters_that_are_not_the_weights_are_refused(folder):
    names = {f"module/{path}": name for path, name in NAMES.items()}
    for case in ("MISS", "IA3"):
        model = lro.layers.PowerpropModule(Model(True), 2.0)
        before = snapshot(model)
        with pytest.raises(TypeError, match="folding changes the layer's weight, but the call of"):
            fold_peft(model, folder(case), names=names)
        assert snapshot(model) == before


def test_saved_weights_are_not_those_of_other_parameters(tmp_path):
    """Weights of ``modules_to_save`` are neither read into parameters that are not, nor written."""
    names = {f"module/{path}": name for path, name in NAMES.items()}
    plain = lro.adapters.attach(Model(True), lro.adapters.LoRA(rank=1), "query", rngs=0)
    lro.adapters.also_train(plain, "head/kernel")
    save_peft(plain, tmp_path / "a", names=NAMES)
    model = lro.layers.PowerpropModule(Model(True), 2.0)
    before = snapshot(model)
    for load in (load_peft, fold_peft):
        with pytest.raises(TypeError, match="the layer's weight, but the call of PowerpropModule"):
            load(model, tmp_path / "a", names=names)
        assert snapshot(model) == before
    lro.adapters.attach(model, lro.adapters.LoRA(rank=1), "query", rngs=0)
    lro.adapters.also_train(model, "head/kernel")
    with pytest.raises(TypeError, match="save_peft writes the layer's weight"):
        save_peft(model, tmp_path / "b", names=names)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("load", [load_peft, fold_peft])
def test_a_saved_square_weight_that_may_be_transposed_is_refused(tmp_path, load):
    plain = lro.adapters.attach(Model(True), lro.adapters.LoRA(rank=1), "query", rngs=0)
    lro.adapters.also_train(plain, "mlp/kernel")
    save_peft(plain, tmp_path / "a", names=NAMES)
    path = changed(tmp_path / "a", fan_in_fan_out=True)
    refused(path, UnsupportedConfigError, "mlp in modules_to_save, a square weight", load)


def test_a_traced_model_is_refused(folder):
    path = folder("MISS")
    with pytest.raises(ValueError, match="call it outside jit"):
        nnx.jit(lambda model: fold_peft(model, path, names=NAMES) and None)(Model(True))


def test_what_is_written_keeps_its_sharding(folder):
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,), devices=devices)
    model = with_biases(True)
    sharding = NamedSharding(mesh, PartitionSpec(None, "m"))
    bias, kernel = model.layers.query.bias, model.layers.query.kernel
    for x in (bias, kernel):
        x.set_value(jax.device_put(x[...], sharding))
    before = np.asarray(bias[...])
    fold_peft(model, folder("IA3"), names=NAMES)
    assert (np.asarray(bias[...]) != before).any()
    for x in (bias, kernel):
        assert x[...].sharding.is_equivalent_to(sharding, x[...].ndim)


def test_what_is_written_is_free_to_go_where_other_arguments_are(folder):
    model = fold_peft(with_biases(True), folder("IA3"), names=NAMES)
    assert not model.layers.query.bias[...].committed
    assert not model.layers.query.kernel[...].committed


def test_a_model_with_adapters_is_refused(folder):
    path, model = folder("MISS"), Model(True)
    lro.adapters.attach(model, lro.adapters.LoRA(rank=1), "query", rngs=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the model has adapters at layers/query.*`detach` them"):
        fold_peft(model, path, names=NAMES)
    assert snapshot(model) == before


def test_old_files_of_oft_are_warned_of_or_refused(folder):
    path = changed(folder("OFT"), peft_version="0.17.1")
    with pytest.warns(UserWarning, match="before PEFT 0.18, which changed the last term"):
        fold_peft(Model(True), path, names=NAMES)
    config, tensors = read(path)
    del config["oft_block_size"]
    refused(write(path, config, tensors), UnsupportedConfigError, "no oft_block_size")


def test_names_without_the_prefix_are_refused(folder):
    path = folder("IA3")
    config, tensors = read(path)
    write(path, config, {k.removeprefix("base_model.model."): x for k, x in tensors.items()})
    refused(path, ValueError, r"lack the prefix 'base_model\.model\.'")


def base_folder(path, model_type, tensors):
    """A base model's folder, by nothing of this library."""
    from safetensors.numpy import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tensors_of(path):
    from safetensors.numpy import load_file

    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_command_folds_a_kind_into_files(folder, tmp_path, case, capsys):
    shapes = {}
    for layer, (module, (d_in, d_out)) in itertools.product(LAYERS, SIZES.items()):
        shapes[f"model.layers.{layer}.{module}.weight"] = (d_out, d_in)
        if module != MLP:
            shapes[f"model.layers.{layer}.{module}.bias"] = (d_out,)
    before = random_tensors(shapes | {"model.norm.weight": (4,)}, seed=1)
    base, path, formula = base_folder(tmp_path / "b", "llama", before), folder(case), CASES[case][0]
    arguments = ["convert", str(path), str(tmp_path / "m"), "--base", str(base), "--merge"]
    assert cli.main(arguments) == 0
    changed = 15 if case == "IA3" else 9  # biases of scaled outputs are scaled
    assert f"{changed} of 16 tensors changed" in capsys.readouterr().out
    tensors = {k: x.astype(np.float64) for k, x in read(path)[1].items()}
    of_all = {k.removeprefix("base_model."): x for k, x in tensors.items() if k.count(".") == 1}
    after = tensors_of(tmp_path / "m")
    assert (after["model.norm.weight"] == before["model.norm.weight"]).all()
    for layer, module in itertools.product(LAYERS, SIZES):
        name = f"model.layers.{layer}.{module}"
        prefix = f"base_model.model.{name}."
        own = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
        weight, bias = before[f"{name}.weight"].astype(np.float64).T, before.get(f"{name}.bias")
        weight, bias = formula(own | of_all, weight, bias, module)
        assert_close(after[f"{name}.weight"], weight.T, 40)
        if bias is not None:
            assert_close(after[f"{name}.bias"], bias, 4)


def test_square_weights_of_gpt2_are_folded_as_they_are_stored(tmp_path):
    name = "transformer.h.0.attn.c_proj"
    before = random_tensors({f"{name}.weight": (4, 4), f"{name}.bias": (4,)})
    base = base_folder(tmp_path / "b", "gpt2", before)
    tensors = random_tensors({f"base_model.model.{name}.ia3_l": (4, 1)}, seed=1)
    config = {"peft_type": "IA3", "target_modules": ["c_proj"], "feedforward_modules": []}
    write(tmp_path / "a", config | {"fan_in_fan_out": True}, tensors)
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "m"), "--base", str(base)]
    assert cli.main([*arguments, "--merge"]) == 0
    (scales,) = tensors.values()
    after = tensors_of(tmp_path / "m")
    assert (after[f"{name}.weight"] == before[f"{name}.weight"] * scales[:, 0]).all()
    assert (after[f"{name}.bias"] == before[f"{name}.bias"] * scales[:, 0]).all()


@pytest.mark.parametrize("dropped", [True, False])
def test_adalora_becomes_a_plain_lora_without_its_base(folder, tmp_path, dropped):
    path = folder("ADALORA")
    config, tensors = read(path)
    gone = f"model.layers.2.{MLP}"
    if dropped:  # all directions of a layer
        config["rank_pattern"] = {f"{gone}.lora_E": [False] * 3}
        for name, axis in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            key = f"base_model.model.{gone}.{name}"
            tensors[key] = np.delete(tensors[key], [0, 1, 2], axis)
        write(path, config, tensors)
    assert cli.main(["convert", str(path), str(tmp_path / "l"), "--plain-lora"]) == 0
    content, _ = read(tmp_path / "l")
    assert content["peft_type"] == "LORA"
    assert content["r"] == content["lora_alpha"] == 3
    assert not content.keys() & {"init_r", "target_r", "total_step"}
    one, other = fold_peft(Model(True), path, names=NAMES), Model(True)
    load_peft(other, tmp_path / "l", names=NAMES)
    lro.adapters.merge(other)
    for module in SIZES:
        assert_close(weights(other, module)[0], weights(one, module)[0], 40)


@pytest.mark.parametrize(
    ("case", "match"),
    [("VERA", "peft_type='VERA': its base is needed"), ("LOKR", "peft_type='LOKR': its base")],
)
def test_what_needs_the_base_to_be_a_plain_lora_says_so(folder, tmp_path, case, match, capsys):
    assert cli.main(["convert", str(folder(case)), str(tmp_path / "l"), "--plain-lora"]) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "l").exists()


def test_a_change_without_thin_factors_is_no_plain_lora(folder, tmp_path, capsys):
    shapes = {f"model.layers.{n}.{m}.weight": SIZES[m][::-1] for n in LAYERS for m in SIZES}
    base = base_folder(tmp_path / "b", "llama", random_tensors(shapes))
    arguments = ["convert", str(folder("LOHA")), str(tmp_path / "l"), "--plain-lora"]
    assert cli.main([*arguments, "--base", str(base)]) == 1
    assert "peft_type='LOHA' is no product of thin factors" in capsys.readouterr().err
