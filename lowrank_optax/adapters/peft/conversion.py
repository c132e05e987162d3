"""Adapters' folders changed into others, and folded into weights, without a model."""

from collections.abc import Mapping
import dataclasses
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.adapters.peft.base_files import modules_of_base, tied_in_files
from lowrank_optax.adapters.peft.checking import Module
from lowrank_optax.adapters.peft.config import BaseConfig, PeftConfig
from lowrank_optax.adapters.peft.tensors import PREFIX, AdapterFolder, Shapes, Tied
from lowrank_optax.adapters.peft.weight_folding import CheckedAdapter
from lowrank_optax.storage.safetensors_files import TensorReader


class BaseModel(NamedTuple):
    """A base model's folder.

    Attributes:
      config: Fields of its config.json.
      reader: Its tensors, open.
    """

    config: Mapping[str, Any]
    reader: TensorReader

    def modules(
        self, adapter: Mapping[str, Shapes], fan_in_fan_out: bool
    ) -> tuple[Mapping[str, Module], Tied | None]:
        """See `Base.modules`."""
        modules = modules_of_base(self.reader.shapes, adapter, self.config, fan_in_fan_out)
        return modules, tied_in_files(self.config, self.reader)

    def weight(self, module: str) -> np.ndarray:
        """The weight of a module."""
        return self.reader.read(f"{module}.weight")


def cast(adapter: AdapterFolder, dtype: DTypeLike) -> AdapterFolder:
    """The same adapter in another dtype; integers stay."""
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


def to_plain_lora(path: str | os.PathLike, base: BaseModel | None) -> AdapterFolder:
    """The same change of the base as a LoRA whose alpha is its rank: scales are folded in.

    LoRA, rsLoRA and AdaLoRA need no base model, and are compared with it if it is given. PiSSA,
    VeRA and MiSS need it.

    Raises:
      TypeError: If the change has no low rank, as that of DoRA.
      ValueError: If it needs the base and there is none; or the adapter is not supported, damaged,
        or of another base.
    """
    checked, tensors = CheckedAdapter(Path(path), base), {}
    config, ranks = checked.config, {}
    is_pissa = isinstance(config, PeftConfig) and config.is_pissa
    for module, of_module in checked.tensors.items():
        is_layer = module in checked.layouts
        own = f"{module}.base_layer" if is_layer else module
        new = {f"{own}.{name}": x for name, x in checked.trained(module).items()}
        # What PEFT saves as PiSSA's base is the residual, and that of a LoRA is the whole weight.
        if "base_layer.weight" in of_module and not is_pissa:
            new[f"{own}.weight"] = of_module["base_layer.weight"]
        if is_layer:
            a, b = checked.factors(module, base.weight(module) if base else None)
            ranks[module] = a.shape[1]
            packed = checked.layouts[module].pack(a, b)
            new |= {f"{module}.{name}": x for name, x in packed.items()}
        tensors |= {PREFIX + name: x for name, x in new.items()}
    if isinstance(config, PeftConfig):
        factor = 2 if is_pissa else 1
        rank, content = factor * config.r, checked.content
        pattern = {p: factor * of_module for p, of_module in config.rank_pattern.items()}
    else:
        rank, content = max(ranks.values()), _lora_content(config)
        pattern = {re.escape(module): r for module, r in ranks.items() if r != rank}
    changed = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return AdapterFolder({**content, **changed}, tensors)


def _lora_content(config: BaseConfig) -> dict[str, Any]:
    """The fields of a LoRA on the modules that an adapter of another kind is on."""
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(BaseConfig)}
    others = {k: x for k, x in config.others.items() if k in BaseConfig.harmless}
    bias = getattr(config, "bias", "none")
    common |= {
        "others": {k: x for k, x in others.items() if k not in ("peft_type", "inference_mode")},
        "bias": "lora_only" if bias.endswith("_only") else bias,
    }
    return PeftConfig(**common).content()


class Merging:
    """A base model's tensors with an adapter folded in, one at a time.

    Attributes:
      names: Names of the tensors that the adapter changes.

    Raises:
      ValueError: If the adapter is not supported, damaged, or of another base.
    """

    def __init__(self, path: str | os.PathLike, base: BaseModel) -> None:
        self._checked, self._base = CheckedAdapter(Path(path), base), base
        self._checked.check_not_tied()
        layers, tied = self._checked.layouts, self._checked.tied
        self._replaced = {
            f"{module}.{name}": tensor
            for module in self._checked.tensors
            for name, tensor in self._checked.trained(module).items()
        }
        if tied and f"{tied.embedding}.weight" in self._replaced:
            self._replaced[f"{tied.head}.weight"] = self._replaced[f"{tied.embedding}.weight"]
        biases = (f"{module}.bias" for module in layers if self._checked.changes_bias(module))
        self.names = {
            name
            for name in (*self._replaced, *(f"{module}.weight" for module in layers), *biases)
            if name in base.reader.shapes  # except a head that is tied
        }
        shapes = {name: base.reader.shapes[name] for name in self.names}
        base.reader.check(shapes, ignore=lambda _: True)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor: computed in float32, rounded once to the base's dtype."""
        old = self._base.reader.read(name)
        if name in self._replaced:
            return self._replaced[name].astype(old.dtype)
        if name not in self.names:
            return old
        module, _, parameter = name.rpartition(".")
        folded = self._checked.folded_bias if parameter == "bias" else self._checked.folded_weight
        return folded(module, old)
