"""Writing the adapter of a Flax model as a folder of Hugging Face PEFT."""

from collections import Counter
from collections.abc import Mapping
import functools
import os
import re
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.adapters.adapted_layers import check_names, check_weights, sharing
from lowrank_optax.adapters.low_rank import LowRank
from lowrank_optax.adapters.methods.dora import DoRA
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.methods.lora_fa import LoRAFA
from lowrank_optax.adapters.methods.pissa import PiSSA
from lowrank_optax.adapters.own_values import values_of
from lowrank_optax.adapters.peft.attached_kinds import AttachedKind, kind_of
from lowrank_optax.adapters.peft.config import BaseConfig, PeftConfig
from lowrank_optax.adapters.peft.module_names import (
    ModuleNames,
    Slot,
    also_trained,
    module_slots,
    tied_in_model,
)
from lowrank_optax.adapters.peft.parameter_names import check_saved, names_in_peft
from lowrank_optax.adapters.peft.tensors import PREFIX, AdapterFolder, Tensors, write_adapter
from lowrank_optax.matrices.selection import path_string
from lowrank_optax.modules.select import modules_by_path

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

    LoRA (with rsLoRA's scale), LoRA-FA and DoRA are written as they are. So are MiSS, MiSSBat and
    RandLoRA (with its bases) of linear layers, if all have the same rank and options, and VeRA
    where one pair of projections serves all adapted layers, as PEFT has it: if they have one shape,
    or came from a file of PEFT. Other MiSS and VeRA, what PEFT does not have (LoTR, LaMDA, AFLoRA,
    SVFit, SoRA, PRILoRA), and PiSSA, whose base is not the model's, are written as a plain LoRA of
    the same change, the scale folded into its factors. A method without such a LoRA and without a
    form in PEFT is refused: SaRA, ``MiSSBat(side="in")``, and FlyLoRA, which routes by its input.

    A layer of experts, an ``nnx.Einsum`` with an axis of experts, is a parameter in PyTorch, one of
    ``target_parameters``; experts of different ranks are written as a plain LoRA. PEFT has no
    dropout of experts.

    Parameters that `also_train` trains with this adapter become ``modules_to_save``, with
    ``ensure_weight_tying`` where that is an embedding which is the model's head too. Layers of a
    stack become modules of their own, with their own ranks.

    The folder is written beside ``path`` and replaces it at the end: a save that fails leaves an
    earlier one as it was.

    Args:
      model: An NNX model with adapters.
      path: A new or empty folder, or one that holds an adapter, which is replaced.
      name: Name of the adapter that is saved.
      names: What PyTorch calls the modules. A mapping of paths, ``{}`` standing for the number of
        a layer: ``{"blocks/{}/attention/query": "model.layers.{}.self_attn.q_proj"}``; or a
        function of a path. Layers of experts have names of parameters, and several of one PyTorch
        module are in the order of their registration there. None for the model's own
        ``huggingface_names``, which the decoder of `lowrank_optax.models` has.
      as_lora: True for a plain LoRA with the scale folded in, of any method; False for PiSSA as
        PEFT has it (which decomposes the base again when it loads), and for VeRA and MiSS in their
        own form or not at all; None as said above.
      base_model: ``base_model_name_or_path``: where PEFT finds the base model.
      task_type: What PEFT makes of it: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, None, ....
      dtype: Dtype of the tensors: float32, bfloat16 or float16.

    Warns:
      UserWarning: An adapter of experts has dropout, which is not written.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: The model has no adapter of this name, or one with a strength; a layer's name is
        not known; layers have methods that one file cannot hold, or PEFT has the method for other
        layers or with other options only; or a weight that the file holds has an adapter merged
        into it, or is the residual of another one.
      TypeError: The method cannot be a LoRA (DoRA), or has no form of its own in PEFT.
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
        own = None if as_lora else _own_form(slots, name)
        piece = functools.partial(_piece, name=name, as_lora=as_lora, own=own)
        pieces = {m: p for m, slot in slots.items() if (p := piece(slot))}
        bases = {m: slots[m] for m in pieces if _holds_base(m, slots[m], name)}
        whole = {m: x for m, x in slots.items() if m not in pieces and also_trained(x.module)}
        check_saved(whole, {module: slots[module] for module in pieces})
        written = {slot.path: slot.module for slot in (bases | whole).values() if slot.is_layer}
        check_weights(model, written, "save_peft writes")
        saved = {m: x for m, slot in slots.items() if (x := _trained(slot, m in pieces))}
        bases = {m: slot.read("weight") for m, slot in bases.items()}
    tied = tied_in_model(model, slots)
    ties = tied is not None and tied.embedding in saved and tied.embedding not in pieces
    content = {
        **_config(pieces, slots, saved, own).content(),
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "ensure_weight_tying": ties,
    }
    if tied and ties:
        saved[tied.head] = saved[tied.embedding]
    name_of = names_in_peft({module: slots[module] for module in pieces})
    tensors = {
        f"{PREFIX}{name_of(module)}.{tensor}": x.astype(jnp.dtype(dtype))
        for module, of_module in [*((m, p.tensors) for m, p in pieces.items()), *saved.items()]
        for tensor, x in of_module.items()
    }
    shared = own.shared if own else {}
    tensors |= {f"base_model.{x}": values.astype(jnp.dtype(dtype)) for x, values in shared.items()}
    # In the model's dtype: `load_peft` compares them with the weights of the model.
    tensors |= {f"{PREFIX}{name_of(module)}.base_layer.weight": x for module, x in bases.items()}
    write_adapter(path, AdapterFolder(content, tensors))


def _check_named(model: Any, slots: Mapping[str, Slot], name: str) -> None:
    """Raises ValueError unless everything that is to be saved has a name in PyTorch."""
    known = {slot.path for slot in slots.values()}
    is_saved = lambda x: bool(name in getattr(x, "adapters", {}) or also_trained(x))
    unknown = [path_string(p) for p in modules_by_path(model, is_saved) if p not in known]
    if unknown:
        raise ValueError(f"names has no PyTorch name of {', '.join(sorted(unknown))}.")


class _Piece(NamedTuple):
    """The adapter of one module: rank, alpha, fields that say the method, tensors by name."""

    rank: int
    alpha: float
    fields: Mapping[str, Any]
    tensors: Tensors


class _OwnForm(NamedTuple):
    """How all layers are written as a kind beside LoRA: its fields, and tensors that they share."""

    kind: type[AttachedKind]
    fields: Mapping[str, Any]
    shared: Tensors


def _own_form(slots: Mapping[str, Slot], name: str) -> _OwnForm | None:
    """PEFT's own form of an adapter; None if PEFT does not have it, or not for these layers."""
    having = [slot for slot in slots.values() if name in slot.adapters]
    methods = [slot.adapters[name].method for slot in having]
    layouts = [layout for slot in having if (layout := slot.layout)]
    if len(set(map(type, methods))) != 1 or any(x.kind != "linear" for x in layouts):
        return None
    kind = kind_of(methods[0])
    fields = [kind.fields_of(method) for method in methods] if kind else [None]
    if kind is None or fields[0] is None or any(of != fields[0] for of in fields):
        return None
    groups = {slot.adapters[name].group: slot.adapters[name].p() for slot in having}
    shared = kind.shared_tensors_of(layouts, list(groups.values()))
    return None if shared is None else _OwnForm(kind, fields[0], shared)


def _piece(slot: Slot, name: str, as_lora: bool | None, own: _OwnForm | None) -> _Piece | None:
    """The adapter of a module; None if it has none, as a layer between those `load_peft` adapts."""
    if name not in slot.adapters:
        return None
    adapter, where, layout = slot.adapters[name], path_string(slot.path), slot.layout
    assert layout is not None  # it has an adapter
    # One layer's arrays; shared ones have no stack axes.
    method: Any = adapter.method
    p = {k: x if k in method.shared else x[slot.index] for k, x in adapter.p().items()}
    scales = np.asarray(p["rank_scale"]) if "rank_scale" in p else None
    if scales is not None and not scales.any():
        return None
    unequal = False  # PEFT has one rank and one scale for all experts
    if scales is not None and layout.experts:
        unequal, scales = bool((scales != scales[0]).any()), scales[0]
    if adapter.strength != 1:
        raise ValueError(
            f"{where}: the adapter's strength is {adapter.strength}, which a file does not hold: "
            "set it to 1 by `activate`."
        )
    if own is not None:
        return _Piece(own.fields["r"], 1.0, own.fields, own.kind.tensors_of(p))
    kind = kind_of(method)
    if kind is not None and not as_lora and not isinstance(method, LowRank):
        raise ValueError(
            f"{where}: {kind.limits}, and no LoRA has the change of this {type(method).__name__}: "
            "it cannot be saved. Merge it into the weights instead."
        )
    fields = _form(method, as_lora)
    dropout = {"lora_dropout": getattr(method, "dropout", 0.0)}
    if fields is None or unequal:  # a plain LoRA of the same change of the original weight
        of_experts = lambda x: jnp.broadcast_to(x, (*layout.experts, *x.shape[-2:]))  # if shared
        a, b = (np.asarray(of_experts(x), np.float32) for x in method.to_lora(p))
        if isinstance(method, LowRank) and isinstance(method.rank, tuple):
            used = np.any(a, axis=-2) & np.any(b, axis=-1)  # the others are padding
            used = used.reshape(-1, used.shape[-1]).any(axis=0)
            used[0] |= not used.any()
            a, b = a[..., used], b[..., used, :]
        rank, stabilized = a.shape[-1], bool(fields and fields["use_rslora"])  # as other layers
        fields = {"use_rslora": stabilized, "use_dora": False, "init_lora_weights": True}
        alpha = rank**0.5 if stabilized else rank
        return _Piece(rank, alpha, fields | dropout, layout.pack(a, b))
    if layout.kind != "linear" and fields["init_lora_weights"] == "pissa":
        raise ValueError(f"{where}: PEFT has PiSSA of linear layers only; leave as_lora out.")
    if layout.kind in ("embedding", "experts") and fields["use_dora"]:
        what = "an embedding" if layout.kind == "embedding" else "experts"
        raise ValueError(f"{where}: DoRA of {what} cannot be saved in PEFT's files.")
    # Rows beyond a layer's own rank are padding.
    used = slice(None) if scales is None else scales != 0
    arrays = {key: np.asarray(x) for key, x in p.items()}
    a, b = arrays["A"][..., used], arrays["B"][..., used, :]
    rank = a.shape[-1]
    scale = method.scale_of(method.max_rank) if scales is None else scales[used][0]
    # The alpha that gives this scale: the method's or a short number, if it does.
    per_alpha = rank**0.5 if fields["use_rslora"] else rank
    exact = float(scale) * per_alpha
    short = (rank if method.alpha is None else method.alpha, float(f"{exact:.6g}"))
    gives = lambda alpha: np.float32(alpha / per_alpha) == np.float32(scale)
    alpha = next(filter(gives, short), exact)
    return _Piece(rank, alpha, fields | dropout, layout.pack(a, b, arrays.get("magnitude")))


def _form(method: Any, as_lora: bool | None) -> dict[str, Any] | None:
    """The fields with which PEFT computes a method from its own ``A, B``; None for a plain LoRA."""
    is_pissa, has_form = type(method) is PiSSA, type(method) in (LoRA, LoRAFA, DoRA)
    if as_lora or (as_lora is None and not has_form):
        return None
    if (kind := kind_of(method)) is not None:
        raise ValueError(f"as_lora=False: {kind.limits}; leave it out for a plain LoRA.")
    if not (has_form or is_pissa):
        raise TypeError(
            f"as_lora=False: PEFT has no {type(method).__name__}; leave it out for a plain LoRA."
        )
    if is_pissa and (method.power_iterations is not None or method.nf4_rounds):
        raise ValueError(
            "as_lora=False: PEFT computes PiSSA's residual base again, by an exact decomposition "
            f"and in full precision, which is not that of {method}; leave it out for a plain LoRA."
        )
    return {
        "use_rslora": method.rank_stabilized,
        "use_dora": isinstance(method, DoRA),
        "init_lora_weights": "pissa" if is_pissa else True,
    }


def _trained(slot: Slot, adapted: bool) -> Tensors:
    """All parameters of a module of which `also_train` trains one; the bias of an adapted one."""
    trained = also_trained(slot.module)
    if not trained:
        return {}
    if slot.is_parameter:
        raise ValueError(
            f"{path_string(slot.path)}: it is trained itself, and PEFT's modules_to_save cannot "
            "hold a stack of experts alone, which is a parameter: train an adapter of it instead."
        )
    if not adapted:
        _check_unchanged(slot)
        return {parameter: slot.read(parameter) for parameter in slot.parameters}
    if slot.parameters["weight"] in trained:
        raise ValueError(
            f"{path_string(slot.path)}: its weight is trained itself and has an adapter, which "
            "PEFT cannot hold; merge the adapter or train only one of them."
        )
    return {"base_layer.bias": slot.read("bias")}


def _holds_base(module: str, slot: Slot, name: str) -> bool:
    """Whether the file holds the weight that an adapter is beside.

    PEFT writes those of embeddings and heads, by their names; here also those of which the adapter
    has values of its own.
    """
    if slot.adapters[name].method.changes_base or slot.is_parameter:
        return False  # a residual is not the base of a plain LoRA; PEFT writes no parameter
    own = getattr(slot.module, "own_values", {})
    holds = module.rpartition(".")[2] in ("embed_tokens", "lm_head")
    holds = holds or slot.parameters["weight"] in own
    if holds:
        _check_unchanged(slot)
    return holds


def _check_unchanged(slot: Slot) -> None:
    """Raises ValueError where an adapter has changed the layer's weight itself."""
    for name, adapter in slot.adapters.items():
        where = f"{path_string(slot.path)}: its weight is saved, and the adapter {name!r}"
        if adapter.merged:
            raise ValueError(f"{where} is merged into it: unmerge {name!r} first.")
        if adapter.method.changes_base:
            method = type(adapter.method).__name__
            raise ValueError(
                f"{where} ({method}) has changed it to a residual: detach {name!r} first."
            )


def _config(
    pieces: Mapping[str, _Piece],
    slots: Mapping[str, Slot],
    saved: Mapping[str, Tensors],
    own: _OwnForm | None,
) -> BaseConfig:
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
    # Last names where all layers of that name are adapted, else whole names.
    last = lambda module: module.rpartition(".")[2]
    parameters = tuple(sorted(m for m in pieces if slots[m].is_parameter))
    others = {last(m) for m, slot in slots.items() if m not in pieces and slot.is_layer}
    targets = {m if last(m) in others else last(m) for m in pieces if m not in parameters}
    common: dict[str, Any] = {
        "r": rank,
        "target_modules": tuple(sorted(targets)),
        "modules_to_save": tuple(sorted(saved.keys() - pieces.keys())) or None,
        **dict(next(iter(fields))),
    }
    if own is not None:
        kind = own.kind
        return kind(bias=kind.bias_only if biases else "none", others=kind.written, **common)
    if parameters and common["lora_dropout"]:
        warnings.warn(
            f"dropout={common['lora_dropout']} is written as lora_dropout=0: PEFT has no dropout "
            "of experts.",
            stacklevel=3,
        )
        common["lora_dropout"] = 0.0
    return PeftConfig(
        lora_alpha=alpha,
        target_parameters=parameters or None,
        rank_pattern={re.escape(m): p.rank for m, p in pieces.items() if p.rank != rank},
        alpha_pattern={re.escape(m): p.alpha for m, p in pieces.items() if p.alpha != alpha},
        bias="lora_only" if biases else "none",
        **common,
    )
