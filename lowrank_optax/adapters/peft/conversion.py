"""Adapters' folders changed into others, and folded into weights, without a model."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.methods.pissa import PiSSA
from lowrank_optax.adapters.peft.base_files import (
    modules_of_adapter,
    modules_of_base,
    tied_in_files,
)
from lowrank_optax.adapters.peft.checking import checked_tensors
from lowrank_optax.adapters.peft.config import CONFIG_FILE, parse_config, read_json
from lowrank_optax.adapters.peft.tensors import (
    PREFIX,
    AdapterFolder,
    open_tensors,
    shapes_by_module,
)
from lowrank_optax.storage.safetensors_files import TensorReader


class BaseModel(NamedTuple):
    """A base model's folder.

    Attributes:
      config: Fields of its config.json.
      reader: Its tensors, open.
    """

    config: Mapping[str, Any]
    reader: TensorReader


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

    PiSSA needs the base model; others are compared with it if it is given.

    Raises:
      TypeError: If it is DoRA, whose change is of full rank.
      ValueError: If it is PiSSA and there is no base; or the adapter is not supported, damaged, or
        of another base.
    """
    checked = _CheckedFolder(Path(path), base)
    config, tensors = checked.config, {}
    if config.is_pissa and base is None:
        raise ValueError("init_lora_weights='pissa': its base is needed to convert it (--base).")
    for module, of_module in checked.tensors.items():
        new = checked.trained(module)
        # What PEFT saves as PiSSA's base is the residual, and that of a LoRA is the whole weight.
        if "base_layer.weight" in of_module and not config.is_pissa:
            new["base_layer.weight"] = of_module["base_layer.weight"]
        if module in checked.layouts:
            method, p, _ = checked.layer(module)
            a, b = (np.asarray(x) for x in method.to_lora(p))
            new |= checked.layouts[module].pack(a, b)
        tensors |= {f"{PREFIX}{module}.{name}": x for name, x in new.items()}
    factor = 2 if config.is_pissa else 1
    pattern = {p: factor * rank for p, rank in config.rank_pattern.items()}
    changed = {
        "r": factor * config.r,
        "lora_alpha": factor * config.r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return AdapterFolder({**checked.content, **changed}, tensors)


class Merging:
    """A base model's tensors with an adapter folded in, one at a time.

    Attributes:
      names: Names of the tensors that the adapter changes.

    Raises:
      ValueError: If the adapter is not supported, damaged, or of another base.
    """

    def __init__(self, path: str | os.PathLike, base: BaseModel) -> None:
        self._checked, self._base = _CheckedFolder(Path(path), base), base
        layers, tied = self._checked.layouts, self._checked.tied
        if tied and not layers.keys().isdisjoint(tied):
            raise ValueError(
                f"{', '.join(m for m in tied if m in layers)}: the base model ties its embedding "
                "and its head, and a change of one would become a change of both. Load the "
                "adapter beside the model instead: lro.adapters.load_peft(model, path)."
            )
        self._replaced = {
            f"{module}.{name.removeprefix('base_layer.')}": tensor
            for module in self._checked.tensors
            for name, tensor in self._checked.trained(module).items()
        }
        if tied and f"{tied.embedding}.weight" in self._replaced:
            self._replaced[f"{tied.head}.weight"] = self._replaced[f"{tied.embedding}.weight"]
        self.names = {
            name
            for name in (*self._replaced, *(f"{module}.weight" for module in layers))
            if name in base.reader.shapes  # except a head that is tied
        }
        shapes = {name: base.reader.shapes[name] for name in self.names}
        base.reader.check(shapes, ignore=lambda _: True)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor: summed in float32, rounded once to the base's dtype."""
        old = self._base.reader.read(name)
        if name in self._replaced:
            return self._replaced[name].astype(old.dtype)
        if name not in self.names:
            return old
        module = name.removesuffix(".weight")
        method, p, base = self._checked.layer(module)
        merged = np.asarray(method.merged(p, base).weight)
        return self._checked.layouts[module].pack_weight(merged).astype(old.dtype)


class _CheckedFolder:
    """A folder's configuration and tensors, after they have been compared with the base."""

    def __init__(self, folder: Path, base: BaseModel | None) -> None:
        self.content, self.base = read_json(folder), base
        self.config = parse_config(self.content, str(folder / CONFIG_FILE))
        with open_tensors(folder) as reader:
            found, self.tied = shapes_by_module(reader), None
            if base is None:
                modules = modules_of_adapter(found)
            else:
                shapes, fan_in_fan_out = base.reader.shapes, self.config.fan_in_fan_out
                modules = modules_of_base(shapes, found, base.config, fan_in_fan_out)
                self.tied = tied_in_files(base.config, base.reader)
            self.layouts, self.tensors = checked_tensors(reader, modules, self.config, self.tied)

    def trained(self, module: str) -> dict[str, np.ndarray]:
        """The module's own parameters that the file has trained values of."""
        return {
            name: x
            for name, x in self.tensors[module].items()
            if not name.startswith("lora_") and name != "base_layer.weight"
        }

    def layer(self, module: str) -> tuple[LoRA | PiSSA, dict[str, jax.Array], Any]:
        """The method of a layer, its arrays and, if there is a base, the weight they add to."""
        tensors, layout = self.tensors[module], self.layouts[module]
        method = self.config.method(module)
        a, b = layout.unpack(tensors)
        p = {"A": jnp.asarray(a), "B": jnp.asarray(b)}
        if self.base is None:
            return method, p, None
        tensor = self.base.reader.read(f"{module}.weight")
        own = tensors.get("base_layer.weight", tensor).astype(tensor.dtype)
        weight, base = (jnp.asarray(layout.unpack_weight(x)) for x in (tensor, own))
        # PiSSA decomposes the base model's weight, and the file's own base is the residual.
        start = weight if self.config.is_pissa else base
        params = method.init(jax.random.key(0), start[None])
        p = method.layer_arrays(params, 0) | p
        if params.base is not None and "base_layer.weight" not in tensors:
            base = params.base[0]
        if self.config.use_dora:
            magnitude = tensors["lora_magnitude_vector"].astype(np.float32)
            p["magnitude"] = jnp.asarray(magnitude.reshape(-1))
        return method, p, base
