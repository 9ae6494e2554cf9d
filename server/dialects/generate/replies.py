"""What POST /generate says on success: typed structs that encode straight to JSON bytes. Knows no model and no HTTP."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from server.protocol.messages import Timings

FinishReason = Literal["length", "eos_token", "stop_sequence", "cancelled", "timeout", "shutdown"]


class TokenInfo(Struct, frozen=True, gc=False):
    """One token of the output. `text` is what became certain with it, so the texts joined are the output.

    In `top_tokens` it is a token that could have stood there, and `text` is that of its own bytes: part of a character
    is U+FFFD.
    """

    id: int
    text: str
    logprob: float | None  # nats, under the model's own distribution; null where `logprobs` is false
    special: bool


class PromptToken(Struct, frozen=True, gc=False):
    """One token of the prompt. The texts joined are the prompt."""

    id: int
    text: str
    logprob: float | None  # null for the first, and where the sequence ended before it was read


class Details(Struct, frozen=True):
    """How a sequence went."""

    finish_reason: FinishReason
    generated_tokens: int
    prompt_tokens: int
    seed: int  # gives this sequence again, alone
    matched_stop: str | int | None  # the stop string, or the id of stop_token_ids
    logprob_sum: float
    timings: Timings
    fingerprint: str
    prefill: list[PromptToken] | UnsetType = UNSET  # empty in plain replies, absent in streams, if not asked for
    tokens: list[TokenInfo] | UnsetType = UNSET  # plain replies only
    top_tokens: list[list[TokenInfo]] | UnsetType = UNSET  # for each token, best first; plain replies, if asked for


class GenerateEvent(Struct, frozen=True, gc=False):
    """One event of a stream. The last one of a sequence has `generated_text` and `details`.

    `token` is null only there, and only where the sequence ended between two tokens (cancelled, timeout, shutdown).
    """

    index: int  # from 1
    token: TokenInfo | None
    generated_text: str | None = None
    details: Details | None = None
    sequence: int | UnsetType = UNSET  # which entry of the plain reply's array, from 0
    top_tokens: list[TokenInfo] | UnsetType = UNSET  # best first; if asked for


class GenerateReply(Struct, frozen=True):
    """The plain reply to one input, or one of its entries where several are asked for."""

    generated_text: str
    details: Details | UnsetType = UNSET
