"""GET /v1/models: the name of the one model that is served. Knows nothing else about it."""

import time
from typing import Any

from fastapi import APIRouter, Response

from server.dialects.openai.replies import Model, ModelList
from server.errors import ModelNotFound
from server.protocol.json import encode
from server.requests.service import Service
from server.web import openapi

_EXAMPLE = Model("default", "model", 1_764_000_000, "allattn")
_LIST_DOCS: dict[str, Any] = {"responses": {200: openapi.ok(ModelList, example=ModelList("list", [_EXAMPLE]))}}
_DOCS: dict[str, Any] = {
    "responses": {200: openapi.ok(Model, example=_EXAMPLE), **openapi.errors(ModelNotFound.of("gpt", name="default"))}
}


def models_router(service: Service) -> APIRouter:
    """The endpoints in which OpenAI's clients look for a model."""
    router = APIRouter(tags=["openai"])
    model = Model(service.model_name, "model", int(time.time()), "allattn")

    @router.get("/v1/models", summary="The models there are", **_LIST_DOCS)
    async def models() -> Response:
        return Response(encode(ModelList("list", [model])), media_type="application/json")

    @router.get("/v1/models/{name:path}", summary="One model", **_DOCS)
    async def one(name: str) -> Response:
        check_model(name, service=service)
        return Response(encode(model), media_type="application/json")

    return router


def check_model(name: str | None, *, service: Service) -> None:
    """Raise ModelNotFound for a name that is not the served model's; None asks for whatever is served."""
    if name is not None and name != service.model_name:
        raise ModelNotFound.of(name, name=service.model_name)
