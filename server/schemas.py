"""What a client may say: the bodies of requests, checked as they are read. Knows no model, so ids are checked later.

Here is what all bodies share, and how a fault of any is worded. An unknown field is refused, so that nothing is
accepted and ignored.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from server.errors import InvalidField, MalformedRequest, RequestError, shorten

MAX_TIMEOUT_S = 86400
RANGED = ("greater_than", "less_than", "int_", "float_", "finite_number")  # pydantic's complaints about numbers
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TimeoutS = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)]


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


def _check_request_id(value: str) -> str:
    if not REQUEST_ID.fullmatch(value):
        raise PydanticCustomError("request_id", "it should be 1 to 128 printable ASCII characters, no spaces")
    return value


RequestId = Annotated[
    str,
    AfterValidator(_check_request_id),
    Field(json_schema_extra={"minLength": 1, "maxLength": 128, "pattern": f"^{REQUEST_ID.pattern}$"}),
]


class RequestBody(BaseModel):
    """What all bodies share: no unknown field, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Body = TypeVar("Body", bound=RequestBody)


def parse(body: bytes, *, model: type[Body]) -> Body:
    """Read a request body.

    Raises:
        MalformedRequest: not JSON.
        InvalidField: a field is unknown, missing or outside its range.
    """
    _check_names(body, model=model)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error, model=model) from None


def _check_names(body: bytes | msgspec.Raw, *, model: type[BaseModel], path: str = "") -> None:
    """Refuse the first unknown field, before pydantic, which would collect them all: a million take it seconds.

    What is no object, or no JSON, is left to pydantic.
    """
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return
    known = {info.alias or name: info for name, info in model.model_fields.items()}
    for name, value in given.items():
        field = path + shorten(name)
        if name not in known:
            raise InvalidField(f"{field}: unknown field; there are {', '.join(known)}", param=field)
        inner = known[name].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            _check_names(value, model=inner, path=f"{field}.")


def _request_error(error: ValidationError, *, model: type[BaseModel]) -> RequestError:
    """The first complaint of pydantic in our words."""
    first = error.errors(include_url=False)[0]
    kind, path = first["type"], [str(part) for part in first["loc"]]
    if kind == "value_error" and isinstance(own := first["ctx"]["error"], RequestError):
        return own
    if kind == "json_invalid":
        return MalformedRequest(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if path and path[0] in ("inputs", "prompt", "prefix"):
        del path[1:2]  # which of the forms was tried
    owner, name = _owner(model, path), path[-1] if path else ""
    field = ".".join(path) or "body"
    if kind == "missing":
        return InvalidField(f"{field}: missing", param=field)
    allowed = first["msg"] if "should" not in first["msg"] else "it should" + first["msg"].partition("should")[2]
    if name in owner.model_fields and kind.startswith(RANGED):
        allowed = _bounds(owner.model_fields[name]) or allowed
    return InvalidField.of(field, value=first["input"], allowed=allowed)


def _owner(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The model whose field the last part of `path` is, or would be."""
    for part in path[:-1]:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return model


def _bounds(field: FieldInfo) -> str:
    """The whole range of a number, where pydantic names at most the side that was left; "" where there is none."""
    words = {"ge": "at least", "gt": "more than", "le": "at most"}
    inner = [part for hint in get_args(field.annotation) for part in get_args(hint) if isinstance(part, FieldInfo)]
    limits = [limit for info in (field, *inner) for limit in info.metadata]
    sides = [f"{words[key]} {getattr(limit, key)}" for limit in limits for key in words if hasattr(limit, key)]
    return "it should be " + " and ".join(sides) if sides else ""
