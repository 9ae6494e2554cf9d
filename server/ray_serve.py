"""`serve run server.ray_serve:app`: the same application on one or many machines, an engine for each replica.

Ray Serve spreads requests over the replicas, adds replicas while requests queue, and replaces dead ones. Needs the
extra `ray`. A request that concerns one replica reaches any of them: /health, /metrics, DELETE /requests/{id}.
"""

import asyncio
import os
from typing import Annotated

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.config import ConfigError, Settings, load_settings
from server.link.supervisor import EngineLink
from server.operation.tracing import Tracing, open_tracing
from server.runtime import log_to_stderr, settle_garbage
from server.served_model import open_model

NOT_OURS = frozenset({"host", "port"})  # the proxy listens; serve start --http-host, --http-port
SPARE_REQUESTS = 64  # a replica takes more than it has room for, so that it is the one to refuse them, with 429
CHECK_S = 2.0  # between two looks at a replica
LAST_S = 5.0  # for the engine to end

Count = Annotated[int, Field(ge=1)]


class Scale(BaseModel):
    """The number of replicas, and each one's part of a machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: Count = 1
    max_replicas: Count = 1
    num_cpus: float = Field(default=1, gt=0)  # also the engine's threads, unless num_threads says otherwise
    num_gpus: float = Field(default=0, ge=0)  # 0 hides every GPU; two replicas share one at 0.5


def app(arguments: dict[str, str]) -> Application:
    """Returns the application of `serve run server.ray_serve:app NAME=VALUE ...`; NAME is of `Scale` or `Settings`.

    Settings can also come from the environment and a file, as for `python -m server`.

    Raises:
        ConfigError: an unknown name, or a value that is not allowed.
    """
    scale = _scale({name: value for name, value in arguments.items() if name in Scale.model_fields})
    given = {name: value for name, value in arguments.items() if name not in Scale.model_fields}
    if theirs := NOT_OURS & given.keys():
        raise ConfigError(f"{min(theirs)} is Ray Serve's, not a replica's: serve start --http-{min(theirs)}")
    settings = load_settings(
        [f"--{name.replace('_', '-')}={value}" for name, value in given.items()], environ=os.environ
    )
    return deployment(_of_replica(settings, scale=scale), scale=scale)


def deployment(settings: Settings, *, scale: Scale) -> Application:
    """Returns the application for settings that are already checked."""
    deployed = serve.deployment(
        serve.ingress()(Replica),
        name="allattn",
        max_ongoing_requests=settings.num_rows + settings.max_waiting + SPARE_REQUESTS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=settings.num_rows,  # more of them wait for a row
        ),
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        health_check_period_s=CHECK_S,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s + LAST_S,
    )
    return deployed.bind(settings)


class Replica:
    """An engine process and the application before it. Ray Serve sends it nothing until the engine is ready."""

    _link: EngineLink | None = None  # until it can be made
    _tracing: Tracing | None = None

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        log_to_stderr()
        bundle, settings = open_model(settings)
        self._tracing = open_tracing(os.environ)
        self._link = link = EngineLink(settings)
        self._app = create_app(settings=settings, bundle=bundle, link=link, tracing=self._tracing)
        await link.start()
        if link.state == "failed":
            raise RuntimeError(f"the engine has failed: {link.failure}")
        self._app.add_middleware(ClientLeaves)
        settle_garbage()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve calls this in the loop of the replica, to which the application belongs."""
        return self._app

    def check_health(self) -> None:
        """Raises RuntimeError if Ray Serve should replace this replica, not if the engine is being restarted."""
        link = self._link
        if link is not None and (link.state == "failed" or link.asked_to_end):
            raise RuntimeError(link.failure or "the engine was asked to end")

    async def __del__(self) -> None:
        """Ray Serve calls this last, after the live requests have ended."""
        if self._link is not None:
            await self._link.close(grace_s=0.5)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


class ClientLeaves:
    """Turns Ray's cancelled task into ASGI's message that a client has disconnected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""

        async def receive_or_leave() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_leave, send)


def _scale(given: dict[str, str]) -> Scale:
    try:
        scale = Scale.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]} = {first['input']!r}: {first['msg']}") from None
    if "max_replicas" not in given:
        return scale.model_copy(update={"max_replicas": scale.min_replicas})
    if scale.max_replicas < scale.min_replicas:
        raise ConfigError(f"max_replicas = {scale.max_replicas}: at least min_replicas, {scale.min_replicas}")
    return scale


def _of_replica(settings: Settings, *, scale: Scale) -> Settings:
    """Returns settings with an absolute path, and no more threads than the replica has cores."""
    threads = settings.num_threads or max(1, int(scale.num_cpus))
    return settings.model_copy(update={"bundle": settings.bundle.absolute(), "num_threads": threads})
