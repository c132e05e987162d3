"""Hugging Face checkpoints: config.json with safetensors, in one file or sharded with an index.

PyTorch stores a linear layer as [out, in]; it is transposed here, once, to JAX's [in, out].
"""

from collections.abc import Iterable, Iterator
import dataclasses
import json
import os
from pathlib import Path
from typing import Any
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.models.decoder import Decoder, Remat
from lowrank_optax.models.decoder_config import DecoderConfig
from lowrank_optax.models.huggingface_config import BLOCK_MODULES, OUTER_MODULES
from lowrank_optax.models.model_folders import (
    MODEL_FOLDER,
    CheckpointReader,
    write_sharded,
)
from lowrank_optax.storage.folders import replaced_folder
from lowrank_optax.storage.safetensors_files import CheckpointMismatchError

_OUTER_NAMES = {
    f"{module}.{parameter}": f"{OUTER_MODULES[module]}.weight"
    for module, parameter in (("embed", "embedding"), ("norm", "scale"), ("lm_head", "kernel"))
}
_EMBEDDING, _HEAD = _OUTER_NAMES["embed.embedding"], _OUTER_NAMES["lm_head.kernel"]
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}

Keys = tuple[Any, ...]  # names and layer numbers: where a parameter stands in the decoder


def load_huggingface(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    scan_layers: bool = True,
    remat: Remat = None,
    remat_every: int = 1,
    activation_bits: int | None = None,
) -> Decoder:
    """Loads a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

    The names and shapes are compared with the configuration before any weight is read; then the
    tensors are read one at a time.

    Args:
        folder: holds config.json and model.safetensors, or its shards and their index.
        dtype: dtype of the activations; None means that of the weights.
        param_dtype: dtype of the weights; None means that of the file's embedding.
        scan_layers: as in `Decoder`.
        remat: as in `Decoder`.
        remat_every: as in `Decoder`.
        activation_bits: as in `Decoder`.

    Returns:
        The decoder with the checkpoint's weights.

    Warns:
        UserWarning: the configuration ties the head to the embedding, but the files hold a head
            with other values. It is used, as transformers does.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: the folder holds no config.json or no safetensors.
        ValueError: the configuration asks for something this decoder does not do, or the weights
            are quantized.
        CheckpointMismatchError: a file is missing or damaged, or the tensors are not those of
            the configuration; the error lists all names concerned.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from lowrank_optax.models import Decoder, decoder_config
        >>> from lowrank_optax.models import load_huggingface, save_huggingface
        >>> config = decoder_config("llama-tiny", vocab_size=257, num_hidden_layers=1)
        >>> folder = tempfile.mkdtemp()
        >>> save_huggingface(Decoder(config, rngs=nnx.Rngs(0)), folder)
        >>> load_huggingface(folder).config == config
        True
    """
    config = DecoderConfig.from_huggingface(folder)
    with CheckpointReader(Path(folder)) as reader:
        own_head = (
            config.tie_word_embeddings
            and {_HEAD, _EMBEDDING} <= reader.shapes.keys()
            and not reader.equal(_HEAD, _EMBEDDING)
        )
        config = dataclasses.replace(config, tie_word_embeddings=False) if own_head else config
        names = _expected_shapes(config)
        _check_prefix(reader, names, folder)
        # Some checkpoints hold a copy of the tied head, or the rotary frequencies.
        tied = (_HEAD,) if config.tie_word_embeddings else ()
        reader.check(names, lambda name: name in tied or name.endswith(".rotary_emb.inv_freq"))
        if own_head:
            warnings.warn(
                f"{folder}: config.json says tie_word_embeddings=true, but {_HEAD} and "
                f"{_EMBEDDING} differ: the head is used as it is, untied.",
                stacklevel=2,
            )
        if param_dtype is None:
            param_dtype = _DTYPES[reader.dtypes[_EMBEDDING]]
        options = {
            "dtype": param_dtype if dtype is None else dtype,
            "param_dtype": param_dtype,
            "scan_layers": scan_layers,
            "remat": remat,
            "remat_every": remat_every,
            "activation_bits": activation_bits,
        }
        graphdef, state = nnx.split(_abstract_decoder(config, **options))
        flat = nnx.to_flat_state(state)
        for path, variable in flat:
            variable.set_value(_read_parameter(reader, path, config, variable.get_value()))
        return nnx.merge(graphdef, nnx.from_flat_state(flat))


def save_huggingface(
    model: Decoder, folder: str | os.PathLike, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Saves config.json and safetensors, which transformers loads.

    Everything is written to a hidden folder beside `folder`, which replaces it at the end; a save
    that fails leaves an earlier one as it was. Other files in an earlier folder (a tokenizer, say)
    stay.

    Args:
        model: the decoder, without adapters (merge or detach them first).
        folder: a new or empty folder, or one that holds a model, which is replaced.
        max_shard_bytes: a larger model is split into several files with an index.

    Raises:
        ImportError: safetensors is not installed.
        FileExistsError: `folder` is a file, or a folder with other things than a model.
        ValueError: the model has parameters that such a checkpoint has no name for, or shared
            blocks, or `max_shard_bytes` is not positive.

    Example:
        See `load_huggingface`.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if model.share_blocks or model.experts is not None:
        raise ValueError(
            "such a checkpoint has dense MLPs and blocks of their own: it cannot hold experts, and "
            "shared blocks only after unshare_blocks(model)"
        )
    if model.position == "comrope" or model.features is not None:
        raise ValueError(
            "such a checkpoint has rotary positions with fixed frequencies and softmax attention: "
            f"it cannot hold position={model.position!r} or random features"
        )
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    shapes = _expected_shapes(model.config)
    foreign = [path for path in parameters if not _names(path, model.config)]
    if foreign or sorted(n for p in parameters for n in _names(p, model.config)) != sorted(shapes):
        listed = ", ".join(".".join(map(str, path)) for path in foreign)
        raise ValueError(
            "the model's parameters are not those of its configuration "
            f"(foreign: {listed or 'none'}); merge or detach its adapters before saving"
        )
    dtype = model.embed.embedding.get_value().dtype
    content = model.config.to_huggingface() | {"torch_dtype": dtype.name}
    with replaced_folder(Path(folder), MODEL_FOLDER) as target:
        text = json.dumps(content, indent=2, sort_keys=True)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")
        write_sharded(target, _stored_tensors(parameters, model.config), max_shard_bytes)


def _abstract_decoder(config: DecoderConfig, **options: Any) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


def _names(path: Keys, config: DecoderConfig) -> list[str]:
    """Hugging Face's names of the tensors in a parameter: one, or one a layer, or none known."""
    if path[0] != "blocks":
        name = _OUTER_NAMES.get(".".join(map(str, path)))
        return [name] if name else []
    stacked = _is_stacked(path)
    layers = range(config.num_hidden_layers) if stacked else [path[1]]
    *module, parameter = path[1:] if stacked else path[2:]
    module = BLOCK_MODULES.get(".".join(map(str, module)))
    if module is None or parameter not in _PARAMETERS:
        return []
    return [f"model.layers.{layer}.{module}.{_PARAMETERS[parameter]}" for layer in layers]


def _is_stacked(path: Keys) -> bool:
    return path[0] == "blocks" and not isinstance(path[1], int)


def _expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and stored shape of every tensor that a checkpoint of this configuration has."""
    shapes = {}
    state = nnx.state(_abstract_decoder(config, scan_layers=True))
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value().shape
        shape = shape[1:] if path[0] == "blocks" else shape
        shape = shape[::-1] if path[-1] == "kernel" else shape
        shapes.update(dict.fromkeys(_names(path, config), shape))
    return shapes


def _check_prefix(
    reader: CheckpointReader, names: Iterable[str], folder: str | os.PathLike
) -> None:
    """Refuses files of the bare model, whose names lack the first word."""
    missing = [name for name in names if name not in reader.shapes]
    flat = [name for name in missing if name.removeprefix("model.") in reader.shapes]
    if len(missing) > 1 and len(flat) >= len(missing) - 1:  # they have no head
        raise CheckpointMismatchError(
            Path(folder),
            what="names of tensors in {} lack the prefix 'model.', as those of a model without a "
            "head do. Load it by transformers' AutoModelForCausalLM and save it again",
            missing=missing,
        )


def _read_parameter(
    reader: CheckpointReader, path: Keys, config: DecoderConfig, abstract: jax.ShapeDtypeStruct
) -> jax.Array:
    """One parameter from its tensors, transposed and stacked, in the abstract one's dtype."""
    value = np.empty(abstract.shape, abstract.dtype)
    for layer, name in enumerate(_names(path, config)):
        tensor = reader.read(name)
        value[layer if _is_stacked(path) else ...] = tensor.T if path[-1] == "kernel" else tensor
    return jnp.asarray(value)


def _stored_tensors(
    parameters: dict[Keys, nnx.Variable], config: DecoderConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, in PyTorch's layout."""
    for path, variable in parameters.items():
        value = np.asarray(variable.get_value())
        tensors = value if _is_stacked(path) else [value]
        for name, tensor in zip(_names(path, config), tensors, strict=True):
            yield name, np.ascontiguousarray(tensor.T if path[-1] == "kernel" else tensor)
