"""LoRA, rsLoRA, DoRA and LoRA-FA's optimizer against Hugging Face PEFT, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Lookup, Patches, Rows
from tests.adapters.compiled import layer_output

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

D_IN, D_OUT, RANK, ALPHA = 12, 7, 3, 5
METHODS = {
    "lora": (lro.adapters.LoRA(rank=RANK, alpha=ALPHA), {}),
    "rslora": (
        lro.adapters.LoRA(rank=RANK, alpha=ALPHA, rank_stabilized=True),
        {"use_rslora": True},
    ),
    "dora": (lro.adapters.DoRA(rank=RANK, alpha=ALPHA), {"use_dora": True}),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def numpy(x):
    return x.detach().numpy().astype(np.float64)


def adapted(layer, options, seed=0, name="0"):
    """A PEFT model of one layer, its parameters random, and that layer."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[name], **options)
    model = peft.get_peft_model(torch.nn.Sequential(layer), config)
    for key, parameter in model.named_parameters():
        if "lora" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model, model.base_model.model[0]


def arrays_of(layer, flat):
    """Its arrays in our layout; ``flat`` turns a kernel of PyTorch into ``[d_in, k]``."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    p = {"A": flat(a), "B": flat(b)}
    if layer.lora_magnitude_vector:
        p["magnitude"] = numpy(layer.lora_magnitude_vector["default"].weight).ravel()
    return {k: jnp.asarray(x, jnp.float32) for k, x in p.items()}


def gradients_of(layer, flat):
    grads = {
        "A": flat(layer.lora_A["default"].weight.grad),
        "B": flat(layer.lora_B["default"].weight.grad),
    }
    if layer.lora_magnitude_vector:
        grads["magnitude"] = numpy(layer.lora_magnitude_vector["default"].weight.grad).ravel()
    return grads


def constants(p, w):
    return {"norm_squared": jnp.sum(jnp.square(w), axis=0)} if "magnitude" in p else {}


def assert_agrees(got, expected):
    """To 1e-5 of its largest entry."""
    size = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(got) / size, np.asarray(expected) / size, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_linear_layers_agree_forward_backward_and_merged(name, bias):
    method, options = METHODS[name]
    model, layer = adapted(torch.nn.Linear(D_IN, D_OUT, bias=bias), options)
    flat = lambda x: numpy(x).T
    w = jnp.asarray(flat(layer.base_layer.weight), jnp.float32)
    b = jnp.asarray(numpy(layer.base_layer.bias), jnp.float32) if bias else None
    x, g = torch.randn(4, 6, D_IN, requires_grad=True), torch.randn(4, 6, D_OUT)
    y = model(x)
    (y * g).sum().backward()
    p = arrays_of(layer, flat)

    def ours(p, x):
        base = x @ w + (0 if b is None else b)
        return layer_output(method, p | constants(p, w), Rows(x), base, weight=w, bias=b)

    mine, pull = jax.vjp(ours, p, jnp.asarray(numpy(x), jnp.float32))
    assert_agrees(mine, numpy(y))
    of_p, of_x = pull(jnp.asarray(numpy(g), jnp.float32))
    assert_agrees(of_x, numpy(x.grad))
    for key, expected in gradients_of(layer, flat).items():
        assert_agrees(of_p[key], expected)
    merged = method.merged(p | constants(p, w), w).weight
    layer.merge()
    assert_agrees(merged, flat(layer.base_layer.weight))
    back = method.unmerged(p | constants(p, w), merged)
    # PEFT keeps DoRA's norms from merging; found again, those of a column that the adapter turned
    # by nearly a right angle lose half of their digits.
    np.testing.assert_allclose(back, w, atol=1e-4 if name == "dora" else 1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_dora_with_dropout_agrees(bias):
    model, layer = adapted(torch.nn.Linear(D_IN, D_OUT, bias=bias), {"use_dora": True})
    mask = torch.bernoulli(torch.full((6, D_IN), 0.5)) * 2
    layer.lora_dropout["default"] = Masked(mask)
    x = torch.randn(6, D_IN)
    flat = lambda x: numpy(x).T
    w = jnp.asarray(flat(layer.base_layer.weight), jnp.float32)
    b = jnp.asarray(numpy(layer.base_layer.bias), jnp.float32) if bias else None
    rows = jnp.asarray(numpy(x), jnp.float32)
    p = arrays_of(layer, flat)
    dropping = lro.adapters.DoRA(rank=RANK, alpha=ALPHA, dropout=0.5)
    operand = MaskedRows(rows, jnp.asarray(numpy(mask), jnp.float32))
    base = rows @ w + (0 if b is None else b)
    y = layer_output(
        dropping, p | constants(p, w), operand, base, weight=w, bias=b, key=jax.random.key(0)
    )
    assert_agrees(y, numpy(model(x)))


class Masked(torch.nn.Module):
    """Dropout that drops what it is told."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


class MaskedRows(Rows):
    """Rows of which dropout drops what it is told."""

    def __init__(self, x, mask):
        super().__init__(x)
        object.__setattr__(self, "mask", mask)

    def drop(self, key, rate):
        return Rows(self.x * self.mask)


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_agree(name):
    method, options = METHODS[name]
    model, layer = adapted(torch.nn.Embedding(20, D_OUT), options)
    table = jnp.asarray(numpy(layer.weight), jnp.float32)
    index, g = torch.tensor([[3, 19], [0, 3]]), torch.randn(2, 2, D_OUT)
    y = model(index)
    (y * g).sum().backward()
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    p = {"A": jnp.asarray(numpy(a).T, jnp.float32), "B": jnp.asarray(numpy(b).T, jnp.float32)}
    if layer.lora_magnitude_vector:
        magnitude = numpy(layer.lora_magnitude_vector["default"].weight).ravel()
        p["magnitude"] = jnp.asarray(magnitude, jnp.float32)
    look = jnp.asarray(index.numpy())
    ours = lambda p: layer_output(
        method, p | constants(p, table), Lookup(look), table[look], weight=table
    )
    mine, pull = jax.vjp(ours, p)
    assert_agrees(mine, numpy(y))
    (of_p,) = pull(jnp.asarray(numpy(g), jnp.float32))
    assert_agrees(of_p["A"], numpy(a.grad).T)
    assert_agrees(of_p["B"], numpy(b.grad).T)


@pytest.mark.parametrize("name", METHODS)
def test_convolutions_agree(name):
    method, options = METHODS[name]
    model, layer = adapted(torch.nn.Conv2d(4, D_OUT, 3, padding=1, stride=2), options)
    # [out, in, h, w] is [h * w * in, out].
    flat = lambda x: numpy(x).transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
    x, g = torch.randn(2, 4, 6, 5), torch.randn(2, D_OUT, 3, 3)
    y = model(x)
    (y * g).sum().backward()
    w = jnp.asarray(flat(layer.base_layer.weight), jnp.float32)
    bias = jnp.asarray(numpy(layer.base_layer.bias), jnp.float32)
    images = jnp.asarray(numpy(x).transpose(0, 2, 3, 1), jnp.float32)

    def convolve(images, matrix):
        return jax.lax.conv_general_dilated(
            images,
            matrix.reshape(3, 3, 4, -1),
            window_strides=(2, 2),
            padding=[(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    p = arrays_of(layer, flat)
    ours = lambda p: layer_output(
        method,
        p | constants(p, w),
        Patches(images, convolve),
        convolve(images, w) + bias,
        weight=w,
        bias=bias,
    )
    mine, pull = jax.vjp(ours, p)
    assert_agrees(mine, numpy(y).transpose(0, 2, 3, 1))
    (of_p,) = pull(jnp.asarray(numpy(g).transpose(0, 2, 3, 1), jnp.float32))
    for key, expected in gradients_of(layer, flat).items():
        assert_agrees(of_p[key], expected)


def test_initial_values_have_pefts_distribution():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4000, D_OUT)), config)
    theirs = numpy(model.base_model.model[0].lora_A["default"].weight)
    a = METHODS["lora"][0].init(jax.random.key(0), np.zeros((1, 4000, D_OUT))).trainable["A"]
    np.testing.assert_allclose(np.std(a), np.std(theirs), rtol=0.02)
    np.testing.assert_allclose(np.abs(a).max(), np.abs(theirs).max(), rtol=1e-3)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_projected_optimizer_agrees_to_the_dtype_of_its_product(bfloat16, monkeypatch):
    from peft import optimizers

    # PEFT multiplies in bfloat16 wherever a machine can, also for a model in float32.
    monkeypatch.setattr(optimizers.lorafa, "is_bf16_available", lambda: bfloat16)
    model, layer = adapted(torch.nn.Linear(D_IN, D_OUT), {})
    theirs = optimizers.create_lorafa_optimizer(
        model=model, r=RANK, lora_alpha=ALPHA, lr=1e-3, weight_decay=0.0
    )
    p = arrays_of(layer, lambda x: numpy(x).T)
    params = {"B": p["B"]}
    scale = ALPHA / RANK
    tx = optax.chain(
        lro.adapters.lora_fa_projection({"": (p["A"], scale)}), optax.adam(1e-3, eps=1e-9)
    )
    state = tx.init(params)
    x, target = torch.randn(16, D_IN), torch.randn(16, D_OUT)
    for _ in range(3):
        theirs.zero_grad()
        ((model(x) - target) ** 2).sum().backward()
        g = numpy(layer.lora_B["default"].weight.grad).T
        theirs.step()
        updates, state = tx.update({"B": jnp.asarray(g, jnp.float32)}, state)
        params = optax.apply_updates(params, updates)
        after = numpy(layer.lora_B["default"].weight).T
        np.testing.assert_allclose(params["B"], after, atol=6e-5 if bfloat16 else 1e-6)
