"""Tests of the answer that Ray Serve's proxy gives when a replica is gone; a few lines here stand for the proxy."""

import json

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from server.operation.ray_proxy import ReplicaLost, middlewares
from tests.support.http_harness import read_events, serving_app

pytestmark = pytest.mark.anyio

EVENT = b'data: {"index":1}\n\n'


async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
    """Send the part of an answer that the path asks for and return, as Ray Serve's proxy does for a dead replica."""
    head, _, rest = scope["path"].strip("/").partition("/")
    if head == "nothing":
        return
    kind = b"text/event-stream" if head == "stream" else b"application/json"
    headers = [(b"content-type", kind), (b"x-request-id", b"the-replica's"), (b"x-request-id", b"the-proxy's")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    if rest == "whole":
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def get(path: str) -> httpx.Response:
    async with serving_app(ReplicaLost(proxy)) as port, httpx.AsyncClient() as client:
        return await client.get(f"http://127.0.0.1:{port}/{path}", headers={"X-Request-Id": "mine"})


async def test_an_answer_that_never_began_is_a_503_to_try_again():
    reply = await get("nothing")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_down")
    assert reply.headers["x-request-id"] == reply.json()["request_id"] == "mine"
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("5", "5000")
    assert reply.headers["content-type"] == "application/json"


async def test_a_stream_ends_with_an_error_event():
    reply = await get("stream/cut")
    first, last = read_events(reply.text)
    assert (first, last["error"]["code"], last["request_id"]) == ({"index": 1}, "engine_down", "the-replica's")


async def test_an_answer_of_another_kind_stays_cut_off():
    with pytest.raises(httpx.RemoteProtocolError):
        await get("plain/cut")


@pytest.mark.parametrize("path", ["stream/whole", "plain/whole"])
async def test_a_whole_answer_passes_with_the_one_id_that_the_replica_gave(path):
    reply = await get(path)
    assert reply.content == EVENT
    assert json.loads(reply.text.removeprefix("data: ")) == {"index": 1}
    assert reply.headers.get_list("x-request-id") == ["the-replica's"]


def test_ray_serve_is_given_what_it_asks_for():
    assert [one.cls for one in middlewares()] == [ReplicaLost]
