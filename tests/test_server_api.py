import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fake_link import FakeLink, fake_logprobs

from model.bundle import Bundle
from model.config import ModelConfig
from model.scoring import Score as Figures
from model.tokenizer import BytesTokenizer
from server.api import create_app
from server.config import Settings
from server.connection import EventStream
from server.messages import Generate

pytestmark = pytest.mark.anyio

SCRIPT = "The café is open. Stop here, or go on → "


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_bundle(*, eos_id: int | None = None) -> Bundle:
    tokenizer = BytesTokenizer()
    tokenizer.eos_id = eos_id
    config = ModelConfig(vocab_size=256, num_layers=1, width=8, num_heads=2, num_persistent=4, max_span=16)
    return Bundle(Path("bundles/tiny"), config, tokenizer, card="# tiny", training={}, hash="ab" * 32, size_bytes=1)


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


@asynccontextmanager
async def serving(link: FakeLink, **settings: Any) -> AsyncIterator[int]:
    """A real uvicorn; yields its port."""
    app = create_app(settings=Settings(**settings), bundle=make_bundle(), link=link)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def message(link: FakeLink) -> Generate:
    sent = link.submitted[-1]
    assert isinstance(sent, Generate)
    return sent


# /generate


async def test_a_plain_reply_is_the_text_of_the_tokens():
    reply = await post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 9}})
    assert reply.status_code == 200
    assert reply.json() == {"generated_text": "The café"}


async def test_details_tell_how_the_sequence_went():
    parameters = {"max_new_tokens": 3, "details": True, "seed": 2**64 - 1}
    details = (await post("/generate", {"inputs": "abc", "parameters": parameters})).json()["details"]
    tokens = [{"id": ord(char), "text": char, "logprob": -0.5, "special": False} for char in "The"]
    assert details == {
        "finish_reason": "length",
        "generated_tokens": 3,
        "prompt_tokens": 3,
        "seed": 2**64 - 1,
        "matched_stop": None,
        "logprob_sum": -1.5,
        "timings": {"queue_ms": 1.0, "prefill_ms": 2.0, "decode_ms": 3.0},
        "fingerprint": details["fingerprint"],
        "tokens": tokens,
    }
    assert details["fingerprint"].startswith("abababababab-float32-cpu-")


@pytest.mark.parametrize("stop", [None, ["Stop"], ["→"], ["n. S", "open"], ["\ufffd"]])
@pytest.mark.parametrize("max_new_tokens", [1, 7, 8, 39, 41, 60])
async def test_streamed_texts_joined_equal_the_plain_reply_byte_for_byte(stop, max_new_tokens):
    body = {"inputs": "x", "parameters": {"max_new_tokens": max_new_tokens, "stop": stop}}
    plain = (await post("/generate", body)).json()["generated_text"]
    events = read_events((await post("/generate", {**body, "stream": True})).text)
    assert "".join(event["token"]["text"] for event in events) == plain
    assert events[-1]["generated_text"] == plain
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))


async def test_only_the_last_event_has_the_text_and_the_details():
    reply = await post("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 3}})
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-accel-buffering"] == "no"
    *events, last = read_events(reply.text)
    assert events[0] == {
        "index": 1,
        "token": {"id": 84, "text": "T", "logprob": -0.5, "special": False},
        "generated_text": None,
        "details": None,
    }
    assert last["generated_text"] == "The"
    assert last["details"]["finish_reason"] == "length"
    assert "tokens" not in last["details"]


async def test_a_stop_string_frees_the_row_and_is_trimmed():
    link = make_link()
    parameters = {"max_new_tokens": 60, "stop": ["Stop"], "details": True}
    reply = (await post("/generate", {"inputs": "x", "parameters": parameters}, link=link)).json()
    assert reply["generated_text"] == "The café is open. "
    assert reply["details"]["finish_reason"] == "stop_sequence"
    assert reply["details"]["matched_stop"] == "Stop"
    assert link.cancelled == [message(link).id]


async def test_the_models_end_has_no_text_and_can_be_ignored():
    parameters = {"max_new_tokens": 5, "details": True}
    ended = (await post("/generate", {"inputs": "x", "parameters": parameters}, eos_id=ord("e"))).json()
    assert ended["generated_text"] == "Th"
    assert ended["details"]["finish_reason"] == "eos_token"
    assert ended["details"]["tokens"][-1] == {"id": 101, "text": "", "logprob": -0.5, "special": True}
    parameters["ignore_eos"] = True
    ignored = (await post("/generate", {"inputs": "x", "parameters": parameters}, eos_id=ord("e"))).json()
    assert ignored["generated_text"] == "The c"


async def test_a_stop_token_id_ends_the_text_and_is_reported():
    parameters = {"stop_token_ids": [ord("e")], "details": True}
    reply = (await post("/generate", {"inputs": "x", "parameters": parameters})).json()
    assert reply["generated_text"] == "Th"
    assert (reply["details"]["finish_reason"], reply["details"]["matched_stop"]) == ("stop_sequence", 101)


async def test_a_list_of_inputs_is_answered_in_order_and_streamed_with_sequence_numbers():
    body = {"inputs": ["a", "bb", "ccc"], "parameters": {"max_new_tokens": 2, "details": True}}
    replies = (await post("/generate", body)).json()
    assert [reply["details"]["prompt_tokens"] for reply in replies] == [1, 2, 3]
    events = read_events((await post("/generate", {**body, "stream": True})).text)
    assert sorted((event["sequence"], event["index"]) for event in events) == [(s, i) for s in range(3) for i in (1, 2)]
    ends = {event["sequence"]: event["details"]["prompt_tokens"] for event in events if event["details"]}
    assert ends == {0: 1, 1: 2, 2: 3}


async def test_ids_are_taken_as_prompts_and_truncate_keeps_the_last_ones():
    link = make_link()
    parameters = {"max_new_tokens": 2, "truncate": 2, "return_full_text": True}
    reply = await post("/generate", {"inputs": [97, 98, 99], "parameters": parameters}, link=link)
    assert reply.json() == {"generated_text": "abcTh"}
    assert np.frombuffer(message(link).tokens, dtype="<i4").tolist() == [98, 99]
    assert len((await post("/generate", {"inputs": [[97], [98]], "parameters": {"max_new_tokens": 1}})).json()) == 2


async def test_generation_is_greedy_unless_sampling_is_asked_for():
    async def sampling(**parameters: Any) -> Any:
        link = make_link()
        await post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 1, **parameters}}, link=link)
        return message(link).sampling

    assert (await sampling()).temperature == 0
    assert (await sampling(temperature=0, top_k=5)).temperature == 0
    assert (await sampling(do_sample=True)).temperature == 1
    asked = await sampling(top_k=5, top_p=0.5, min_p=0.25, seed=7)
    assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.seed) == (1, 5, 0.5, 0.25, 7)
    assert (await sampling()).seed != (await sampling()).seed


async def test_a_stream_without_a_limit_lasts_until_something_ends_it():
    body = {"inputs": "x", "stream": True, "parameters": {"max_new_tokens": None, "stop": ["→ The"]}}
    assert read_events((await post("/generate", body)).text)[-1]["details"]["matched_stop"] == "→ The"


async def test_a_shutdown_ends_a_stream_with_what_was_held_back():
    link = make_link(hang_after=5)
    async with make_client(link) as client:
        body = {"inputs": "x", "stream": True, "parameters": {"stop": ["e caf\u00e9!"]}}
        request = asyncio.create_task(client.post("/generate", json=body))
        await eventually(lambda: link.num_hanging)
        link.end_all("shutdown")
        *events, last = read_events((await request).text)
    assert "".join(event["token"]["text"] for event in events) == "Th"
    assert (last["index"], last["token"], last["generated_text"]) == (5, None, "The c")
    assert last["details"]["finish_reason"] == "shutdown"


# /score


async def test_a_document_is_scored_in_the_units_of_the_shared_function():
    text = "It was a dark night, ça va."
    reply = (await post("/score", {"inputs": text})).json()
    tokens = list(text.encode())[1:]
    figures = Figures.of(BytesTokenizer(), tokens, fake_logprobs(np.array(tokens)).tolist())
    for name in ("num_tokens", "num_bytes", "num_chars", "num_words", "logprob", "perplexity", "bits_per_char"):
        assert reply[name] == getattr(figures, name)
    assert reply["is_greedy"] is False
    assert "tokens" not in reply


@pytest.mark.parametrize(("prefix", "num_prefix"), [("\n\n", 2), (10, 1)])
async def test_a_prefix_gives_the_first_token_a_score_and_is_not_scored_itself(prefix, num_prefix):
    link = make_link()
    reply = (await post("/score", {"inputs": "abc", "prefix": prefix, "return": ["tokens"]}, link=link)).json()
    assert len(link.submitted[0].tokens) == 4 * (3 + num_prefix)
    assert [token["logprob"] for token in reply["tokens"]] == fake_logprobs(np.array([97, 98, 99])).tolist()
    assert (reply["num_tokens"], reply["num_bytes"]) == (3, 3)


async def test_the_first_token_has_no_score_without_a_prefix():
    tokens = (await post("/score", {"inputs": "aé", "return": ["tokens"]})).json()["tokens"]
    assert tokens[0] == {"id": 97, "text": "a", "logprob": None, "rank": None}
    assert [token["text"] for token in tokens] == ["a", "", "é"]
    assert tokens[1]["rank"] == 0xC3 % 3


async def test_a_text_of_one_token_has_no_figures():
    reply = (await post("/score", {"inputs": "a"})).json()
    assert (reply["num_tokens"], reply["logprob"], reply["perplexity"]) == (0, 0.0, None)


async def test_a_long_document_is_scored_whole():
    text = "0123456789" * 30_000
    reply = (await post("/score", {"inputs": text})).json()
    assert reply["num_bytes"] == len(text) - 1


async def test_several_documents_are_scored_in_order():
    replies = (await post("/score", {"inputs": ["a b", "a b c d"]})).json()
    assert [reply["num_words"] for reply in replies] == [1, 3]  # the first token is not scored


async def test_a_shutdown_refuses_what_was_not_scored_to_the_end():
    link = make_link(hang_after=0)
    async with make_client(link) as client:
        request = asyncio.create_task(client.post("/score", json={"inputs": "abc"}))
        await eventually(lambda: link.submitted)
        link.end_all("shutdown")
        assert (await request).status_code == 503


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
        ("/score", {"inputs": "a", "unit": "byte"}, "unit"),
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


@pytest.mark.parametrize("state", ["starting", "draining", "failed", "silent"])
async def test_work_is_refused_with_a_time_to_come_back_while_there_is_no_engine(state):
    link = make_link()
    if state == "silent":
        link.heartbeat_age_s = 60
    else:
        link.state = state
    code = {"failed": "engine_down", "silent": "engine_down"}.get(state, state)
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
    link.script = [999]  # no such token
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
        _, writer = await send(port, path, {"inputs": ["a", "b"]})
        await eventually(lambda: len(link.submitted) == 2)
        await asyncio.sleep(0.05)
        assert not link.cancelled
        writer.close()
        await eventually(lambda: len(link.cancelled) == 2)


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

    async def wait(send_event: Any) -> None:
        await asyncio.sleep(0.1)

    await EventStream([wait], request_id="1", ping_s=0.02)({}, asyncio.Event().wait, send)
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
        assert info["engine"]["ring_sizes"] == [[32, 40]]
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
        'allattn_step_duration_seconds_count{phase="decode"} 4.0',
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
        assert set(endpoint["responses"]) == {"200", "400", "413", "422", "429", "500", "503"}
        for response in endpoint["responses"].values():
            content = response["content"]["application/json"]
            assert content.get("example") or content["examples"]
        assert endpoint["requestBody"]["content"]["application/json"]["example"]
    defined = document["components"]["schemas"]
    referred = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert referred <= set(defined)


async def test_a_log_line_has_counts_and_no_text(caplog):
    with caplog.at_level(logging.INFO, logger="server.api"):
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
    code = "import sys, server.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
