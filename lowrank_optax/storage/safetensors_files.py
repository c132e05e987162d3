"""Safetensors files, whose names and shapes are compared with what is expected before reading."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

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
        what: str = "the checkpoint in {} does not fit its configuration",
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
        super().__init__(what.format(folder) + ": " + "; ".join(part for part in parts if part))


class _DuplicateError(ValueError):
    """Two files of a checkpoint hold a tensor of one name."""


def _listing(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{title} ({len(items)}): {', '.join(items[:_LISTED])}{more}"


class TensorReader:
    """The tensors of some files, read one at a time. A context manager.

    Attributes:
        folder: the folder of the files.
        shapes: name to shape, from the headers of the files.
        dtypes: name to dtype as safetensors spells it (`"F32"`, `"BF16"`, ...).
        files: name to the file that holds it.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        *,
        missing_package: str,
        what: str = "the checkpoint in {} does not fit its configuration",
    ) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.folder, self._paths = folder, files
        self._missing_package, self._what = missing_package, what
        self._handles: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Opens every file and reads the headers."""
        with self._stack as stack:
            safetensors, damaged = import_safetensors(self._missing_package), {}
            for file in self._paths:
                try:
                    handle = safetensors.safe_open(self.folder / file, framework="numpy")
                    self._read_header(file, stack.enter_context(handle))
                except FileNotFoundError:
                    damaged[file] = "missing"
                except (safetensors.SafetensorError, OSError, _DuplicateError) as error:
                    damaged[file] = str(error)
            if damaged:
                what = "files in {} are damaged, truncated or missing"
                raise CheckpointMismatchError(self.folder, what=what, files=damaged)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files."""
        self._stack.close()

    def _read_header(self, file: str, handle: Any) -> None:
        for name in handle.keys():  # noqa: SIM118  (a handle is no mapping)
            if name in self.files:
                raise _DuplicateError(f"it holds {name}, and so does {self.files[name]}")
            view = handle.get_slice(name)
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = view.get_dtype()
            self.files[name] = file
            self._handles[name] = handle

    def check(self, expected: Mapping[str, tuple[int, ...]], ignore: Callable[[str], bool]) -> None:
        """Refuses files whose tensors are not exactly the expected ones.

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
            raise CheckpointMismatchError(self.folder, what=self._what, **problems)

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored.

        Raises:
            ValueError: its dtype is one that NumPy has not.
        """
        try:
            return self._handles[name].get_tensor(name)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{name} in {self.folder / self.files[name]} is of dtype {self.dtypes[name]}, "
                "which cannot be read"
            ) from error

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; False of dtypes that are not read."""
        if self.shapes[one] != self.shapes[other]:
            return False
        if not {self.dtypes[one], self.dtypes[other]} <= set(_FLOATS):
            return False
        return bool(np.array_equal(self.read(one), self.read(other)))


def import_safetensors(missing_package: str) -> ModuleType:
    """The package safetensors, or ImportError with this sentence."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(missing_package) from error
    return safetensors
