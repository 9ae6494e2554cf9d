import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from server.runtime import JsonLines

log = logging.getLogger("server.somewhere")


class Lines(logging.Handler):
    """A log handler that keeps the lines that would be written to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        assert "\n" not in line
        self.lines.append(json.loads(line))


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    handler = Lines()
    logging.getLogger().addHandler(handler)
    yield handler.lines
    logging.getLogger().removeHandler(handler)


def fail(message: str) -> None:
    raise ValueError(message)


def test_a_record_is_one_line_with_its_fields_as_keys(lines):
    log.warning("two\n%s", "lines", extra={"fields": {"request_id": "a", "seconds": 0.5, "of": {1: fail}}})
    (line,) = lines
    assert (line["level"], line["logger"], line["event"]) == ("warning", "server.somewhere", "two\nlines")
    assert (line["request_id"], line["seconds"]) == ("a", 0.5)
    assert datetime.fromisoformat(line["time"]).utcoffset() is not None


def test_an_exception_is_logged_by_type_and_place_without_its_message(lines):
    try:
        fail("the secret prompt")
    except ValueError:
        log.exception("a bug")
    (line,) = lines
    *places, kind = line["trace"]
    assert kind == "builtins.ValueError"
    assert places[-1].startswith(__file__ + ":")
    assert places[-1].endswith(" fail")
    assert "secret" not in str(line)


def test_causes_and_groups_are_logged_without_their_messages(lines):
    def from_a_cause() -> None:
        try:
            fail("secret 1")
        except ValueError as error:
            raise KeyError("secret 2") from error

    try:
        try:
            from_a_cause()
        except KeyError as error:
            error.add_note("secret 3")
            raise ExceptionGroup("secret 4", [error, TypeError("secret 5")]) from None
    except ExceptionGroup:
        log.exception("a bug")
    kinds = [entry for entry in lines[0]["trace"] if entry.startswith("builtins.")]
    assert kinds == ["builtins.ExceptionGroup", "builtins.ValueError", "builtins.KeyError", "builtins.TypeError"]
    assert "secret" not in str(lines)


def test_an_exception_that_is_its_own_context_does_not_hold_the_log_up(lines):
    first, second = ValueError("secret"), KeyError("secret")
    first.__context__, second.__context__ = second, first
    log.error("a bug", exc_info=first)
    assert sorted(lines[0]["trace"]) == ["builtins.KeyError", "builtins.ValueError"]


def test_what_asyncio_says_of_a_lost_task_has_no_message_either(lines):
    async def lose_a_task() -> None:
        async def work() -> None:
            fail("the secret prompt")

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        del task

    asyncio.run(lose_a_task())
    (line,) = [line for line in lines if line["logger"] == "asyncio"]
    assert line["event"] == "Task exception was never retrieved"
    assert "secret" not in str(line)


def test_logging_outside_an_exception_has_no_trace(lines):
    assert sys.exc_info() == (None, None, None)
    log.error("said", exc_info=True)
    assert "trace" not in lines[0]


def test_an_endless_recursion_is_cut_to_its_innermost_frames(lines):
    def again() -> None:
        again()

    try:
        again()
    except RecursionError:
        log.exception("a bug")
    assert 10 < len(lines[0]["trace"]) < 100
