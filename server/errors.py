"""The ways a request can fail, and the one body every failure is told in. Knows no HTTP library.

ServerError
├── RequestError            the client can mend it
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

# ruff: noqa: N818 - the names say what happened, as they read after `raise`

import json
import math
from typing import ClassVar

import msgspec


class ServerError(Exception):
    """A failure with a name the client can act on.

    `type` is one of the three words that text-generation-inference's clients know; `code` tells more exactly what
    happened.
    """

    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str]
    retry_after_s: float | None = None  # when the same request may succeed, where that is to be expected

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
    """The server asks for an API key; the request has none, or an unknown one."""

    status, code = 401, "unauthorized"


class NotFound(RequestError):
    """No such path."""

    status, code = 404, "not_found"


class ModelNotFound(RequestError):
    """No such model."""

    status, code = 404, "model_not_found"

    @classmethod
    def of(cls, given: str, *, name: str) -> "ModelNotFound":
        """Word the message. `name`: the model that there is."""
        return cls(f"model: {shown(given)} is not served here; there is {shown(name)}", param="model")


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    status, code = 405, "method_not_allowed"


class BodyTooLarge(RequestError):
    """More bytes than `max_body_bytes`."""

    status, code = 413, "body_too_large"


class InvalidField(RequestError):
    """A field is unknown or outside its range; the message names the field, its value and what is allowed."""

    status, code = 422, "invalid_field"

    @classmethod
    def of(cls, field: str, *, value: object, allowed: str) -> "InvalidField":
        """Word the message: `temperature: 3 is not allowed; a number from 0 to 2`."""
        return cls(f"{field}: {shown(value)} is not allowed; {allowed}", param=field)


class Overloaded(ServerError):
    """Nothing is wrong with the request; it may be sent again after `retry_after_s`."""

    type = "overloaded"
    retry_after_s = 1.0

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: a better guess than that of the class."""
        super().__init__(message, param=param)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """As many requests wait as `max_waiting` allows."""

    status, code = 429, "queue_full"


class Starting(Overloaded):
    """The engine has not run its first step yet."""

    status, code, retry_after_s = 503, "starting", 2.0


class Draining(Overloaded):
    """The server is about to end and takes no new work."""

    status, code, retry_after_s = 503, "draining", 5.0


class EngineDown(Overloaded):
    """The engine process has failed or does not answer."""

    status, code, retry_after_s = 503, "engine_down", 5.0


class RequestTimeout(ServerError):
    """The time that the request gave itself, or that the server gives all, has passed before there was an answer."""

    status, type, code = 408, "generation", "timeout"


class Cancelled(ServerError):
    """Somebody ended the request by its id before there was an answer."""

    status, type, code = 499, "generation", "cancelled"


class InternalError(ServerError):
    """A bug, or a sequence that the engine had to give up."""

    status, type, code = 500, "generation", "internal"


def shown(value: object) -> str:
    """`value` as it stood in the JSON of the request, cut to a length that fits a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return shorten(text)


def shorten(text: str) -> str:
    """Cut to a length that fits a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


class ErrorInfo(msgspec.Struct, frozen=True):
    """The part that OpenAI's clients read."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(msgspec.Struct, frozen=True):
    """One body that OpenAI's, text-generation-inference's and huggingface_hub's clients can all parse."""

    error: ErrorInfo
    error_type: str
    request_id: str


def error_reply(error: ServerError, *, request_id: str) -> ErrorReply:
    """The body of an error, streamed or not."""
    info = ErrorInfo(error.message, error.type, error.param, error.code)
    return ErrorReply(info, error_type=error.type, request_id=request_id)


def retry_headers(error: ServerError) -> dict[str, str]:
    """When to come back, in the two spellings clients look for: whole seconds, and milliseconds."""
    if error.retry_after_s is None:
        return {}
    seconds, milliseconds = math.ceil(error.retry_after_s), round(1000 * error.retry_after_s)
    return {"Retry-After": str(max(1, seconds)), "retry-after-ms": str(max(1, milliseconds))}
