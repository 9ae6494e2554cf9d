"""What crosses the line between the API process and the engine process: small typed messages, nothing else.

Arrays travel as raw little-endian bytes (`array` of the named type), so that a long document costs one copy.
"""

from typing import Any, Literal

import msgspec

from model.sampling.params import SamplingParams

FinishReason = Literal[
    "length", "eos_token", "stop_sequence", "cancelled", "timeout", "shutdown"
]  # of a generated text
EngineFinish = Literal[FinishReason, "scored", "error"]  # of a sequence; the engine knows no stop strings
LinkState = Literal["starting", "ready", "draining", "restarting", "failed"]  # of the line between the two processes
TOKEN_BYTES = 4  # of an int32


class Extras(msgspec.Struct, frozen=True):
    """What to tell of each scored token beside its log-probability and rank."""

    num_top: int = 0  # the most probable tokens
    entropy: bool = False
    memory_share: bool = False


class Generate(msgspec.Struct, tag=True, frozen=True):
    """Continue `tokens`. Answered by Tokens, then one Ended.

    With `forks` the prompt is read once and continued several times; each fork has a name and seed of its own.
    """

    id: str
    tokens: bytes  # int32
    sampling: SamplingParams
    max_new_tokens: int
    timeout_s: float | None = None  # from now
    prompt_extras: Extras | None = None  # if set: answer with Scores of the prompt too, before the first token
    forks: tuple[tuple[str, int], ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of all its sequences."""
        return (self.id, *(name for name, _ in self.forks))

    @property
    def num_tokens(self) -> int:
        """Tokens to read."""
        return len(self.tokens) // TOKEN_BYTES


class Score(msgspec.Struct, tag=True, frozen=True):
    """Log-probability of every token after the first `num_shared` + 1. Answered by Scores, then one Ended.

    With `forks` those first `num_shared` tokens are read once; each fork then goes on with tokens of its own, of which
    the first is not scored.
    """

    id: str
    tokens: bytes  # int32
    num_shared: int = 0
    extras: Extras = Extras()
    timeout_s: float | None = None  # from now
    forks: tuple[tuple[str, bytes], ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of all its sequences."""
        return (self.id, *(name for name, _ in self.forks))

    @property
    def num_tokens(self) -> int:
        """Tokens to read."""
        return (len(self.tokens) + sum(len(tokens) for _, tokens in self.forks)) // TOKEN_BYTES


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
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens and their log-probabilities, best first


class Scores(msgspec.Struct, frozen=True):
    """The next stretch of T scored tokens. The extras are empty where they were not asked for."""

    sequence: str
    logprobs: bytes  # [T] float32, nats
    ranks: bytes  # [T] int32, 0 = the most probable token of all
    top_ids: bytes = b""  # [T, num_top] int32
    top_logprobs: bytes = b""  # [T, num_top] float32
    entropies: bytes = b""  # [T] float32, nats, of the distribution that the token was scored under
    memory_shares: bytes = b""  # [T, layers] float32: persistent share of attention at the position before


class Ended(msgspec.Struct, frozen=True):
    """The one ending of a sequence; `error` says why where the engine gave it up."""

    sequence: str
    finish_reason: EngineFinish
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
    num_waiting: int = 0  # sequences
    tokens_waiting: int = 0  # that are still to be read, of all sequences


class EngineFacts(msgspec.Struct, frozen=True):
    """What a runner that has warmed up knows of itself; GET /info and the log tell these facts under these names."""

    backend: str
    device: str
    dtype: str  # of the state of rows
    weights: str  # number format in which they are kept
    num_rows: int
    state_bytes_per_row: int
    batch_invariant: bool  # whether a batch was seen to give each row, bit for bit, what it gets alone
    spans: tuple[tuple[int, ...], ...]  # how far each head of each layer looks back, in tokens
    variant: str | None = None  # instructions of the native backend

    @property
    def state_bytes(self) -> int:
        """Bytes that all rows cost."""
        return self.num_rows * self.state_bytes_per_row

    def as_dict(self) -> dict[str, Any]:
        """All facts by name, with `state_bytes`."""
        return {**msgspec.structs.asdict(self), "state_bytes": self.state_bytes}


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine has loaded the model and run real steps of every shape."""

    pid: int
    facts: EngineFacts
    warm_up_s: float = 0.0


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent at least once a second while the engine's loop turns and has no step to tell of."""


class AskedToEnd(msgspec.Struct, tag=True, frozen=True):
    """Somebody sent SIGTERM to the engine process and means the server: a service manager, or who looked for a name."""


class Died(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot go on; `message` says why. The process exits after it."""

    message: str
    blames_model: bool = False  # the engine has refused a model whose files are wrong; it has not failed itself


ToEngine = Generate | Score | Cancel
FromEngine = Ready | Step | Heartbeat | AskedToEnd | Died
