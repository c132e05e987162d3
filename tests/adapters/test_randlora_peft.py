"""RandLoRA against Hugging Face PEFT, in float32: outputs, gradients, merging, bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import Compiled, gradient, layer_output

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
if not hasattr(peft, "RandLoraConfig"):
    pytest.skip("a version of peft without RandLoRA", allow_module_level=True)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# A wide, a tall and a square layer that share bases: PEFT's are [r, 1, 12] and [15, nb, r].
SIDES = ((8, 15), (15, 7), (7, 12))


@pytest.mark.parametrize(
    ("rank", "options"),
    [(4, {}), (5, {"sparse": True}), (3, {"very_sparse": True}), (16, {})],
    ids=str,
)
def test_outputs_gradients_and_merged_weights_are_pefts(rank, options):
    torch.manual_seed(0)
    names = [str(i) for i in range(len(SIDES))]
    config = peft.RandLoraConfig(r=rank, randlora_alpha=7, target_modules=names, **options)
    layers = torch.nn.Sequential(*[torch.nn.Linear(*sides) for sides in SIDES])
    model = peft.get_peft_model(layers, config)
    numpy = lambda x: x.detach().float().numpy().copy()
    method = lro.adapters.RandLoRA(rank=rank, alpha=7)
    for i in range(len(SIDES)):
        layer = model.base_model.model[i]
        weight, bias = numpy(layer.base_layer.weight).T, numpy(layer.base_layer.bias)
        shared = {"A": layer.randlora_A["default"], "B": layer.randlora_B["default"]}
        shared = {name: numpy(x) for name, x in shared.items()}
        theirs = {"lambda": layer.randlora_lambda, "gamma": layer.randlora_gamma}
        theirs = {name: x["default"] for name, x in theirs.items()}
        start = Compiled(method).init_layers(jax.random.key(0), weight[None], shared).trainable
        for name, x in theirs.items():
            np.testing.assert_allclose(start[name][0], numpy(x), rtol=1e-6)
            # Small enough that outputs are of order one, so that 1e-5 means something.
            x.data = (0.3 if name == "lambda" else 0.1) * torch.randn_like(x)
        trained = {name: numpy(x) for name, x in theirs.items()}

        x = torch.randn(3, 5, layer.in_features, requires_grad=True)
        weights_of_loss = torch.randn(3, 5, layer.out_features)
        y = layer(x)
        (weights_of_loss * y).sum().backward()

        def output(trained, x, shared=shared, weight=weight, bias=bias):
            own = x @ weight + bias
            return layer_output(method, shared | trained, Rows(x), own, weight=weight, bias=bias)

        np.testing.assert_allclose(jax.jit(output)(trained, numpy(x)), numpy(y), **CLOSE)
        factors = numpy(weights_of_loss)
        loss = lambda trained, x, w=factors, f=output: jnp.sum(w * f(trained, x))
        slopes, of_x = gradient(loss, trained, numpy(x), argnums=(0, 1))
        np.testing.assert_allclose(of_x, numpy(x.grad), **CLOSE)
        for name, x in theirs.items():
            expected = numpy(x.grad)
            size = np.abs(expected).max()
            np.testing.assert_allclose(slopes[name] / size, expected / size, **CLOSE)
        layer.merge()
        merged = Compiled(method).merged(shared | trained, weight).weight
        np.testing.assert_allclose(merged.T, numpy(layer.base_layer.weight), **CLOSE)


def test_the_bases_have_pefts_distribution():
    torch.manual_seed(0)
    for options, bases in (({}, "dense"), ({"sparse": True}, "sparse")):
        config = peft.RandLoraConfig(r=16, target_modules=["0"], **options)
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(96, 128)), config)
        theirs = model.base_model.model[0].randlora_B["default"].float().numpy()
        ours = (
            lro.adapters.RandLoRA(rank=16, bases=bases)
            .init_shared(jax.random.key(0), [jax.ShapeDtypeStruct((1, 96, 128), jnp.float32)])
            .frozen["B"]
        )
        assert ours.shape == theirs.shape
        levels = np.linspace(0, 1, 11)
        quantiles = [np.quantile(np.asarray(x), levels) for x in (ours, theirs)]
        np.testing.assert_allclose(*quantiles, atol=0.06)
