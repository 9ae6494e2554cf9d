"""A runner without a model: its next token is a hash of the whole history that its row was fed, in order."""

import os
import time
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from server.config import EngineOptions
from server.engine.sequence import Chunk, ChunkResult, ChunkScores, Draw, Drawn
from server.protocol.messages import EngineFacts

VOCABULARY = 251
NOT_A_NUMBER_TOKEN = 13  # a history that ends with it gets a log-probability of NaN
RAISE_TOKEN = 14  # reading it raises
STALL_TOKEN = 15  # reading it takes an hour
DIE_TOKEN = 16  # reading it ends the process
OUT_OF_MEMORY_TOKEN = 17  # reading it raises MemoryError
RAISE_ALL_TOKEN = 18  # after it is read, every step raises


def next_token(history: Sequence[int]) -> int:
    """Return the token that the runner generates after a history."""
    return int.from_bytes(blake2b(bytes(history), digest_size=4).digest(), "big") % 200 + 20


class FakeRunner:
    """A runner whose rows hold the tokens that they have read."""

    def __init__(self, num_rows: int = 4) -> None:
        self.num_rows = num_rows
        self.rows: list[list[int] | None] = [None] * num_rows
        self.calls: list[tuple[str, int]] = []  # (kind of work, number of tokens or rows)
        self.is_broken = False

    @classmethod
    def load(cls, options: EngineOptions) -> "FakeRunner":
        """Return a runner; the engine process calls this."""
        return cls(options.num_rows)

    def warm_up(self) -> EngineFacts:
        return EngineFacts("fake", "fake", "float32", "float32", self.num_rows, 8, True, ((1,),))

    def check(self) -> None:
        if self.is_broken:
            raise RuntimeError("the fake device is broken")

    def reset(self, row: int) -> None:
        self.rows[row] = []

    def move(self, source: int, target: int) -> None:
        self.rows[target] = list(self._history(source))
        self.rows[source] = None

    def snapshot(self, row: int) -> object:
        return tuple(self._history(row))

    def restore(self, row: int, snapshot: object) -> None:
        assert isinstance(snapshot, tuple)
        self.rows[row] = list(snapshot)

    def extend(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        assert len({chunk.row for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            self._look_at(chunk.tokens.tolist())
        self.calls.append(("extend", sum(len(chunk.tokens) for chunk in chunks)))
        return [self._read(chunk) for chunk in chunks]

    def decode(self, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]) -> list[Drawn]:
        self._look_at(tokens)
        self.calls.append(("decode", max(rows) + 1))
        results = []
        for row, token, draw in zip(rows, tokens, draws, strict=True):
            history = self._history(row)
            history.append(token)
            results.append(_draw(history, draw))
        return results

    def _read(self, chunk: Chunk) -> ChunkResult:
        history = self._history(chunk.row)
        targets = [] if chunk.targets is None else chunk.targets.tolist()
        logprobs, ranks = [], []
        for i, token in enumerate(chunk.tokens.tolist()):
            history.append(token)
            if i < len(targets):
                ranks.append(int(next_token(history) != targets[i]))
                logprobs.append(_logprob(history))
        scores = ChunkScores(np.array(logprobs, np.float32), np.array(ranks)) if targets else None
        return ChunkResult(tuple(_draw(history, draw) for draw in chunk.draws), scores)

    def _look_at(self, tokens: Sequence[int]) -> None:
        """Fail if a token asks for it, before any state has changed, as a runner must."""
        if DIE_TOKEN in tokens:
            os._exit(9)
        if STALL_TOKEN in tokens:
            time.sleep(3600)
        if OUT_OF_MEMORY_TOKEN in tokens:
            raise MemoryError("the fake device has no memory for this")
        self.is_broken |= RAISE_ALL_TOKEN in tokens
        if self.is_broken or RAISE_TOKEN in tokens:
            raise RuntimeError("the fake device has failed")

    def _history(self, row: int) -> list[int]:
        history = self.rows[row]
        assert history is not None
        return history


def _draw(history: list[int], draw: Draw) -> Drawn:
    assert draw.position == len(history)
    token = next_token([*history, draw.sampling.seed % 200]) if draw.sampling.temperature else next_token(history)
    return Drawn(token, _logprob(history))


def _logprob(history: list[int]) -> float:
    return float("nan") if history[-1] == NOT_A_NUMBER_TOKEN else -len(history) / 8
