"""What crosses the line between the API process and the engine process: small typed messages, nothing else.

Arrays travel as raw little-endian bytes (`array` of the named type), so that a long document costs one copy.
"""

from typing import Literal

import msgspec

LinkState = Literal["starting", "ready", "draining", "failed"]  # of the line between the two processes


class EngineOptions(msgspec.Struct, frozen=True):
    """What the API process tells the engine process at its start."""

    inbox: str  # ZeroMQ address of messages to the engine
    outbox: str
    bundle: str
    num_rows: int
    dtype: str
    device: str
    num_threads: int | None  # None leaves it to torch
    chunk_tokens: int
    budget_tokens: int
    runner: str = "server.runner:TorchRunner.from_bundle"  # module:factory


class Sampling(msgspec.Struct, frozen=True):
    """How to draw the tokens of one sequence; every field already validated and defaulted by the API process."""

    temperature: float  # 0 = greedy
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    min_p: float  # 0 = off
    seed: int  # u64; with the position it alone decides the noise of a draw


class Generate(msgspec.Struct, tag=True, frozen=True):
    """Continue `tokens`. Answered by Tokens messages, the last one with `finish_reason`."""

    id: str
    tokens: bytes  # int32
    sampling: Sampling
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


class Score(msgspec.Struct, tag=True, frozen=True):
    """Log-probability of every token after the first. Answered by Scores messages, the last one with `last`."""

    id: str
    tokens: bytes  # int32


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Free the row of a sequence. Answered by its ending, finish_reason "cancelled", unless it has already ended."""

    id: str


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds a sequence spent waiting for a row, reading its prompt, and producing tokens."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float


class Token(msgspec.Struct, array_like=True, frozen=True):
    """One new token of one sequence. `logprob` is under the model's own distribution (temperature 1, nothing cut)."""

    sequence: str
    token: int
    logprob: float


class Scores(msgspec.Struct, frozen=True):
    """The next stretch of a scored document."""

    sequence: str
    logprobs: bytes  # float32, nats
    ranks: bytes  # int32, 0 = the most probable token of all


class Ended(msgspec.Struct, frozen=True):
    """The one ending of a sequence: length, eos_token, scored, cancelled, shutdown, or error (then with `error`)."""

    sequence: str
    finish_reason: str
    timings: Timings
    error: str = ""


class Step(msgspec.Struct, tag=True, frozen=True):
    """All that one engine step has to say, in one message. A sequence's tokens and scores come before its ending."""

    tokens: tuple[Token, ...] = ()
    scores: tuple[Scores, ...] = ()
    ended: tuple[Ended, ...] = ()
    num_decoded: int = 0  # rows that produced a token
    num_prefilled: int = 0  # prompt and document tokens read
    seconds: float = 0.0
    rows_used: int = 0
    num_waiting: int = 0


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine has loaded the bundle and run a real step."""

    pid: int
    device: str
    dtype: str
    num_rows: int
    state_bytes_per_row: int
    spans: tuple[tuple[int, ...], ...]  # how far each head of each layer looks back, in tokens


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent at least once a second while the engine's loop turns and has no step to tell of."""


class Died(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot go on; `message` says why. The process exits after it."""

    message: str


ToEngine = Generate | Score | Cancel
FromEngine = Ready | Step | Heartbeat | Died
