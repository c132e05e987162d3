"""Folders that are replaced as a whole: a write that fails leaves what was there before."""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import shutil
from typing import NamedTuple
import uuid


class FolderKind(NamedTuple):
    """What a folder holds, and how that is told.

    Attributes:
        what: with its article, for messages: `"a model"`.
        marker: name of the JSON file that every such folder has.
        key: a key of the object in that file.
        files: patterns of the names of the files that belong to it.
    """

    what: str
    marker: str
    key: str
    files: tuple[str, ...]


@contextlib.contextmanager
def replaced_folder(folder: Path, kind: FolderKind) -> Iterator[Path]:
    """A folder to write into, which replaces `folder` if the body succeeds.

    Files of an earlier folder that do not belong to its kind are copied.

    Yields:
        A new hidden folder beside `folder`.

    Raises:
        FileExistsError: `folder` is a file, or a folder with other things than this kind.
    """
    folder = folder.resolve()
    _check_replaceable(folder, kind)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        if folder.exists():
            shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(*kind.files))
        else:
            staging.mkdir(parents=True)
        yield staging
        _swap(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(folder: Path, kind: FolderKind) -> None:
    if not folder.exists():
        return
    noun = kind.what.split()[-1]
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder to save the {noun} into")
    if not any(folder.iterdir()):
        return
    try:
        content = json.loads((folder / kind.marker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or kind.key not in content:
        raise FileExistsError(f"{folder} holds other things than {kind.what}; give another folder")


def _swap(staging: Path, folder: Path) -> None:
    """Replaces `folder` by `staging`; killed half-way, `folder` is beside it as .old."""
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
