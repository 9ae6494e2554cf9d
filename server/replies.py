"""What the server says on success: typed structs that encode straight to JSON bytes. Knows no model and no HTTP."""

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from server.messages import Timings

FinishReason = Literal["length", "eos_token", "stop_sequence", "cancelled", "timeout", "shutdown"]


class TokenInfo(Struct, frozen=True):
    """One generated token. `text` is what became certain with it, so the texts joined are the output."""

    id: int
    text: str
    logprob: float  # nats, under the model's own distribution
    special: bool


class Details(Struct, frozen=True):
    """How a sequence went."""

    finish_reason: FinishReason
    generated_tokens: int
    prompt_tokens: int
    seed: int
    matched_stop: str | int | None  # the stop string, or the id of stop_token_ids
    logprob_sum: float
    timings: Timings
    fingerprint: str
    tokens: list[TokenInfo] | UnsetType = UNSET  # plain replies only


class GenerateEvent(Struct, frozen=True):
    """One event of a stream. The last one of a sequence has `generated_text` and `details`.

    `token` is null only there, and only where the sequence ended between two tokens (cancelled, shutdown).
    """

    index: int  # from 1
    token: TokenInfo | None
    generated_text: str | None = None
    details: Details | None = None
    sequence: int | UnsetType = UNSET  # which input of a list, from 0


class GenerateReply(Struct, frozen=True):
    """The plain reply to one input."""

    generated_text: str
    details: Details | UnsetType = UNSET


class ScoredToken(Struct, frozen=True):
    """One token of a scored text. Null where nothing came before it. Rank 0 is the model's first choice."""

    id: int
    text: str
    logprob: float | None
    rank: int | None


class ScoreReply(Struct, frozen=True):
    """The figures of one input over its scored tokens; null where nothing was scored (or infinite)."""

    num_tokens: int
    num_bytes: int
    num_chars: int
    num_words: int
    logprob: float  # nats, sum
    perplexity: float | None
    word_perplexity: float | None
    bits_per_token: float | None
    bits_per_byte: float | None
    bits_per_char: float | None
    is_greedy: bool
    tokens: list[ScoredToken] | UnsetType = UNSET


class EngineHealth(Struct, frozen=True):
    """Is the engine's loop turning."""

    pid: int | None
    heartbeat_age_s: float | None
    last_step_age_s: float | None


class RowsHealth(Struct, frozen=True):
    """Lanes of the batch."""

    used: int
    free: int


class QueueHealth(Struct, frozen=True):
    """What waits for a row."""

    requests: int


class ModelHealth(Struct, frozen=True):
    """Which model."""

    name: str
    hash: str


class HealthReply(Struct, frozen=True):
    """GET /health."""

    state: Literal["starting", "ready", "draining", "failed"]
    failure: str
    engine: EngineHealth
    rows: RowsHealth
    queue: QueueHealth
    model: ModelHealth


def encode(reply: Struct | Sequence[Struct]) -> bytes:
    """JSON. Infinities and NaN become null."""
    return msgspec.json.encode(reply)
