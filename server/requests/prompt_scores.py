"""The scores of a prompt: the engine tells them to the first sequence of an input, and all sequences report them."""

import asyncio

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer
from server.protocol.messages import TOKEN_BYTES, Extras, Scores
from server.requests.offload import beside_the_loop
from server.requests.results import ScoredToken
from server.requests.token_list import TokenLister


class PromptScores:
    """The tokens of one prompt with their figures, for all sequences that continue it."""

    def __init__(self, tokens: NDArray[np.int32], *, tokenizer: Tokenizer, extras: Extras) -> None:
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._extras = extras
        self._parts: list[Scores] = []
        self._whole: asyncio.Future[list[ScoredToken]] = asyncio.get_running_loop().create_future()

    def add(self, scores: Scores) -> None:
        """Take the next stretch."""
        self._parts.append(scores)

    async def complete(self) -> None:
        """List the tokens: nothing more comes."""
        if not self._whole.done():
            self._whole.set_result(await beside_the_loop(self._list, size=self._tokens.nbytes))

    async def tokens(self) -> list[ScoredToken]:
        """All tokens of the prompt, once it is complete; those that were not read before the end have no figures."""
        return await asyncio.shield(self._whole)

    def _list(self) -> list[ScoredToken]:
        lister = TokenLister(self._tokenizer, num_tokens=len(self._tokens), extras=self._extras)
        entries = [lister.unscored(int(self._tokens[0]))]
        for scores in self._parts:
            size = len(scores.logprobs) // TOKEN_BYTES
            entries += lister.scored(self._tokens[len(entries) : len(entries) + size], scores)
        return entries + [lister.unscored(token) for token in self._tokens[len(entries) :].tolist()]
