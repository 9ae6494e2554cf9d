"""What a loss means: one place that turns nats into perplexity and bits, for training, evaluation and the server.

A figure is a sum of nats over a sum of units; the units are counted over the scored tokens only. Knows no torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self


class TokenBytes(Protocol):
    """What counting units needs of a tokenizer."""

    def token_bytes(self, token: int, /) -> bytes:
        """The bytes a token stands for."""
        ...


@dataclass(frozen=True)
class Score:
    """Log-probability of a text and its size in every unit."""

    logprob: float  # nats, summed over the scored tokens
    num_tokens: int
    num_bytes: int
    num_chars: int
    num_words: int  # stretches without whitespace

    @classmethod
    def of(cls, tokenizer: TokenBytes, tokens: Iterable[int], logprobs: Sequence[float]) -> Self:
        """Sum up scored tokens (those with a log-probability, and only those) and count what they stand for."""
        text = b"".join(map(tokenizer.token_bytes, tokens))
        return cls(
            logprob=math.fsum(logprobs),
            num_tokens=len(logprobs),
            num_bytes=len(text),
            num_chars=sum((byte & 0xC0) != 0x80 for byte in text),
            num_words=len(text.split()),
        )

    @property
    def perplexity(self) -> float | None:
        """exp of nats per token; None where nothing was scored, as for all figures below."""
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


def _bits(nats: float | None) -> float | None:
    return None if nats is None else nats / math.log(2)


def _exp(nats: float | None) -> float | None:
    """e^nats, or infinity where a double cannot hold it."""
    if nats is None:
        return None
    return math.exp(nats) if nats < 709 else math.inf
