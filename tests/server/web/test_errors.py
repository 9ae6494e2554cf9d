"""Tests of errors: when a client should come back, and the tree of error classes."""

import re

import pytest

from server import errors
from server.errors import (
    Cancelled,
    EngineDown,
    InternalError,
    QueueFull,
    RequestTimeout,
    ServerError,
    Unauthorized,
    retry_headers,
)


@pytest.mark.parametrize(
    ("error", "seconds", "milliseconds"),
    [
        (QueueFull("full", retry_after_s=0.35), "1", "350"),
        (QueueFull("full", retry_after_s=2.07), "3", "2070"),
        (QueueFull("full", retry_after_s=0), "1", "1"),
        (QueueFull("full"), "1", "1000"),
        (EngineDown("down"), "5", "5000"),
    ],
)
def test_when_to_come_back_is_told_in_whole_seconds_and_in_milliseconds(error, seconds, milliseconds):
    assert retry_headers(error) == {"Retry-After": seconds, "retry-after-ms": milliseconds}


@pytest.mark.parametrize(
    ("error", "status"), [(RequestTimeout, 408), (Unauthorized, 401), (Cancelled, 499), (InternalError, 500)]
)
def test_what_time_alone_does_not_mend_names_no_time(error, status):
    assert error.status == status
    assert retry_headers(error("no")) == {}


def test_every_error_has_a_type_that_clients_know_and_its_place_in_the_tree():
    def leaves(kind: type[ServerError]) -> list[type[ServerError]]:
        return [leaf for one in kind.__subclasses__() for leaf in leaves(one)] or [kind]

    drawn = dict(re.findall(r"── (\w+) +(\d{3})$", errors.__doc__ or "", flags=re.MULTILINE))
    assert drawn == {leaf.__name__: str(leaf.status) for leaf in leaves(ServerError)}
    assert all(leaf.type in ("validation", "generation", "overloaded") for leaf in leaves(ServerError))
    assert len({leaf.code for leaf in leaves(ServerError)}) == len(drawn)
