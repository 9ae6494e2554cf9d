"""The tokens of a text, each with its figures; and the names of tokens. Knows no HTTP.

A text comes in stretches, so that what a long one costs in memory does not depend on its length.
"""

from collections.abc import Iterator

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from model.tokenizer import BPE_EOS, StreamingDecoder, Tokenizer
from server.protocol.messages import Extras, Scores
from server.requests.results import ScoredToken, TopToken


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""The text of a token, or where its bytes are no text "bytes:\xNN..."; no two tokens have the same."""
    data = tokenizer.token_bytes(token)
    if not data:
        return BPE_EOS
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


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
