"""The choices of a completion: texts and log-probabilities in OpenAI's shapes, plain and as events. Knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from model.tokenizer import Tokenizer
from server.dialects.openai.logprobs import LogprobLister, joined
from server.dialects.openai.replies import Choice, Completion, CompletionFinish, Logprobs, Usage
from server.protocol.json import encode_event
from server.protocol.messages import FinishReason
from server.requests.results import Generated, Output, ScoredToken

FINISH: dict[FinishReason, CompletionFinish] = {"eos_token": "stop", "stop_sequence": "stop"}  # all else cut it off


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all replies and events of a request have in common."""

    id: str
    created: int  # Unix time, seconds
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    lists_logprobs: bool
    usage: UnsetType | None = UNSET  # of the events before the last one: null where the usage is asked for

    def completion(self, choices: list[Choice], *, usage: Usage | UnsetType | None = UNSET) -> Completion:
        """A reply, or an event of a stream."""
        return Completion(self.id, "text_completion", self.created, self.model, self.fingerprint, choices, usage)


@dataclass(frozen=True)
class PromptPart:
    """What a choice says of its prompt."""

    text: str = ""
    logprobs: Logprobs | None = None

    @classmethod
    def of(cls, text: str, *, scored: Sequence[ScoredToken] | None, tokenizer: Tokenizer) -> "PromptPart":
        """The part of an echoed prompt; `scored`: its tokens, if they are listed."""
        if scored is None:
            return cls(text)
        lister = LogprobLister(tokenizer)
        for token in scored:
            lister.add(token, top=token.top or ())
        return cls(text, lister.take())


def scored_choice(index: int, prompt: PromptPart) -> Choice:
    """The choice of a prompt that was only scored."""
    return Choice(index, prompt.text, prompt.logprobs, finish_of("length"))


def plain_choice(index: int, generated: Generated, *, prompt: PromptPart, shape: Shape) -> Choice:
    """The choice of a plain reply."""
    text, finish = prompt.text + generated.ending.text, finish_of(generated.ending.finish_reason)
    if not shape.lists_logprobs:
        return Choice(index, text, None, finish)
    lister = LogprobLister(shape.tokenizer, offset=len(prompt.text))
    for token, top in zip(generated.tokens, generated.tops or [[]] * len(generated.tokens), strict=True):
        lister.add(token, top=top)
    logprobs = lister.take() if prompt.logprobs is None else joined(prompt.logprobs, lister.take())
    return Choice(index, text, logprobs, finish)


class ChoiceEvents:
    """Turns the outputs of one sequence into framed events of its choice."""

    def __init__(self, index: int, *, echo: str | None, shape: Shape) -> None:
        """echo: the text of the prompt, if it is echoed."""
        self._index = index
        self._echo = echo
        self._shape = shape
        self._lister = LogprobLister(shape.tokenizer, offset=len(echo or "")) if shape.lists_logprobs else None
        self._num_sent = 0  # characters of the output

    def of_prompt(self, scored: Sequence[ScoredToken] | None) -> bytes:
        """The event of the echoed prompt, after which the generated tokens come."""
        assert self._echo is not None
        prompt = PromptPart.of(self._echo, scored=scored, tokenizer=self._shape.tokenizer)
        return self._framed(Choice(self._index, prompt.text, prompt.logprobs))

    def of_output(self, output: Output) -> bytes:
        """What an output adds. The last one may have text that is in no token."""
        if output.prompt is not None:
            return self.of_prompt(output.prompt)
        text = "" if output.token is None else output.token.text
        if output.ending is not None:
            text = output.ending.text[self._num_sent :]
        self._num_sent += len(text)
        logprobs = None
        if self._lister is not None and output.token is not None:
            self._lister.add(output.token, top=output.top or ())
            logprobs = self._lister.take()
        finish = None if output.ending is None else finish_of(output.ending.finish_reason)
        return self._framed(Choice(self._index, text, logprobs, finish))

    def _framed(self, choice: Choice) -> bytes:
        return encode_event(self._shape.completion([choice], usage=self._shape.usage))


def finish_of(reason: FinishReason) -> CompletionFinish:
    """OpenAI's word for the end of a sequence."""
    return FINISH.get(reason, "length")
