"""What both processes set up first: the log, one JSON object a line on standard error, and garbage collection.

A request's text can reach the log only by way of an exception, whose message may quote it: so of an exception the log
has the type and the places it came through, never the message.
"""

import gc
import json
import logging
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

YOUNG_OBJECTS = 50_000  # before a look at the young ones; the default is 700, which a batch fills in a few steps
MAX_FRAMES = 40  # of one exception; an endless recursion has a thousand


class JsonLines(logging.Formatter):
    """`logging`'s records as JSON; what a caller passes as extra={"fields": {...}} becomes keys of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        error = record.exc_info[1] if record.exc_info else None
        message = record.getMessage()
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            # asyncio's further lines are a repr of the task, with the message of its exception
            "event": message if error is None else message.partition("\n")[0],
            **getattr(record, "fields", {}),
        }
        if error is not None:
            line["trace"] = trace(error)
        return json.dumps(line, ensure_ascii=False, default=str)


def trace(error: BaseException) -> list[str]:
    """The types of an exception and of those it came from, the first cause first, each after its innermost frames."""
    lines: list[str] = []
    _add_trace(error, lines=lines, seen=set())
    return lines


def _add_trace(error: BaseException, *, lines: list[str], seen: set[int]) -> None:
    seen.add(id(error))  # a chain of causes may be a ring
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and id(cause) not in seen:
        _add_trace(cause, lines=lines, seen=seen)
    walk = traceback.walk_tb(error.__traceback__)
    frames = traceback.StackSummary.extract(walk, limit=-MAX_FRAMES, lookup_lines=False)
    lines += [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    lines.append(f"{type(error).__module__}.{type(error).__qualname__}")
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        if id(part) not in seen:
            _add_trace(part, lines=lines, seen=seen)


def log_to_stderr() -> None:
    """Warnings of everyone, and what this package says of its requests."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("server").setLevel(logging.INFO)


def settle_garbage() -> None:
    """Call it once everything is loaded: no collection looks at what is there now, and each makes a shorter pause."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def package_version() -> str:
    """The version of allattn, as installed."""
    try:
        return version("allattn")
    except PackageNotFoundError:  # run from a tree that was not installed
        return "source"
