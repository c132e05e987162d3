"""What the tests of PEFT's files share: a small model of many kinds of layers, and folders."""

import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

HEADS, WIDTH, DIM = 2, 3, 4
NAMES = {
    "table": "model.embed_tokens",
    "layers/{}/query": "model.layers.{}.self_attn.q_proj",
    "layers/{}/out": "model.layers.{}.self_attn.o_proj",
    "layers/{}/mlp": "model.layers.{}.mlp",
    "layers/{}/norm": "model.layers.{}.norm",
    "picture": "vision.patches",
    "head": "lm_head",
}
Q, OUT, MLP = "self_attn.q_proj", "self_attn.o_proj", "mlp"
SIZES = {Q: (4, 6), OUT: (6, 4), MLP: (4, 4)}
"""Inputs and outputs of the linear layers of each `Layer`; the first two have a bias."""


def layers_of(one_by_one, stacked):
    """The layers as a list, or stacked for a scan."""
    if not stacked:
        return nnx.List(one_by_one)
    states = [nnx.state(layer) for layer in one_by_one]
    stack = lambda *x: jnp.asarray(np.stack(x))
    return nnx.merge(nnx.graphdef(one_by_one[0]), jax.tree.map(stack, *states))


def initial(seed):
    """Initial values of kernels that compile nothing, one after the other."""
    rng = np.random.default_rng(seed)
    draw = lambda key, shape, dtype: jnp.asarray(rng.normal(size=shape) * 0.4, dtype)
    return {"kernel_init": draw, "rngs": nnx.Rngs(seed)}


class Layer(nnx.Module):
    def __init__(self, options):
        self.query = nnx.LinearGeneral(DIM, (HEADS, WIDTH), **options)
        self.out = nnx.LinearGeneral((HEADS, WIDTH), DIM, axis=(-2, -1), **options)
        self.mlp = nnx.Linear(DIM, DIM, use_bias=False, **options)
        self.norm = nnx.LayerNorm(DIM, rngs=options["rngs"])

    def __call__(self, x):
        return x + self.mlp(jnp.tanh(self.out(self.query(self.norm(x)))))


class Model(nnx.Module):
    """Embedding, a convolution, layers (stacked or not) with fused heads, a head."""

    def __init__(self, stacked, layers=3, seed=0):
        self.table = nnx.Embed(7, DIM, rngs=nnx.Rngs(seed))
        options = initial(seed)
        self.picture = nnx.Conv(2, DIM, (2, 3), padding="VALID", **options)
        one_by_one = [Layer(options) for _ in range(layers)]
        self.layers = layers_of(one_by_one, stacked)
        self.head = nnx.Linear(DIM, 7, use_bias=False, **options)

    def __call__(self, tokens, picture):
        x = self.table(tokens) + self.picture(picture).mean((1, 2))[:, None]
        if isinstance(self.layers, nnx.List):
            for layer in self.layers:
                x = layer(x)
            return self.head(x)
        graphdef, state = nnx.split(self.layers)
        x, _ = jax.lax.scan(lambda x, one: (nnx.merge(graphdef, one)(x), None), x, state)
        return self.head(x)


def output(model):
    picture = np.random.default_rng(5).normal(size=(2, 4, 5, 2)).astype(np.float32)
    return np.asarray(_compiled(model, np.arange(10).reshape(2, 5) % 7, picture))


_compiled = nnx.jit(lambda model, tokens, picture: model(tokens, picture))


def adapted(stacked, method, where=".*", seed=3, **options):
    """A model with an adapter that has been trained, so to speak."""
    model = Model(stacked)
    lro.adapters.attach(model, method, where, rngs=seed, **options)
    state = nnx.state(model, lro.adapters.trainable)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    move = lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype)
    moved = [move(x) for x in leaves]
    nnx.update(model, jax.tree.unflatten(treedef, moved))
    return model


def snapshot(model) -> dict[str, bytes]:
    """Every variable of a model, its type and its bytes."""
    return {
        "/".join(map(str, path)): (type(x).__name__, np.asarray(x[...]).tobytes())
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Variable)
    }


def random_tensors(shapes: dict[str, tuple[int, ...]], seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A folder as PEFT writes it, by nothing of this library."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def changed(folder: Path, **changes: Any) -> Path:
    """The folder with other fields in its configuration."""
    config, tensors = read(folder)
    return write(folder, config | changes, tensors)


def refused(folder, error, match, load=lro.adapters.fold_peft):
    """The error, of a model that is left as it was."""
    model = Model(True)
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        load(model, folder, names=NAMES)
    assert snapshot(model) == before
    assert type(model) is Model
    return caught.value


def query_folder(folder: Path, **changes: Any) -> Path:
    """LoRA of rank 2 on the query layers of `Model`."""
    shapes = {}
    for layer in range(3):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        shapes[f"{module}.lora_A.weight"] = (2, DIM)
        shapes[f"{module}.lora_B.weight"] = (HEADS * WIDTH, 2)
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    return write(folder, config | changes, random_tensors(shapes))
