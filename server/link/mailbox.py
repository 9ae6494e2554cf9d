"""The mailbox between the link and the one coroutine that answers a client."""

import asyncio
from collections.abc import Callable

from server.protocol.messages import Ended, EngineFinish, Scores, Timings, Token

Message = Token | Scores | Ended
Sink = Callable[[Token], bool]
_NO_TIMINGS = Timings(0.0, 0.0, 0.0)


class Stream:
    """The messages of one sequence, in order, the last of which is its one Ended. For a single consumer.

    Not a queue: the consumer takes all that is there at once, so that it does more per turn the further it is behind.
    One that has left more than `max_behind` messages unread loses them and gets an error for an ending instead.
    """

    def __init__(self, *, max_behind: int) -> None:
        self._max_behind = max_behind
        self._unread: list[Message] = []
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._complete = False  # the ending is there

    def put(self, message: Message) -> bool:
        """Hand on what the engine said. False where nothing more is wanted: it is complete, or has just overflowed."""
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
        """Let the consumer go on, whatever it waits for here."""
        self._sink = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Message]:
        """All that is there, at least one message. Not to be called after the ending has been taken."""
        while not self._unread:
            await self._arrival()
        messages, self._unread = self._unread, []
        return messages

    async def pour(self, sink: Sink) -> None:
        """Give each token to `sink` in the very turn in which it comes: no task is woken for it, which costs the most.

        Returns once something else is there, or a token that the sink did not take, or at `wake`; raises what the sink
        raises.
        """
        if not self._unread:
            self._sink = sink
            await self._arrival()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Message:
        """One message at a time; for those who can afford it."""
        while not self._unread:
            if self._complete:
                raise StopAsyncIteration
            await self._arrival()
        return self._unread.pop(0)

    def _pour(self, sink: Sink, message: Message) -> bool:
        try:
            return isinstance(message, Token) and sink(message)
        except Exception as error:  # the consumer's; whoever puts has nothing to do with it
            self._sink = None
            assert self._waiter is not None
            if not self._waiter.done():
                self._waiter.set_exception(error)
            return True

    def _arrival(self) -> asyncio.Future[None]:
        """Done once there is something; a future and not a coroutine, for it is waited for once a token."""
        assert not self._complete, "nothing comes after the ending"
        assert self._waiter is None or self._waiter.done(), "a stream has one consumer"
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter


def untimed_ending(sequence: str, finish_reason: EngineFinish, *, error: str = "") -> Ended:
    """An ending that does not come from the engine, which alone knows the timings."""
    return Ended(sequence, finish_reason, _NO_TIMINGS, error)
