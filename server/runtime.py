"""Set-up of both processes: the log, one JSON object per line on standard error, and the garbage collector.

The message of an exception may quote a request, so the log has only the type and the stack frames of an exception. No
text of a request can reach the log in another way.
"""

import gc
import json
import logging
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

YOUNG_OBJECTS = 50_000  # allocations before a young collection; a batch reaches Python's default of 700 in a few steps
MAX_FRAMES = 40  # logged per exception; an endless recursion has a thousand


class JsonLines(logging.Formatter):
    """A formatter of log records as JSON. Fields passed as extra={"fields": {...}} become keys of the object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        error = record.exc_info[1] if record.exc_info else None
        message = record.getMessage()
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            # the later lines of asyncio's message show the task with its exception's message
            "event": message if error is None else message.partition("\n")[0],
            **getattr(record, "fields", {}),
        }
        if error is not None:
            line["trace"] = trace(error)
        return json.dumps(line, ensure_ascii=False, default=str)


def trace(error: BaseException) -> list[str]:
    """Return the types of an exception and its causes, the first cause first, each after its innermost frames."""
    lines: list[str] = []
    _add_trace(error, lines=lines, seen=set())
    return lines


def _add_trace(error: BaseException, *, lines: list[str], seen: set[int]) -> None:
    seen.add(id(error))  # a chain of causes may have a cycle
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
    """Log warnings of all packages and requests of this server to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("server").setLevel(logging.INFO)


def settle_garbage() -> None:
    """Exempt all present objects from garbage collection, for shorter pauses. Call it once everything is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def package_version() -> str:
    """Return the installed version of allattn, or "source"."""
    try:
        return version("allattn")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "source"
