"""The body of a request: read within its limit, parsed and checked; a fault names the field. Knows no endpoint.

An unknown field is refused, so that nothing is accepted and ignored.
"""

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar, get_args

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from server.errors import BodyTooLarge, InvalidField, MalformedRequest, RequestError, shorten, shown

MAX_TIMEOUT_S = 86400
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
RANGED = ("greater_than", "less_than", "int_", "float_", "finite_number")  # pydantic's complaints about numbers


TimeoutS = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)]
ENDS_AS_IT_IS = "seconds after which the output ends as it is; the server's own limit if not set"


def _check_request_id(value: str) -> str:
    if not REQUEST_ID.fullmatch(value):
        raise PydanticCustomError("request_id", "it should be 1 to 128 printable ASCII characters, no spaces")
    return value


RequestId = Annotated[
    Annotated[
        str,
        AfterValidator(_check_request_id),
        Field(json_schema_extra={"minLength": 1, "maxLength": 128, "pattern": f"^{REQUEST_ID.pattern}$"}),
    ]
    | None,
    Field(description="the request's name, for DELETE /requests/{id}; wins over the header X-Request-Id"),
]


class FieldError(ValueError):
    """A fault that a validator of ours finds; `parse` knows where the validated value stands in the body."""

    def __init__(self, place: str, complaint: str) -> None:
        """place: of the fault below the validated value, "" for the value itself. complaint: of the field there."""
        super().__init__(complaint)
        self._place = place
        self._complaint = complaint

    @classmethod
    def of(cls, place: str, *, value: object, allowed: str) -> "FieldError":
        """Make the fault of a value that is not allowed."""
        return cls(place, f"{shown(value)} is not allowed; {allowed}")

    def told(self, path: Sequence[str]) -> InvalidField:
        """The fault as the client hears of it. `path`: where the validated value stands."""
        field = ".".join((*path, self._place)) if self._place else ".".join(path)
        return InvalidField(f"{field}: {self._complaint}", param=field)


class RequestBody(BaseModel):
    """What all bodies share: no unknown field, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Body = TypeVar("Body", bound=RequestBody)


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: as soon as more than `max_bytes` are announced or have arrived.
        MalformedRequest: the Content-Length is not a number.
    """
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal():
        raise MalformedRequest(f"Content-Length {announced!r} is not a number")
    too_large = BodyTooLarge(f"the body is larger than {max_bytes} bytes")
    if int(announced) > max_bytes:
        raise too_large
    chunks, arrived = [], 0
    async for chunk in request.stream():
        arrived += len(chunk)
        if arrived > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


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
    if kind == "value_error" and isinstance(fault := first["ctx"]["error"], FieldError):
        return fault.told(path)
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
