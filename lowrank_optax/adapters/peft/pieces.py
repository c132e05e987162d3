"""The adapter of a Flax model, taken apart into PyTorch's modules."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.adapted_layers import AlsoTrained, LayerAdapter
from lowrank_optax.adapters.low_rank import LowRank
from lowrank_optax.adapters.peft.forms import peft_form
from lowrank_optax.adapters.peft.layouts import Layout
from lowrank_optax.adapters.peft.module_names import Slot
from lowrank_optax.matrices.selection import path_string


class Piece(NamedTuple):
    """The adapter of one module.

    Attributes:
      rank: Rank of the adapter.
      alpha: Alpha of the adapter.
      fields: Fields of adapter_config.json that say which method it is.
      tensors: Tensors by what follows the module's name.
    """

    rank: int
    alpha: float
    fields: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]


def adapter_pieces(
    slots: Mapping[str, Slot], name: str, as_lora: bool | None
) -> Iterator[tuple[str, Piece]]:
    """The adapted modules by name; call it inside `sharing`.

    Layers of a stack that have no adapter, as `load_peft` makes them, are left out.
    """
    for module, slot in slots.items():
        if name not in getattr(slot.module, "adapters", {}):
            continue
        adapter = slot.module.adapters[name]
        # One layer's arrays; shared ones have no stack axes.
        shared = adapter.method.shared
        p = {k: x if k in shared else x[slot.index] for k, x in adapter.p().items()}
        if "rank_scale" not in p or p["rank_scale"].any():
            yield module, _piece(slot, adapter, p, as_lora)


def written_bases(
    slots: Mapping[str, Slot], adapted: Iterable[str], name: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights that adapters are beside, where a file holds them: of embeddings and heads.

    PEFT writes those by their names; others come along where the adapter has values of its own.

    Raises:
      ValueError: If such a weight has another adapter's change in it, or this one's.
    """
    for module in adapted:
        slot = slots[module]
        of_vocabulary = module.rpartition(".")[2] in ("embed_tokens", "lm_head")
        own = getattr(slot.module, "own_values", {})
        if slot.module.adapters[name].method.changes_base:
            continue  # the weight is a residual, which is no base of a plain LoRA
        if of_vocabulary or slot.parameters()["weight"] in own:
            _check_unchanged(slot)
            yield module, slot.read("weight")


def trained_parameters(
    slots: Mapping[str, Slot], adapted: Mapping[str, Piece]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Modules with parameters of `also_train`, and all their parameters; of adapted ones, biases.

    Raises:
      ValueError: If a layer's weight is trained and adapted too, or has an adapter's change in it.
    """
    for module, slot in slots.items():
        if not any(isinstance(x, AlsoTrained) for x in vars(slot.module).values()):
            continue
        names = slot.parameters()
        if module not in adapted:
            _check_unchanged(slot)
            yield module, {parameter: slot.read(parameter) for parameter in names}
        elif isinstance(getattr(slot.module, names["weight"]), AlsoTrained):
            raise ValueError(
                f"{path_string(slot.path)}: its weight is trained itself and has an adapter, which "
                "PEFT cannot hold; merge the adapter or train only one of them."
            )
        else:
            yield module, {"base_layer.bias": slot.read("bias")}


def _check_unchanged(slot: Slot) -> None:
    """Raises ValueError where an adapter has changed the layer's weight itself."""
    for adapter in getattr(slot.module, "adapters", {}).values():
        where = f"{path_string(slot.path)}: its weight is saved, and the adapter {adapter.name!r}"
        if adapter.merged:
            raise ValueError(f"{where} is merged into it: unmerge {adapter.name!r} first.")
        if adapter.method.changes_base:
            method = type(adapter.method).__name__
            raise ValueError(
                f"{where} ({method}) has changed it to a residual: detach {adapter.name!r} first."
            )


def _piece(slot: Slot, adapter: LayerAdapter, p: Mapping[str, Any], as_lora: bool | None) -> Piece:
    where, method, layout = path_string(slot.path), adapter.method, slot.layout()
    assert layout is not None  # it has an adapter
    if adapter.strength != 1:
        raise ValueError(
            f"{where}: the adapter's strength is {adapter.strength}, which a file does not hold: "
            "set it to 1 by `activate`."
        )
    fields = peft_form(method, as_lora)
    dropout = {"lora_dropout": getattr(method, "dropout", 0.0)}
    if fields is None:
        return _converted(method, p, layout, dropout)
    if layout.kind != "linear" and fields["init_lora_weights"] == "pissa":
        raise ValueError(f"{where}: PEFT has PiSSA of linear layers only; leave as_lora out.")
    if layout.kind == "embedding" and fields["use_dora"]:
        raise ValueError(f"{where}: DoRA of an embedding cannot be saved in PEFT's files.")
    return _as_it_is(method, p, layout, fields | dropout)


def _as_it_is(method: Any, p: Mapping[str, Any], layout: Layout, fields: dict[str, Any]) -> Piece:
    arrays = {name: np.asarray(x) for name, x in p.items()}
    of_rows = arrays.get("rank_scale")
    # Rows beyond a layer's own rank are padding.
    used = slice(None) if of_rows is None else of_rows != 0
    a, b = arrays["A"][:, used], arrays["B"][used]
    scale = method.scale_of(method.max_rank) if of_rows is None else of_rows[used][0]
    rank = a.shape[1]
    alpha = _alpha(rank if method.alpha is None else method.alpha, rank, scale, fields)
    return Piece(rank, alpha, fields, layout.pack(a, b, arrays.get("magnitude")))


def _alpha(alpha: float, rank: int, scale: float, fields: Mapping[str, Any]) -> float:
    """The alpha that gives this scale: the method's, if it does."""
    per_alpha = rank**0.5 if fields["use_rslora"] else rank
    exact = float(scale) * per_alpha
    for short in (alpha, float(f"{exact:.6g}")):
        if np.float32(short / per_alpha) == np.float32(scale):
            return short
    return exact


def _converted(method: Any, p: Mapping[str, Any], layout: Layout, dropout: dict[str, Any]) -> Piece:
    """A plain LoRA of the same change of the original weight."""
    a, b = (np.asarray(x.astype(jnp.float32)) for x in method.to_lora(p))
    if isinstance(method, LowRank) and isinstance(method.rank, tuple):
        used = np.any(a, axis=0) & np.any(b, axis=1)
        used[0] |= not used.any()
        a, b = a[:, used], b[used]
    rank = a.shape[1]
    fields: dict[str, Any] = {
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    return Piece(rank, rank, fields | dropout, layout.pack(a, b))
