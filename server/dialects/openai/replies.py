"""What POST /v1/completions and GET /v1/models say on success, in OpenAI's shapes. Knows no model and no HTTP."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

CompletionFinish = Literal["stop", "length"]


class Logprobs(Struct, frozen=True):
    """Four lists of one length, an entry a token. The first token of a prompt has null for its figures.

    A token that is part of a character is named by its bytes, "bytes:\\xe2\\x82", so that no two names are the same.
    """

    tokens: list[str]
    token_logprobs: list[float | None]  # nats, under the model's own distribution
    top_logprobs: list[dict[str, float] | None]  # best first; the token itself is always among them
    text_offset: list[int]  # characters of the choice's text before the token


class Choice(Struct, frozen=True):
    """One continuation, or in a stream what there is more of one. In streams all but the last have no finish_reason.

    "length" is also what was cut off by a deadline, a cancellation or the end of the server.
    """

    index: int  # the n of the first prompt first
    text: str
    logprobs: Logprobs | None = None
    finish_reason: CompletionFinish | None = None


class Usage(Struct, frozen=True):
    """Tokens of the whole request; each prompt counts once, and so do sequences that best_of left out."""

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
    usage: Usage | UnsetType | None = UNSET  # in streams if asked for: null, and at last with no choices


class Model(Struct, frozen=True):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int  # Unix time, seconds: when the server began
    owned_by: str


class ModelList(Struct, frozen=True):
    """All models there are: one."""

    object: Literal["list"]
    data: list[Model]
