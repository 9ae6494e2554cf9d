"""What a client may say to POST /v1/completions, and what it means in the words of POST /generate.

The fields are OpenAI's, and those of vLLM's that say something /generate knows. Null stands for the default of any
field but the prompt. Knows no model, so ids are checked later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, Self

from pydantic import BeforeValidator, Field, PlainValidator, field_validator, model_validator
from pydantic_core import PydanticUseDefault

from server.dialects.generate.schema import MAX_BEST_OF, MAX_IDS, MAX_N, MAX_STOP_CHARS, MAX_TOP, LogitBias, Parameters
from server.dialects.inputs import Inputs, RequestId, TimeoutS, TokenId
from server.errors import InvalidField
from server.protocol.messages import Extras
from server.requests.prompts import num_inputs
from server.web.body import RequestBody

MAX_USER_CHARS = 256
SAME = (  # fields of /generate with the same name and meaning
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "best_of",
)
OUR_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "logprobs": "top_n_tokens"}
THEIR_NAMES = {"inputs": "prompt", **{ours: theirs for theirs, ours in OUR_NAMES.items()}}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _refuse_suffix(value: Any) -> NoReturn:
    raise InvalidField.of("suffix", value=value, allowed="this model only continues a text, leave it out")


Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)]
Stop = Annotated[Texts, BeforeValidator(_listed, json_schema_input_type=str | Texts)]
Suffix = Annotated[str, PlainValidator(_refuse_suffix, json_schema_input_type=None)]


class StreamOptions(RequestBody):
    """What a stream tells beside the text."""

    include_usage: bool = Field(default=False, description="end with an event of no choices that has the `usage`")


class CompletionRequest(RequestBody):
    """Body of POST /v1/completions. Null stands for the default of any field but the prompt.

    It samples at temperature 1 unless told otherwise, as OpenAI's does; /generate is greedy.
    """

    model: str | None = Field(default=None, description="the name in /v1/models (404 for another), or none")
    prompt: Inputs
    max_tokens: int = Field(
        default=16, ge=0, le=2**31 - 1, description="0 generates nothing: the prompt is scored, with echo and logprobs"
    )
    min_tokens: int = Field(
        default=0, ge=0, le=2**31 - 1, description="nothing ends the output before: no end id, no text of `stop`"
    )
    temperature: float = Field(default=1, ge=0, le=2, description="0 = greedy")
    top_p: float = Field(default=1, gt=0, le=1, description="keep the most probable tokens up to this share")
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1, description="keep the k most probable tokens; 0 or -1 = off")
    min_p: float = Field(default=0, ge=0, le=1, description="keep tokens of at least this share of the best one")
    repetition_penalty: float = Field(
        default=1, gt=0, description="divides (below 0 multiplies) logits of tokens seen in prompt or output; 1 = off"
    )
    frequency_penalty: float = Field(
        default=0, ge=-2, le=2, description="taken off a token's logit for each time it is in the output"
    )
    presence_penalty: float = Field(
        default=0, ge=-2, le=2, description="taken off a token's logit once it is in the output"
    )
    logit_bias: LogitBias | None = Field(
        default=None, description=f'added to logits, by token id ("17"); at most {MAX_IDS} entries'
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**64 - 1, description="drawn where not given; of several choices the next has seed + 1"
    )
    stop: Stop | None = Field(default=None, description="a text or texts that end the output; they are not part of it")
    stop_token_ids: list[TokenId] | None = Field(
        default=None, max_length=MAX_IDS, fail_fast=True, description="ids that end the output, without their text"
    )
    ignore_eos: bool = Field(default=False, description="go on after the model's own end")
    n: int = Field(default=1, ge=1, le=MAX_N, description="choices for each prompt, those of the first prompt first")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEST_OF,
        description="sequences to generate, of which the n with the highest mean log-probability are returned; n where "
        "not given; not in streams",
    )
    echo: bool = Field(default=False, description="begin each choice with the prompt, as its tokens read")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP,
        description="tell the log-probability of each token, and so many of the most probable ones in its place; with "
        "echo of those of the prompt too",
    )
    stream: bool = Field(default=False, description="answer with server-sent events, the last of which is [DONE]")
    stream_options: StreamOptions = StreamOptions()
    suffix: Suffix | None = Field(default=None, description="refused: this model only continues a text")
    user: str | None = Field(
        default=None, max_length=MAX_USER_CHARS, description="who asks, for the server's request log"
    )
    timeout_s: TimeoutS | None = Field(
        default=None, description="seconds after which the output ends as it is; the server's own limit if not set"
    )
    request_id: RequestId | None = Field(
        default=None, description="the request's name, for DELETE /requests/{id}; wins over the header X-Request-Id"
    )

    @field_validator(
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("frequency_penalty", "presence_penalty", "ignore_eos", "n", "echo", "stream", "stream_options"),
        mode="before",
    )
    @classmethod
    def _default(cls, value: Any) -> Any:
        if value is None:
            raise PydanticUseDefault
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_sequences()
        self._check_lengths()
        if self.stream_options.include_usage and not self.stream:
            raise InvalidField.of("stream_options", value={"include_usage": True}, allowed="it goes with stream: true")
        return self

    def _check_sequences(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise _refusal(self, "best_of", f"it should be at least n, which is {self.n}")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise _refusal(self, "best_of", "the best of several is known at their end only, leave out stream")
        if self.num_generated == 1 or (self.max_tokens and self.temperature):
            return
        why = "at temperature 0 they" if self.max_tokens else "without any max_tokens they"
        raise _refusal(self, "n" if self.n > 1 else "best_of", f"{why} would all be equal")

    def _check_lengths(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise _refusal(self, "min_tokens", f"it should be at most max_tokens, which is {self.max_tokens}")
        if not self.max_tokens and not self.scores_prompt:
            raise _refusal(self, "max_tokens", "it should be at least 1, or 0 with echo and logprobs")
        if sum(map(len, self.stop or ())) > MAX_STOP_CHARS:
            raise _refusal(self, "stop", f"at most {MAX_STOP_CHARS} characters in all")

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt are asked for."""
        return self.echo and self.logprobs is not None

    @property
    def num_generated(self) -> int:
        """Sequences for each prompt, if any token is to be generated."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_sequences(self) -> int:
        """How many the engine has to do with: those that are generated, and a scoring of each prompt."""
        each = (self.num_generated if self.max_tokens else 0) + self.scores_prompt
        return num_inputs(self.prompt) * each

    @property
    def parameters(self) -> Parameters:
        """The same in the words of /generate."""
        return Parameters(
            **{name: getattr(self, name) for name in SAME},
            max_new_tokens=self.max_tokens or 1,  # where it is 0, nothing is generated
            min_new_tokens=self.min_tokens,
            top_k=max(self.top_k, 0),
            top_n_tokens=self.logprobs or 0,
        )

    @property
    def extras(self) -> Extras:
        """What to tell of each token of the prompt beside its log-probability."""
        return Extras(num_top=self.logprobs or 0)


def _refusal(body: CompletionRequest, name: str, allowed: str) -> InvalidField:
    return InvalidField.of(name, value=getattr(body, name), allowed=allowed)


@contextmanager
def their_names() -> Iterator[None]:
    """Have complaints about a field of /generate name that of /v1/completions."""
    try:
        yield
    except InvalidField as error:
        ours = error.param or ""
        first, *rest = ours.removeprefix("parameters.").split(".")
        theirs = ".".join((THEIR_NAMES.get(first, first), *rest))
        raise InvalidField(theirs + error.message.removeprefix(ours), param=theirs) from None
