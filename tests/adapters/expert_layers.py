"""A small model of experts, each kind of which is one parameter in PyTorch."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro
from tests.adapters.peft_files import initial, layers_of

EXPERTS, DIM, WIDTH = 3, 4, 5
NAMES = {  # in the order of registration in PyTorch
    "layers/{}/experts/gate": "model.layers.{}.experts.gate_proj",
    "layers/{}/experts/up": "model.layers.{}.experts.up_proj",
    "layers/{}/experts/down": "model.layers.{}.experts.down_proj",
    "layers/{}/mix": "model.layers.{}.mix",
}
SIDES = {"gate": (DIM, WIDTH), "up": (DIM, WIDTH), "down": (WIDTH, DIM)}


class Experts(nnx.Module):
    def __init__(self, options):
        into = lambda: nnx.Einsum("ebd,edf->ebf", (EXPERTS, DIM, WIDTH), **options)
        self.gate, self.up = into(), into()
        self.down = nnx.Einsum("ebf,efd->ebd", (EXPERTS, WIDTH, DIM), **options)

    def __call__(self, x):
        x = jnp.broadcast_to(x, (EXPERTS, *x.shape))
        return self.down(jnp.tanh(self.gate(x)) * self.up(x)).sum(0)


class Layer(nnx.Module):
    def __init__(self, options):
        self.experts = Experts(options)
        self.mix = nnx.Linear(DIM, DIM, use_bias=False, **options)

    def __call__(self, x):
        return x + self.mix(self.experts(x))


class Model(nnx.Module):
    """Layers of experts, stacked for a scan or not."""

    def __init__(self, stacked, layers=2, seed=0):
        options = initial(seed)
        one_by_one = [Layer(options) for _ in range(layers)]
        self.stacked = stacked
        self.layers = layers_of(one_by_one, stacked)

    def __call__(self, x):
        if not self.stacked:
            for layer in self.layers:
                x = layer(x)
            return x
        graphdef, state = nnx.split(self.layers)
        return jax.lax.scan(lambda x, one: (nnx.merge(graphdef, one)(x), None), x, state)[0]


def kernels(model):
    """Values of the weights of all layers, ``[layers, experts, d_in, d_out]``, by name."""
    layers = [model.layers] if model.stacked else list(model.layers)
    value = lambda layer, name: np.asarray(getattr(layer.experts, name).kernel[...])
    stack = (lambda x: x[0]) if model.stacked else np.stack
    return {name: stack([value(layer, name) for layer in layers]) for name in SIDES}


def adapted(stacked, method, where="experts", seed=3, **options):
    """A model with an adapter that has been trained, so to speak."""
    model = lro.adapters.attach(Model(stacked), method, where, rngs=seed, **options)
    state, rng = nnx.state(model, lro.adapters.trainable), np.random.default_rng(seed)
    move = lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype)
    nnx.update(model, jax.tree.map(move, state))
    return model


INPUTS = np.random.default_rng(5).normal(size=(6, DIM)).astype(np.float32)
output = nnx.jit(lambda model: model(INPUTS))
