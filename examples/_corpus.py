"""Text files -> tokens in memory -> shuffled, resumable batches from grain."""

from collections.abc import Callable, Iterator, Sequence
import glob
import hashlib
import os
from pathlib import Path
import sysconfig
from typing import NamedTuple

from _settings import InputError, Settings
import grain
import numpy as np
import tokenizers

HELD_OUT_FRACTION = 0.05
# Of the standard library: no tests, no tables of characters, nothing that is installed later.
_NOT_PROSE = frozenset(
    ("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings")
    + ("pydoc_data", "site-packages", "dist-packages", "lib-dynload", "__pycache__")
)


class Corpus(NamedTuple):
    """Tokens of the two splits, and what reads and writes them."""

    train: np.ndarray  # [tokens], uint16 or int32
    held_out: np.ndarray  # [tokens], of other files than `train`
    vocab_size: int
    decode: Callable[[Sequence[int]], str]
    files: int
    fingerprint: str  # changes when the text, the split or the tokenizer does

    def describe(self) -> str:
        """Says in one line what there is."""
        return (
            f"{self.files} files: {len(self.train):,} tokens to train on, "
            f"{len(self.held_out):,} held out"
        )


def load_corpus(
    data: str | None, tokenizer: str | None, sequence_length: int, separator: int | None = None
) -> Corpus:
    """Reads, splits and tokenizes the text.

    Args:
      data: a folder, a file or a glob pattern; None is the standard library's sources.
      tokenizer: path of a `tokenizers` JSON file; None makes every byte a token.
      sequence_length: tokens a sequence predicts; each split must hold one sequence.
      separator: the token between documents; None for one more than the vocabulary has.

    Raises:
      InputError: if there is no such file, no text in it, or less than one sequence.
    """
    documents = standard_library() if data is None else list(_read(_find(data)))
    return make_corpus(documents, _name(data), tokenizer, sequence_length, separator)


def make_corpus(
    documents: list[tuple[str, str]],
    name: str,
    tokenizer: str | None,
    sequence_length: int,
    separator: int | None = None,
) -> Corpus:
    """Splits and tokenizes documents.

    Args:
      documents: (name, text) of each.
      name: what the whole is called in an error.
      tokenizer: path of a `tokenizers` JSON file; None makes every byte a token.
      sequence_length: tokens a sequence predicts; each split must hold one sequence.
      separator: the token between documents; None for one more than the vocabulary has.

    Raises:
      InputError: if there is no text, or less than one sequence.
    """
    encode, decode, vocab_size = _byte_codec() if tokenizer is None else _load_codec(tokenizer)
    if not documents:
        raise InputError(f"{name} holds no text: every file is empty or not UTF-8")
    if separator is None:
        separator, vocab_size = vocab_size, vocab_size + 1
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    splits = []
    for part, texts in zip(("training", "held-out"), _split(documents), strict=True):
        tokens = [token for text in texts for token in (encode(text), [separator])]
        splits.append(np.concatenate([np.asarray(t, dtype) for t in tokens] or [[]]))
        if len(splits[-1]) <= sequence_length:
            raise InputError(
                f"the {part} text of {name} has {len(splits[-1])} tokens, too few for one "
                f"sequence of {sequence_length} + 1: give more text or a smaller --sequence-length"
            )
    train, held_out = splits
    digest = hashlib.sha256(train.tobytes() + held_out.tobytes()).hexdigest()
    return Corpus(train, held_out, vocab_size, decode, len(documents), digest)


def _name(data: str | None) -> str:
    return "the standard library" if data is None else f"--data {data}"


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yields the visible files below a folder, without entering the folders in `skip`."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skip]
        yield from (Path(folder, f) for f in files if not f.startswith("."))


def standard_library() -> list[tuple[str, str]]:
    """Names and texts of the Python sources that come with Python.

    Raises:
      InputError: if there are none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in _walk(root, _NOT_PROSE) if p.suffix == ".py"]
    files = [p for p in files if not p.name.startswith("_sysconfigdata")]
    if not files:
        raise InputError(f"no Python sources in {root}: name your own text with --data")
    return list(_read({p.relative_to(root).as_posix(): p for p in files}))


def _find(data: str) -> dict[str, Path]:
    """Maps names, which do not depend on where the text lies, to files."""
    root = Path(data).expanduser()
    if root.is_dir():
        paths = list(_walk(root))
    else:
        paths = [p for p in map(Path, glob.glob(str(root), recursive=True)) if p.is_file()]
    if not paths:
        raise InputError(f"--data {data}: no such file, or a folder or pattern without files")
    base = os.path.commonpath([p.parent for p in paths])
    return {p.relative_to(base).as_posix(): p for p in paths}


def _read(files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every file which is not empty and is UTF-8, in sorted order."""
    for name in sorted(files):
        try:
            text = files[name].read_bytes().decode()
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise InputError(f"cannot read {files[name]}: {error.strerror}") from None
        if text.strip():
            yield name, text


def _split(documents: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Holds out files by the hash of their names; of a single file, its end."""
    if len(documents) == 1:
        text = documents[0][1]
        cut = len(text) - round(HELD_OUT_FRACTION * len(text))
        return [text[:cut]], [text[cut:]]
    count = max(1, round(HELD_OUT_FRACTION * len(documents)))
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest())
    held_out = {name for name, _ in by_hash[:count]}
    return (
        [text for name, text in documents if name not in held_out],
        [text for name, text in documents if name in held_out],
    )


def _byte_codec() -> tuple[Callable, Callable, int]:
    """256 bytes."""

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")

    return encode, decode, 256


def _load_codec(path: str) -> tuple[Callable, Callable, int]:
    """A tokenizer's own vocabulary."""
    if not Path(path).is_file():
        raise InputError(f"--tokenizer {path}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"--tokenizer {path} is not a tokenizers JSON file: {error}") from None
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode([int(t) for t in tokens if t < vocab_size])

    return encode, decode, vocab_size


class _Windows:
    """A grain data source: window i of the tokens, one token longer than a sequence."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int32)


def training_batches(
    corpus: Corpus, settings: Settings, size: int | None = None
) -> grain.DatasetIterator:
    """Iterates without end over batches [size, sequence_length + 1] int32.

    Without a size they are of the first batch size. Every epoch sees every window once, in an order
    of its own which the seed fixes. The iterator's `get_state()` is a small dict; `set_state` goes
    on from there.
    """
    size = settings.first_batch_size if size is None else size
    windows = grain.MapDataset.source(_Windows(corpus.train, settings.sequence_length))
    # Without end, but for grain, whose count of single windows would overflow.
    batches = windows.seed(settings.seed).shuffle().repeat(2**32).batch(size)
    threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(batches.to_iter_dataset(threads))


def held_out_windows(corpus: Corpus, settings: Settings) -> np.ndarray:
    """Returns windows spread evenly over the held-out text, as many as full batches need.

    Their shape is [batches, batch, sequence_length + 1], int32, a batch being a micro-batch.
    """
    batch, length = settings.micro_batch_size, settings.sequence_length
    batches = -(-settings.eval_sequences // batch)
    starts = np.linspace(0, len(corpus.held_out) - length - 1, batches * batch).astype(int)
    windows = np.stack([corpus.held_out[s : s + length + 1] for s in starts])
    return windows.astype(np.int32).reshape(batches, batch, length + 1)
