"""GET /v1/models: the name of the one model that is served. Knows nothing else about it."""

import time

from fastapi import Response

from server.dialects.openai.replies import Model, ModelList
from server.errors import ModelNotFound
from server.protocol.json import encode
from server.requests.service import Service
from server.web.endpoint import Endpoint, Handler


def _list(service: Service) -> Handler:
    model = _model(service)

    async def models() -> Response:
        return Response(encode(ModelList("list", [model])), media_type="application/json")

    return models


def _one(service: Service) -> Handler:
    model = _model(service)

    async def one(name: str) -> Response:
        service.check_model(name)
        return Response(encode(model), media_type="application/json")

    return one


def _model(service: Service) -> Model:
    return Model(service.model_name, "model", int(time.time()), "allattn")


_EXAMPLE = Model("default", "model", 1_764_000_000, "allattn")

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/models",
        tag="openai",
        summary="The models there are",
        make=_list,
        reply=ModelList("list", [_EXAMPLE]),
    ),
    Endpoint(
        method="GET",
        path="/v1/models/{name:path}",
        tag="openai",
        summary="One model",
        make=_one,
        reply=_EXAMPLE,
        errors=(ModelNotFound.of("gpt", name="default"),),
    ),
)
