"""Encodes replies as JSON, plain and as server-sent events."""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

_ENCODER = msgspec.json.Encoder()


def encode_event(event: Struct) -> bytes:
    """Return a server-sent event: JSON in one data line."""
    return b"data: " + _ENCODER.encode(event) + b"\n\n"


def encode(reply: Struct | Sequence[Struct]) -> bytes:
    """Return JSON. Infinities and NaN become null."""
    return _ENCODER.encode(reply)
