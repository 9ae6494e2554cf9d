"""The vocabulary of a checkpoint of the paper's code: rebuilt from its train.txt and mapped to our tokenizers' ids.

The paper's code (data.py) splits every line at whitespace and ends it with <eos>. Ids are in order of first appearance;
with adaptive embeddings they are in order of descending count, and of tokens with equal counts the token that appears
last comes first. The train.txt of enwik8 has byte values as decimal numbers and the line ends of the original (so <eos>
is byte 10). The train.txt of text8 has letters, with _ for the space, in a single line (so <eos> occurs once). Knows no
checkpoint.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from model.tokenizer import LINE_END, BytesTokenizer, Tokenizer, TokenizerError, WordTokenizer

Symbols = Literal["bytes", "letters", "words"]
SYMBOLS: tuple[Symbols, ...] = get_args(Symbols)

EOS = "<eos>"
# The output bias of a byte that is not a symbol of the checkpoint. Other scores are of the order of 10, so in fp32 the
# probability of the byte is exactly 0 and the other probabilities do not change. The bias is finite in fp16 too.
NEVER = -1e4
_NUMBER = re.compile(r"0|[1-9][0-9]{0,2}", re.ASCII)


class VocabularyError(ValueError):
    """A text that cannot be the train.txt of a checkpoint; the message says what is allowed."""


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a checkpoint, and our tokenizer and ids for them."""

    tokenizer: Tokenizer
    ids: tuple[int | None, ...]  # our id for each official id; None for a symbol without an id of ours
    symbols: Symbols
    eos: str  # what <eos> became, as the predicate of a sentence


def byte_values() -> Vocabulary:
    """The vocabulary of a checkpoint whose ids are byte values."""
    return Vocabulary(BytesTokenizer(), tuple(range(256)), "bytes", "is not a symbol")


def read_vocabulary(path: Path, *, symbols: Symbols | None, by_count: bool) -> Vocabulary:
    """The vocabulary that the paper's code builds from its train.txt.

    Args:
        symbols: the kind of tokens in the text; None infers it from the text.
        by_count: whether ids are in order of descending count, as with adaptive embeddings.

    Raises:
        VocabularyError: the text cannot be read, is empty, or its tokens are not `symbols`.
    """
    counts = count_tokens(path)
    if not counts:
        raise VocabularyError(f"{path} is empty; it must be the train.txt that the model was trained on")
    tokens = list(counts)
    if by_count:
        tokens.reverse()
        tokens.sort(key=counts.__getitem__, reverse=True)  # stable: tokens of equal count keep their order
    kind = symbols or _kind(counts)
    try:
        return _words(tokens) if kind == "words" else _bytes(tokens, kind)
    except (VocabularyError, TokenizerError) as error:
        raise VocabularyError(f"{path}, read as {kind}: {error}; --symbols says what its tokens are") from error


def count_tokens(path: Path, *, piece_chars: int = 1 << 20) -> Counter[str]:
    """The counts of the tokens of a text, in order of first appearance; every line ends with <eos>, also the last line.

    Args:
        piece_chars: number of characters of a long line to read at once.

    Raises:
        VocabularyError: the text cannot be read or is not UTF-8.
    """
    counts: Counter[str] = Counter()
    cut = ""  # the beginning of a token, at the end of a piece of a long line
    inside_line = False
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.readline(piece_chars):
                inside_line = not piece.endswith("\n")
                whole, _, rest = (cut + piece).rpartition(" " if inside_line else "\n")
                counts.update(whole.split())
                cut = rest
                counts.update([] if inside_line else [EOS])
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path} is not UTF-8 text: {error}") from error
    counts.update(cut.split())
    counts.update([EOS] if inside_line else [])
    return counts


def place_symbols(tensors: dict[str, Tensor], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The weights with the rows of the plain embedding and output layer in the order of our ids.

    An id without a symbol of the checkpoint gets zero rows and the bias `NEVER`. A symbol without an id is dropped;
    that does not change the ratios of the other probabilities.
    """
    kept = [id for id in vocabulary.ids if id is not None]
    rows = [row for row, id in enumerate(vocabulary.ids) if id is not None]
    filling = {"embedding.weight": 0.0, "output.weight": 0.0, "output.bias": NEVER}
    placed = dict(tensors)
    for name, fill in filling.items():
        table = tensors[name]
        placed[name] = table.new_full((vocabulary.tokenizer.vocab_size, *table.shape[1:]), fill)
        placed[name][torch.tensor(kept)] = table[torch.tensor(rows)]
    return placed


def _kind(tokens: Iterable[str]) -> Symbols:
    others = [token for token in tokens if token != EOS]
    if all(_is_byte(token) for token in others):
        return "bytes"
    return "letters" if all(len(token) == 1 and token.isascii() for token in others) else "words"


def _words(tokens: list[str]) -> Vocabulary:
    words = {LINE_END if token == EOS else token: id for id, token in enumerate(tokens)}
    return Vocabulary(WordTokenizer(words), tuple(range(len(tokens))), "words", "is the line end")


def _bytes(tokens: list[str], kind: Symbols) -> Vocabulary:
    byte_of = {token: _byte(token, kind) for token in tokens if token != EOS}
    newline = ord(LINE_END)
    dropped = newline in byte_of.values()
    eos = None if dropped else newline
    ids = tuple(eos if token == EOS else byte_of[token] for token in tokens)
    eos_text = "was dropped, as the line end is another symbol" if dropped else "is the line end, byte 10"
    return Vocabulary(BytesTokenizer(), ids, kind, eos_text)


def _byte(token: str, kind: Symbols) -> int:
    if kind == "bytes" and _is_byte(token):
        return int(token)
    if kind == "letters" and len(token) == 1 and token.isascii():
        return ord(" ") if token == "_" else ord(token)
    allowed = "a decimal number from 0 to 255" if kind == "bytes" else "a single ASCII character (_ for the space)"
    raise VocabularyError(f"token {token[:40]!r} is not {allowed}")


def _is_byte(token: str) -> bool:
    return _NUMBER.fullmatch(token) is not None and int(token) < 256
