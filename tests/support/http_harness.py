"""The HTTP side over a fake engine, for the tests of the server."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from model.bundle import Bundle
from model.config import ModelConfig
from model.tokenizer import BytesTokenizer
from server.app import create_app
from server.config import Settings
from tests.support.fake_link import FakeLink

SCRIPT = "The café is open. Stop here, or go on → "


def make_bundle(*, eos_id: int | None = None) -> Bundle:
    tokenizer = BytesTokenizer()
    tokenizer.eos_id = eos_id
    config = ModelConfig(vocab_size=256, num_layers=1, width=8, num_heads=2, num_persistent=4, max_span=16)
    return Bundle(Path("bundles/tiny"), config, tokenizer, card="# tiny", training={}, hash="ab" * 32)


def make_link(**options: Any) -> FakeLink:
    return FakeLink(list(SCRIPT.encode()), **options)


def make_client(link: FakeLink, *, eos_id: int | None = None, **settings: Any) -> httpx.AsyncClient:
    app = create_app(settings=Settings(**settings), bundle=make_bundle(eos_id=eos_id), link=link)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def read_events(text: str) -> list[dict[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def post(path: str, body: object, *, link: FakeLink | None = None, **options: Any) -> httpx.Response:
    async with make_client(link or make_link(), **options) as client:
        return await client.post(path, json=body)


def serving(link: FakeLink, **settings: Any) -> AbstractAsyncContextManager[int]:
    """Serve with a real uvicorn and give its port."""
    return serving_app(create_app(settings=Settings(**settings), bundle=make_bundle(), link=link))


@asynccontextmanager
async def serving_app(app: FastAPI) -> AsyncIterator[int]:
    """Serve any application with a real uvicorn and give its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)
