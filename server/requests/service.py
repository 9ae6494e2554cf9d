"""What all endpoints share: the open bundle, the link to the engine, admission, and requests by their ids.

Knows no HTTP.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count
from types import TracebackType
from typing import Protocol, Self

from model.bundle import Bundle
from server.config import Settings
from server.errors import Draining, EngineDown, InternalError, ModelNotFound, ServerError, Starting
from server.protocol.messages import Ended, Generate, LinkState, Ready, Score, Scores, Step, Token
from server.requests.admission import Admission
from server.requests.metrics import Metrics
from server.runtime import package_version

Said = Token | Scores | Ended


class SequenceStream(Protocol):
    """What the engine says of one sequence."""

    async def take(self) -> list[Said]:
        """All messages that are there, at least one. Exactly one Ended, the last, whatever happens."""
        ...

    async def pour(self, sink: Callable[[Token], bool]) -> None:
        """Give tokens to `sink` at once, until something comes that it does not take, or `wake` is called."""
        ...

    def wake(self) -> None:
        """Make `pour` return."""
        ...


class Link(Protocol):
    """The engine as the API process sees it."""

    on_step: Callable[[Step], None] | None

    @property
    def state(self) -> LinkState: ...  # noqa: D102
    @property
    def asked_to_end(self) -> bool: ...  # noqa: D102
    @property
    def ready(self) -> Ready | None: ...  # noqa: D102
    @property
    def failure(self) -> str: ...  # noqa: D102
    @property
    def blames_model(self) -> bool: ...  # noqa: D102
    @property
    def restarts(self) -> int: ...  # noqa: D102
    @property
    def heartbeat_age_s(self) -> float: ...  # noqa: D102
    @property
    def last_step_age_s(self) -> float: ...  # noqa: D102
    @property
    def num_waiting(self) -> int: ...  # noqa: D102
    @property
    def tokens_waiting(self) -> int: ...  # noqa: D102
    @property
    def rows_used(self) -> int: ...  # noqa: D102

    async def start(self) -> None:
        """Return once the engine is ready or has failed; `state` tells which."""
        ...

    async def close(self, grace_s: float) -> None:
        """Take nothing new, let live work end for so long, end the rest with "shutdown", then end the engine."""
        ...

    def submit(self, message: Generate | Score) -> Sequence[SequenceStream]:
        """Start the sequences of a message; one stream for each of its ids, in order."""
        ...

    def cancel(self, sequence: str) -> None:
        """Free the row of a sequence."""
        ...


class Service:
    """Admits requests and keeps count of them, so that a burst is refused before the engine ever sees it."""

    def __init__(self, settings: Settings, *, bundle: Bundle, link: Link) -> None:
        self.settings = settings
        self.bundle = bundle
        self.model_name = bundle.path.resolve().name
        self.tokenizer = bundle.tokenizer
        self.link = link
        self.admission = Admission(
            max_sequences=settings.num_rows + settings.max_waiting,
            max_tokens=settings.max_waiting_tokens,
            tokens_waiting=lambda: link.tokens_waiting,
        )
        self.metrics = Metrics(link, num_rows=settings.num_rows)
        self._by_request: dict[str, dict[str, LiveSequence]] = {}  # request id, id of the sequence
        self._numbers = count(1)
        link.on_step = self._hear

    def _hear(self, step: Step) -> None:
        self.metrics.observe_step(step)
        self.admission.hear()

    @property
    def fingerprint(self) -> str:
        """Equal ones on one machine mean equal numerics: weights, how and in what they are computed, version."""
        facts, settings = self.link.ready and self.link.ready.facts, self.settings
        how = f"chunk{settings.chunk_tokens}{'-invariant' if settings.batch_invariant else ''}"
        where = f"{facts.backend}-{facts.weights}-{facts.device}-{how}" if facts else "starting"
        return f"{self.bundle.hash[:12]}-{where}-{package_version()}"

    def new_id(self) -> str:
        """A name for a sequence, unique in this process (the request ids of clients are not)."""
        return str(next(self._numbers))

    def deadline(self, timeout_s: float | None) -> float | None:
        """Seconds a request may take: what it asks for, else the server's default."""
        return self.settings.timeout_s if timeout_s is None else timeout_s

    def unavailable(self) -> ServerError | None:
        """Why no work can be taken now."""
        link = self.link
        match link.state:
            case "starting":
                return Starting("the model is being loaded")
            case "draining":
                return Draining("the server is shutting down")
            case "restarting":
                return EngineDown(f"the engine is being restarted: {link.failure}")
            case "failed":
                return EngineDown(f"the engine has failed: {link.failure}")
        if link.heartbeat_age_s > self.settings.heartbeat_timeout_s:
            return EngineDown(f"the engine has not answered for {link.heartbeat_age_s:.0f} s")
        return None

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFound for a name that is not the served model's; None asks for whatever is served."""
        if name is not None and name != self.model_name:
            raise ModelNotFound.of(name, name=self.model_name)

    def check_admission(self, num_sequences: int, *, num_tokens: int = 0, field: str = "inputs") -> None:
        """Refuse a request of so many sequences and, at most, so many prompt tokens.

        Raises:
            InvalidField: they would not fit into an empty server.
            Starting, Draining, EngineDown: there is no engine to take them.
            QueueFull: they do not fit now.
        """
        if error := self.unavailable():
            raise error
        self.admission.check(num_sequences, num_tokens=num_tokens, field=field)

    def submit(self, messages: Sequence[Generate | Score], *, request_id: str) -> list["LiveSequence"]:
        """Admit all sequences of a request or none, each of `ids` in order. Raises as `check_admission` does."""
        num_tokens = sum(message.num_tokens for message in messages)
        self.check_admission(sum(len(message.ids) for message in messages), num_tokens=num_tokens)
        live = [
            LiveSequence(stream, id=name, request_id=request_id, service=self)
            for message in messages
            for name, stream in zip(message.ids, self.link.submit(message), strict=True)
        ]
        self.admission.enter(len(live), num_tokens=num_tokens)
        self._by_request.setdefault(request_id, {}).update({one.id: one for one in live})
        return live

    def cancel(self, request_id: str) -> int:
        """Ask the engine to stop all that lives of a request; the number of its sequences, 0 for an unknown id."""
        live = self._by_request.get(request_id, {})
        for one in live.values():
            one.cancel()
        return len(live)

    def leave(self, sequence: "LiveSequence") -> None:
        """The counterpart of `submit` for one sequence, cancelled if it has not ended. Twice does no harm."""
        siblings = self._by_request.get(sequence.request_id, {})
        if siblings.pop(sequence.id, None) is None:
            return
        if not siblings:
            del self._by_request[sequence.request_id]
        self.admission.leave()
        if sequence.ended is None:
            sequence.cancel()


class LiveSequence:
    """One admitted sequence: a context to be in while it lives, and its messages."""

    def __init__(self, stream: SequenceStream, *, id: str, request_id: str, service: Service) -> None:
        self.id = id
        self.request_id = request_id
        self.submitted = time.perf_counter()
        self.ended: Ended | None = None
        self._stream = stream
        self._service = service

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.leave(self)

    async def take(self) -> list[Said]:
        """All messages that are there. Raises EngineDown or InternalError where the engine gave the sequence up."""
        messages = await self._stream.take()
        last = messages[-1]
        if isinstance(last, Ended):
            self.ended = last
            if last.finish_reason == "error":
                down = self._service.link.state in ("restarting", "failed")
                raise (EngineDown if down else InternalError)(f"the engine gave up: {last.error}")
        return messages

    async def pour(self, sink: Callable[[Token], bool]) -> None:
        """Let `sink` have the tokens as they come, until there is something else to `take`, or at `wake`."""
        await self._stream.pour(sink)

    def wake(self) -> None:
        """Make `pour` return."""
        self._stream.wake()

    async def __aiter__(self) -> AsyncIterator[Said]:
        """The messages one by one. Raises as `take` does."""
        while self.ended is None:
            for message in await self.take():
                yield message

    def cancel(self) -> None:
        """Ask the engine to stop; the ending still comes."""
        self._service.link.cancel(self.id)

    async def ending(self) -> Ended:
        """Skip to the ending."""
        while self.ended is None:
            await self.take()
        return self.ended
