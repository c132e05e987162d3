"""MiSS against Hugging Face PEFT, in float32: outputs, gradients, merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import Compiled, gradient, layer_output

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
if not hasattr(peft, "MissConfig"):
    pytest.skip("a version of peft without MiSS", allow_module_level=True)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CASES = {
    "divides": (12, 8, lro.adapters.MiSS(rank=4), {}),
    "short_last_block": (11, 7, lro.adapters.MiSS(rank=4), {}),
    "wide": (5, 30, lro.adapters.MiSS(rank=3), {}),
    "mini": (11, 8, lro.adapters.MiSS(rank=4, mini_rank=2), {"init_weights": "mini", "mini_r": 2}),
    "bat_tall": (12, 8, lro.adapters.MiSSBat(rank=4), {"init_weights": "bat"}),
    "bat_wide": (6, 15, lro.adapters.MiSSBat(rank=3), {"init_weights": "bat"}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_merged_weights_are_pefts(case):
    d_in, d_out, method, options = CASES[case]
    torch.manual_seed(0)
    config = peft.MissConfig(r=method.rank, target_modules=["0"], **options)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(d_in, d_out)), config)
    layer = model.base_model.model[0]
    block = layer.miss_block["default"]
    assert not block.detach().any()
    block.data = 0.2 * torch.randn_like(block)
    x, weights_of_loss = torch.randn(3, 5, d_in, requires_grad=True), torch.randn(3, 5, d_out)
    y = model(x)
    (weights_of_loss * y).sum().backward()

    numpy = lambda x: x.detach().numpy().copy()
    weight, bias = numpy(layer.base_layer.weight).T, numpy(layer.base_layer.bias)
    params = method.init(jax.random.key(0), jnp.asarray(weight)[None])
    (name,) = params.trainable
    assert params.trainable[name].shape[1:] == tuple(block.shape)
    p = {k: np.asarray(v) for k, v in method.layer_arrays(params, 0).items()}
    p[name] = numpy(block)

    def output(d, x):
        own = x @ weight + bias
        return layer_output(method, p | {name: d}, Rows(x), own, weight=weight, bias=bias)

    np.testing.assert_allclose(jax.jit(output)(p[name], numpy(x)), numpy(y), **CLOSE)
    # By x through the layer itself and the adapter.
    loss = lambda d, x: jnp.sum(numpy(weights_of_loss) * output(d, x))
    of_d, of_x = gradient(loss, p[name], numpy(x), argnums=(0, 1))
    np.testing.assert_allclose(of_d, numpy(block.grad), **CLOSE)
    np.testing.assert_allclose(of_x, numpy(x.grad), **CLOSE)
    layer.merge()
    merged = Compiled(method).merged(p, weight).weight
    np.testing.assert_allclose(merged.T, numpy(layer.base_layer.weight), **CLOSE)
    layer.unmerge()
    np.testing.assert_allclose(numpy(layer.base_layer.weight).T, weight, **CLOSE)
    np.testing.assert_allclose(Compiled(method).unmerged(p, merged), weight, **CLOSE)
