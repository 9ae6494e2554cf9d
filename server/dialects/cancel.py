"""DELETE /requests/{id}: end what lives of a request, by the id that its answer carries."""

from typing import Any

from fastapi import APIRouter, Response
from msgspec import Struct

from server.errors import NotFound
from server.protocol.json import encode
from server.requests.service import Service
from server.web import openapi


class CancelReply(Struct, frozen=True):
    """How many sequences of the request were still alive. Each of them ends with finish_reason "cancelled"."""

    request_id: str
    cancelled: int


_DOCS: dict[str, Any] = {
    "responses": {
        200: openapi.ok(CancelReply, example=CancelReply("6f1c0e4a", 1)),
        **openapi.errors(NotFound("no request with the id '6f1c0e4a' is alive")),
    }
}


def requests_router(service: Service) -> APIRouter:
    """The endpoint that cancels."""
    router = APIRouter(tags=["generate"])

    @router.delete("/requests/{request_id:path}", summary="Cancel a request", **_DOCS)
    async def cancel(request_id: str) -> Response:
        cancelled = service.cancel(request_id)
        if not cancelled:
            raise NotFound(f"no request with the id {request_id!r} is alive")
        return Response(encode(CancelReply(request_id, cancelled)), media_type="application/json")

    return router
