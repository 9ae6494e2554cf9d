"""The log-probabilities of a prompt, which several sequences report though the engine tells them to one."""

import asyncio

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import StreamingDecoder, Tokenizer
from server.dialects.generate.replies import PromptToken
from server.protocol.messages import Scores
from server.requests.offload import beside_the_loop


class PromptScores:
    """What the engine says of a prompt. It says it to the first sequence of an input, and all of them report it."""

    def __init__(self, tokens: NDArray[np.int32], *, tokenizer: Tokenizer) -> None:
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._parts: list[bytes] = []
        self._whole: asyncio.Future[list[PromptToken]] = asyncio.get_running_loop().create_future()

    def add(self, scores: Scores) -> None:
        """The next stretch."""
        self._parts.append(scores.logprobs)

    async def complete(self) -> None:
        """Nothing more comes."""
        if not self._whole.done():
            self._whole.set_result(await beside_the_loop(self._list, size=self._tokens.nbytes))

    async def tokens(self) -> list[PromptToken]:
        """All tokens of the prompt, once it is complete."""
        return await asyncio.shield(self._whole)

    def _list(self) -> list[PromptToken]:
        scored: list[float] = np.frombuffer(b"".join(self._parts), dtype="<f4").tolist()
        logprobs = [None, *scored, *[None] * (len(self._tokens) - 1 - len(scored))]
        decoder, ids = StreamingDecoder(self._tokenizer), self._tokens.tolist()
        texts = [decoder.add(token) for token in ids]
        texts[-1] += decoder.finish()
        return [PromptToken(*column) for column in zip(ids, texts, logprobs, strict=True)]
