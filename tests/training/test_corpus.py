"""Corpora: the splits of each named corpus, what is rejected, and tokens that are encoded only once."""

import lzma
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import training.corpus
from training.config import DataConfig, TokenizerConfig
from training.corpus import CorpusError, load_corpus, prepare
from training.sources import PUBLISHED

BYTES = TokenizerConfig()
BPE = TokenizerConfig(kind="bpe", vocab_size=270)
TEXT = "".join(f"the cat sat on the mat {number} times, the café was shut.\n" for number in range(60))


def data(folder: Path, **changes: Any) -> DataConfig:
    fields: dict[str, Any] = {"batch": 1, "block": 2, "cache_dir": folder / "cache"}
    return DataConfig.model_validate(fields | changes)


def text_file(folder: Path, content: str | bytes = TEXT, *, name: str = "story.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sparse_file(folder: Path, size: int) -> Path:
    """A file of `size` zero bytes that takes no space on the disk."""
    path = folder / "zeros"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def cached(folder: Path) -> dict[str, int]:
    """The files of the cache, each with its time of writing."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}


def test_shakespeare_ships_and_is_split_as_nanogpt_splits_it(tmp_path: Path) -> None:
    corpus = load_corpus(data(tmp_path, name="shakespeare"))
    assert (len(corpus.train), len(corpus.valid), corpus.test) == (1_003_854, 111_540, None)
    assert corpus.train.startswith(b"First Citizen:")
    assert corpus.train.isascii()  # so bytes equal characters, which nanoGPT counts


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_the_hundred_megabyte_corpora_are_split_90_5_5(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (member,) = PUBLISHED[name].members
    without_sum = replace(PUBLISHED[name], members=(replace(member, sha256=None),))
    monkeypatch.setitem(PUBLISHED, name, without_sum)
    corpus = load_corpus(data(tmp_path, name=name, path=sparse_file(tmp_path, 100_000_000)))
    assert corpus.test is not None
    assert (corpus.name, len(corpus.train)) == (name, 90_000_000)
    assert (len(corpus.valid), len(corpus.test)) == (5_000_000, 5_000_000)


@pytest.mark.parametrize("name", ["enwik8", "text8", "classics8"])
def test_a_named_corpus_of_another_size_is_refused_with_both_sizes(name: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=rf"zeros has 99999999 bytes; {name} has 100000000"):
        load_corpus(data(tmp_path, name=name, path=sparse_file(tmp_path, 99_999_999)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("classics8", "zeros is not classics8: a split has sha256 .* expected a6fc9fd3"),
        ("enwik8", "zeros is not enwik8: it has sha256 .* expected 2b49720e"),
        ("text8", "zeros is not text8: it has sha256 .* expected 6e890197"),
    ],
)
def test_the_hundred_megabyte_corpora_are_known_by_their_check_sums(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=message):
        load_corpus(data(tmp_path, name=name, path=sparse_file(tmp_path, 100_000_000)))


def test_classics8_asks_for_its_path(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'classics8' is nowhere on the web: give data\.path"):
        load_corpus(data(tmp_path, name="classics8"))


def test_a_folder_is_read_as_three_files(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        text_file(tmp_path, split, name=f"{split}.txt")
    corpus = load_corpus(data(tmp_path, path=tmp_path))
    assert (corpus.name, corpus.train, corpus.valid, corpus.test) == (tmp_path.name, b"train", b"valid", b"test")


def test_a_file_is_split_90_5_5_packed_or_not(tmp_path: Path) -> None:
    content = bytes(range(128)) * 10
    plain = load_corpus(data(tmp_path, path=text_file(tmp_path, content)))
    packed = load_corpus(data(tmp_path, path=text_file(tmp_path, lzma.compress(content), name="story.xz")))
    assert (plain.train, plain.valid, plain.test) == (content[:1152], content[1152:1216], content[1216:])
    assert packed == plain


@given(text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_no_split_of_a_text_cuts_a_character_and_none_is_lost(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    corpus = load_corpus(data(folder, path=text_file(folder, text)))
    assert corpus.test is not None
    assert "".join(part.decode() for part in (corpus.train, corpus.valid, corpus.test)) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give data.name .*shakespeare.* or data.path"),
        ({"name": "enwik9"}, "data.name = 'enwik9' is unknown; allowed: shakespeare, classics8, enwik8"),
        ({"path": "gone.txt"}, r"gone\.txt cannot be read: No such file"),
    ],
)
def test_a_corpus_that_is_nowhere_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=message):
        load_corpus(data(tmp_path, **fields))


def test_an_empty_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"story\.txt is empty"):
        load_corpus(data(tmp_path, path=text_file(tmp_path, "")))
    half = lzma.compress(TEXT.encode())[:-20]
    with pytest.raises(CorpusError, match=r"half\.xz is not a whole xz file"):
        load_corpus(data(tmp_path, path=text_file(tmp_path, half, name="half.xz")))


def test_byte_tokens_are_the_bytes_of_any_file(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    dataset = prepare(data(tmp_path, path=text_file(tmp_path, content)), BYTES)
    assert dataset.test is not None
    assert np.concatenate([dataset.train, dataset.valid, dataset.test]).tobytes() == content
    assert dataset.nats_per_bit(dataset.train) == pytest.approx(math.log(2))
    assert not (tmp_path / "cache").exists()


def test_bpe_tokens_decode_to_the_splits(tmp_path: Path) -> None:
    config = data(tmp_path, path=text_file(tmp_path))
    corpus, dataset = load_corpus(config), prepare(config, BPE)
    assert dataset.test is not None and corpus.test is not None  # noqa: PT018 - for the type checker
    assert dataset.tokenizer.vocab_size == 270
    for part, tokens in ((corpus.train, dataset.train), (corpus.valid, dataset.valid), (corpus.test, dataset.test)):
        assert dataset.tokenizer.decode(tokens.tolist()).encode() == part
        assert dataset.nats_per_bit(tokens) == pytest.approx(len(part) / len(tokens) * math.log(2))


def test_word_tokens_cover_the_whole_training_split(tmp_path: Path) -> None:
    lines = "".join(f"word{index} again \n" for index in range(100))
    for split in ("train", "valid", "test"):
        text_file(tmp_path, lines, name=f"{split}.txt")
    dataset = prepare(data(tmp_path, path=tmp_path), TokenizerConfig(kind="word"))
    assert dataset.tokenizer.vocab_size == 103  # with "again", the line end and "<unk>"
    assert dataset.tokenizer.decode(dataset.train.tolist()).split() == lines.split()


def test_what_was_learned_and_encoded_once_is_read_the_second_time(tmp_path: Path) -> None:
    config = data(tmp_path, path=text_file(tmp_path))
    first = prepare(config, BPE)
    written = cached(tmp_path)
    second = prepare(config, BPE)
    assert cached(tmp_path) == written
    assert len(written) == 4  # the tokenizer and three splits; nothing half-written
    assert all(name.endswith((".tokenizer.json", ".npy")) for name in written)
    assert np.array_equal(first.train, second.train)


def test_another_text_or_tokenizer_is_encoded_anew(tmp_path: Path) -> None:
    prepare(data(tmp_path, path=text_file(tmp_path)), BPE)
    changed = data(tmp_path, path=text_file(tmp_path, TEXT.replace("cat", "dog")))
    dataset = prepare(changed, BPE)
    assert b"dog" in load_corpus(changed).train
    assert "dog" in dataset.tokenizer.decode(dataset.train.tolist())
    smaller = prepare(changed, TokenizerConfig(kind="bpe", vocab_size=260))
    assert (dataset.tokenizer.vocab_size, smaller.tokenizer.vocab_size) == (270, 260)
    assert len(smaller.train) > len(dataset.train)


@pytest.mark.parametrize("size", [600, 601, 602])
def test_a_tokenizer_can_be_learned_from_a_sample_that_ends_inside_a_character(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.corpus, "TOKENIZER_SAMPLE", size)
    text = "ab cde" * 100 + "é " * 900  # the first é is the bytes 600 and 601
    dataset = prepare(data(tmp_path, path=text_file(tmp_path, text)), TokenizerConfig(kind="bpe", vocab_size=257))
    assert dataset.tokenizer.vocab_size == 257


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_text_that_is_not_utf8_is_refused_by_tokenizers_of_text(kind: str, tmp_path: Path) -> None:
    config = data(tmp_path, path=text_file(tmp_path, b"ab cd \n" * 10 + b"\xff" + b"ab cd \n" * 90))
    tokenizer = TokenizerConfig.model_validate({"kind": kind, "vocab_size": 257 if kind == "bpe" else None})
    with pytest.raises(CorpusError, match=r"byte 70 is not UTF-8; tokenizer\.kind = 'bytes' reads any file"):
        prepare(config, tokenizer)


@pytest.mark.parametrize(("size", "message"), [(100, "100 must be at least 256"), (9999, "9999 is too large")])
def test_a_vocabulary_that_cannot_be_learned_is_refused(size: int, message: str, tmp_path: Path) -> None:
    config = data(tmp_path, path=text_file(tmp_path))
    with pytest.raises(CorpusError, match=rf"tokenizer\.kind = 'bpe' on story: vocab_size {message}"):
        prepare(config, TokenizerConfig(kind="bpe", vocab_size=size))


def test_a_split_too_short_to_be_evaluated_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = text_file(tmp_path, b"x" * 400)
    prepare(data(tmp_path, path=path, block=10), BYTES)
    with pytest.raises(CorpusError, match=r"valid split of story has 20 tokens; at least 22 .* data\.block = 11"):
        prepare(data(tmp_path, path=path, block=11), BYTES)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    with pytest.raises(CorpusError, match=r"cannot be written: Not a directory; set data\.cache_dir"):
        prepare(data(tmp_path, path=path, cache_dir=path / "cache"), BPE)
