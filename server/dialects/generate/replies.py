"""The replies and events of POST /generate. Knows no model and no HTTP."""

from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from server.protocol.messages import FinishReason, Timings
from server.requests.results import Ending, Generated, Output, OutputToken, ScoredToken


class PromptToken(Struct, frozen=True, gc=False):
    """One token of the prompt. The texts joined are the prompt."""

    id: int
    text: str
    logprob: float | None  # null for the first token, and for tokens that the sequence did not read before its end


class Details(Struct, frozen=True):
    """Counts, finish reason and times of a sequence."""

    finish_reason: FinishReason
    generated_tokens: int
    prompt_tokens: int
    seed: int  # a request of one sequence with this seed repeats it
    matched_stop: str | int | None  # the stop string, or the id from stop_token_ids
    logprob_sum: float
    timings: Timings
    fingerprint: str
    prefill: list[PromptToken] | UnsetType = UNSET  # if not requested: empty in plain replies, absent in streams
    tokens: list[OutputToken] | UnsetType = UNSET  # plain replies only
    top_tokens: list[list[OutputToken]] | UnsetType = UNSET  # best first, if requested; plain replies only


class GenerateEvent(Struct, frozen=True, gc=False):
    """One event of a stream. The last event of a sequence has `generated_text` and `details`.

    `token` is null only in the last event, if the sequence ended between two tokens (cancelled, timeout, shutdown).
    """

    index: int  # from 1
    token: OutputToken | None
    generated_text: str | None = None
    details: Details | None = None
    sequence: int | UnsetType = UNSET  # index in the array of the plain reply, from 0
    top_tokens: list[OutputToken] | UnsetType = UNSET  # best first, if requested


class GenerateReply(Struct, frozen=True):
    """The plain reply of one sequence."""

    generated_text: str
    details: Details | UnsetType = UNSET


class EventMaker:
    """Maker of the events of one sequence from its outputs."""

    def __init__(self, *, sequence: int | UnsetType, echo: str, logprobs: bool) -> None:
        """sequence: the index that the events carry. echo: the text at the start of generated_text."""
        self._sequence = sequence
        self._echo = echo
        self._logprobs = logprobs
        self._prefill: list[PromptToken] | UnsetType = UNSET

    def event(self, output: Output) -> GenerateEvent | None:
        """Return the event of an output; None for the prompt's output, which goes into the last event."""
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
    """Return the plain reply of one sequence. `details`, `logprobs` and `tops`: whether the reply has them."""
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
