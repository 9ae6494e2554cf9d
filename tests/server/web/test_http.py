import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config import Settings
from server.web.event_stream import EventStream
from tests.support.http_harness import eventually, make_bundle, make_client, make_link, post, read_events, serving

pytestmark = pytest.mark.anyio


# errors


def check_error(reply: httpx.Response, status: int, *, code: str, param: str | None = None) -> dict[str, Any]:
    body = reply.json()
    assert reply.status_code == status
    assert set(body) == {"error", "error_type", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error_type"] == body["error"]["type"]
    assert body["request_id"] == reply.headers["x-request-id"]
    return body["error"]


async def test_what_cannot_be_read_is_malformed():
    async with make_client(make_link()) as client:
        check_error(await client.post("/generate", content=b"{"), 400, code="malformed")
        check_error(await client.post("/score", content=b""), 400, code="malformed")
        check_error(await client.get("/nothing"), 404, code="not_found")
        check_error(await client.get("/generate"), 405, code="method_not_allowed")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {"inputs": ""}, "inputs"),
        ("/generate", {"inputs": ["a", ""]}, "inputs.1"),
        ("/generate", {"inputs": [97, 256]}, "inputs.1"),
        ("/generate", {"inputs": ["a"] * 6}, "inputs"),
        ("/generate", {"inputs": "a", "parameters": {"stop_token_ids": [1, 300]}}, "parameters.stop_token_ids.1"),
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": None}}, "parameters.max_new_tokens"),
        ("/generate_stream", {"inputs": "a", "stream": False}, "stream"),
        ("/score", {"inputs": "a", "prefix": 256}, "prefix"),
        ("/score", {"inputs": "a", "unit": "line"}, "unit"),
    ],
)
async def test_an_invalid_field_is_named(path, body, param):
    link = make_link()
    check_error(await post(path, body, link=link, num_rows=2, max_waiting=3), 422, code="invalid_field", param=param)
    assert not link.submitted


async def test_a_body_over_the_limit_is_refused_while_it_arrives():
    async with make_client(make_link(), max_body_bytes=1000) as client:
        check_error(await client.post("/score", json={"inputs": "a" * 2000}), 413, code="body_too_large")
        arrived = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal arrived
            while True:
                arrived += 100
                yield b"x" * 100

        check_error(await client.post("/score", content=endless()), 413, code="body_too_large")
        assert arrived < 2000


@pytest.mark.parametrize("state", ["starting", "draining", "restarting", "failed", "silent"])
async def test_work_is_refused_with_a_time_to_come_back_while_there_is_no_engine(state):
    link = make_link()
    if state == "silent":
        link.heartbeat_age_s = 60
    else:
        link.state = state
    code = state if state in ("starting", "draining") else "engine_down"
    async with make_client(link) as client:
        for reply in (
            await client.post("/generate", json={"inputs": "a", "stream": True}),
            await client.post("/score", json={"inputs": "a"}),
            await client.get("/health/ready"),
            await client.get("/readyz"),
        ):
            check_error(reply, 503, code=code)
            assert 1000 * int(reply.headers["retry-after"]) == int(reply.headers["retry-after-ms"])
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/health")).json()["state"] == link.state


async def test_a_full_queue_refuses_and_takes_work_again_when_it_has_room():
    link = make_link(hang_after=0)
    async with make_client(link, num_rows=1, max_waiting=1) as client:
        first = asyncio.create_task(client.post("/generate", json={"inputs": ["a", "b"]}))
        await eventually(lambda: len(link.submitted) == 2)
        reply = await client.post("/generate", json={"inputs": "c", "stream": True})
        check_error(reply, 429, code="queue_full")
        assert reply.headers["retry-after"] == "1"
        link.end_all("cancelled")
        await first
        link.hang_after = None
        assert (await client.post("/generate", json={"inputs": "c"})).status_code == 200


async def test_a_sequence_the_engine_gives_up_is_an_error_plain_and_streamed():
    for stream in (False, True):
        link = make_link(hang_after=2)
        async with make_client(link) as client:
            request = asyncio.create_task(client.post("/generate", json={"inputs": ["a", "b"], "stream": stream}))
            await eventually(lambda link=link: link.num_hanging == 2)
            link.end_all("error", error="not finite")
            reply = await request
        if stream:
            assert reply.status_code == 200
            assert read_events(reply.text)[-1]["error"]["code"] == "internal"
        else:
            assert "not finite" in check_error(reply, 500, code="internal")["message"]


async def test_a_bug_is_a_500_with_a_body_and_a_request_id():
    link = make_link()
    link.script = [999]  # the vocabulary has no such token
    reply = await post("/generate", {"inputs": "a"}, link=link)
    assert check_error(reply, 500, code="internal")["message"].startswith("an unexpected error")


async def test_the_request_id_of_the_client_comes_back():
    async with make_client(make_link()) as client:
        reply = await client.post("/generate", json={"inputs": "a"}, headers={"X-Request-Id": "mine-1"})
        assert reply.headers["x-request-id"] == "mine-1"
        reply = await client.get("/health", headers={"X-Request-Id": "not\tone"})
        assert len(reply.headers["x-request-id"]) == 32


# connections


async def send(port: int, path: str, body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/score"])
async def test_a_client_that_leaves_frees_the_row(path):
    link = make_link(hang_after=1)
    async with serving(link) as port:
        _, writer = await send(port, path, {"inputs": ["aa", "bb"]})
        await eventually(lambda: len(link.submitted) == 2)
        await asyncio.sleep(0.05)
        assert not link.cancelled
        writer.close()
        await eventually(lambda: len(link.cancelled) == 2)


@pytest.mark.parametrize("path", ["/generate", "/score"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_has_left_before_its_answer_begins_frees_its_rows(path, stream):
    """No coroutine of the request has run yet, so none of them can give the rows back."""
    link = make_link(hang_after=1)
    app = create_app(settings=Settings(), bundle=make_bundle(), link=link)
    body = json.dumps({"inputs": ["aa", "bb"], "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert len(link.cancelled) == len(link.submitted) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_cancelled_by_its_id(stream):
    link = make_link(hang_after=3)
    async with make_client(link) as client:
        body = {"inputs": ["a", "b"], "stream": stream, "request_id": "mine", "parameters": {"details": True}}
        request = asyncio.create_task(client.post("/generate", json=body))
        await eventually(lambda: link.num_hanging == 2)
        assert (await client.delete("/requests/mine")).json() == {"request_id": "mine", "cancelled": 2}
        reply = await request
        ends = read_events(reply.text)[-2:] if stream else reply.json()
        assert [(one["generated_text"], one["details"]["finish_reason"]) for one in ends] == [("The", "cancelled")] * 2
        check_error(await client.delete("/requests/mine"), 404, code="not_found")


async def test_a_reader_that_does_not_read_is_cut_off_and_its_row_freed():
    link = make_link(max_behind=50)
    async with serving(link) as port:
        _, writer = await send(port, "/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": None}})
        await eventually(lambda: link.cancelled)
        writer.close()


async def test_tokens_are_sent_as_they_come():
    link = make_link(hang_after=3)
    async with serving(link) as port:
        reader, writer = await send(port, "/generate_stream", {"inputs": "a"})
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"text/event-stream" in head
        for index in (1, 2, 3):
            assert f'"index":{index}'.encode() in await reader.readuntil(b"\n\n")
        writer.close()
        await eventually(lambda: link.cancelled)


async def test_an_idle_stream_is_kept_alive_by_comments():
    sent = []

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    async def wait(send_events: Any) -> None:
        await asyncio.sleep(0.1)

    closed: list[bool] = []
    stream = EventStream([wait], request_id="1", close=lambda: closed.append(True), ping_s=0.02)
    await stream({}, asyncio.Event().wait, send)
    assert closed == [True]
    assert sent[0] is None
    assert set(sent[1:-1]) == {b": ping\n\n"}
    assert sent[-1] == b""


# for operators


async def test_health_and_info_tell_what_is_served():
    async with make_client(make_link(), num_rows=2) as client:
        health = (await client.get("/health")).json()
        assert health["rows"] == {"used": 0, "free": 2}
        assert health["model"] == {"name": "tiny", "hash": "ab" * 32}
        info = (await client.get("/info")).json()
        assert info["defaults"]["max_new_tokens"] == 128
        assert info["engine"]["spans"] == [[32, 40]]
        assert info["model"]["config"]["width"] == 8
        assert (await client.get("/healthz")).status_code == (await client.get("/readyz")).status_code == 200


async def test_metrics_count_sequences_tokens_and_refusals():
    link = make_link()
    async with make_client(link) as client:
        await client.post("/generate", json={"inputs": "abc", "parameters": {"max_new_tokens": 4}})
        await client.post("/score", json={"inputs": "abc"})
        await client.post("/generate", json={"inputs": ""})
        metrics = (await client.get("/metrics")).text.splitlines()
    for line in (
        "allattn_prompt_tokens_total 3.0",
        "allattn_generation_tokens_total 4.0",
        "allattn_scored_tokens_total 2.0",
        'allattn_requests_finished_total{finish_reason="length"} 1.0',
        'allattn_requests_finished_total{finish_reason="scored"} 1.0',
        'allattn_requests_rejected_total{reason="invalid_field"} 1.0',
        "allattn_time_to_first_token_seconds_count 1.0",
        "allattn_inter_token_latency_seconds_count 3.0",
        'allattn_step_duration_seconds_count{phase="decode"} 3.0',
        "allattn_rows_used 0.0",
    ):
        assert line in metrics
    assert any(line.startswith('http_requests_total{handler="/generate"') for line in metrics)


async def test_every_error_of_an_endpoint_is_documented_with_an_example():
    async with make_client(make_link()) as client:
        document = (await client.get("/openapi.json")).json()
        assert (await client.get("/docs")).status_code == 200
    for path in ("/generate", "/generate_stream", "/score"):
        endpoint = document["paths"][path]["post"]
        cancelled = {"499"} if path == "/score" else set()  # /generate answers with the text so far
        assert set(endpoint["responses"]) == {"200", "400", "408", "413", "422", "429", "500", "503"} | cancelled
        for response in endpoint["responses"].values():
            content = response["content"]["application/json"]
            assert content.get("example") or content["examples"]
        content = endpoint["requestBody"]["content"]["application/json"]
        assert content.get("example") or content["examples"]
    defined = document["components"]["schemas"]
    referred = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert referred <= set(defined)


async def test_a_log_line_has_counts_and_no_text(caplog):
    with caplog.at_level(logging.INFO, logger="server.web.request_log"):
        await post("/generate", {"inputs": "secret", "parameters": {"max_new_tokens": 4}})
    fields = caplog.records[-1].fields
    assert (fields["path"], fields["status"], fields["prompt_tokens"], fields["generated_tokens"]) == (
        "/generate",
        200,
        6,
        4,
    )
    assert fields["finish_reasons"] == ["length"]
    assert "secret" not in str(fields)
    assert "The" not in str(fields)


def test_the_http_side_never_imports_torch():
    code = "import sys, server.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


async def test_a_wrong_method_names_the_right_one_and_no_path_is_redirected():
    async with make_client(make_link()) as client:
        assert (await client.get("/generate")).headers["allow"] == "POST"
        check_error(await client.post("/generate/", json={"inputs": "a"}), 404, code="not_found")


async def test_a_request_is_cancelled_by_any_id_it_may_have():
    link = make_link(hang_after=1)
    async with make_client(link) as client:
        request = asyncio.create_task(client.post("/generate", json={"inputs": "a", "request_id": "a/b?c"}))
        await eventually(lambda: link.num_hanging)
        assert (await client.delete("/requests/a%2Fb%3Fc")).json()["cancelled"] == 1
        assert (await request).status_code == 200
