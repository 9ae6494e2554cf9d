"""The mailbox between the link and the one coroutine that answers a client."""

import asyncio
from collections.abc import Callable

from server.protocol.messages import Ended, EngineFinish, Scores, Timings, Token

Message = Token | Scores | Ended
Sink = Callable[[Token], bool]
_NO_TIMINGS = Timings(0.0, 0.0, 0.0)


class Stream:
    """The messages of one sequence in order; the last one is its Ended. Has a single consumer.

    This is not a queue: the consumer takes all messages at once, and so does more in a turn the further it is behind. A
    consumer that leaves more than `max_behind` messages unread loses them; its ending is then an error.
    """

    def __init__(self, *, max_behind: int) -> None:
        self._max_behind = max_behind
        self._unread: list[Message] = []
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._complete = False  # it holds, or has given, its ending

    def put(self, message: Message) -> bool:
        """Add a message. Returns False if the stream takes no more: it is complete, or has just overflowed."""
        if self._complete:
            return False
        if self._sink is not None and self._pour(self._sink, message):
            return True
        ending = isinstance(message, Ended)
        if overflowed := len(self._unread) >= self._max_behind and not ending:
            why = f"the client reads too slowly: {len(self._unread)} events were unread"
            self._unread.clear()
            message = untimed_ending(message.sequence, "error", error=why)
        self._unread.append(message)
        self._complete = ending or overflowed
        self.wake()
        return not overflowed

    def wake(self) -> None:
        """Let the consumer go on, whether it waits in `take` or in `pour`."""
        self._sink = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Message]:
        """Returns all messages that are there, at least one. Must not be called after it has returned the ending."""
        while not self._unread:
            await self._arrival()
        messages, self._unread = self._unread, []
        return messages

    async def pour(self, sink: Sink) -> None:
        """Call `sink` with each token in the very turn in which it comes, without waking a task, which costs the most.

        Returns at another message, at a token that the sink refuses, or at `wake`. Raises what the sink raises.
        """
        if not self._unread:
            self._sink = sink
            await self._arrival()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Message:
        """Returns one message; slower than `take`."""
        while not self._unread:
            if self._complete:
                raise StopAsyncIteration
            await self._arrival()
        return self._unread.pop(0)

    def _pour(self, sink: Sink, message: Message) -> bool:
        try:
            return isinstance(message, Token) and sink(message)
        except Exception as error:  # it is the consumer's, not the caller's
            self._sink = None
            assert self._waiter is not None
            if not self._waiter.done():
                self._waiter.set_exception(error)
            return True

    def _arrival(self) -> asyncio.Future[None]:
        """Returns a future that is done at the next message; a coroutine would cost more, once a token."""
        assert not self._complete, "nothing comes after the ending"
        assert self._waiter is None or self._waiter.done(), "a stream has one consumer"
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter


def untimed_ending(sequence: str, finish_reason: EngineFinish, *, error: str = "") -> Ended:
    """Return an ending without timings, which only the engine knows."""
    return Ended(sequence, finish_reason, _NO_TIMINGS, error)
