"""Byte, byte-level BPE and word tokenizers: encoding, decoding (also token by token), and training.

Owns tokenizer.json, which is a valid file of the `tokenizers` library for all three kinds (bytes are a BPE without
merges whose ids are the byte values), so other programs read the same ids. Knows no torch and no model.
"""

import codecs
import contextlib
import json
import re
from abc import ABC
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

BPE_EOS = "<|endoftext|>"
LINE_END = "\n"  # the entry of a word vocabulary that other code calls <eos>
UNKNOWN = "<unk>"

_PIECE_CHARS = 1 << 16
_PIECES_PER_BATCH = 64
_CUT = re.compile(r"(?<=\S)[ \n]")
_WORD = r"\n|[^\s\x1c-\x1f]+"  # the line end, and the words of str.split(), which also splits at \x1c..\x1f


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: for each printable character the byte that it stands for, sorted by byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    same = [letter for letter in letters if ord(letter) < 256]  # letters that stand for the byte of their own code
    missing = sorted(set(range(256)) - set(map(ord, same)))
    table = {letter: ord(letter) for letter in same} | dict(zip(letters[len(same) :], missing, strict=True))
    return dict(sorted(table.items(), key=lambda item: item[1]))


_BYTE_OF = _byte_alphabet()


class TokenizerError(ValueError):
    """An unusable tokenizer file, id or text; the message names it and says what is allowed."""


class Tokenizer(ABC):
    """A tokenizer with the ids 0 to vocab_size - 1. `eos_id` is the id that ends a text, or None if there is none."""

    kind: ClassVar[Literal["bytes", "bpe", "word"]]

    def __init__(self, library: Library, *, token_bytes: Sequence[bytes], eos_id: int | None) -> None:
        self._library = library
        self._token_bytes = tuple(token_bytes)
        self.vocab_size = len(self._token_bytes)
        self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. No end id is added, and no text encodes to BPE's end id.

        Raises:
            TokenizerError: `text` holds a lone surrogate, which has no UTF-8 form.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            _utf8(text)
        return [encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is outside 0 .. vocab_size - 1.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes of an id; empty for BPE's end id. Raises TokenizerError as `decode` does."""
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is out of range: this tokenizer has ids 0 to {self.vocab_size - 1}")
        return self._token_bytes[id]

    def token_text(self, id: int) -> str:
        """The text of a single id, for display: a part of a character shows as U+FFFD."""
        return self.decode([id])

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json at `path`; `load_tokenizer` gives back an equal tokenizer."""
        Path(path).write_text(self._library.to_str(pretty=True), encoding="utf-8")


class BytesTokenizer(Tokenizer):
    """A tokenizer whose ids are the bytes of the text in UTF-8; it has no end id. Round-trips every text."""

    kind = "bytes"

    def __init__(self) -> None:
        library = _byte_level(_BYTE_OF, merges=[], use_regex=False)
        super().__init__(library, token_bytes=[bytes([value]) for value in range(256)], eos_id=None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The UTF-8 bytes of each text."""
        return [list(_utf8(text)) for text in texts]


class BpeTokenizer(Tokenizer):
    """A byte-level BPE tokenizer with GPT-2's word splitting. Round-trips every text.

    The end id, if there is one, is a vocabulary entry that no merge leads to, so no text ever encodes to it.
    """

    kind = "bpe"

    def __init__(self, vocab: dict[str, int], *, merges: Sequence[tuple[str, str]]) -> None:
        tokens = _in_id_order(vocab)
        missing = _BYTE_OF.keys() - vocab.keys()
        if missing:
            raise TokenizerError(f"a byte-level vocabulary needs all 256 bytes; it lacks {len(missing)} of them")
        library = _byte_level(vocab, merges=merges, use_regex=True)
        super().__init__(library, token_bytes=list(map(_bpe_bytes, tokens)), eos_id=vocab.get(BPE_EOS))


class WordTokenizer(Tokenizer):
    r"""A tokenizer of words between whitespace, as in WikiText-103 and the paper; `eos_id` is the line end.

    A word decodes to itself and one space, a line end to "\n". So ids -> text -> ids gives the same ids, but text ->
    ids -> text turns unknown words into "<unk>" and puts exactly one space after each word. Other code appends <eos>
    to every line of a file; here each "\n" is an <eos>, so a last line without "\n" has no <eos>.
    """

    kind = "word"

    def __init__(self, vocab: dict[str, int]) -> None:
        words = _in_id_order(vocab)
        for needed in (LINE_END, UNKNOWN):
            if needed not in vocab:
                raise TokenizerError(f"a word vocabulary needs the entry {needed!r}")
        library = Library(models.WordLevel(vocab, unk_token=UNKNOWN))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
        spellings = [word.encode() if word == LINE_END else word.encode() + b" " for word in words]
        super().__init__(library, token_bytes=spellings, eos_id=vocab[LINE_END])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote at `path`.

    Raises:
        TokenizerError: the file is missing, is not a tokenizer file, or has the rules of none of the three kinds.
    """
    try:
        library = Library.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself for every error in a file
        raise TokenizerError(f"{path} is not a readable tokenizer file ({error}); copy it again") from error
    rules = json.loads(library.to_str())
    try:
        tokenizer = _of_model(rules["model"])
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    # Both sides are written by this version of the library, so a file from another version compares by its meaning.
    ours = json.loads(tokenizer._library.to_str())
    if foreign := [key for key in rules if rules[key] != ours[key]]:
        raise TokenizerError(
            f"{path}: {', '.join(foreign)} are not as a {tokenizer.kind} tokenizer of allattn has them"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], *, vocab_size: int, eos: bool = False) -> BpeTokenizer:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` ids: 256 bytes, merges, and the end id if `eos`.

    Deterministic.


    Raises:
        TokenizerError: `vocab_size` is too small for the 256 bytes, or larger than the texts have merges for.
    """
    num_learned = vocab_size - eos
    if num_learned < 256:
        raise TokenizerError(f"vocab_size {vocab_size} must be at least {256 + eos}: every byte needs an id")
    library = _byte_level({}, merges=[], use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=num_learned, initial_alphabet=list(_BYTE_OF), show_progress=False)
    library.train_from_iterator((piece for text in texts for piece in split_text(text)), trainer)
    model = json.loads(library.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    if len(vocab) < num_learned:
        raise TokenizerError(f"vocab_size {vocab_size} is too large: the texts give {len(vocab) + eos} tokens at most")
    if eos:
        vocab[BPE_EOS] = len(vocab)
    return BpeTokenizer(vocab, merges=_pairs(model["merges"]))


def train_words(texts: Iterable[str], *, vocab_size: int | None = None) -> WordTokenizer:
    """Train a word tokenizer: the `vocab_size` most frequent words of `texts`, most frequent first.

    None keeps all words. Words of equal count are sorted by spelling. The line end counts as a word, and "<unk>" counts
    all dropped words. No text may begin or end inside a word.

    Raises:
        TokenizerError: `vocab_size` is below 2 or above the number of words.
    """
    counts: Counter[str] = Counter({LINE_END: 0, UNKNOWN: 0})
    for text in texts:
        for piece in split_text(text):
            counts.update(piece.split())
            counts[LINE_END] += piece.count(LINE_END)
    size = len(counts) if vocab_size is None else vocab_size
    if not 2 <= size <= len(counts):
        raise TokenizerError(f"vocab_size {size} must be between 2 and {len(counts)}, the number of words in the texts")

    def rank(word: str) -> tuple[int, str]:
        return -counts[word], word

    ranked = sorted(counts.keys() - {LINE_END, UNKNOWN}, key=rank)
    kept, cut = ranked[: size - 2], ranked[size - 2 :]
    counts[UNKNOWN] += sum(counts[word] for word in cut)
    return WordTokenizer({word: id for id, word in enumerate(sorted([*kept, LINE_END, UNKNOWN], key=rank))})


def split_text(text: str, *, size: int = _PIECE_CHARS) -> Iterator[str]:
    """Cut `text` into pieces of at least `size` characters (the last may be shorter) that encode as within `text`.

    A cut comes before a space or a newline that follows a non-space. No token of any kind spans a cut: in GPT-2's
    pattern only the first character of a run may be a space, and a run of spaces does not end after a non-space.
    """
    assert size >= 1
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def encode_corpus(
    tokenizer: Tokenizer, text: str, *, progress: Callable[[int], object] | None = None
) -> NDArray[np.uint16] | NDArray[np.int32]:
    """The ids of a text of any size, [number of tokens], encoded on all cores in little memory.

    The dtype is uint16 if every id fits, else int32. `progress` is called with the number of characters encoded since
    its last call, as the `update` method of a tqdm bar expects.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    parts = [np.empty(0, dtype)]
    remaining = split_text(text)
    while pieces := list(islice(remaining, _PIECES_PER_BATCH)):
        parts += [np.array(ids, dtype) for ids in tokenizer.encode_batch(pieces)]
        if progress:
            progress(sum(map(len, pieces)))
    return np.concatenate(parts)


class StreamingDecoder:
    """A decoder of one sequence, id by id; the pieces joined equal `tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """The text that this id completes; "" while a character is incomplete.

        Raises:
            TokenizerError: the id is out of range; the decoder is unchanged.
        """
        data = self._tokenizer.token_bytes(id)
        if not self._decoder.buffer:  # no character is pending: the fast path, as most tokens are whole characters
            with contextlib.suppress(UnicodeDecodeError):
                return data.decode()
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD if a character was never completed, else ""; resets the decoder."""
        return self._decoder.decode(b"", final=True)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise TokenizerError(
            f"the text has the lone surrogate U+{code:04X} at character {error.start}, which has no UTF-8 form"
        ) from error


def _byte_level(vocab: dict[str, int], *, merges: Sequence[tuple[str, str]], use_regex: bool) -> Library:
    library = Library(models.BPE(vocab, list(merges)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    library.decoder = decoders.ByteLevel()
    return library


def _bpe_bytes(token: str) -> bytes:
    if token == BPE_EOS:
        return b""
    try:
        return bytes(_BYTE_OF[letter] for letter in token)
    except KeyError as error:
        raise TokenizerError(f"the vocabulary entry {token!r} is not written in the byte alphabet") from error


def _in_id_order(vocab: dict[str, int]) -> list[str]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(vocab))):
        raise TokenizerError(f"the {len(vocab)} vocabulary entries must have the ids 0 to {len(vocab) - 1}, each once")
    return tokens


def _pairs(merges: list[list[str]]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in merges]


def _of_model(model: dict[str, Any]) -> Tokenizer:
    if model["type"] == "WordLevel":
        return WordTokenizer(model["vocab"])
    if model["type"] != "BPE":
        raise TokenizerError(
            f"model type {model['type']!r} is not supported; known are 'BPE' (byte-level) and 'WordLevel'"
        )
    if model["vocab"] == _BYTE_OF and not model["merges"]:
        return BytesTokenizer()
    return BpeTokenizer(model["vocab"], merges=_pairs(model["merges"]))
