"""The errors of requests, and the body in which a client receives them. Knows no HTTP library.

ServerError
├── RequestError            the client must change the request
│   ├── MalformedRequest    400
│   ├── Unauthorized        401
│   ├── NotFound            404
│   ├── ModelNotFound       404
│   ├── MethodNotAllowed    405
│   ├── BodyTooLarge        413
│   └── InvalidField        422
├── Overloaded              the same request may succeed later
│   ├── QueueFull           429
│   ├── Starting            503
│   ├── Draining            503
│   └── EngineDown          503
├── RequestTimeout          408
├── Cancelled               499
└── InternalError           500
"""

# ruff: noqa: N818 - a name without "Error" says what happened and reads well after `raise`

import json
import math
from typing import ClassVar

import msgspec


class ServerError(Exception):
    """Base of all errors that a client receives.

    `type` is one of three names that text-generation-inference's clients know; `code` names the exact error.
    """

    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str]
    retry_after_s: float | None = None  # when the same request may succeed, if it may

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class RequestError(ServerError, ValueError):
    """The request itself is wrong; sending it again will not help."""

    type = "validation"


class MalformedRequest(RequestError):
    """The request cannot be read."""

    status, code = 400, "malformed"


class Unauthorized(RequestError):
    """The server requires an API key, and the request has none or an unknown key."""

    status, code = 401, "unauthorized"


class NotFound(RequestError):
    """There is no such path, or no live request with this id."""

    status, code = 404, "not_found"


class ModelNotFound(RequestError):
    """The server does not serve this model."""

    status, code = 404, "model_not_found"

    @classmethod
    def of(cls, given: str, *, name: str) -> "ModelNotFound":
        """Make the error. `given`: the requested name; `name`: of the served model."""
        return cls(f"model: {shown(given)} is not served here; there is {shown(name)}", param="model")


class MethodNotAllowed(RequestError):
    """The path exists, but not with this method."""

    status, code = 405, "method_not_allowed"


class BodyTooLarge(RequestError):
    """The body has more bytes than `max_body_bytes`."""

    status, code = 413, "body_too_large"


class InvalidField(RequestError):
    """A field is unknown or outside its range; the message names the field, its value and what is allowed."""

    status, code = 422, "invalid_field"

    @classmethod
    def of(cls, field: str, *, value: object, allowed: str) -> "InvalidField":
        """Make the error: `temperature: 3 is not allowed; it should be at most 2`. `allowed`: what the field may be."""
        return cls(f"{field}: {shown(value)} is not allowed; {allowed}", param=field)


class Overloaded(ServerError):
    """The request is valid; the client may send it again after `retry_after_s`."""

    type = "overloaded"
    retry_after_s = 1.0

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: replaces the default of the class."""
        super().__init__(message, param=param)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """As many sequences or prompt tokens wait as the server allows."""

    status, code = 429, "queue_full"


class Starting(Overloaded):
    """The engine has not run its first step yet."""

    status, code, retry_after_s = 503, "starting", 2.0


class Draining(Overloaded):
    """The server is shutting down and accepts no new work."""

    status, code, retry_after_s = 503, "draining", 5.0


class EngineDown(Overloaded):
    """The engine process has failed or does not answer."""

    status, code, retry_after_s = 503, "engine_down", 5.0


class RequestTimeout(ServerError):
    """The time limit of the request or of the server passed before there was a reply."""

    status, type, code = 408, "generation", "timeout"


class Cancelled(ServerError):
    """A client cancelled the request by its id before there was a reply."""

    status, type, code = 499, "generation", "cancelled"


class InternalError(ServerError):
    """The server has a bug, or the engine gave up the sequence."""

    status, type, code = 500, "generation", "internal"


def shown(value: object) -> str:
    """Return `value` as JSON, shortened for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return shorten(text)


def shorten(text: str) -> str:
    """Return `text`, shortened for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


class ErrorInfo(msgspec.Struct, frozen=True):
    """The part of an error body that OpenAI's clients read."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(msgspec.Struct, frozen=True):
    """The body of an error, which clients of OpenAI, text-generation-inference and huggingface_hub can parse."""

    error: ErrorInfo
    error_type: str
    request_id: str


def error_reply(error: ServerError, *, request_id: str) -> ErrorReply:
    """Return the body of an error, for a plain response or a stream."""
    info = ErrorInfo(error.message, error.type, error.param, error.code)
    return ErrorReply(info, error_type=error.type, request_id=request_id)


def retry_headers(error: ServerError) -> dict[str, str]:
    """Return the headers that say when to retry, in whole seconds and in milliseconds: clients read either."""
    if error.retry_after_s is None:
        return {}
    seconds, milliseconds = math.ceil(error.retry_after_s), round(1000 * error.retry_after_s)
    return {"Retry-After": str(max(1, seconds)), "retry-after-ms": str(max(1, milliseconds))}
