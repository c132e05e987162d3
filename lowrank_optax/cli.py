"""The command ``lowrank-optax``: conversions of files."""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
from pathlib import Path
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_optax.adapters.peft.conversion import BaseModel

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".ckpt", ".gguf", ".onnx", ".npz",
)  # fmt: skip
_DESCRIPTION = "Memory-efficient training for JAX: the parts that work on files."
_CONVERT = """\
Convert an adapter of Hugging Face PEFT, or fold it into its base model.

SOURCE is an adapter's folder (adapter_config.json and adapter_model.safetensors). TARGET is
replaced when the result is complete.

  another dtype:        lowrank-optax convert SOURCE TARGET --dtype bfloat16
  scales folded in:     lowrank-optax convert SOURCE TARGET --plain-lora
  PiSSA as a LoRA:      lowrank-optax convert SOURCE TARGET --plain-lora --base MODEL
  a model, merged:      lowrank-optax convert SOURCE TARGET --base MODEL --merge

AdaLoRA, VeRA and MiSS (with --base) become plain LoRAs too. LoHa, LoKr, IA3, OFT and RandLoRA can
only be merged. VeRA and RandLoRA need their random projections in the file (save_projection).

An adapter of type BONE is renamed to MISS, as PEFT calls it now. Adapters of this library become
PEFT's by `lowrank_optax.adapters.save_peft`, which needs the model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: Arguments; None for those of the program.

    Returns:
      The exit status: 0, or 1 after an error about the files, which goes to stderr.

    Raises:
      SystemExit: With 2 after an error about the arguments; with 0 after ``--help``.
    """
    options = _parser().parse_args(argv)
    if options.merge and not options.base:
        _parser().error("--merge needs --base: the model to fold the adapter into")
    if options.merge and (options.dtype or options.plain_lora):
        _parser().error("--merge keeps the base's dtype: leave out --dtype and --plain-lora")
    try:
        print(_merge(options) if options.merge else _convert(options))
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"lowrank-optax: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowrank-optax", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    convert = commands.add_parser(
        "convert",
        help="convert an adapter of Hugging Face PEFT, or fold it into its base model",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", metavar="SOURCE", type=Path, help="an adapter's folder")
    convert.add_argument("target", metavar="TARGET", type=Path, help="the folder to write")
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors; as they are"
    )
    convert.add_argument(
        "--plain-lora", action="store_true", help="a LoRA with alpha = r, of the same change"
    )
    convert.add_argument(
        "--base", metavar="MODEL", type=Path, help="the base model's folder (safetensors)"
    )
    convert.add_argument("--merge", action="store_true", help="write the merged model, no adapter")
    return parser


def _convert(options: argparse.Namespace) -> str:
    from lowrank_optax.adapters.peft import conversion
    from lowrank_optax.adapters.peft.tensors import read_adapter, write_adapter

    if options.plain_lora and options.base:
        with _open_base(options.base) as base:
            adapter = conversion.to_plain_lora(options.source, base)
    elif options.plain_lora:
        adapter = conversion.to_plain_lora(options.source, None)
    else:
        adapter = conversion.rename_bone(read_adapter(options.source))
    if options.dtype:
        adapter = conversion.cast(adapter, options.dtype)
    write_adapter(options.target, adapter)
    return f"{options.target}: {adapter.content['peft_type']}, {len(adapter.tensors)} tensors"


def _merge(options: argparse.Namespace) -> str:
    from lowrank_optax.adapters.peft import conversion
    from lowrank_optax.models.model_folders import MODEL_FOLDER, write_sharded
    from lowrank_optax.storage.folders import replaced_folder

    with _open_base(options.base) as base:
        merging = conversion.Merging(options.source, base)
        tensors = ((name, merging.tensor(name)) for name in base.reader.shapes)
        with replaced_folder(options.target, MODEL_FOLDER) as folder:
            for file in options.base.iterdir():
                if file.is_file() and not _holds_weights(file):
                    shutil.copy2(file, folder)
            write_sharded(folder, tensors, 5 * 2**30)
        changed, total = len(merging.names), len(base.reader.shapes)
    return f"{options.target}: {changed} of {total} tensors changed"


@contextlib.contextmanager
def _open_base(folder: Path) -> Iterator["BaseModel"]:
    from lowrank_optax.adapters.peft.conversion import BaseModel
    from lowrank_optax.models.model_folders import CheckpointReader

    with CheckpointReader(folder) as reader:
        yield BaseModel(reader.config, reader)


def _holds_weights(file: Path) -> bool:
    """Whether a file of the base has weights that are not merged, in any format, or lists them."""
    return any(suffix in _WEIGHTS for suffix in file.suffixes)


if __name__ == "__main__":
    sys.exit(main())
