"""What POST /generate says on success: typed structs that encode straight to JSON bytes. Knows no model and no HTTP."""

from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from server.protocol.messages import FinishReason, Timings
from server.requests.results import Ending, Generated, Output, OutputToken, ScoredToken


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
    tokens: list[OutputToken] | UnsetType = UNSET  # plain replies only
    top_tokens: list[list[OutputToken]] | UnsetType = UNSET  # for each token, best first; plain replies, if asked for


class GenerateEvent(Struct, frozen=True, gc=False):
    """One event of a stream. The last one of a sequence has `generated_text` and `details`.

    `token` is null only there, and only where the sequence ended between two tokens (cancelled, timeout, shutdown).
    """

    index: int  # from 1
    token: OutputToken | None
    generated_text: str | None = None
    details: Details | None = None
    sequence: int | UnsetType = UNSET  # which entry of the plain reply's array, from 0
    top_tokens: list[OutputToken] | UnsetType = UNSET  # best first; if asked for


class GenerateReply(Struct, frozen=True):
    """The plain reply to one input, or one of its entries where several are asked for."""

    generated_text: str
    details: Details | UnsetType = UNSET


class EventMaker:
    """Turns the outputs of one sequence into its events."""

    def __init__(self, *, sequence: int | UnsetType, echo: str, logprobs: bool) -> None:
        """sequence: the number that the events carry. echo: what generated_text begins with."""
        self._sequence = sequence
        self._echo = echo
        self._logprobs = logprobs
        self._prefill: list[PromptToken] | UnsetType = UNSET

    def event(self, output: Output) -> GenerateEvent | None:
        """The event of an output; None for the prompt, which the last event tells."""
        if output.prompt is not None:
            self._prefill = _prefill(output.prompt)
            return None
        token = output.token if self._logprobs else _without_logprob(output.token)
        tops = UNSET if output.top is None else output.top
        if output.ending is None:
            return GenerateEvent(output.index, token, None, None, self._sequence, tops)
        details = _details(output.ending, prefill=self._prefill)
        text = self._echo + output.ending.text
        return GenerateEvent(output.index, token, text, details, self._sequence, tops)


def plain_reply(generated: Generated, *, echo: str, details: bool, logprobs: bool, tops: bool) -> GenerateReply:
    """The plain reply of one sequence; `details`, `logprobs` and `tops` as they were asked for."""
    text = echo + generated.ending.text
    if not details:
        return GenerateReply(text)
    tokens = generated.tokens if logprobs else [replace(token, logprob=None) for token in generated.tokens]
    return GenerateReply(
        text,
        replace(
            _details(generated.ending, prefill=_prefill(generated.prompt or ())),
            tokens=tokens,
            top_tokens=generated.tops if tops else UNSET,
        ),
    )


def _details(ending: Ending, *, prefill: list[PromptToken] | UnsetType) -> Details:
    return Details(
        finish_reason=ending.finish_reason,
        generated_tokens=ending.num_tokens,
        prompt_tokens=ending.num_prompt_tokens,
        seed=ending.seed,
        matched_stop=ending.matched_stop,
        logprob_sum=ending.logprob_sum,
        timings=ending.timings,
        fingerprint=ending.fingerprint,
        prefill=prefill,
    )


def _prefill(prompt: Sequence[ScoredToken]) -> list[PromptToken]:
    return [PromptToken(token.id, token.text, token.logprob) for token in prompt]


def _without_logprob(token: OutputToken | None) -> OutputToken | None:
    return None if token is None else replace(token, logprob=None)
