"""A trained adapter as files, and the proof that they hold it: merged, saved, read, compared."""

from collections.abc import Mapping
from pathlib import Path
import shutil
from typing import Any

from _adapters import Parts, put_together
from flax import nnx
import jax
import jax.numpy as jnp

import lowrank_optax as lro
from lowrank_optax.models import Decoder, load_huggingface, save_huggingface

# Largest difference of logits that rounding explains, over the largest logit.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


class CheckError(RuntimeError):
    """What was saved does not give the numbers of what was trained."""


def save_merged(
    parts: Parts, folder: Path, tokenizer: Mapping[str, Path], tokens: jax.Array, adapted: bool
) -> tuple[Decoder, float]:
    """Folds the adapter into the weights, saves them for transformers, and reads them back.

    Args:
      parts: the trained model.
      folder: becomes a Hugging Face folder: config.json, safetensors and the tokenizer.
      tokenizer: its files, by the names that transformers knows them by.
      tokens: [batch, length] to compare on.
      adapted: whether there is an adapter to merge.

    Returns:
      The model that was read, and the largest difference of a logit.

    Raises:
      CheckError: if it is larger than rounding explains.
    """
    model = put_together(parts)
    logits = logits_of(model, tokens)
    if adapted:
        lro.adapters.merge(model)
        lro.adapters.detach(model)
    save_huggingface(model, folder)
    for name, file in tokenizer.items():
        shutil.copy(file, folder / name)
    merged = load_huggingface(folder, dtype=model.dtype)
    return merged, compare("the merged model", logits_of(merged, tokens), logits, model.dtype)


def save_peft(
    parts: Parts, base: Decoder, folder: Path, tokens: jax.Array, base_folder: Path | None
) -> float | None:
    """Saves the adapter for Hugging Face PEFT, loads it onto the model before, and compares.

    Args:
      parts: the trained model.
      base: the model that was adapted, which gets the adapter.
      folder: becomes PEFT's.
      tokens: [batch, length] to compare on.
      base_folder: where PEFT finds the model before; None if it is in no folder of its kind.

    Returns:
      The largest difference of a logit; None if PEFT has no form of such an adapter.

    Raises:
      CheckError: if it is larger than rounding explains.
    """
    model = put_together(parts)
    name = None if base_folder is None else str(base_folder)
    try:
        lro.adapters.save_peft(model, folder, base_model=name)
    except TypeError:  # its change depends on the input, or has no low rank
        return None
    lro.adapters.load_peft(base, folder)
    base.eval()
    found, expected = logits_of(base, tokens), logits_of(model, tokens)
    return compare("the adapter in PEFT's files", found, expected, model.dtype)


def logits_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The model's logits, computed without the backend's shortcuts."""
    with jax.default_matmul_precision("highest"):
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)


def compare(what: str, found: jax.Array, expected: jax.Array, dtype: Any) -> float:
    """The largest difference.

    Raises:
      CheckError: if it is larger than rounding explains.
    """
    difference = float(jnp.abs(found - expected).max())
    bound = TOLERANCE[jnp.dtype(dtype).name] * float(jnp.abs(expected).max())
    if not difference <= bound:  # a NaN is no small difference
        raise CheckError(
            f"{what} differs from the trained one by {difference:.2g} in a logit: rounding "
            f"explains {bound:.2g}"
        )
    return difference
