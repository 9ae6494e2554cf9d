"""DELETE /requests/{id}: end what lives of a request, by the id that its answer carries."""

from fastapi import Response
from msgspec import Struct

from server.errors import NotFound
from server.protocol.json import encode
from server.requests.service import Service
from server.web.endpoint import Endpoint, Handler


class CancelReply(Struct, frozen=True):
    """How many sequences of the request were still alive. Each of them ends with finish_reason "cancelled"."""

    request_id: str
    cancelled: int


def _cancel(service: Service) -> Handler:
    async def cancel(request_id: str) -> Response:
        cancelled = service.cancel(request_id)
        if not cancelled:
            raise NotFound(f"no request with the id {request_id!r} is alive")
        return Response(encode(CancelReply(request_id, cancelled)), media_type="application/json")

    return cancel


ENDPOINTS = (
    Endpoint(
        method="DELETE",
        path="/requests/{request_id:path}",
        tag="generate",
        summary="Cancel a request",
        make=_cancel,
        reply=CancelReply("6f1c0e4a", 1),
        errors=(NotFound("no request with the id '6f1c0e4a' is alive"),),
    ),
)
