"""The handler of all requests that need the engine, in every dialect: from the body to the response.

It checks admission three times, so that no work is wasted on a refused request: before it reads the body, before it
tokenises the inputs, and before it submits the sequences to the engine.
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
    """Base of the bodies that need the engine. Each dialect declares these three fields in its own order."""

    if TYPE_CHECKING:
        stream: bool
        timeout_s: float | None
        request_id: str | None

    @property
    def num_sequences(self) -> int:
        """Number of sequences that the engine computes."""
        raise NotImplementedError

    @property
    def counted_field(self) -> str:
        """Name of the field that sets the number of sequences, for error messages."""
        raise NotImplementedError


class Work(Protocol):
    """The live sequences of a request, with the replies and events of its dialect."""

    def jobs(self) -> Sequence[Job]:
        """Return functions that send the events of a stream; they run concurrently."""
        ...

    def folds(self) -> Sequence[Coroutine[Any, Any, Any]]:
        """Return coroutines that produce the results of a plain reply; they run concurrently."""
        ...

    async def reply(self, results: list[Any]) -> bytes:
        """Return the plain reply as JSON. `results`: of the coroutines of `folds`, in order."""
        ...

    def summary(self) -> WorkSummary:
        """Return the counts and times for the log."""
        ...

    def close(self) -> None:
        """Free the rows of all sequences, also of sequences that nobody awaited."""
        ...


class Plan(Protocol):
    """A request that is fully checked and not yet admitted."""

    def messages(self, new_id: Callable[[], str]) -> list[Generate | Score]:
        """Return the messages for the engine. `new_id` makes a sequence id."""
        ...

    def begin(self, live: list[LiveSequence], *, request_id: str) -> Work:
        """Return the work of the admitted sequences. `live`: in the order of the messages."""
        ...


Body = TypeVar("Body", bound=EngineRequest)
MakePlan = Callable[[Body, Service], Plan]  # called in a thread if the body is large; raises RequestError


class EngineRoad(Generic[Body]):
    """Factory of an endpoint's handler, from the type of its body and the function that plans its work."""

    def __init__(self, body: type[Body], *, plan: MakePlan[Body]) -> None:
        self._body = body
        self._plan = plan

    def __call__(self, service: Service) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""

        async def handle(request: Request) -> Response:
            return await self._answer(request, service=service)

        return handle

    async def _answer(self, request: Request, *, service: Service) -> Response:
        """Read, check, plan, admit and respond."""
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
