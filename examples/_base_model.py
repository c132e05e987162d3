"""The model that `finetune.py` adapts: of a run of the main job, from files, or made first."""

from collections.abc import Callable
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from _corpus import Corpus, load_corpus, make_corpus, standard_library
from _finetune_settings import FinetuneSettings
from _options import one_line
from _ranks import dense_settings, make_dense
from _settings import InputError, Settings, flag, remat_choice
from _texts import Documents, code_and_prose
from flax import nnx
import jax
import orbax.checkpoint as ocp
from pretrain import make_model

from lowrank_optax.models import Decoder, DecoderConfig, load_huggingface

# What transformers reads of a tokenizer, and of how the model writes with it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)
BYTES = 257  # tokens of a model without a tokenizer: each byte, and what separates documents


class Base(NamedTuple):
    """A model to adapt, of which nothing but shapes has been read."""

    name: str  # what it is called in a sentence
    text: Corpus  # to adapt it to
    before: Corpus | None  # what it was trained on, if that is known
    make: Callable[[], Decoder]  # its shapes; the weights are those of a start
    load: Callable[[], Decoder] | None  # its weights; None where it is made first
    tokenizer: dict[str, Path]  # its files, by their names beside a Hugging Face model
    made_of: Corpus | None = None  # the text, where it is made first
    folder: Path | None = None  # of Hugging Face's kind, if it comes from one


def find_base(settings: FinetuneSettings) -> Base:
    """Finds the model and the texts that the settings name.

    Raises:
      InputError: if one of them is not there or does not fit.
    """
    if settings.source is not None:
        return _of_main_job(settings, Path(settings.source).expanduser())
    if settings.hf is not None:
        return _of_huggingface(settings, Path(settings.hf).expanduser())
    return _to_be_made(settings)


def _to_be_made(settings: FinetuneSettings) -> Base:
    code, prose = code_and_prose(standard_library())
    tokenizer, length = settings.tokenizer, settings.sequence_length
    text = _text(settings, tokenizer, prose=prose)
    made_of = make_corpus(code, "the standard library's code", tokenizer, length)
    before = _before(settings, tokenizer) or made_of
    job = _with_arithmetic(settings.base(), settings)
    make = functools.partial(_make, job, made_of.vocab_size)
    return Base(settings.model, text, before, make, None, _file(tokenizer), made_of)


def _file(tokenizer: str | None) -> dict[str, Path]:
    return {} if tokenizer is None else {"tokenizer.json": Path(tokenizer)}


def _text(
    settings: FinetuneSettings,
    tokenizer: str | None,
    separator: int | None = None,
    prose: Documents | None = None,
) -> Corpus:
    """The text to adapt to."""
    length = settings.sequence_length
    if settings.data is not None:
        return load_corpus(settings.data, tokenizer, length, separator)
    documents = code_and_prose(standard_library())[1] if prose is None else prose
    name = "the standard library's documentation"
    return make_corpus(documents, name, tokenizer, length, separator)


def _before(
    settings: FinetuneSettings, tokenizer: str | None, separator: int | None = None
) -> Corpus | None:
    """The text of `--base-data`."""
    if settings.base_data is None:
        return None
    try:
        return load_corpus(settings.base_data, tokenizer, settings.sequence_length, separator)
    except InputError as error:
        raise InputError(str(error).replace("--data", "--base-data")) from None


def _with_arithmetic(job: Settings, settings: FinetuneSettings) -> Settings:
    """The main job's settings, with this run's choices for a step, and none of its own."""
    dtype = job.dtype if settings.dtype is None else settings.dtype
    own: dict[str, Any] = {"update_in_backward": False, "activation_bits": None}
    own |= {"remat": settings.remat, "remat_every": settings.remat_every}
    return dataclasses.replace(job, dtype=dtype, **own)


def _make(job: Settings, vocab_size: int) -> Decoder:
    try:
        return make_model(job, vocab_size)
    except (ValueError, OSError) as error:
        raise InputError(f"--model {job.model}: {one_line(error)}") from None


def _of_main_job(settings: FinetuneSettings, folder: Path) -> Base:
    run, part = _find_run(folder)
    try:
        known = {field.name for field in dataclasses.fields(Settings)}
        was: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in run["settings"].items()
            if k in known
        }
        job = Settings(**was)
    except (KeyError, TypeError, AttributeError, InputError):
        raise InputError(f"--from {folder}: its run.json is not that of a run") from None
    plain = Settings()
    for name in ("attention", "position", "share_blocks", "experts"):
        if getattr(job, name) != getattr(plain, name):
            raise InputError(
                f"--from {folder}: its model has {flag(name)}, and what is fine-tuned is written "
                "as Hugging Face's files, which have no such models"
            )
    text = _text(settings, job.tokenizer)
    before = _before(settings, job.tokenizer)
    if before is None:
        try:
            before = load_corpus(job.data, job.tokenizer, settings.sequence_length)
        except InputError:  # the text has gone: nothing else needs it
            before = None
    own = _with_arithmetic(job, settings)
    make = functools.partial(_make, dense_settings(own), text.vocab_size)
    trained = functools.partial(_make, own, text.vocab_size)
    load = lambda: make_dense(load_checkpoint(part / "checkpoints", trained), own)
    return Base(str(part), text, before, make, load, _file(job.tokenizer))


def _find_run(folder: Path) -> tuple[dict[str, Any], Path]:
    """The run.json of a run, and the part of it that holds the checkpoints of a model."""
    root = folder.parent if (folder / "checkpoints").is_dir() else folder
    try:
        run = json.loads((root / "run.json").read_text())
        if run["program"] != Settings.PROGRAM:
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--from {folder} is not a run of pretrain.py") from None
    saved = lambda part: any(p.name.isdigit() for p in (part / "checkpoints").glob("*"))
    names = run["settings"]["optimizers"]
    parts = [folder] if root != folder else [folder / name for name in names]
    parts = [part for part in parts if saved(part)]
    if not parts:
        raise InputError(f"--from {folder} holds no checkpoint yet")
    if len(parts) > 1:
        choices = " or ".join(f"--from {part}" for part in parts)
        raise InputError(f"--from {folder} holds several models: choose by {choices}")
    return run, parts[0]


def load_checkpoint(checkpoints: Path, make: Callable[[], Decoder]) -> Decoder:
    """The model in the latest checkpoint of the main job.

    Raises:
      InputError: if the checkpoint is not one of this model.
    """
    graphdef, params = nnx.split(make())
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
    with ocp.CheckpointManager(checkpoints.resolve()) as manager:
        items = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        try:
            restored = manager.restore(manager.latest_step(), args=items).params
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"cannot read {checkpoints}: {one_line(error)}") from None
    return nnx.merge(graphdef, restored)


def _of_huggingface(settings: FinetuneSettings, folder: Path) -> Base:
    types: dict[str, Any] = {"dtype": settings.dtype, "remat": remat_choice(settings.remat)}
    types["remat_every"] = settings.remat_every

    def checked(load: Callable[[], Any]) -> Any:
        try:
            return load()
        except (ValueError, OSError, ImportError) as error:
            raise InputError(f"--hf {folder}: {one_line(error)}") from None

    config = checked(lambda: DecoderConfig.from_huggingface(folder))
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if settings.tokenizer is not None:
        files = _file(settings.tokenizer)
    tokenizer = str(files["tokenizer.json"]) if "tokenizer.json" in files else None
    if tokenizer is None and config.vocab_size > BYTES:
        raise InputError(
            f"--hf {folder}: there is no tokenizer.json for the model's {config.vocab_size} tokens"
            f"{_instead(files)}: name one by --tokenizer, or let transformers write it "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    end = config.eos_token_id
    end = end[0] if isinstance(end, tuple) else end
    separator = None if tokenizer is None else end or 0  # bytes have a separator of ours
    text = _text(settings, tokenizer, separator)
    if text.vocab_size > config.vocab_size:
        raise InputError(
            f"--hf {folder}: the model knows {config.vocab_size} tokens, the text has "
            f"{text.vocab_size}: give the model's own tokenizer by --tokenizer"
        )
    shapes: dict[str, Any] = {k: v for k, v in types.items() if v is not None}
    make = lambda: checked(lambda: Decoder(config, rngs=nnx.Rngs(0), **shapes))
    load = lambda: checked(lambda: load_huggingface(folder, **types))
    before = _before(settings, tokenizer, separator)
    return Base(str(folder), text, before, make, load, files, folder=folder.resolve())


def _instead(files: dict[str, Path]) -> str:
    """Of a tokenizer in other files than the one that can be read."""
    others = [name for name in files if name.startswith(("tokenizer.model", "vocab", "merges"))]
    return f", only {' and '.join(others)}" if others else ""
