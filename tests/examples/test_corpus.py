"""Text on disk becomes the same tokens and the same batches every time."""

from pathlib import Path

from _corpus import held_out_windows, load_corpus, training_batches
from _settings import InputError, Settings
import numpy as np
import pytest
import tokenizers

SETTINGS = Settings(batch_size=4, sequence_length=16, eval_sequences=6)


def test_bytes_and_separators_give_back_the_text(text: Path) -> None:
    corpus = load_corpus(str(text), None, 16)
    both = np.concatenate([corpus.train, corpus.held_out])
    assert corpus.vocab_size == 257
    assert both.max() == 256
    assert (both == 256).sum() == 4
    assert corpus.files == 4  # the fifth is not text
    decoded = corpus.decode(both)
    for path in text.rglob("*.txt"):
        assert path.read_text() in decoded


def test_splits_share_no_file(text: Path) -> None:
    corpus = load_corpus(str(text), None, 16)
    held_out = [p for p in text.rglob("*.txt") if p.read_text() in corpus.decode(corpus.held_out)]
    train = [p for p in text.rglob("*.txt") if p.read_text() in corpus.decode(corpus.train)]
    assert len(held_out) == 1
    assert len(train) == 3
    assert not set(held_out) & set(train)


def test_split_does_not_depend_on_where_the_text_lies(text: Path, tmp_path: Path) -> None:
    for path in text.rglob("*.txt"):
        copy = tmp_path / "elsewhere" / path.relative_to(text)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    there = load_corpus(str(tmp_path / "elsewhere"), None, 16)
    assert there.fingerprint == load_corpus(str(text), None, 16).fingerprint


def test_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "only.txt"
    path.write_text("a" * 1900 + "b" * 100)
    corpus = load_corpus(str(path), None, 16)
    assert corpus.decode(corpus.train) == "a" * 1900
    assert corpus.decode(corpus.held_out) == "b" * 100


def test_glob_takes_the_files_it_names(text: Path) -> None:
    assert load_corpus(str(text / "*.txt"), None, 16).files == 3
    assert load_corpus(str(text / "**" / "*.txt"), None, 16).files == 4


def test_default_text_is_the_standard_library_without_its_tests() -> None:
    corpus = load_corpus(None, None, 256)
    assert corpus.files > 300
    assert len(corpus.train) > 5e6
    share = len(corpus.held_out) / len(corpus.train)
    assert 0.01 < share < 0.1


def test_tokenizer_file_is_used_and_reversed(text: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=64, show_progress=False)
    tokenizer.train([str(p) for p in text.rglob("*.txt")], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = load_corpus(str(text), str(tmp_path / "tokenizer.json"), 16)
    assert corpus.vocab_size == 65
    assert (corpus.held_out == 64).sum() == 1
    as_bytes = load_corpus(str(text), None, 16)
    assert corpus.decode(corpus.held_out.tolist()) == as_bytes.decode(as_bytes.held_out)
    assert len(corpus.held_out) < len(as_bytes.held_out) / 2


def test_epoch_holds_every_window_once_and_the_next_has_another_order(text: Path) -> None:
    corpus = load_corpus(str(text), None, 16)
    windows = (len(corpus.train) - 1) // 16
    batches = training_batches(corpus, SETTINGS)
    seen = np.concatenate([next(batches) for _ in range(-(-2 * windows // 4))])[: 2 * windows]
    expected = np.stack([corpus.train[16 * i : 16 * i + 17] for i in range(windows)])
    first, second = seen[:windows], seen[windows:]
    assert sorted(map(bytes, first)) == sorted(map(bytes, expected.astype(np.int32)))
    assert sorted(map(bytes, second)) == sorted(map(bytes, first))
    assert not np.array_equal(first, second)


def test_batches_depend_on_the_seed_alone_and_go_on_from_a_saved_position(text: Path) -> None:
    corpus = load_corpus(str(text), None, 16)
    batches = training_batches(corpus, SETTINGS)
    expected = [next(batches) for _ in range(9)]
    again = training_batches(corpus, SETTINGS)
    for batch in expected[:4]:
        np.testing.assert_array_equal(next(again), batch)
    later = training_batches(corpus, SETTINGS)
    later.set_state(again.get_state())
    for batch in expected[4:]:
        np.testing.assert_array_equal(next(later), batch)
    other = next(training_batches(corpus, Settings(**vars(SETTINGS) | {"seed": 1})))
    assert not np.array_equal(other, expected[0])


def test_single_windows_come_in_the_same_order(text: Path) -> None:
    corpus = load_corpus(str(text), None, SETTINGS.sequence_length)
    batches, single = training_batches(corpus, SETTINGS), training_batches(corpus, SETTINGS, 1)
    for _ in range(40):  # some epochs
        rows = [next(single) for _ in range(SETTINGS.batch_size)]
        np.testing.assert_array_equal(next(batches), np.concatenate(rows))


def test_held_out_windows_fill_whole_batches(text: Path) -> None:
    corpus = load_corpus(str(text), None, 16)
    windows = held_out_windows(corpus, SETTINGS)
    assert windows.shape == (2, 4, 17)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows[0, 0], corpus.held_out[:17])
    np.testing.assert_array_equal(windows[-1, -1], corpus.held_out[-17:])


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00"])
def test_file_without_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match="holds no text"):
        load_corpus(str(tmp_path), None, 16)
