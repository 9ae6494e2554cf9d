"""What a client may say to POST /v1/completions.

The fields are OpenAI's, and those of vLLM's that say something /generate knows. Null stands for the default of any
field but the prompt. Knows no model, so ids are checked later.
"""

from typing import Annotated, Any, ClassVar, NoReturn, Self

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticUseDefault

from server.dialects.inputs import MAX_TOP, Inputs
from server.dialects.sampling import SamplingFields, Stop
from server.protocol.messages import Extras
from server.requests.prompts import num_inputs
from server.web.body import ENDS_AS_IT_IS, FieldError, RequestBody, RequestId, TimeoutS
from server.web.engine_request import EngineRequest

MAX_USER_CHARS = 256


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _refuse_suffix(value: Any) -> NoReturn:
    raise FieldError.of("", value=value, allowed="this model only continues a text, leave it out")


StopOrStops = Annotated[Stop, BeforeValidator(_listed, json_schema_input_type=str | Stop)]
Suffix = Annotated[str, PlainValidator(_refuse_suffix, json_schema_input_type=None)]


class StreamOptions(RequestBody):
    """What a stream tells beside the text."""

    include_usage: bool = Field(default=False, description="end with an event of no choices that has the `usage`")


class CompletionRequest(SamplingFields, EngineRequest):
    """Body of POST /v1/completions. Null stands for the default of any field but the prompt.

    It samples at temperature 1 unless told otherwise, as OpenAI's does; /generate is greedy.
    """

    min_field: ClassVar[str] = "min_tokens"
    max_field: ClassVar[str] = "max_tokens"
    top_field: ClassVar[str] = "logprobs"

    model: str | None = Field(default=None, description="the name in /v1/models (404 for another), or none")
    prompt: Inputs
    max_tokens: int = Field(
        default=16, ge=0, le=2**31 - 1, description="0 generates nothing: the prompt is scored, with echo and logprobs"
    )
    min_tokens: int = Field(
        default=0, ge=0, le=2**31 - 1, description="nothing ends the output before: no end id, no text of `stop`"
    )
    temperature: float = Field(default=1, ge=0, le=2, description="0 = greedy")
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1, description="keep the k most probable tokens; 0 or -1 = off")
    stop: StopOrStops | None = Field(
        default=None, description="a text or texts that end the output; they are not part of it"
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
    timeout_s: TimeoutS | None = Field(default=None, description=ENDS_AS_IT_IS)
    request_id: RequestId = None

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if value is None and not cls.model_fields[info.field_name].is_required():
            raise PydanticUseDefault
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_sequences()
        if not self.max_tokens and not self.scores_prompt:
            raise self.fault("max_tokens", "it should be at least 1, or 0 with echo and logprobs")
        if self.stream_options.include_usage and not self.stream:
            raise FieldError.of("stream_options", value={"include_usage": True}, allowed="it goes with stream: true")
        return self

    def _check_sequences(self) -> None:
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise self.fault("best_of", "the best of several is known at their end only, leave out stream")
        if self.num_generated == 1 or (self.max_tokens and self.temperature):
            return
        why = "at temperature 0 they" if self.max_tokens else "without any max_tokens they"
        raise self.fault("n" if self.n > 1 else "best_of", f"{why} would all be equal")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken at every place."""
        return self.temperature == 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt are asked for."""
        return self.echo and self.logprobs is not None

    @property
    def num_sequences(self) -> int:
        """How many the engine has to do with: generated ones, or a scoring of each prompt where none is."""
        return num_inputs(self.prompt) * (self.num_generated if self.max_tokens else 1)

    @property
    def counted_field(self) -> str:
        """What asks for so many."""
        return "prompt"

    @property
    def prompt_extras(self) -> Extras | None:
        """What to tell of each token of the prompt, if anything."""
        return Extras(num_top=self.logprobs or 0) if self.scores_prompt else None
