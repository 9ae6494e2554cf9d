"""Start a coroutine without a task, because most coroutines that write to a socket never wait."""

from collections.abc import Coroutine, Generator
from typing import Any


def begin(coroutine: Coroutine[Any, Any, None]) -> "Rest | None":
    """Run `coroutine` until it ends or waits; return the rest of it for a task to await, or None at its end.

    Raises what the coroutine raises.
    """
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return Rest(coroutine, waits_for=waits_for)


class Rest:
    """The part of a started coroutine that has not run yet. Await it once."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], *, waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        """Yield each object that the coroutine waits for, beginning with the one at which `begin` stopped."""
        waits_for = self._waits_for
        while True:
            failure: BaseException | None = None
            try:
                yield waits_for
            except BaseException as error:  # for example a cancellation: the coroutine handles it
                failure = error
            try:
                waits_for = self._coroutine.send(None) if failure is None else self._coroutine.throw(failure)
            except StopIteration:
                return
