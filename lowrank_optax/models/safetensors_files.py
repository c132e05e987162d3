"""Folders of safetensors files: checked before they are read, replaced only when complete."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import json
import os
from pathlib import Path
import shutil
from types import ModuleType
from typing import Any, Self
import uuid

import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")
_LISTED = 20


class CheckpointMismatchError(ValueError):
    """The files of a checkpoint are not those of its configuration.

    Attributes:
        files: missing or damaged files, and what is wrong with each; where there is one, the
            names have not been compared.
        missing: names of tensors that should be there.
        extra: names of tensors that should not.
        wrong_shape: name to (shape found, shape expected), both in PyTorch's layout.
        wrong_dtype: name to the dtype found, where it is not F32, BF16 or F16.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: Mapping[str, str] | None = None,
        missing: Iterable[str] = (),
        extra: Iterable[str] = (),
        wrong_shape: Mapping[str, tuple] | None = None,
        wrong_dtype: Mapping[str, str] | None = None,
    ) -> None:
        self.files = dict(files or {})
        self.missing, self.extra = sorted(missing), sorted(extra)
        self.wrong_shape, self.wrong_dtype = dict(wrong_shape or {}), dict(wrong_dtype or {})
        shapes = [f"{n} {found}, not {want}" for n, (found, want) in self.wrong_shape.items()]
        dtypes = [f"{name} {found}" for name, found in self.wrong_dtype.items()]
        parts = [
            _listing("unusable files", [f"{name} ({why})" for name, why in self.files.items()]),
            _listing("missing", self.missing),
            _listing("extra", self.extra),
            _listing("wrong shape", shapes),
            _listing("wrong dtype", dtypes),
        ]
        super().__init__(
            f"the checkpoint in {folder} does not fit its configuration: "
            + "; ".join(part for part in parts if part)
        )


def _listing(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{title} ({len(items)}): {', '.join(items[:_LISTED])}{more}"


class CheckpointReader:
    """The tensors of a folder, read one at a time. A context manager.

    Attributes:
        shapes: name to shape, from the headers of the files.
        dtypes: name to dtype as safetensors spells it (`"F32"`, `"BF16"`, ...).
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._folder = folder
        self._handles: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Opens every file and reads the headers."""
        with self._stack as stack:
            safetensors, damaged = _import_safetensors(), {}
            for file in _checkpoint_files(self._folder):
                try:
                    handle = safetensors.safe_open(self._folder / file, framework="numpy")
                    self._read_header(stack.enter_context(handle))
                except FileNotFoundError:
                    damaged[file] = "missing"
                except (safetensors.SafetensorError, OSError) as error:
                    damaged[file] = str(error)
            if damaged:
                raise CheckpointMismatchError(self._folder, files=damaged)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files."""
        self._stack.close()

    def _read_header(self, handle: Any) -> None:
        for name in handle.keys():  # noqa: SIM118  (a handle is no mapping)
            view = handle.get_slice(name)
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = view.get_dtype()
            self._handles[name] = handle

    def check(self, expected: Mapping[str, tuple[int, ...]], ignore: Callable[[str], bool]) -> None:
        """Refuses a folder whose tensors are not exactly the expected ones.

        Args:
            expected: name to shape.
            ignore: which names may be there as well.

        Raises:
            CheckpointMismatchError: with all the names concerned.
        """
        common = expected.keys() & self.shapes.keys()
        problems = {
            "missing": expected.keys() - common,
            "extra": [n for n in self.shapes.keys() - common if not ignore(n)],
            "wrong_shape": {
                n: (self.shapes[n], expected[n])
                for n in sorted(common)
                if self.shapes[n] != expected[n]
            },
            "wrong_dtype": {
                n: self.dtypes[n] for n in sorted(common) if self.dtypes[n] not in _FLOATS
            },
        }
        if any(problems.values()):
            raise CheckpointMismatchError(self._folder, **problems)

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored."""
        return self._handles[name].get_tensor(name)


def _import_safetensors() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "Hugging Face checkpoints need safetensors: pip install 'lowrank_optax[examples]'"
        ) from error
    return safetensors


def _checkpoint_files(folder: Path) -> list[str]:
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.exists():
        raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = {INDEX_FILE: f"no index: {error!r}"}
        raise CheckpointMismatchError(folder, files=damaged) from error
    outside = {str(f): "not a file name" for f in files if Path(str(f)).name != f}
    if outside:
        raise CheckpointMismatchError(folder, files=outside)
    return sorted(files)


def write_sharded(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes tensors as `model.safetensors`, or in several files with an index.

    A file holds at most `max_shard_bytes`, or one tensor if that alone is larger.
    """
    _import_safetensors()
    from safetensors.numpy import save_file

    weight_maps, total = [], 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        # The metadata is what transformers asks for.
        save_file(shard, folder / f"{number}.part", metadata={"format": "pt"})
        weight_maps.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    count = len(weight_maps)
    if count == 1:
        (folder / "0.part").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(weight_maps):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to write a model into, which takes the place of `folder` if the body succeeds.

    Files of an earlier model folder other than its configuration and safetensors are copied.

    Yields:
        A new hidden folder beside `folder`.

    Raises:
        FileExistsError: `folder` is a file, or a folder with other things than a model.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        if folder.exists():
            ours = shutil.ignore_patterns("config.json", "*.safetensors", INDEX_FILE)
            shutil.copytree(folder, staging, ignore=ours)
        else:
            staging.mkdir(parents=True)
        yield staging
        _swap(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder to save the model into")
    if not any(folder.iterdir()):
        return
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or "model_type" not in content:
        raise FileExistsError(f"{folder} holds other things than a model; give another folder")


def _swap(staging: Path, folder: Path) -> None:
    """Puts `staging` in the place of `folder`; killed half-way, `folder` is beside it as .old."""
    if not folder.exists():
        os.rename(staging, folder)
        return
    old = staging.with_suffix(".old")
    os.rename(folder, old)
    try:
        os.rename(staging, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old)
