"""From the engine's scores to what a client reads: sums over a text, and a list of its tokens. Knows no HTTP.

Both take a text in stretches, so that what a long one costs in memory does not depend on its length.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from model import scoring
from model.tokenizer import StreamingDecoder, Tokenizer
from server.dialects.score.replies import ScoredToken, ScoreReply, TopToken
from server.dialects.score.schema import Unit
from server.protocol.messages import Extras, Scores


class Tally:
    """Running sums of one text. They end up as `scoring.Score.of` over the whole."""

    def __init__(self) -> None:
        self._sum = scoring.Score(logprob=0.0, num_tokens=0, num_bytes=0, num_chars=0, num_words=0)
        self._is_greedy = True
        self._in_word = False  # the text so far ends within a word, which may go on

    @property
    def num_tokens(self) -> int:
        """How many were added."""
        return self._sum.num_tokens

    def add(self, text: bytes, scores: Scores) -> None:
        """Count the next tokens, which stand for `text`."""
        logprobs = np.frombuffer(scores.logprobs, dtype="<f4")
        codes = np.frombuffer(text, dtype=np.uint8)
        continues_word = self._in_word and not text[:1].isspace() and bool(text)
        before = self._sum
        self._sum = scoring.Score(
            logprob=math.fsum([before.logprob, *logprobs.tolist()]),
            num_tokens=before.num_tokens + len(logprobs),
            num_bytes=before.num_bytes + len(text),
            num_chars=before.num_chars + int(np.count_nonzero((codes & 0xC0) != 0x80)),
            num_words=before.num_words + len(text.split()) - continues_word,
        )
        if text:
            self._in_word = not text[-1:].isspace()
        self._is_greedy &= not np.frombuffer(scores.ranks, dtype="<i4").any()

    def reply(self, unit: Unit) -> ScoreReply:
        """All figures of the text."""
        figures = self._sum
        units = {
            "token": figures.num_tokens,
            "byte": figures.num_bytes,
            "char": figures.num_chars,
            "word": figures.num_words,
        }
        return ScoreReply(
            num_tokens=figures.num_tokens,
            num_bytes=figures.num_bytes,
            num_chars=figures.num_chars,
            num_words=figures.num_words,
            logprob=figures.logprob,
            # As if each unit were a token: so it is the shared function that decides what a perplexity is.
            perplexity=replace(figures, num_tokens=units[unit]).perplexity,
            word_perplexity=figures.word_perplexity,
            bits_per_token=figures.bits_per_token,
            bits_per_byte=figures.bits_per_byte,
            bits_per_char=figures.bits_per_char,
            is_greedy=self._is_greedy,
        )


class TokenLister:
    """Turns the tokens of one text into the entries of its list, in order."""

    def __init__(self, tokenizer: Tokenizer, *, num_tokens: int, extras: Extras) -> None:
        """num_tokens: of the whole text; after so many no character can become complete any more."""
        self._tokenizer = tokenizer
        self._decoder = StreamingDecoder(tokenizer)
        self._num_left = num_tokens
        self._extras = extras

    def unscored(self, token: int) -> ScoredToken:
        """The entry of a token with nothing before it."""
        asked = self._extras
        return ScoredToken(
            token,
            self._text(token),
            top=None if asked.num_top else UNSET,
            entropy=None if asked.entropy else UNSET,
            memory_share=None if asked.memory_share else UNSET,
        )

    def scored(self, tokens: NDArray[np.int32], scores: Scores) -> list[ScoredToken]:
        """The entries of the next T tokens."""
        num, asked = len(tokens), self._extras
        logprobs: list[float] = np.frombuffer(scores.logprobs, dtype="<f4").tolist()
        ranks: list[int] = np.frombuffer(scores.ranks, dtype="<i4").tolist()
        entropies: list[float] = np.frombuffer(scores.entropies, dtype="<f4").tolist()
        shares: list[list[float]] = np.frombuffer(scores.memory_shares, dtype="<f4").reshape(num, -1).tolist()
        tops = list(self._tops(num, scores)) if asked.num_top else []
        return [
            ScoredToken(
                token,
                self._text(token),
                logprobs[i],
                ranks[i],
                top=tops[i] if asked.num_top else UNSET,
                entropy=entropies[i] if asked.entropy else UNSET,
                memory_share=shares[i] if asked.memory_share else UNSET,
            )
            for i, token in enumerate(tokens.tolist())
        ]

    def _tops(self, num: int, scores: Scores) -> Iterator[list[TopToken]]:
        ids = np.frombuffer(scores.top_ids, dtype="<i4").reshape(num, -1).tolist()
        logprobs = np.frombuffer(scores.top_logprobs, dtype="<f4").reshape(num, -1).tolist()
        text = self._tokenizer.token_text
        for row in zip(ids, logprobs, strict=True):
            yield [TopToken(id, text(id), logprob) for id, logprob in zip(*row, strict=True)]

    def _text(self, token: int) -> str:
        self._num_left -= 1
        text = self._decoder.add(token)
        return text if self._num_left else text + self._decoder.finish()
