"""Adapters' folders changed into others, and folded into weights, without a model."""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.adapters.peft.config import PeftConfig, parse_config, read_json
from lowrank_optax.adapters.peft.folders import PREFIX, open_tensors, plain_name, write_folder
from lowrank_optax.adapters.peft.forms import method_of
from lowrank_optax.adapters.peft.layouts import Layout
from lowrank_optax.adapters.peft.matching import alpha_of, rank_of

Weight = Callable[[str], np.ndarray]
"""The base model's tensor of a name, ``model.layers.0.self_attn.q_proj.weight``."""


class AdapterFolder(NamedTuple):
    """What is in an adapter's folder.

    Attributes:
      content: Of its adapter_config.json.
      tensors: Of its adapter_model.safetensors, by the names there.
    """

    content: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]


def read_adapter(path: str | os.PathLike) -> AdapterFolder:
    """Reads a folder of any kind of PEFT's adapters."""
    content = read_json(Path(path))
    with open_tensors(Path(path)) as reader:
        return AdapterFolder(content, {name: reader.read(name) for name in reader.shapes})


def write_adapter(path: str | os.PathLike, adapter: AdapterFolder) -> None:
    """Writes a folder, which takes the place of an earlier one when it is complete."""
    text = json.dumps(adapter.content, indent=2, sort_keys=True) + "\n"
    tensors = {name: np.ascontiguousarray(x) for name, x in adapter.tensors.items()}
    write_folder(path, text, tensors)


def cast(adapter: AdapterFolder, dtype: DTypeLike) -> AdapterFolder:
    """The same in another dtype; integers stay."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return adapter._replace(
        tensors={
            name: x.astype(jnp.dtype(dtype)) if floating(x) else x
            for name, x in adapter.tensors.items()
        }
    )


def rename_bone(adapter: AdapterFolder) -> AdapterFolder:
    """An adapter of type BONE under the name that PEFT gives it now, MISS; others as they are."""
    if str(adapter.content.get("peft_type")).upper() != "BONE":
        return adapter
    return AdapterFolder(
        {**adapter.content, "peft_type": "MISS"},
        {name.replace(".bone_", ".miss_"): x for name, x in adapter.tensors.items()},
    )


def to_plain_lora(adapter: AdapterFolder, weight_of: Weight | None) -> AdapterFolder:
    """The same change of the base as a LoRA whose alpha is its rank: scales are folded in.

    Args:
      adapter: LoRA, rsLoRA or PiSSA.
      weight_of: The base model's tensors, which PiSSA needs.

    Raises:
      TypeError: If it is DoRA, whose change is of full rank.
      ValueError: If it is PiSSA and there is no base; or the adapter is not supported or damaged.
    """
    config = parse_config(adapter.content)
    if config.init_lora_weights == "pissa" and weight_of is None:
        raise ValueError("init_lora_weights='pissa': its base is needed to convert it (--base).")
    tensors, ranks = {}, {}
    for module, of_module in modules(adapter.tensors).items():
        if not is_adapted(of_module):
            tensors |= {f"{PREFIX}{module}.{name}": x for name, x in of_module.items()}
            continue
        layer = _Layer(module, of_module, config, weight_of)
        a, b = (np.asarray(x) for x in layer.method.to_lora(layer.p))
        ranks[module] = a.shape[1]
        packed = layer.layout.pack(a, b)
        tensors |= {f"{PREFIX}{module}.{name}": x for name, x in packed.items()}
    factor = 2 if config.init_lora_weights == "pissa" else 1
    pattern = {p: factor * rank for p, rank in config.rank_pattern.items()}
    changed = {
        "r": factor * config.r,
        "lora_alpha": factor * config.r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return AdapterFolder({**adapter.content, **changed}, tensors)


class Merging:
    """A base model's tensors with an adapter folded in, one at a time.

    Attributes:
      names: Of the tensors that the adapter changes.
    """

    def __init__(self, adapter: AdapterFolder, weight_of: Weight) -> None:
        self._config, self._weight_of = parse_config(adapter.content), weight_of
        self._modules = modules(adapter.tensors)
        self._adapted = {f"{m}.weight": m for m, of in self._modules.items() if is_adapted(of)}
        self._replaced = {
            f"{module}.{name.removeprefix('base_layer.')}": (module, name)
            for module, of_module in self._modules.items()
            for name in of_module
            if name in ("weight", "bias", "base_layer.bias")
        }
        self.names = self._adapted.keys() | self._replaced.keys()

    def tensor(self, name: str) -> np.ndarray:
        """A tensor: summed in float32, rounded once to the base's dtype.

        Raises:
          ValueError: If the adapter does not fit the base.
        """
        old = self._weight_of(name)
        if name in self._replaced:
            module, parameter = self._replaced[name]
            new = self._modules[module][parameter]
            _check_shape(name, new.shape, old.shape)
            return new.astype(old.dtype)
        if name not in self._adapted:
            return old
        module = self._adapted[name]
        layer = _Layer(module, self._modules[module], self._config, self._weight_of)
        merged = np.asarray(layer.method.merged(layer.p, layer.base).weight)
        return layer.layout.pack_weight(merged).astype(old.dtype)


def modules(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Tensors by the module's name and what follows it."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for raw, value in tensors.items():
        name = plain_name(raw)
        at = name.find(".lora_") if ".lora_" in name else name.rfind(".")
        at = name.find(".base_layer.") if ".base_layer." in name else at
        found.setdefault(name[:at], {})[name[at + 1 :]] = value
    return found


def is_adapted(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the tensors of a module are those of an adapter."""
    return any(name.startswith("lora_") for name in tensors)


class _Layer:
    """One module's adapter: its method, its arrays, and (with a base) its weight."""

    def __init__(
        self,
        module: str,
        tensors: Mapping[str, np.ndarray],
        config: PeftConfig,
        weight_of: Weight | None,
    ) -> None:
        rank = rank_of(module, config)
        self.layout = _layout(tensors)
        self.method = method_of(config, rank, alpha_of(module, config))
        expected = self.layout.shapes(rank, config.use_dora)
        for name, shape in expected.items():
            found = tensors[name].shape if name in tensors else None
            _check_shape(f"{module}.{name}", found, shape)
        a, b = self.layout.unpack(tensors)
        self.p = {"A": jnp.asarray(a), "B": jnp.asarray(b)}
        if weight_of is None:
            return
        tensor = weight_of(f"{module}.weight")
        _check_shape(f"{module}.weight", tensor.shape, self.layout.weight_shape)
        weight = jnp.asarray(self.layout.unpack_weight(tensor))
        params = self.method.init(jax.random.key(0), weight[None])
        start = self.method.layer_arrays(params, 0)
        self.base = weight if params.base is None else params.base[0]
        self.p = start | self.p
        if config.use_dora:
            magnitude = tensors["lora_magnitude_vector"].astype(np.float32)
            self.p["magnitude"] = jnp.asarray(magnitude.reshape(-1))


def _layout(tensors: Mapping[str, np.ndarray]) -> Layout:
    if "lora_embedding_A" in tensors:
        a, b = tensors["lora_embedding_A"], tensors.get("lora_embedding_B")
        return Layout("embedding", a.shape[1], 0 if b is None else b.shape[0])
    a, b = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"an adapter has {', '.join(sorted(tensors))}, no lora_A and lora_B.")
    if a.ndim == 2:
        return Layout("linear", a.shape[1], b.shape[0])
    return Layout("convolution", int(np.prod(a.shape[1:])), b.shape[0], a.shape[2:])


def _check_shape(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    if found != expected:
        what = "missing" if found is None else f"of shape {found}"
        raise ValueError(f"{name} is {what}, and should be of shape {expected}.")
