"""A runner without a model: its next token is a hash of the whole history that its row was fed, in order."""

import time
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from server.sequence import Chunk, ChunkResult, Draw

VOCABULARY = 251
NOT_A_NUMBER_TOKEN = 13  # a history that ends with it has no numbers
RAISE_TOKEN = 14  # reading it raises
STALL_TOKEN = 15  # reading it takes for ever


def next_token(history: Sequence[int]) -> int:
    """What the runner says after a history."""
    return int.from_bytes(blake2b(bytes(history), digest_size=4).digest(), "big") % 200 + 20


class FakeRunner:
    """Rows hold the tokens they were fed. Device facts are as a TorchRunner's."""

    device, dtype, state_bytes_per_row, spans = "fake", "float32", 8, ((1,),)

    def __init__(self, num_rows: int = 4) -> None:
        self.num_rows = num_rows
        self.rows: list[list[int] | None] = [None] * num_rows
        self.calls: list[tuple[str, int]] = []  # kind of work, tokens

    @classmethod
    def load(cls, _path: str, *, num_rows: int, dtype: str, device: str, num_threads: int | None) -> "FakeRunner":
        """The factory that an engine process calls."""
        return cls(num_rows)

    def reset(self, row: int) -> None:
        self.rows[row] = []

    def move(self, source: int, target: int) -> None:
        history = self.rows[source]
        assert history is not None
        self.rows[target] = list(history)
        self.rows[source] = None

    def extend(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        assert len({chunk.row for chunk in chunks}) == len(chunks)
        self.calls.append(("extend", sum(len(chunk.tokens) for chunk in chunks)))
        return [self._read(chunk) for chunk in chunks]

    def decode(
        self, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]
    ) -> tuple[list[int], list[float]]:
        self.calls.append(("decode", max(rows) + 1))
        results = []
        for row, token, draw in zip(rows, tokens, draws, strict=True):
            history = self._feed(row, [token])
            assert draw.position == len(history)
            results.append((next_token(history), _logprob(history)))
        return [token for token, _ in results], [logprob for _, logprob in results]

    def _read(self, chunk: Chunk) -> ChunkResult:
        if chunk.targets is None:
            history = self._feed(chunk.row, chunk.tokens.tolist())
            if chunk.draw is None:
                return ChunkResult()
            assert chunk.draw.position == len(history)
            return ChunkResult(token=next_token(history), logprob=_logprob(history))
        logprobs, ranks = [], []
        for token, target in zip(chunk.tokens.tolist(), chunk.targets.tolist(), strict=True):
            history = self._feed(chunk.row, [token])
            ranks.append(int(next_token(history) != target))
            logprobs.append(_logprob(history))
        return ChunkResult(logprobs=np.array(logprobs, np.float32), ranks=np.array(ranks))

    def _feed(self, row: int, tokens: list[int]) -> list[int]:
        history = self.rows[row]
        assert history is not None
        if RAISE_TOKEN in tokens:
            raise RuntimeError("the fake device has failed")
        if STALL_TOKEN in tokens:
            time.sleep(3600)
        history += tokens
        return history


def _logprob(history: list[int]) -> float:
    return float("nan") if history[-1] == NOT_A_NUMBER_TOKEN else -len(history) / 8
