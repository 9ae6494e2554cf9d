"""The live sequence, and the types of the work that the engine gives to a runner. Knows no torch and no HTTP."""

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
    """The parameters to draw (sample) one token, and its position."""

    sampling: SamplingParams
    position: int  # tokens before the drawn token
    num_generated: int  # the generated tokens among them


@dataclass(frozen=True)
class Drawn:
    """A drawn token, with log-probabilities under the model's own distribution (temperature 1, nothing cut)."""

    token: int
    logprob: float
    top: Top = ()


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of the prompt or document of one row, to read in one step."""

    row: int
    tokens: np.ndarray  # [T] int32, at least one
    targets: np.ndarray | None = None  # [<= T] int32: tokens to score; the i-th follows the chunk's i-th token
    extras: Extras = NO_EXTRAS  # the extra figures of the targets
    draws: tuple[Draw, ...] = ()  # how to draw the next token, once for each sequence of the group
    penalised: bool = False  # whether later draws penalise these tokens


@dataclass(frozen=True)
class ChunkScores:
    """The scores of T targets: log-probabilities in nats, ranks and the requested extras."""

    logprobs: np.ndarray  # [T] float32
    ranks: np.ndarray  # [T] integers, 0 = the most probable
    top_ids: np.ndarray | None = None  # [T, num_top] integers
    top_logprobs: np.ndarray | None = None  # [T, num_top] float32
    entropies: np.ndarray | None = None  # [T] float32
    memory_shares: np.ndarray | None = None  # [T, layers] float32


@dataclass(frozen=True)
class ChunkResult:
    """The drawn tokens and scores of a chunk."""

    drawn: tuple[Drawn, ...] = ()
    scores: ChunkScores | None = None


class Runner(Protocol):
    """The model on its device: rows of state, and the two kinds of work on them, extend (prefill) and decode.

    A call of `extend` or `decode` that raises has changed nothing, so the engine can repeat it with fewer rows.
    """

    def check(self) -> None:
        """Compute something small. Raises if the device has failed."""
        ...

    @property
    def num_rows(self) -> int:
        """The most sequences that can have a row at a time."""
        ...

    def warm_up(self) -> EngineFacts:
        """Run every shape once. Return what the runner then knows of itself."""
        ...

    def reset(self, row: int) -> None:
        """Set a row to the state before any token."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a row's whole state over another row's."""
        ...

    def snapshot(self, row: int) -> object:
        """Return a copy of a row's whole state."""
        ...

    def restore(self, row: int, snapshot: object) -> None:
        """Set a row to a state that `snapshot` returned."""
        ...

    def extend(self, chunks: Many[Chunk]) -> list[ChunkResult]:
        """Read chunks of prompts and documents, one for each row. Return their results in order."""
        ...

    def decode(self, rows: Many[int], tokens: Many[int], draws: Many[Draw]) -> list[Drawn]:
        """Feed each row its last token. Return the drawn next tokens, in the order of `rows`."""
        ...


class Phase(Enum):
    """The phase of a sequence, from its submission to its end."""

    FORKING = auto()  # waits for its leader to read the shared tokens
    WAITING = auto()  # waits for a row
    READING = auto()  # reads its prompt or document (prefill)
    DECODING = auto()  # generates a token in each step
    ENDED = auto()


@dataclass(eq=False)
class Sequence:
    """A live sequence: its request and its progress. Times are in seconds of the engine's clock."""

    request: Generate | Score
    submitted: float
    tokens: np.ndarray = field(init=False)  # [n] int32, the prompt or document
    phase: Phase = Phase.WAITING
    row: int = -1  # -1 without a row
    num_read: int = 0  # the tokens of `num_to_read` that it has read
    num_generated: int = 0
    last_token: int = -1
    admitted: float = 0.0  # time at which it got its row
    read: float = 0.0  # time at which it had read its tokens
    snapshot: object = None  # the state to begin from, if not from the start
    leader: "Sequence | None" = None  # the sequence that reads the tokens they share
    forks: list["Sequence"] = field(init=False, default_factory=list)  # they wait for the shared tokens to be read

    def __post_init__(self) -> None:
        self.tokens = np.frombuffer(self.request.tokens, dtype="<i4")

    @classmethod
    def group(cls, request: Generate | Score, *, submitted: float) -> "Sequence":
        """Make the sequences of a request; return the leader, which reads the shared tokens, with its forks."""
        first = cls(request, submitted)
        for fork in _fork_requests(request):
            other = cls(fork, submitted, phase=Phase.FORKING, leader=first)
            other.num_read = other.num_to_read if isinstance(fork, Generate) else 0
            first.forks.append(other)
        return first

    @property
    def id(self) -> str:
        """The sequence id, which the API process chose."""
        return self.request.id

    @property
    def deadline(self) -> float | None:
        """The time at which the sequence ends with "timeout"."""
        return None if self.request.timeout_s is None else self.submitted + self.request.timeout_s

    @property
    def num_shared(self) -> int:
        """Number of tokens that the leader reads for its forks too."""
        return self.request.num_shared if isinstance(self.request, Score) else len(self.tokens)

    @property
    def num_to_read(self) -> int:
        """Number of tokens to read: all of a prompt, all but the last of a document."""
        return len(self.tokens) - 1 if isinstance(self.request, Score) else len(self.tokens)

    @property
    def num_unread(self) -> int:
        """Number of tokens left to read."""
        return self.num_to_read - self.num_read

    def chunk_size(self, chunk_tokens: int) -> int:
        """Return the size of the next chunk. It depends on the request only, and so do the numerics."""
        border = self.num_shared if self.num_read < self.num_shared else self.num_to_read
        return min(chunk_tokens, border - self.num_read)

    def next_chunk(self, size: int) -> Chunk:
        """Return the next `size` tokens to read, with their targets and draws."""
        start, stop = self.num_read, self.num_read + size
        assert 0 < size <= self.num_unread
        request, tokens = self.request, self.tokens[start:stop]
        targets = self.tokens[start + 1 : stop + 1]
        if isinstance(request, Score):
            if stop <= request.num_shared:
                return Chunk(self.row, tokens)
            return Chunk(self.row, tokens, targets=targets, extras=request.extras)
        draws = tuple(member.next_draw() for member in (self, *self.forks)) if stop == len(self.tokens) else ()
        return Chunk(
            self.row,
            tokens,
            targets=targets if request.prompt_extras is not None and len(targets) else None,
            extras=request.prompt_extras or NO_EXTRAS,
            draws=draws,
            penalised=request.sampling.repetition_penalty != 1,
        )

    def next_draw(self) -> Draw:
        """Return the parameters to draw the next token."""
        assert isinstance(self.request, Generate)
        return Draw(self.request.sampling, len(self.tokens) + self.num_generated, self.num_generated)

    def timings(self, now: float) -> Timings:
        """Return how long the sequence has waited, read and generated until `now`."""
        admitted = self.admitted or now
        read = self.read or now
        return Timings(
            queue_ms=(admitted - self.submitted) * 1e3, prefill_ms=(read - admitted) * 1e3, decode_ms=(now - read) * 1e3
        )


def _fork_requests(request: Generate | Score) -> list[Generate | Score]:
    """Return a request for each fork, which continues after the shared tokens."""
    if isinstance(request, Score):
        return [Score(name, tokens, 0, request.extras, request.timeout_s) for name, tokens in request.forks]
    replace = msgspec.structs.replace
    return [
        replace(
            request, id=name, sampling=dataclasses.replace(request.sampling, seed=seed), forks=(), prompt_extras=None
        )
        for name, seed in request.forks
    ]
