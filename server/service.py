"""What all endpoints share: the open bundle, the link to the engine, and admission. Knows no HTTP."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from types import TracebackType
from typing import Protocol, Self

from model.bundle import Bundle
from server.config import Settings
from server.errors import Draining, EngineDown, InternalError, InvalidField, QueueFull, ServerError, Starting
from server.messages import Ended, Generate, LinkState, Ready, Score, Scores, Step, Token
from server.metrics import Metrics

HEARTBEAT_LIMIT_S = 5.0  # the engine sends one a second: more is a hang, not a hiccup


class Link(Protocol):
    """The engine as the API process sees it."""

    on_step: Callable[[Step], None] | None

    @property
    def state(self) -> LinkState: ...  # noqa: D102
    @property
    def ready(self) -> Ready | None: ...  # noqa: D102
    @property
    def failure(self) -> str: ...  # noqa: D102
    @property
    def heartbeat_age_s(self) -> float: ...  # noqa: D102
    @property
    def last_step_age_s(self) -> float: ...  # noqa: D102
    @property
    def num_waiting(self) -> int: ...  # noqa: D102
    @property
    def rows_used(self) -> int: ...  # noqa: D102

    async def start(self) -> None:
        """Return once the engine is ready or has failed; `state` tells which."""
        ...

    async def close(self, grace_s: float) -> None:
        """Take nothing new, let live work end for so long, end the rest with "shutdown", then end the engine."""
        ...

    def submit(self, message: Generate | Score) -> AsyncIterator[Token | Scores | Ended]:
        """Start a sequence. Its messages hold exactly one Ended, the last."""
        ...

    def cancel(self, sequence: str) -> None:
        """Free the row of a sequence."""
        ...


class Service:
    """Admits sequences and keeps count of them, so that a burst is refused before the engine ever sees it."""

    def __init__(self, settings: Settings, *, bundle: Bundle, link: Link) -> None:
        self.settings = settings
        self.bundle = bundle
        self.tokenizer = bundle.tokenizer
        self.link = link
        self.metrics = Metrics(rows_used=lambda: link.rows_used, num_waiting=lambda: link.num_waiting)
        self._live: set[str] = set()
        self._numbers = count(1)
        link.on_step = self.metrics.observe_step

    @property
    def max_inputs(self) -> int:
        """The most sequences there can be at a time, computed or waiting."""
        return self.settings.num_rows + self.settings.max_waiting

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal numerics: weights, number format, kind of device, version."""
        ready = self.link.ready
        where = f"{ready.dtype}-{ready.device}" if ready else "starting"
        return f"{self.bundle.hash[:12]}-{where}-{package_version()}"

    def new_id(self) -> str:
        """A name for a sequence, unique in this process (the request ids of clients are not)."""
        return str(next(self._numbers))

    def unavailable(self) -> ServerError | None:
        """Why no work can be taken now."""
        link = self.link
        match link.state:
            case "starting":
                return Starting("the model is being loaded")
            case "draining":
                return Draining("the server is shutting down")
            case "failed":
                return EngineDown(f"the engine has failed: {link.failure}")
        if link.heartbeat_age_s > HEARTBEAT_LIMIT_S:
            return EngineDown(f"the engine has not answered for {link.heartbeat_age_s:.0f} s")
        return None

    def check_admission(self, num_sequences: int) -> None:
        """Refuse a request of so many sequences.

        Raises:
            InvalidField: they would not fit into an empty server.
            Starting, Draining, EngineDown: there is no engine to take them.
            QueueFull: they do not fit now.
        """
        if num_sequences > self.max_inputs:
            raise InvalidField(
                f"inputs: a list of {num_sequences} is not allowed; at most {self.max_inputs}", param="inputs"
            )
        if error := self.unavailable():
            raise error
        if len(self._live) + num_sequences > self.max_inputs:
            raise QueueFull(
                f"{len(self._live)} sequences are running or waiting and {num_sequences} more were asked for; "
                f"the limit is {self.max_inputs}"
            )

    def submit(self, messages: Sequence[Generate | Score]) -> list["LiveSequence"]:
        """Admit all sequences of a request or none. Raises as `check_admission` does."""
        self.check_admission(len(messages))
        self._live.update(message.id for message in messages)
        return [LiveSequence(self.link.submit(message), id=message.id, service=self) for message in messages]

    def leave(self, sequence: "LiveSequence") -> None:
        """The counterpart of `submit`, once a sequence; one that has not ended is cancelled."""
        self._live.discard(sequence.id)
        if sequence.ended is None:
            self.link.cancel(sequence.id)


class LiveSequence:
    """One admitted sequence: a context to be in while it lives, and the iterator of its messages."""

    def __init__(self, stream: AsyncIterator[Token | Scores | Ended], *, id: str, service: Service) -> None:
        self.id = id
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

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token | Scores | Ended:
        """The next message. Raises EngineDown or InternalError where the engine had to give the sequence up."""
        message = await anext(self._stream)
        if isinstance(message, Ended):
            self.ended = message
            if message.finish_reason == "error":
                down = self._service.link.state == "failed"
                raise (EngineDown if down else InternalError)(f"the engine gave up: {message.error}")
        return message

    def cancel(self) -> None:
        """Ask the engine to stop; the ending still comes."""
        self._service.link.cancel(self.id)

    async def ending(self) -> Ended:
        """Skip to the ending."""
        while self.ended is None:
            await anext(self)
        return self.ended


def package_version() -> str:
    """The version of allattn, as installed."""
    try:
        return version("allattn")
    except PackageNotFoundError:  # run from a tree that was not installed
        return "source"
