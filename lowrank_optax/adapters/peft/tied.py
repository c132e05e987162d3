"""Embeddings whose table is the output head's weight too."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from lowrank_optax.adapters.peft.module_names import Slot
from lowrank_optax.storage.fields import (
    BOOLEAN,
    NULL,
    OBJECT,
    POSITIVE_INTEGER,
    TEXT,
    list_of,
    wrong_fields,
)
from lowrank_optax.storage.safetensors_files import TensorReader

HEAD = "lm_head"

# Last names of embeddings and of heads.
_TABLES = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
_HEADS = (HEAD, "embed_out", "output", "decoder")
_KINDS = {
    "architectures": list_of(TEXT) | NULL,
    "model_type": TEXT | NULL,
    "text_config": OBJECT | NULL,
    "tie_word_embeddings": BOOLEAN | NULL,
    "vocab_size": POSITIVE_INTEGER | NULL,
}


class Tied(NamedTuple):
    """Two modules of PyTorch with one weight.

    Attributes:
      embedding: Name of the embedding.
      head: Name of the head, which the Flax model or the file may be without.
    """

    embedding: str
    head: str


def tied_in_model(model: Any, slots: Mapping[str, Slot]) -> Tied | None:
    """The tied modules of a model whose configuration says that there are any."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    tables = [name for name, slot in slots.items() if isinstance(slot.module, nnx.Embed)]
    return Tied(tables[0], HEAD) if tables else None


def may_be_tied(model: Any, slots: Mapping[str, Slot], embedding: str) -> bool:
    """Whether a model that does not say so could use this table as its head: it has no other."""
    if hasattr(getattr(model, "config", None), "tie_word_embeddings"):
        return False
    rows = slots[embedding].shapes()["weight"][0]
    others = (slot.shapes().get("weight") for name, slot in slots.items() if name != embedding)
    return all(shape is None or shape[0] != rows for shape in others)


def tied_in_files(config: Mapping[str, Any], reader: TensorReader) -> Tied | None:
    """The tied modules of a model's folder.

    A configuration that leaves `tie_word_embeddings` out has its type's default, which for most is
    true. So only one that says false, or a head with values of its own, shows that they are not
    tied; another table with as many rows, such as GPT-2's of positions, does not.

    Args:
      config: Fields of its config.json.
      reader: Its tensors.

    Raises:
      ValueError: If a field that says so has a value that it cannot have.
    """
    text = config.get("text_config")
    wrong = wrong_fields(config, _KINDS) or wrong_fields(text or {}, _KINDS)
    if wrong:
        raise ValueError(f"config.json of the base: {'; '.join(wrong)}.")
    both = [config, text if isinstance(text, Mapping) else {}]
    said = [c["tie_word_embeddings"] for c in both if c.get("tie_word_embeddings") is not None]
    rows = next((c["vocab_size"] for c in both if c.get("vocab_size")), None)
    if (said and not said[0]) or not _has_head(config):
        return None
    tables = {
        name.removesuffix(".weight"): shape[0]
        for name, shape in reader.shapes.items()
        if name.endswith(".weight")
        and len(shape) == 2
        and not any(part.isdigit() for part in name.split("."))  # not of a layer
    }
    last = lambda name: name.rpartition(".")[2]
    others = [name for name in tables if last(name) not in _HEADS]
    named = [name for name in others if last(name) in _TABLES]
    embeddings = named or [name for name in others if tables[name] == rows]
    embeddings.sort(key=lambda name: tables[name] != rows)
    if not embeddings:
        return Tied(HEAD, HEAD) if HEAD in tables else None
    embedding = embeddings[0]
    heads = [name for name in tables if last(name) in _HEADS]
    shape = lambda name: reader.shapes[f"{name}.weight"]
    same = [name for name in heads if shape(name) == shape(embedding)]
    equal = [name for name in same if reader.equal(f"{embedding}.weight", f"{name}.weight")]
    if heads and not equal:
        return None
    return Tied(embedding, equal[-1] if equal else HEAD)


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model predicts tokens, as far as its configuration says."""
    architectures = config.get("architectures") or ["ForCausalLM"]
    kinds = ("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
    return any(kind in str(name) for name in architectures for kind in kinds)
