"""One object per live request, and the words in which the engine asks a runner for work. Knows no torch and no HTTP."""

import dataclasses
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

import msgspec
import numpy as np

from model.sampling.params import SamplingParams
from server.protocol.messages import EngineFacts, Extras, Generate, Score, Timings

NO_EXTRAS = Extras()
Top = tuple[tuple[int, float], ...]  # the most probable tokens and their log-probabilities, best first


@dataclass(frozen=True)
class Draw:
    """How to draw one token, and where."""

    sampling: SamplingParams
    position: int  # tokens before the drawn one
    num_generated: int  # of those, the generated ones


@dataclass(frozen=True)
class Drawn:
    """A drawn token; its log-probability and the best alternatives are of the model's own distribution."""

    token: int
    logprob: float
    top: Top = ()


@dataclass(frozen=True)
class Chunk:
    """A stretch of one row's prompt or document."""

    row: int
    tokens: np.ndarray  # [T] int32, at least one
    targets: np.ndarray | None = None  # [<= T] int32: the tokens that follow the first ones, to be scored
    extras: Extras = NO_EXTRAS  # of the targets
    draws: tuple[Draw, ...] = ()  # draw the token that follows the last one, once for each
    penalised: bool = False  # the draws to come will want to know these tokens


@dataclass(frozen=True)
class ChunkScores:
    """Figures of T targets: nats and ranks, and the extras that were asked for."""

    logprobs: np.ndarray  # [T] float32
    ranks: np.ndarray  # [T] integers, 0 = the most probable
    top_ids: np.ndarray | None = None  # [T, num_top] integers
    top_logprobs: np.ndarray | None = None  # [T, num_top] float32
    entropies: np.ndarray | None = None  # [T] float32
    memory_shares: np.ndarray | None = None  # [T, layers] float32


@dataclass(frozen=True)
class ChunkResult:
    """What a chunk asked for."""

    drawn: tuple[Drawn, ...] = ()
    scores: ChunkScores | None = None


class Runner(Protocol):
    """The device side: rows of state, and the two kinds of work on them.

    A call of `extend` or `decode` that raises has changed nothing, so that it can be repeated with fewer rows.
    """

    def check(self) -> None:
        """Compute something small; raises where the device does not work any more."""
        ...

    @property
    def num_rows(self) -> int:
        """How many sequences can live at a time."""
        ...

    def warm_up(self) -> EngineFacts:
        """Run every shape there is once; returns what the runner then knows of itself."""
        ...

    def reset(self, row: int) -> None:
        """Begin a fresh stream in a row."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a row's whole state over another row's."""
        ...

    def snapshot(self, row: int) -> object:
        """A copy of a row's whole state."""
        ...

    def restore(self, row: int, snapshot: object) -> None:
        """Begin a stream in a row from the state that another one had."""
        ...

    def extend(self, chunks: Many[Chunk]) -> list[ChunkResult]:
        """Read stretches of prompts and documents, one a row."""
        ...

    def decode(self, rows: Many[int], tokens: Many[int], draws: Many[Draw]) -> list[Drawn]:
        """Feed each row its last token; the next ones, in the order of `rows`."""
        ...


class Phase(Enum):
    """Where a sequence is on its way."""

    FORKING = auto()  # waits until another one has read what they share
    WAITING = auto()  # for a row
    READING = auto()  # its prompt or document
    DECODING = auto()  # a token a step
    ENDED = auto()


@dataclass(eq=False)
class Sequence:
    """A live sequence: what was asked, and how far it is. Times are seconds of the engine's clock."""

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
    snapshot: object = None  # where to begin, if not afresh
    leader: "Sequence | None" = None  # who reads what they share
    forks: list["Sequence"] = field(init=False, default_factory=list)  # who waits for what this one reads

    def __post_init__(self) -> None:
        self.tokens = np.frombuffer(self.request.tokens, dtype="<i4")

    @classmethod
    def group(cls, request: Generate | Score, *, submitted: float) -> "Sequence":
        """The sequence that reads first, with those that fork off it."""
        first = cls(request, submitted)
        for fork in _fork_requests(request):
            other = cls(fork, submitted, phase=Phase.FORKING, leader=first)
            other.num_read = other.num_to_read if isinstance(fork, Generate) else 0
            first.forks.append(other)
        return first

    @property
    def id(self) -> str:
        """The name the API process gave it."""
        return self.request.id

    @property
    def deadline(self) -> float | None:
        """When it must have ended."""
        return None if self.request.timeout_s is None else self.submitted + self.request.timeout_s

    @property
    def num_shared(self) -> int:
        """Tokens that are only read; after them the forks part."""
        return self.request.num_shared if isinstance(self.request, Score) else len(self.tokens)

    @property
    def num_to_read(self) -> int:
        """Tokens that go through the model before it generates, or all but the last of a document."""
        return len(self.tokens) - 1 if isinstance(self.request, Score) else len(self.tokens)

    @property
    def num_unread(self) -> int:
        """What is left of `num_to_read`."""
        return self.num_to_read - self.num_read

    def chunk_size(self, chunk_tokens: int) -> int:
        """How many tokens to read next. It depends on nothing but the request, so that its numerics do not either."""
        border = self.num_shared if self.num_read < self.num_shared else self.num_to_read
        return min(chunk_tokens, border - self.num_read)

    def next_chunk(self, size: int) -> Chunk:
        """The next `size` tokens to read, with what the runner shall do about them."""
        start, stop = self.num_read, self.num_read + size
        assert 0 < size <= self.num_unread
        request, tokens = self.request, self.tokens[start:stop]
        targets = self.tokens[start + 1 : stop + 1]
        if isinstance(request, Score):
            if stop <= request.num_shared:
                return Chunk(self.row, tokens)
            return Chunk(self.row, tokens, targets=targets, extras=request.extras)
        draws = tuple(one.next_draw() for one in (self, *self.forks)) if stop == len(self.tokens) else ()
        return Chunk(
            self.row,
            tokens,
            targets=targets if request.prompt_extras is not None and len(targets) else None,
            extras=request.prompt_extras or NO_EXTRAS,
            draws=draws,
            penalised=request.sampling.repetition_penalty != 1,
        )

    def next_draw(self) -> Draw:
        """How to draw the next generated token."""
        assert isinstance(self.request, Generate)
        return Draw(self.request.sampling, len(self.tokens) + self.num_generated, self.num_generated)

    def timings(self, now: float) -> Timings:
        """How long it waited, read and generated until now."""
        admitted = self.admitted or now
        read = self.read or now
        return Timings(
            queue_ms=(admitted - self.submitted) * 1e3, prefill_ms=(read - admitted) * 1e3, decode_ms=(now - read) * 1e3
        )


def _fork_requests(request: Generate | Score) -> list[Generate | Score]:
    """Each fork as a request of its own, for what comes after the part that is shared."""
    if isinstance(request, Score):
        return [Score(name, tokens, 0, request.extras, request.timeout_s) for name, tokens in request.forks]
    replace = msgspec.structs.replace
    return [
        replace(
            request, id=name, sampling=dataclasses.replace(request.sampling, seed=seed), forks=(), prompt_extras=None
        )
        for name, seed in request.forks
    ]
