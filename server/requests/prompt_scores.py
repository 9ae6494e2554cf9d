"""The scores of a prompt: the first sequence of an input receives them, and all sequences of the input report them."""

import asyncio

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer
from server.protocol.messages import TOKEN_BYTES, Extras, Scores
from server.requests.offload import beside_the_loop
from server.requests.results import ScoredToken
from server.requests.token_list import TokenLister


class PromptScores:
    """Collector of the scores of one prompt, shared by all sequences that continue it."""

    def __init__(self, tokens: NDArray[np.int32], *, tokenizer: Tokenizer, extras: Extras) -> None:
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._extras = extras
        self._parts: list[Scores] = []
        self._whole: asyncio.Future[list[ScoredToken]] = asyncio.get_running_loop().create_future()

    def add(self, scores: Scores) -> None:
        """Add the scores of the next chunk."""
        self._parts.append(scores)

    async def complete(self) -> None:
        """Make the list of tokens, after the last chunk."""
        if not self._whole.done():
            self._whole.set_result(await beside_the_loop(self._list, size=self._tokens.nbytes))

    async def tokens(self) -> list[ScoredToken]:
        """Wait for `complete` and return all tokens of the prompt. Tokens that the engine did not read are unscored."""
        return await asyncio.shield(self._whole)

    def _list(self) -> list[ScoredToken]:
        lister = TokenLister(self._tokenizer, num_tokens=len(self._tokens), extras=self._extras)
        entries = [lister.unscored(int(self._tokens[0]))]
        for scores in self._parts:
            size = len(scores.logprobs) // TOKEN_BYTES
            entries += lister.scored(self._tokens[len(entries) : len(entries) + size], scores)
        return entries + [lister.unscored(token) for token in self._tokens[len(entries) :].tolist()]
