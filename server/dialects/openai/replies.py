"""The replies of POST /v1/completions and GET /v1/models, in OpenAI's format. Knows no model and no HTTP."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

CompletionFinish = Literal["stop", "length"]


class Logprobs(Struct, frozen=True):
    """Four lists with one entry for each token. The first token of a prompt has null log-probabilities.

    A token that is part of a character is named by its bytes, "bytes:\\xe2\\x82", so that no two tokens share a name.
    """

    tokens: list[str]
    token_logprobs: list[float | None]  # nats, under the model's own distribution
    top_logprobs: list[dict[str, float] | None]  # best first; the token itself is always among them
    text_offset: list[int]  # characters before the token in the choice's text


class Choice(Struct, frozen=True):
    """One continuation, or in a stream a new piece of it. In streams only its last piece has a finish_reason.

    "length" also stands for a deadline, a cancellation and a shutdown of the server.
    """

    index: int  # in the order of the prompts
    text: str
    logprobs: Logprobs | None = None
    finish_reason: CompletionFinish | None = None


class Usage(Struct, frozen=True):
    """Token counts of the whole request. Each prompt counts once; sequences that best_of drops count too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Struct, frozen=True):
    """A reply, or an event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int  # Unix time, seconds
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET  # in streams, if requested: null until the last event, which has no choices


class Model(Struct, frozen=True):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int  # start of the server, Unix time in seconds
    owned_by: str


class ModelList(Struct, frozen=True):
    """The list of served models, which has one entry."""

    object: Literal["list"]
    data: list[Model]
