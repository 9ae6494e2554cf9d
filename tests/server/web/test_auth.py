import asyncio
import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.web.auth import OPEN_PATHS
from tests.support.guarded_app import KEYS, PARENT, SUMMARY, TRACE, TRACEPARENT, ends, log_lines, make_app, make_client
from tests.support.http_harness import make_client as make_server
from tests.support.http_harness import make_link
from tests.support.http_harness import serving_app as serving

__all__ = ["log_lines"]  # a fixture

pytestmark = pytest.mark.anyio


# API keys


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_each_of_several_keys_opens_the_door(key, scheme):
    async with make_client(make_app(keys=KEYS)) as client:
        reply = await client.post("/echo", content=b"abc", headers={"Authorization": f"{scheme} {key}"})
        assert (reply.status_code, reply.content) == (200, b"abc")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong-key-wrong-key",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0].upper()}",
        f"Bearer {KEYS[0]},{KEYS[1]}",
        f"Basic {KEYS[0]}",
        f"Bearer{KEYS[0]}",
        KEYS[0],
        b"Bearer \xff\xfe",
    ],
)
async def test_without_a_known_key_the_answer_is_401_in_the_form_of_every_error(authorization, log_lines):
    headers = {} if authorization is None else {"Authorization": authorization}
    async with make_client(make_app(keys=KEYS)) as client:
        reply = await client.get("/health", headers=headers)
    body = reply.json()
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert (body["error"]["code"], body["error"]["type"], body["error_type"]) == (
        "unauthorized",
        "validation",
        "validation",
    )
    assert body["request_id"] == reply.headers["x-request-id"]
    (line,) = ends(log_lines)
    assert (line["status"], line["path"], line["request_id"]) == (401, "/health", body["request_id"])
    assert not any(part in str(log_lines) for part in (*KEYS, KEYS[0][:-1], "wrong-key"))


async def test_all_but_liveness_and_the_page_is_guarded():
    async with make_client(make_app(keys=KEYS)) as client:
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200
            assert (await client.post(path)).status_code == 401
        for path in ("/", "/playground/app.js"):  # an application without a playground
            assert (await client.get(path)).status_code == 404
            assert (await client.post(path)).status_code == 401
        for path in (
            "/playground",
            "/page",
            "/docs",
            "/openapi.json",
            "/health",
            "/health/live/",
            "/nothing",
            "http://server//healthz",
        ):
            assert (await client.get(path)).status_code == 401


async def test_nobody_is_asked_for_a_key_where_there_are_none():
    async with make_client() as client:
        assert (await client.post("/echo", content=b"abc")).status_code == 200
        document = (await client.get("/openapi.json")).json()
    assert "security" not in document
    assert "401" not in document["paths"]["/echo"]["post"]["responses"]


async def test_a_request_is_refused_before_its_body_is_read():
    read = False

    async def receive() -> dict[str, Any]:
        nonlocal read
        read = True
        return {"type": "http.request", "body": b"", "more_body": False}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/echo", "headers": [], "query_string": b""}
    await make_app(keys=KEYS)(scope, receive, send)
    assert sent[0]["status"] == 401
    assert not read


async def test_a_large_body_without_a_key_gets_its_401_and_the_connection_goes_on():
    async with serving(make_app(keys=KEYS)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b"x" * 3_000_000
        writer.write(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b" 401 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 " in await reader.read()
        writer.close()


async def test_the_scheme_and_the_401_are_documented_where_there_are_keys():
    async with make_client(make_app(keys=KEYS), key=KEYS[0]) as client:
        document = (await client.get("/openapi.json")).json()
        assert (await client.get("/openapi.json")).json() == document
    assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"bearer": []}]
    content = document["paths"]["/echo"]["post"]["responses"]["401"]["content"]["application/json"]
    assert content["examples"]["unauthorized"]["value"]["error"]["code"] == "unauthorized"
    assert "ErrorReply" in document["components"]["schemas"]
    live = document["paths"]["/health/live"]["get"]
    assert live["security"] == []
    assert "401" not in live["responses"]


# headers


@pytest.mark.parametrize("path", ["/health", "/page", "/nothing", "/docs", "/openapi.json"])
async def test_no_answer_is_sniffed(path):
    async with make_client() as client:
        assert (await client.get(path)).headers["x-content-type-options"] == "nosniff"


async def test_answers_to_strangers_and_to_bugs_are_not_sniffed_either():
    async with make_client(make_app(keys=KEYS)) as client:
        assert (await client.get("/page")).headers["x-content-type-options"] == "nosniff"
    async with make_client() as client:
        assert (await client.post("/bug")).headers["x-content-type-options"] == "nosniff"


async def test_a_page_loads_only_what_is_ours_and_is_not_framed():
    async with make_client() as client:
        page = (await client.get("/page")).headers
        data = (await client.get("/health")).headers
        special = (await client.get("/special")).headers
    assert page["content-security-policy"].startswith("default-src 'self';")
    assert (page["referrer-policy"], page["x-frame-options"]) == ("no-referrer", "DENY")
    assert special["content-security-policy"] == "default-src 'none'"
    assert not {"content-security-policy", "referrer-policy", "x-frame-options"} & set(data)


async def test_the_documentation_may_run_its_script_and_no_other():
    async with make_client() as client:
        reply = await client.get("/docs")
        assert (await client.get("/redoc")).status_code == 404
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", reply.text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (cdn,) = [source for source in policy["script-src"].split() if source.startswith("https:")]
    assert set(policy["script-src"].split()) == {cdn, f"'sha256-{digest}'"}
    loaded = re.findall(r'(?:src|href)="(.*?)"', reply.text)
    assert sorted(url.removeprefix(cdn) for url in loaded) == ["data:,", "swagger-ui-bundle.js", "swagger-ui.css"]
    assert cdn in policy["style-src"].split()
    assert "url: 'openapi.json'" in script
    assert policy["connect-src"] == "'self'"
    assert "data:" in policy["img-src"]


# request ids and the line in the log


@pytest.mark.parametrize(
    ("headers", "request_id", "trace_id"),
    [
        ({"X-Request-Id": "mine-1"}, "mine-1", None),
        ({"traceparent": TRACEPARENT}, TRACE, TRACE),
        ({"X-Request-Id": "mine-1", "traceparent": TRACEPARENT}, "mine-1", TRACE),
        ({"X-Request-Id": "not one", "traceparent": TRACEPARENT}, TRACE, TRACE),
    ],
)
async def test_the_id_is_the_clients_or_the_traces(headers, request_id, trace_id, log_lines):
    async with make_client() as client:
        reply = await client.post("/echo", content=b"secret", headers=headers)
    assert reply.headers["x-request-id"] == request_id
    (line,) = ends(log_lines)
    assert (line["request_id"], line.get("trace_id")) == (request_id, trace_id)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Request-Id": ""},
        {"X-Request-Id": "a" * 129},
        {"X-Request-Id": "tab\tbed"},
        {"traceparent": f"01-{TRACE}-{PARENT}-01"},
        {"traceparent": f"00-{TRACE}-{PARENT}-01-extra"},
        {"traceparent": f"00-{TRACE.upper()}-{PARENT}-01"},
        {"traceparent": f"00-{'0' * 32}-{PARENT}-01"},
        {"traceparent": f"00-{TRACE}-{'0' * 16}-01"},
        {"traceparent": TRACE},
    ],
)
async def test_without_a_valid_id_there_is_a_new_one(headers, log_lines):
    async with make_client() as client:
        ids = [(await client.post("/echo", headers=headers)).headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{32}", one) and one != TRACE for one in ids)
    assert [line["request_id"] for line in ends(log_lines)] == ids
    assert not any("trace_id" in line for line in ends(log_lines))


async def test_an_id_that_the_body_names_is_the_one_that_is_told(log_lines):
    async with make_client() as client:
        reply = await client.post("/named", headers={"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == ends(log_lines)[0]["request_id"] == "from-the-body"


async def test_each_post_and_delete_is_one_line_with_what_the_endpoint_counted(log_lines):
    async with make_client() as client:
        await client.post("/echo", content=b"secret")
        await client.delete("/requests/a-1")
        await client.get("/health")
        await client.post("/nothing")
    first, second, third = ends(log_lines)
    assert set(first) - {"time", "level", "logger", "event"} == {
        "request_id",
        "method",
        "path",
        "status",
        "seconds",
        *SUMMARY.fields(),
    }
    assert (first["path"], first["status"], first["prompt_tokens"]) == ("/echo", 200, 3)
    assert (second["method"], second["path"], second["status"]) == ("DELETE", "/requests/a-1", 200)
    assert (third["path"], third["status"]) == ("/nothing", 404)
    assert "secret" not in str(log_lines)


async def test_a_bug_is_answered_and_logged_under_the_id_without_what_its_message_quotes(log_lines):
    async with serving(make_app()) as port, httpx.AsyncClient() as client:
        reply = await client.post(f"http://127.0.0.1:{port}/bug", content=b"the secret prompt")
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal"
    bug, end = [json.loads(line) for line in log_lines if "request_id" in line]
    assert (bug["event"], bug["level"], bug["trace"][-1]) == ("a bug", "error", "builtins.ValueError")
    assert any("guarded_app.py" in entry for entry in bug["trace"])
    assert bug["request_id"] == end["request_id"] == reply.json()["request_id"]
    assert end["status"] == 500
    assert "secret" not in str(log_lines)


async def test_a_bug_in_the_middle_of_an_answer_cuts_it_off_and_is_logged_likewise(log_lines):
    async with serving(make_app()) as port, httpx.AsyncClient() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(f"http://127.0.0.1:{port}/late-bug", content=b"the secret prompt")
    assert [json.loads(line)["trace"][-1] for line in log_lines if "a bug" in line] == ["builtins.ValueError"]
    assert "secret" not in str(log_lines)


async def test_a_client_that_leaves_is_a_499(log_lines):
    async with serving(make_app()) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        assert not log_lines
        writer.close()
        async with asyncio.timeout(5):
            while not log_lines:
                await asyncio.sleep(0.01)
    assert [line["status"] for line in ends(log_lines)] == [499]


# the application


async def test_the_application_is_guarded_by_the_keys_of_its_settings(tmp_path, caplog):
    path: Path = tmp_path / "keys"
    path.write_text(KEYS[1])
    path.chmod(0o644)
    async with make_server(make_link(), api_keys=[KEYS[0]], api_key_file=path) as client:
        for key in (*KEYS, "wrong-key-wrong-key"):
            headers = {"Authorization": f"Bearer {key}"}
            for target in ("/metrics", "/info", "/health", "/health/ready", "/docs", "/openapi.json"):
                reply = await client.get(target, headers=headers)
                assert reply.status_code == (200 if key in KEYS else 401)
                assert not any(one in reply.text for one in KEYS)
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.post("/generate", content=b"{")).status_code == 401
        metrics = (await client.get("/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"})).text
    assert 'allattn_requests_rejected_total{reason="unauthorized"} 7.0' in metrics
    assert [record.getMessage() for record in caplog.records if "every user" in record.getMessage()] == [
        f"{path} can be read by every user of this machine"
    ]
