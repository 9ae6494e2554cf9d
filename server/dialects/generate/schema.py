"""What a client may say to POST /generate. Knows no model, so ids are checked later."""

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from server.dialects.inputs import MAX_TOP, Inputs
from server.dialects.sampling import FilterFields, SamplingFields
from server.requests.prompts import is_list_of_inputs, num_inputs
from server.web.body import ENDS_AS_IT_IS, FieldError, RequestId, TimeoutS
from server.web.engine_request import EngineRequest


class Parameters(SamplingFields):
    """How to continue. Greedy unless temperature, top_k, top_p, min_p or typical_p is given or do_sample is true.

    Null means "not given", except for max_new_tokens.
    """

    path: ClassVar[str] = "parameters."
    min_field: ClassVar[str] = "min_new_tokens"
    max_field: ClassVar[str] = "max_new_tokens"
    top_field: ClassVar[str] = "top_n_tokens"

    max_new_tokens: int | None = Field(
        default=128, ge=1, le=2**31 - 1, description="null = until something else ends it, for streams only"
    )
    min_new_tokens: int = Field(
        default=0, ge=0, le=2**31 - 1, description="nothing ends the output before: no end id, no text of `stop`"
    )
    do_sample: bool | None = Field(default=None, description="true samples at temperature 1 unless another is given")
    return_full_text: bool = Field(default=False, description="begin generated_text with the prompt")
    truncate: int | None = Field(default=None, ge=1, description="read only the last n tokens of the prompt")
    details: bool = Field(default=False, description="add details to a plain reply; a stream always ends with them")
    decoder_input_details: bool = Field(default=False, description="add the prompt's tokens to the details")
    top_n_tokens: int = Field(
        default=0, ge=0, le=MAX_TOP, description="tell so many of the most probable tokens beside each one"
    )
    logprobs: bool = Field(
        default=True, description="false leaves `logprob` of generated tokens null, for readers that do not want it"
    )

    @property
    def is_greedy(self) -> bool:
        """The one documented rule."""
        if self.temperature is not None:
            return self.temperature == 0
        return not self.do_sample and not self.given_filters

    @model_validator(mode="after")
    def _samples_or_not(self) -> Self:
        if self.do_sample is False and self.given_filters:
            raise self.fault("do_sample", f"{self.given_filters[0]} asks for sampling, leave one of them out")
        if self.do_sample and self.temperature == 0:
            raise self.fault("do_sample", "temperature 0 is greedy, leave one of them out")
        if self.num_generated > 1 and self.is_greedy:
            name = "n" if self.n > 1 else "best_of"
            raise self.fault(name, "greedy sequences would all be equal; do_sample: true makes them differ")
        return self


# The fields that shape one text, for a command line or a form that asks for one: all of sampling, and the lengths.
ONE_TEXT_FIELDS = (
    *(name for name in SamplingFields.model_fields if name not in ("n", "best_of")),
    *("max_new_tokens", "min_new_tokens", "do_sample"),
)


def describe_numbers() -> list[dict[str, Any]]:
    """The numbers among ONE_TEXT_FIELDS with what a form needs to know of them, as JSON."""
    properties = Parameters.model_json_schema()["properties"]
    described = []
    for name in ONE_TEXT_FIELDS:
        schema = properties[name]
        kind = next((one for one in schema.get("anyOf", [schema]) if one.get("type") in ("integer", "number")), None)
        if kind is not None:
            limits = {"minimum": kind.get("minimum", kind.get("exclusiveMinimum")), "maximum": kind.get("maximum")}
            described.append(
                {
                    "name": name,
                    "description": schema["description"],
                    "type": kind["type"],
                    "default": schema["default"],
                    **limits,
                    "asks_for_sampling": name in FilterFields.model_fields,
                }
            )
    return described


class GenerateRequest(EngineRequest):
    """Body of POST /generate."""

    inputs: Inputs
    parameters: Parameters = Parameters()
    stream: bool = Field(default=False, description="answer with server-sent events, one a token")
    timeout_s: TimeoutS | None = Field(default=None, description=ENDS_AS_IT_IS)
    request_id: RequestId = None

    @model_validator(mode="after")
    def _fits_the_reply(self) -> Self:
        """Refuse what this kind of reply cannot hold, for it would be ignored."""
        asked = self.parameters
        if self.stream:
            if asked.num_generated > asked.n:
                raise self._fault("best_of", "the best of several is known at their end only, leave out stream")
            return self
        if asked.max_new_tokens is None:
            raise self._fault("max_new_tokens", "no limit is for streams only")
        only_in_details = {
            "decoder_input_details": asked.decoder_input_details,
            "top_n_tokens": asked.top_n_tokens > 0,
            "logprobs": "logprobs" in asked.model_fields_set,
        }
        for name, is_asked in only_in_details.items():
            if is_asked and not asked.details:
                raise self._fault(name, "it is part of the details, ask for them with details: true")
        return self

    def _fault(self, name: str, allowed: str) -> FieldError:
        return FieldError.of(f"parameters.{name}", value=getattr(self.parameters, name), allowed=allowed)

    @property
    def num_sequences(self) -> int:
        """Sequences to generate for all inputs."""
        return num_inputs(self.inputs) * self.parameters.num_generated

    @property
    def counted_field(self) -> str:
        """What asks for so many."""
        return "inputs" if self.parameters.num_generated == 1 else "inputs, each of n or best_of sequences"

    @property
    def has_list_reply(self) -> bool:
        """Whether the plain reply is an array."""
        return is_list_of_inputs(self.inputs) or self.parameters.n > 1


class GenerateStreamRequest(GenerateRequest):
    """Body of POST /generate_stream: the same, where only a stream may be asked for."""

    stream: bool = True

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if not self.stream:
            raise FieldError.of("stream", value=False, allowed="/generate_stream always streams, see /generate")
        return self
