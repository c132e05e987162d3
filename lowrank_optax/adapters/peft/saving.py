"""Writing the adapter of a Flax model as a folder of Hugging Face PEFT."""

from collections import Counter
from collections.abc import Iterable, Mapping
import dataclasses
import os
import re
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.adapters.adapted_layers import AlsoTrained, adapted_layers, check_names, sharing
from lowrank_optax.adapters.own_values import values_of
from lowrank_optax.adapters.peft.config import PeftConfig
from lowrank_optax.adapters.peft.folders import PREFIX, write_folder
from lowrank_optax.adapters.peft.module_names import ModuleNames, Slot, module_slots
from lowrank_optax.adapters.peft.pieces import (
    Piece,
    adapter_pieces,
    trained_parameters,
    written_bases,
)
from lowrank_optax.adapters.peft.tied import tied_in_model
from lowrank_optax.matrices.selection import path_string

_DTYPES = ("float32", "bfloat16", "float16")


def save_peft(
    model: nnx.Module,
    path: str | os.PathLike,
    *,
    name: str = "default",
    names: ModuleNames | None = None,
    as_lora: bool | None = None,
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Saves an adapter as a folder that Hugging Face PEFT loads.

    LoRA (with rsLoRA's scale), LoRA-FA and DoRA are written as they are. What PEFT does not have
    (LoTR, LaMDA, AFLoRA, SVFit), and PiSSA, whose base is not the model's, is written as a plain
    LoRA of the same change, the scale folded into its factors. Parameters that `also_train` trains
    with this adapter become ``modules_to_save``, with ``ensure_weight_tying`` where that is an
    embedding which is the model's head too. Layers of a stack become modules of their own, with
    their own ranks.

    The folder is written beside ``path`` and takes its place at the end: a save that fails leaves
    an earlier one as it was.

    Args:
      model: An NNX model with adapters.
      path: A new or empty folder, or one that holds an adapter, which is replaced.
      name: Name of the adapter that is saved.
      names: What PyTorch calls the modules. A mapping of paths, ``{}`` standing for the number of
        a layer: ``{"blocks/{}/attention/query": "model.layers.{}.self_attn.q_proj"}``; or a
        function of a path. None for the model's own ``huggingface_names``, which the decoder of
        `lowrank_optax.models` has.
      as_lora: True for a plain LoRA with the scale folded in, of any method; False for PiSSA as
        PEFT has it (which decomposes the base anew when it loads); None as said above.
      base_model: ``base_model_name_or_path``: where PEFT finds the base model.
      task_type: What PEFT makes of it: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, None, ....
      dtype: Dtype of the tensors: float32, bfloat16 or float16.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: The model has no adapter of this name, or one with a strength; a layer's name is
        not known; layers have methods that one file cannot hold; or a weight that the file holds
        has an adapter merged into it, or is the residual of another one.
      TypeError: The method can be no LoRA (DoRA), or has no form of its own in PEFT.
      FileExistsError: ``path`` holds something else.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
      >>> _ = lro.adapters.attach(model, lro.adapters.LoRA(rank=1), rngs=0)
      >>> folder, names = tempfile.mkdtemp(), {"layers/{}": "{}"}
      >>> lro.adapters.save_peft(model, folder, names=names)
      >>> again = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
      >>> _ = lro.adapters.load_peft(again, folder, names=names)
      >>> a = lambda m: m.layers[0].adapters["default"].arrays["A"][...]
      >>> print(bool((a(again) == a(model)).all()))
      True

    Reference:
      Mangrulkar et al., PEFT, 2022, https://github.com/huggingface/peft, as of 0.21.
    """
    if jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}.")
    check_names(model, [name])
    slots = module_slots(model, names)
    with values_of(model, name), sharing(model):
        _check_named(model, slots, name)
        pieces = dict(adapter_pieces(slots, name, as_lora))
        saved = dict(trained_parameters(slots, pieces))
        bases = dict(written_bases(slots, pieces, name))
    tied = tied_in_model(model, slots)
    ties = tied is not None and tied.embedding in saved and tied.embedding not in pieces
    others = {"base_model_name_or_path": base_model, "task_type": task_type}
    config = dataclasses.replace(_config(pieces, slots, saved, others), ensure_weight_tying=ties)
    if tied and ties:
        saved[tied.head] = saved[tied.embedding]
    arrays = [(module, piece.tensors) for module, piece in pieces.items()] + list(saved.items())
    tensors = {
        f"{PREFIX}{module}.{tensor}": np.ascontiguousarray(np.asarray(x).astype(jnp.dtype(dtype)))
        for module, of_module in arrays
        for tensor, x in of_module.items()
    }
    # In the model's dtype: `load_peft` compares them with the weights of the model.
    tensors |= {f"{PREFIX}{module}.base_layer.weight": x for module, x in bases.items()}
    write_folder(path, config.to_json(), tensors)


def _check_named(model: Any, slots: Mapping[str, Slot], name: str) -> None:
    """Everything that is to be saved has a name in PyTorch."""
    known = {slot.path for slot in slots.values()}
    wanted = [path for path, layer in adapted_layers(model).items() if name in layer.adapters]
    wanted += [
        tuple(map(str, path))
        for path, module in nnx.iter_modules(model)
        if any(isinstance(x, AlsoTrained) for x in vars(module).values())
    ]
    unknown = sorted({path_string(path) for path in wanted if path not in known})
    if unknown:
        raise ValueError(f"names has no PyTorch name of {', '.join(unknown)}.")


def _config(
    pieces: Mapping[str, Piece],
    slots: Mapping[str, Slot],
    saved: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Any],
) -> PeftConfig:
    fields = {tuple(sorted(p.fields.items())) for p in pieces.values()}
    if len(fields) != 1:
        found = "; ".join(str(dict(f)) for f in sorted(fields, key=str))
        raise ValueError(
            f"one file holds one method, and the layers have {len(fields)} ({found}): save those "
            "of each under a name of their own."
        )
    rank = Counter(p.rank for p in pieces.values()).most_common(1)[0][0]
    alpha = Counter(p.alpha for p in pieces.values()).most_common(1)[0][0]
    biases = any("base_layer.bias" in of_module for of_module in saved.values())
    modules = tuple(sorted(m for m in saved if m not in pieces))
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_targets(pieces, slots),
        rank_pattern={re.escape(m): p.rank for m, p in pieces.items() if p.rank != rank},
        alpha_pattern={re.escape(m): p.alpha for m, p in pieces.items() if p.alpha != alpha},
        modules_to_save=modules or None,
        bias="lora_only" if biases else "none",
        others=others,
        **dict(next(iter(fields))),
    )


def _targets(adapted: Iterable[str], slots: Mapping[str, Slot]) -> tuple[str, ...]:
    """Last names where all layers of that name are adapted, else whole names."""
    last = lambda module: module.rpartition(".")[2]
    others = {last(m) for m, slot in slots.items() if m not in adapted and slot.is_layer}
    return tuple(sorted({m if last(m) in others else last(m) for m in adapted}))
