"""What a client may say: the bodies of requests, checked as they are read. Knows no model, so ids are checked later.

A field that is not here is refused, so nothing that is accepted is ignored. Where null is allowed it means "not given",
except for max_new_tokens.
"""

import secrets
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic.fields import FieldInfo

from server.errors import InvalidField, MalformedRequest, RequestError

MAX_STOP_CHARS = 65536  # of all stop strings together; building their automaton takes about 1 us a character
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _form_of_inputs(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    return {str: "texts", int: "ids", list: "batch"}.get(type(first))


InputsValue = str | list[str] | list[int] | list[list[int]]
Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
    | Annotated[list[TokenId], Field(fail_fast=True), Tag("ids")]
    | Annotated[list[Annotated[list[TokenId], Field(fail_fast=True)]], Field(fail_fast=True), Tag("batch")],
    Discriminator(
        _form_of_inputs,
        custom_error_type="inputs",
        custom_error_message="it should be a text, a list of token ids, or a list of one or more of either",
    ),
    Field(description="a text or a list of token ids; or a list of either, answered by an array in the same order"),
]

Prefix = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[TokenId, Tag("id")],
    Discriminator(
        lambda value: {str: "text", int: "id"}.get(type(value)),
        custom_error_type="prefix",
        custom_error_message="it should be a text or a token id",
    ),
]


class RequestBody(BaseModel):
    """What all bodies share: no unknown field, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Parameters(RequestBody):
    """How to continue. Greedy unless temperature, top_k, top_p or min_p is given or do_sample is true."""

    max_new_tokens: int | None = Field(
        default=128, ge=1, le=2**31 - 1, description="null = until something else ends it, for streams only"
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 = greedy; 1 where sampling and not given"
    )
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="keep the k most probable tokens; 0 = off")
    top_p: float | None = Field(default=None, gt=0, le=1, description="keep the most probable tokens up to this share")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="keep tokens of at least this share of the best one"
    )
    seed: int | None = Field(default=None, ge=0, le=2**64 - 1, description="drawn where not given; reported in details")
    do_sample: bool | None = Field(default=None, description="true samples at temperature 1 unless another is given")
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, description="texts that end the output; they are not part of it"
    )
    stop_token_ids: list[TokenId] | None = Field(
        default=None, description="ids that end the output; without their text"
    )
    ignore_eos: bool = Field(default=False, description="go on after the model's own end")
    return_full_text: bool = Field(default=False, description="begin generated_text with the prompt")
    truncate: int | None = Field(default=None, ge=1, description="read only the last n tokens of the prompt")
    details: bool = Field(default=False, description="add details to a plain reply; a stream always ends with them")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        asked = [name for name in ("temperature", "top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.do_sample is False and asked:
            raise InvalidField.of(
                "parameters.do_sample", value=False, allowed=f"{asked[0]} asks for sampling, leave one of them out"
            )
        if self.do_sample and self.temperature == 0:
            raise InvalidField.of(
                "parameters.do_sample", value=True, allowed="temperature 0 is greedy, leave one of them out"
            )
        if sum(map(len, self.stop or ())) > MAX_STOP_CHARS:
            raise InvalidField.of(
                "parameters.stop", value=self.stop, allowed=f"at most {MAX_STOP_CHARS} characters in all"
            )
        return self

    @property
    def is_greedy(self) -> bool:
        """The one documented rule."""
        if self.temperature is not None:
            return self.temperature == 0
        return not self.do_sample and self.top_k is None and self.top_p is None and self.min_p is None

    def draw_seed(self) -> int:
        """The seed of one sequence: the client's, or a new one of 53 bits, which survives readers that hold doubles."""
        return secrets.randbits(53) if self.seed is None else self.seed


class GenerateRequest(RequestBody):
    """Body of POST /generate."""

    inputs: Inputs
    parameters: Parameters = Parameters()
    stream: bool = Field(default=False, description="answer with server-sent events, one a token")


class ScoreRequest(RequestBody):
    """Body of POST /score."""

    inputs: Inputs
    prefix: Prefix | None = Field(
        default=None,
        description="a text or a token id that is read before each input, so that its first token has a score",
    )
    return_: list[Literal["tokens"]] = Field(
        default=[], alias="return", description="tokens: every token's own figures"
    )


Body = TypeVar("Body", bound=RequestBody)


def parse(body: bytes, *, model: type[Body]) -> Body:
    """Read a request body.

    Raises:
        MalformedRequest: not JSON.
        InvalidField: a field is unknown, missing or outside its range.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error, model=model) from None


def _request_error(error: ValidationError, *, model: type[BaseModel]) -> RequestError:
    """The first complaint of pydantic in our words."""
    first = error.errors(include_url=False)[0]
    kind, path = first["type"], [str(part) for part in first["loc"]]
    if kind == "value_error" and isinstance(own := first["ctx"]["error"], RequestError):
        return own
    if kind == "json_invalid":
        return MalformedRequest(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if path and path[0] in ("inputs", "prefix"):
        del path[1:2]  # which of the forms was tried
    owner, name = (Parameters if path[:1] == ["parameters"] and len(path) > 1 else model), path[-1] if path else ""
    field = ".".join(path) or "body"
    if kind == "extra_forbidden":
        known = ", ".join(info.alias or key for key, info in owner.model_fields.items())
        return InvalidField(f"{field}: unknown field; there are {known}", param=field)
    if kind == "missing":
        return InvalidField(f"{field}: missing", param=field)
    allowed = first["msg"] if "should" not in first["msg"] else "it should" + first["msg"].partition("should")[2]
    if kind.startswith(("greater_than", "less_than")) and name in owner.model_fields:
        allowed = _bounds(owner.model_fields[name])
    return InvalidField.of(field, value=first["input"], allowed=allowed)


def _bounds(field: FieldInfo) -> str:
    """The whole range of a number, where pydantic names only the side that was left."""
    words = {"ge": "at least", "gt": "more than", "le": "at most"}
    sides = [f"{words[key]} {getattr(side, key)}" for side in field.metadata for key in words if hasattr(side, key)]
    return "it should be " + " and ".join(sides)
