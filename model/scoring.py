"""Perplexity and bits per unit from a log-probability: the one definition for training, evaluation and the server.

Each figure is a sum of nats divided by a sum of units; only scored tokens count. Knows no torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character


class TokenBytes(Protocol):
    """The part of a tokenizer that counting bytes, characters and words needs."""

    def token_bytes(self, token: int, /) -> bytes:
        """The bytes that a token stands for."""
        ...


@dataclass(frozen=True)
class TextFigures:
    """Log-probability of a text and its size in every unit."""

    logprob: float  # nats, summed over the scored tokens
    num_tokens: int
    num_bytes: int
    num_chars: int
    num_words: int  # runs of characters without whitespace

    @classmethod
    def of(cls, tokenizer: TokenBytes, tokens: Iterable[int], logprobs: Sequence[float]) -> Self:
        """The score of `tokens`, which must be exactly the tokens that have a log-probability."""
        return cls.of_text(b"".join(map(tokenizer.token_bytes, tokens)), logprobs)

    @classmethod
    def of_text(cls, text: bytes, logprobs: Sequence[float]) -> Self:
        """The score of the tokens whose bytes together are `text`, from the log-probability of each."""
        return cls(
            logprob=math.fsum(logprobs),
            num_tokens=len(logprobs),
            num_bytes=len(text),
            num_chars=len(text.translate(None, _CONTINUATION)),
            num_words=len(text.split()),
        )

    @property
    def perplexity(self) -> float | None:
        """exp of nats per token; like all figures below, None if the text has none of the unit."""
        return _exp(self._per(self.num_tokens))

    @property
    def word_perplexity(self) -> float | None:
        """exp of nats per word."""
        return _exp(self._per(self.num_words))

    @property
    def bits_per_token(self) -> float | None:
        """Bits per token."""
        return _bits(self._per(self.num_tokens))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of UTF-8."""
        return _bits(self._per(self.num_bytes))

    @property
    def bits_per_char(self) -> float | None:
        """Bits per Unicode character."""
        return _bits(self._per(self.num_chars))

    def _per(self, units: int) -> float | None:
        return -self.logprob / units if units else None


class RunningFigures:
    """The running figures of a text that comes in pieces, in constant memory.

    They equal `TextFigures.of` over the whole text: a word that spans two pieces counts once, and the rounding error of
    the sum of log-probabilities is carried along.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._sum = TextFigures(logprob=0.0, num_tokens=0, num_bytes=0, num_chars=0, num_words=0)
        self._rest = 0.0  # the exact sum minus the rounded sum
        self._in_word = False  # whether the text so far ends inside a word

    @property
    def score(self) -> TextFigures:
        """The score of all tokens added so far."""
        return self._sum

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add the next tokens, each with its log-probability."""
        text = b"".join(map(self._tokenizer.token_bytes, tokens))
        new, before = TextFigures.of_text(text, logprobs), self._sum
        parts = [before.logprob, self._rest, *logprobs]
        total = math.fsum(parts)
        self._rest = math.fsum([*parts, -total]) if math.isfinite(total) else 0.0
        self._sum = TextFigures(
            logprob=total,
            num_tokens=before.num_tokens + new.num_tokens,
            num_bytes=before.num_bytes + new.num_bytes,
            num_chars=before.num_chars + new.num_chars,
            num_words=before.num_words + new.num_words - (self._in_word and text[:1].strip() != b""),
        )
        if text:
            self._in_word = not text[-1:].isspace()


def _bits(nats: float | None) -> float | None:
    return None if nats is None else nats / math.log(2)


def _exp(nats: float | None) -> float | None:
    """e^nats, or infinity if the result is too large for a double."""
    if nats is None:
        return None
    return math.exp(nats) if nats < 709 else math.inf
