"""The one road of a request that the engine works on: from the body to the answer, whatever the dialect.

It asks for admission three times, each time before the work that would be in vain: of reading the body, of tokenising
it, and of the engine.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from fastapi import Request, Response

from server.protocol.messages import Generate, Score
from server.requests.offload import beside_the_loop
from server.requests.results import WorkSummary
from server.requests.service import LiveSequence, Service
from server.web.body import RequestBody, parse, read_body
from server.web.event_stream import EventStream, Job, while_connected
from server.web.exchange import exchange_of


class EngineRequest(RequestBody):
    """A body that has the engine work. Each dialect declares these three fields in a place of its own."""

    if TYPE_CHECKING:
        stream: bool
        timeout_s: float | None
        request_id: str | None

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine has to do with."""
        raise NotImplementedError

    @property
    def counted_field(self) -> str:
        """The name of the field that asks for so many."""
        raise NotImplementedError


class Work(Protocol):
    """The live sequences of a request, and how its dialect tells of them."""

    def jobs(self) -> Sequence[Job]:
        """What sends the events of a stream; the jobs run side by side."""
        ...

    def folds(self) -> Sequence[Coroutine[Any, Any, Any]]:
        """What gives the results of a plain reply; they run side by side."""
        ...

    async def reply(self, results: list[Any]) -> bytes:
        """The plain reply as JSON, from the results of `folds` in order."""
        ...

    def summary(self) -> WorkSummary:
        """For the log."""
        ...

    def close(self) -> None:
        """Let go of all sequences, also of those that nobody came to wait for."""
        ...


class Plan(Protocol):
    """A request that is checked in full and not yet admitted."""

    def messages(self, new_id: Callable[[], str]) -> list[Generate | Score]:
        """What the engine is told."""
        ...

    def begin(self, live: list[LiveSequence], *, request_id: str) -> Work:
        """The work of the sequences, in the order of the messages."""
        ...


Body = TypeVar("Body", bound=EngineRequest)
MakePlan = Callable[[Body, Service], Plan]  # called in a thread where the body is large; raises RequestError


class EngineRoad(Generic[Body]):
    """Makes the handler of an endpoint from its body and what plans the work."""

    def __init__(self, body: type[Body], *, plan: MakePlan[Body]) -> None:
        self._body = body
        self._plan = plan

    def __call__(self, service: Service) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler."""

        async def handle(request: Request) -> Response:
            return await self._answer(request, service=service)

        return handle

    async def _answer(self, request: Request, *, service: Service) -> Response:
        """Read, check, plan, admit, answer."""
        service.check_admission(1)
        raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
        body = await beside_the_loop(lambda: parse(raw, model=self._body), size=len(raw))
        exchange = exchange_of(request.scope)
        exchange.request_id = body.request_id or exchange.request_id
        service.check_admission(body.num_sequences, num_tokens=len(raw), field=body.counted_field)
        plan = await beside_the_loop(lambda: self._plan(body, service), size=len(raw))
        live = service.submit(plan.messages(service.new_id), request_id=exchange.request_id)
        work = plan.begin(live, request_id=exchange.request_id)
        exchange.summary = work.summary
        if body.stream:
            return EventStream(work.jobs(), request_id=exchange.request_id, close=work.close)
        try:
            results = await while_connected(request.receive, work.folds())
        finally:
            work.close()
        return Response(await work.reply(results), media_type="application/json")
