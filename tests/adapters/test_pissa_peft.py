"""PiSSA against Hugging Face PEFT: start, forward, gradients, merged weight, conversion."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import layer_output

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

D_IN, D_OUT, RANK = 12, 9, 4
SCALES = [(4, False), (16, False), (6, True)]
every_scale = pytest.mark.parametrize(("alpha", "rank_stabilized"), SCALES, ids=str)


class OneLayer(torch.nn.Module):
    """PEFT wants a model whose layers have names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(D_IN, D_OUT)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def ours_and_theirs(alpha: float, rank_stabilized: bool) -> tuple[Any, Any, Any, np.ndarray]:
    """The method, its parameters, PEFT's layer, and the weight they start from."""
    model = OneLayer()
    weight = model.layer.weight.detach().numpy().T.copy()
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=alpha,
        use_rslora=rank_stabilized,
        target_modules=["layer"],
        init_lora_weights="pissa",
    )
    layer = peft.get_peft_model(model, config).base_model.model.layer
    method = lro.adapters.PiSSA(rank=RANK, alpha=alpha, rank_stabilized=rank_stabilized)
    params = method.init(jax.random.key(0), jnp.asarray(weight)[None])
    return method, params, layer, weight


def factors_of(layer: Any) -> dict[str, jax.Array]:
    """PEFT's factors, which may differ from ours in signs."""
    of = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    return {name: jnp.asarray(w.detach().numpy().T) for name, w in of.items()}


@every_scale
def test_the_start_is_pefts(alpha: float, rank_stabilized: bool) -> None:
    method, params, layer, weight = ours_and_theirs(alpha, rank_stabilized)
    base = layer.base_layer.weight.detach().numpy().T
    np.testing.assert_allclose(params.base[0], base, atol=1e-5)
    p = method.layer_arrays(params, 0)
    theirs = factors_of(layer)
    for name in "AB":
        np.testing.assert_allclose(np.abs(p[name]), np.abs(theirs[name]), atol=1e-5)
    x = np.random.default_rng(0).standard_normal((5, D_IN)).astype(np.float32)
    bias = layer.base_layer.bias.detach().numpy()
    y = layer_output(
        method, p, Rows(jnp.asarray(x)), x @ params.base[0] + bias, weight=params.base[0]
    )
    np.testing.assert_allclose(y, layer(torch.tensor(x)).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(y, x @ weight + bias, atol=1e-5)


@every_scale
@pytest.mark.parametrize("residual", [True, False])
def test_after_training_outputs_gradients_and_merged_weights_are_pefts(
    alpha: float, rank_stabilized: bool, residual: bool
) -> None:
    method, _, layer, weight = ours_and_theirs(alpha, rank_stabilized)
    start = factors_of(layer)
    torch.manual_seed(1)
    for linear in (layer.lora_A["default"], layer.lora_B["default"]):
        linear.weight.data += 0.2 * torch.randn_like(linear.weight)
    now = factors_of(layer)
    base = jnp.asarray(layer.base_layer.weight.detach().numpy().T)
    bias = layer.base_layer.bias.detach().numpy()
    x, g = (
        np.random.default_rng(i).standard_normal((5, n)).astype(np.float32)
        for i, n in enumerate((D_IN, D_OUT))
    )
    of_peft = layer(torch.tensor(x))
    (of_peft * torch.tensor(g)).sum().backward()
    slopes = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)

    if not residual:
        method = lro.adapters.PiSSA(
            rank=RANK, alpha=alpha, rank_stabilized=rank_stabilized, residual=False
        )
        base = jnp.asarray(weight)
    p = {"A_0": start["A"], "B_0": start["B"]}

    def output(trained: dict[str, jax.Array]) -> jax.Array:
        return layer_output(method, p | trained, Rows(jnp.asarray(x)), x @ base + bias, weight=base)

    np.testing.assert_allclose(output(now), of_peft.detach().numpy(), atol=1e-5)
    found = jax.grad(lambda trained: jnp.sum(g * output(trained)))(now)
    for name, slope in zip("AB", slopes, strict=True):
        np.testing.assert_allclose(found[name], slope.numpy().T, atol=1e-5)
    layer.merge()
    merged = layer.base_layer.weight.detach().numpy().T
    np.testing.assert_allclose(method.merged(p | now, base).weight, merged, atol=1e-5)
    change = np.matmul(*method.to_lora(p | now))
    np.testing.assert_allclose(weight + change, merged, atol=1e-5)
