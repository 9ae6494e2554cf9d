"""Begin a coroutine outside of any task: most of those that write to a socket have nothing to wait for."""

from collections.abc import Coroutine, Generator
from typing import Any


def begin(coroutine: Coroutine[Any, Any, None]) -> "Rest | None":
    """Run it to its end, or until it has to wait: then the rest of it, for a task to await. Raises what it raises."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return Rest(coroutine, waits_for=waits_for)


class Rest:
    """What is left of a coroutine that has been begun. Await it once."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], *, waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        """Hand on what the coroutine waits for, first of all what it was waiting for when it was begun."""
        waits_for = self._waits_for
        while True:
            failure: BaseException | None = None
            try:
                yield waits_for
            except BaseException as error:  # a cancellation, say: the coroutine's own affair
                failure = error
            try:
                waits_for = self._coroutine.send(None) if failure is None else self._coroutine.throw(failure)
            except StopIteration:
                return
