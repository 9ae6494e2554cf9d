"""One object per live request, and the words in which the engine asks a runner for work. Knows no torch and no HTTP."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

import numpy as np

from server.messages import Generate, Sampling, Score, Timings


@dataclass(frozen=True)
class Draw:
    """How to draw one token, and where."""

    sampling: Sampling
    position: int  # tokens before the drawn one


@dataclass(frozen=True)
class Chunk:
    """A stretch of one row's prompt or document."""

    row: int
    tokens: np.ndarray  # [T] int32, at least one
    targets: np.ndarray | None = None  # [T] int32: the tokens that follow, to be scored
    draw: Draw | None = None  # draw the token that follows the last one


@dataclass(frozen=True)
class ChunkResult:
    """What a chunk asked for: a drawn token, or log-probabilities (nats) and ranks of its targets, or nothing."""

    token: int = -1
    logprob: float = 0.0
    logprobs: np.ndarray | None = None  # [T] float32
    ranks: np.ndarray | None = None  # [T] integers, 0 = the most probable


class Runner(Protocol):
    """The device side: rows of state, and the two kinds of work on them."""

    @property
    def num_rows(self) -> int:
        """How many sequences can live at a time."""
        ...

    @property
    def device(self) -> str:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> str:
        """What weights and state are kept in."""
        ...

    @property
    def state_bytes_per_row(self) -> int:
        """Bytes a live sequence costs."""
        ...

    @property
    def spans(self) -> tuple[tuple[int, ...], ...]:
        """How far each head of each layer looks back, in tokens."""
        ...

    def reset(self, row: int) -> None:
        """Begin a fresh stream in a row."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a row's whole state over another row's."""
        ...

    def extend(self, chunks: Many[Chunk]) -> list[ChunkResult]:
        """Read stretches of prompts and documents, one a row."""
        ...

    def decode(self, rows: Many[int], tokens: Many[int], draws: Many[Draw]) -> tuple[list[int], list[float]]:
        """Feed each row its last token; the next tokens and their log-probabilities."""
        ...


class Phase(Enum):
    """Where a sequence is on its way."""

    WAITING = auto()  # for a row
    READING = auto()  # its prompt or document
    DECODING = auto()  # a token a step
    ENDED = auto()


@dataclass(eq=False)
class Sequence:
    """A live request: what was asked, and how far it is. Times are seconds of the engine's clock."""

    request: Generate | Score
    submitted: float
    tokens: np.ndarray = field(init=False)  # [n] int32, the prompt or document
    phase: Phase = Phase.WAITING
    row: int = -1  # -1 while it has none
    num_read: int = 0  # of the tokens that must be read
    num_generated: int = 0
    last_token: int = -1
    admitted: float = 0.0  # got its row
    read: float = 0.0  # finished reading

    def __post_init__(self) -> None:
        self.tokens = np.frombuffer(self.request.tokens, dtype="<i4")

    @property
    def id(self) -> str:
        """The name the API process gave it."""
        return self.request.id

    @property
    def num_to_read(self) -> int:
        """Tokens that go through the model before it generates, or all but the last of a document."""
        return len(self.tokens) - 1 if isinstance(self.request, Score) else len(self.tokens)

    @property
    def num_unread(self) -> int:
        """What is left of `num_to_read`."""
        return self.num_to_read - self.num_read

    def next_chunk(self, size: int) -> Chunk:
        """The next `size` tokens to read, with what the runner shall do about them."""
        start, stop = self.num_read, self.num_read + size
        assert 0 < size <= self.num_unread
        if isinstance(self.request, Score):
            return Chunk(self.row, self.tokens[start:stop], targets=self.tokens[start + 1 : stop + 1])
        return Chunk(self.row, self.tokens[start:stop], draw=self.next_draw() if stop == len(self.tokens) else None)

    def next_draw(self) -> Draw:
        """How to draw the next generated token."""
        assert isinstance(self.request, Generate)
        return Draw(self.request.sampling, len(self.tokens) + self.num_generated)

    def timings(self, now: float) -> Timings:
        """How long it waited, read and generated until now."""
        admitted = self.admitted or now
        read = self.read or now
        return Timings(
            queue_ms=(admitted - self.submitted) * 1e3, prefill_ms=(read - admitted) * 1e3, decode_ms=(now - read) * 1e3
        )
