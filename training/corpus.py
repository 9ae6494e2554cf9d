"""Corpora: the splits of each corpus, and their tokens, which are encoded once and cached.

A split is bytes until a tokenizer encodes it. Knows no batches.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.tokenizer import (
    BytesTokenizer,
    Tokenizer,
    TokenizerError,
    encode_corpus,
    load_tokenizer,
    train_bpe,
    train_words,
)
from training.config import DataConfig, TokenizerConfig
from training.sources import CorpusError, read_file, read_published

__all__ = ["SHAKESPEARE", "Corpus", "CorpusError", "Dataset", "load_corpus", "prepare"]

SHAKESPEARE = Path(__file__).parent / "corpora" / "shakespeare.txt"
CLASSICS8_SHA256 = (
    "a6fc9fd30dc2bc0a4bb399a999df3bc2a5205491d4f6743f3864a52363048639",
    "6c9bec257a1101acb75fe28563423066b5734dd6b8a8fa6f6cd1e7296cfffac5",
    "432be13988668513cfedf725ebee0e5c8aafe81c3a25468a2039b1bcb81a8fcd",
)
HUNDRED_MEGABYTES = 100_000_000
_AT_ONCE = 1 << 20  # tokens whose bytes are counted at once
TOKENIZER_SAMPLE = 20_000_000  # bytes of the training split to train BPE on; more bytes change few merges


@dataclass(frozen=True)
class Corpus:
    """A corpus: the bytes of its splits."""

    name: str
    train: bytes
    valid: bytes
    test: bytes | None  # None if the corpus has no test split


@dataclass(frozen=True)
class Dataset:
    """A corpus encoded by a tokenizer."""

    name: str
    tokenizer: Tokenizer
    train: np.ndarray  # [n] integers
    valid: np.ndarray
    test: np.ndarray | None

    def nats_per_bit(self, tokens: np.ndarray) -> float:
        """The loss in nats per token that equals one bit per byte, for the text of `tokens` [n]."""
        sizes = np.array([len(self.tokenizer.token_bytes(id)) for id in range(self.tokenizer.vocab_size)])
        starts = range(0, len(tokens), _AT_ONCE)
        num_bytes = sum(int(sizes[tokens[start : start + _AT_ONCE]].sum()) for start in starts)
        return num_bytes / len(tokens) * math.log(2)


def load_corpus(config: DataConfig) -> Corpus:
    """Read a corpus by name, or from a path: a folder of train/valid/test.txt, or one file that is split 90/5/5.

    Raises:
        CorpusError: the name is unknown, a file is missing, a download fails, or the content is not the named corpus.
    """
    if config.name:
        if config.name not in _BY_NAME:
            raise CorpusError(
                f"data.name = {config.name!r} is unknown; allowed: {', '.join(_BY_NAME)}, or a data.path alone"
            )
        return _BY_NAME[config.name](config)
    if config.path is None:
        raise CorpusError(f"give data.name (one of {', '.join(_BY_NAME)}) or data.path (a text file or a folder)")
    return _from_path(config.path)


def prepare(data: DataConfig, tokenizer: TokenizerConfig) -> Dataset:
    """Load a corpus, train its tokenizer if the kind needs training, and encode it; both are cached on disk.

    Raises:
        CorpusError: see `load_corpus`; also if a split cannot be encoded or is too short for evaluation, if the
            tokenizer cannot be trained on the text, or if the cache cannot be written.
    """
    corpus = load_corpus(data)
    learned = _tokenizer(corpus, tokenizer, data.cache_dir)
    dataset = Dataset(
        name=corpus.name,
        tokenizer=learned,
        train=_encode(corpus.train, learned, data.cache_dir),
        valid=_encode(corpus.valid, learned, data.cache_dir),
        test=None if corpus.test is None else _encode(corpus.test, learned, data.cache_dir),
    )
    for split, tokens in (("valid", dataset.valid), ("test", dataset.test)):
        if tokens is not None and len(tokens) < 2 * data.block:
            raise CorpusError(
                f"the {split} split of {corpus.name} has {len(tokens)} tokens; at least {2 * data.block} are needed, "
                f"two blocks of data.block = {data.block}"
            )
    return dataset


def _shakespeare(config: DataConfig) -> Corpus:
    """The text of nanoGPT's shakespeare_char with its splits: the first 90 % are train, the rest is valid, no test."""
    text = read_file(config.path or SHAKESPEARE)
    cut = int(len(text) * 0.9)
    return Corpus("shakespeare", text[:cut], text[cut:], None)


def _classics8(config: DataConfig) -> Corpus:
    """100 MB of public-domain books: 90/5/5 million bytes; no book is in two splits."""
    if config.path is None:
        raise CorpusError("data.name = 'classics8' is nowhere on the web: give data.path, a local copy")
    text = read_file(config.path)
    if len(text) != HUNDRED_MEGABYTES:
        raise CorpusError(f"{config.path} has {len(text)} bytes; classics8 has {HUNDRED_MEGABYTES}")
    corpus = _cut("classics8", text)
    for part, expected in zip((corpus.train, corpus.valid, corpus.test), CLASSICS8_SHA256, strict=True):
        assert part is not None
        found = hashlib.sha256(part).hexdigest()
        if found != expected:
            raise CorpusError(f"{config.path} is not classics8: a split has sha256 {found}, expected {expected}")
    return corpus


def _one_text(config: DataConfig) -> Corpus:
    """enwik8 and text8: 100,000,000 bytes, of which 90, 5 and 5 million are train, valid and test."""
    (text,) = read_published(config)
    return _cut(config.name, text)


def _own_splits(config: DataConfig) -> Corpus:
    """WikiText-103: the three files as published."""
    train, valid, test = read_published(config)
    return Corpus(config.name, train, valid, test)


def _cut(name: str, text: bytes) -> Corpus:
    """Split a text at 90 % and 95 % of its bytes."""
    cuts = len(text) * 90 // 100, len(text) * 95 // 100
    return Corpus(name, text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :])


_BY_NAME: dict[str, Callable[[DataConfig], Corpus]] = {
    "shakespeare": _shakespeare,
    "classics8": _classics8,
    "enwik8": _one_text,
    "text8": _one_text,
    "wikitext103": _own_splits,
}


def _from_path(path: Path) -> Corpus:
    if path.is_dir():
        return Corpus(path.name, *(read_file(path / name) for name in ("train.txt", "valid.txt", "test.txt")))
    text = read_file(path)
    cuts = [_character_start(text, len(text) * share // 100) for share in (90, 95)]
    return Corpus(path.stem, text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :])


def _character_start(text: bytes, index: int) -> int:
    """The first index at or after `index` that does not cut a UTF-8 character."""
    while index < len(text) and text[index] & 0xC0 == 0x80:
        index += 1
    return index


def _tokenizer(corpus: Corpus, config: TokenizerConfig, cache: Path) -> Tokenizer:
    if config.kind == "bytes":
        return BytesTokenizer()
    size = len(corpus.train) if config.kind == "word" else TOKENIZER_SAMPLE
    sample = corpus.train[: _character_start(corpus.train, size)]
    path = cache / f"{_key(sample, config.model_dump_json().encode())}.tokenizer.json"
    try:
        if not path.exists():
            _write_atomically(path, _learn(_decode(sample), config).save)
        return load_tokenizer(path)
    except TokenizerError as error:
        raise CorpusError(f"tokenizer.kind = {config.kind!r} on {corpus.name}: {error}") from error


def _learn(text: str, config: TokenizerConfig) -> Tokenizer:
    if config.kind == "word":
        return train_words([text], vocab_size=config.vocab_size)
    assert config.vocab_size is not None, "TokenizerConfig requires it for bpe"
    return train_bpe([text], vocab_size=config.vocab_size)


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"byte {error.start} is not UTF-8; tokenizer.kind = 'bytes' reads any file") from error


def _encode(text: bytes, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    if isinstance(tokenizer, BytesTokenizer):
        return np.frombuffer(text, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        description = (Path(folder) / "tokenizer.json").read_bytes()
    path = cache / f"{_key(text, description)}.npy"
    if not path.exists():
        decoded = _decode(text)
        with tqdm(total=len(decoded), desc="encode", unit="char", unit_scale=True) as bar:
            tokens = encode_corpus(tokenizer, decoded, progress=bar.update)

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, tokens)

        _write_atomically(path, save)
    encoded: np.ndarray = np.load(path, mmap_mode="r")
    return encoded


def _key(text: bytes, description: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(text).digest() + description).hexdigest()[:24]


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be written: {error.strerror}; set data.cache_dir to another folder"
        ) from error
