"""Tests of the load tools: bytes that arrive in any parts give the same reply, and every ending has its name."""

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import Connection, Reply, ReplyParser, ask, encode_request
from benchmarks.load import Crowd, figures, flags_of, lengths_of, median_rows, real_prompts, spread
from benchmarks.soak import Case, growth, judge, memory

ROOT = Path(__file__).parents[2]
EVENTS = [
    b'data: {"a":"\xc3\xa9 data: "}\n\n',
    b": ping\n\n",
    b'data: {"a":2}\n\n',
    b'data: {"finish_reason":"length"}\n\n',
]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
PLAIN = b'HTTP/1.1 429 Too Many\r\nRetry-After: 1\r\ncontent-length: 9\r\n\r\n{"a": 12}'
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunked(*payloads: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in (*payloads, b""))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % len(data) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


def parsed(pieces: list[bytes], *, keep: bool = True) -> Reply:
    reply = Reply()
    parser = ReplyParser(reply, keep=keep)
    done = [parser.feed(piece, float(i)) for i, piece in enumerate(pieces)]
    assert done == [False] * (len(pieces) - 1) + [True]
    return reply


cuts = st.lists(st.integers(0, 10_000), max_size=12)


@given(in_chunks=cuts, in_reads=cuts)
def test_a_stream_cut_anywhere_has_the_same_events(in_chunks, in_reads):
    body = chunked(*cut(b"".join(EVENTS), in_chunks))
    reply = parsed(cut(STREAM_HEAD + body, in_reads))
    assert reply.status == 200
    assert reply.events() == [{"a": "é data: "}, {"a": 2}, {"finish_reason": "length"}]
    assert len(reply.times) == 3
    assert list(reply.times) == sorted(reply.times)


@given(in_reads=cuts)
def test_a_stream_that_is_not_kept_is_counted_and_has_its_last_event(in_reads):
    reply = parsed(cut(STREAM_HEAD + chunked(*EVENTS), in_reads), keep=False)
    assert len(reply.times) == 3
    assert reply.events()[-1] == {"finish_reason": "length"}


@given(in_reads=cuts)
def test_a_plain_reply_cut_anywhere_is_whole(in_reads):
    reply = parsed(cut(PLAIN, in_reads))
    assert (reply.status, reply.headers[b"retry-after"], json.loads(reply.body)) == (429, b"1", {"a": 12})


def test_what_is_not_http_is_an_error():
    with pytest.raises(ValueError, match="not HTTP"):
        ReplyParser(Reply(), keep=True).feed(b"SSH-2.0\r\n\r\n", 0.0)


def serving(handler: Handler, client: Callable[[tuple[str, int]], Awaitable[Any]]) -> Any:
    """Serve `handler`, run `client` in the same event loop, and return its result."""

    handling = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
        writer.close()

    async def run() -> Any:
        async with asyncio.timeout(10), await asyncio.start_server(handle, "127.0.0.1") as server:
            result = await client(server.sockets[0].getsockname())
            await asyncio.gather(*handling)
            await asyncio.sleep(0.01)  # until the transports are closed
            return result

    return asyncio.run(run())


def answering(*pieces: bytes, then_close: bool = False) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            while await reader.readline() not in (b"\r\n", b""):
                pass
            for piece in pieces:
                writer.write(piece)
            if then_close:
                break

    return handle


def test_a_connection_serves_one_exchange_after_another():
    async def twice(address):
        connection = await Connection.open(address)
        replies = [await connection.exchange(encode_request("GET", "/"), keep=True) for _ in range(2)]
        connection.leave()
        return replies

    for reply in serving(answering(STREAM_HEAD, chunked(*EVENTS)), twice):
        assert (reply.status, reply.error, len(reply.events()), reply.problem) == (200, "", 3, "")
        assert reply.sent <= reply.times[0] <= reply.ended


@pytest.mark.parametrize(
    ("handler", "timeout_s", "error"),
    [
        (answering(STREAM_HEAD, chunked(EVENTS[0])[:-5], then_close=True), 5, "cut off"),
        (answering(STREAM_HEAD), 0.05, "timeout"),
        (answering(b"what?\r\n\r\n"), 5, "not HTTP"),
    ],
)
def test_an_answer_without_its_end_says_why(handler, timeout_s, error):
    reply = serving(handler, lambda address: ask(address, encode_request("GET", "/"), timeout_s=timeout_s))
    assert (reply.error, reply.problem) == (error, error)
    assert reply.ended > reply.sent


def test_nobody_at_the_address_is_an_error_of_the_reply():
    reply = asyncio.run(ask(("127.0.0.1", 1), encode_request("GET", "/")))
    assert reply.error == "no connection"


def test_a_client_can_leave_and_can_stop_reading_for_a_while():
    async def pause_then_leave(address):
        connection = await Connection.open(address, receive_buffer=4096)
        later = asyncio.get_running_loop().call_later
        exchange = asyncio.create_task(connection.exchange(encode_request("GET", "/"), keep=True))
        await asyncio.sleep(0.05)
        connection.pause()
        later(0.05, connection.resume)
        later(0.1, connection.leave)
        return await exchange

    reply = serving(answering(STREAM_HEAD, chunked(EVENTS[0])[:-5]), pause_then_leave)
    assert (reply.error, reply.problem, len(reply.times)) == ("left", "", 1)


def test_a_crowd_asks_again_once_it_is_answered():
    async def crowd(address):
        requests = iter(lambda: encode_request("GET", "/"), None)
        async with Crowd(address, requests=requests, size=3) as crowd:
            await crowd.until_busy(3)
            while sum(reply.ended > 0 for reply in crowd.replies) < 9:
                await asyncio.sleep(0.01)
        return crowd.replies

    replies = serving(answering(STREAM_HEAD, chunked(*EVENTS)), crowd)
    assert {reply.problem for reply in replies} == {""}


def made_reply(*times: float, sent: float = 0.0, ended: float = 0.0, **fields: Any) -> Reply:
    reply = Reply(status=200, sent=sent, ended=ended, **fields)
    reply.times.extend(times)
    return reply


def test_figures_count_what_came_inside_the_window():
    whole = made_reply(1.0, 2.0, 4.0, sent=0.5, ended=4.0, body=bytearray(b'{"finish_reason":"length"}'))
    still = made_reply(9.5, 9.6, 20.0, sent=9.0)
    refused = Reply(status=429, sent=3.0, ended=3.1)
    row = figures([whole, still, refused], start=1.5, end=10.0)
    assert (row["tokens"], row["requests"], row["errors"]) == (4, 2, {"429": 1})
    assert row["tokens_per_s"] == round(4 / 8.5, 1)
    assert row["ttft_ms"]["p50"] == 500
    assert row["itl_ms"]["p50"] == 1000  # the gaps are 1, 2 and 0.1 seconds
    assert row["e2e_ms"]["p50"] == 3500


def test_percentiles_are_milliseconds_or_nothing():
    assert spread([i / 1000 for i in range(101)]) == {"p50": 50.0, "p99": 99.0}
    assert spread([]) == {"p50": None, "p99": None}


def test_rounds_become_medians_and_errors_their_sum():
    rounds = [[{"rate": rate, "itl": {"p50": None, "p99": rate}, "errors": {"429": 2}}] for rate in (1, 5, 3)]
    assert median_rows(rounds) == [{"rate": 3, "itl": {"p50": None, "p99": 3}, "errors": {"429": 6}}]


def test_first_lengths_are_random_and_the_rest_are_full():
    lengths = lengths_of(100, num_short=5)
    assert max(next(lengths) for _ in range(5)) <= 100
    assert [next(lengths) for _ in range(3)] == [100] * 3


def test_prompts_have_the_asked_number_of_tokens():
    prompts = real_prompts(ROOT / "bundles/default", text=ROOT / "training/corpora/shakespeare.txt", num_tokens=64)
    assert {len(prompt) for prompt in prompts} == {64}
    assert len(set(map(tuple, prompts))) > 500


def test_settings_become_flags():
    assert flags_of(["num_rows=8", "dtype=bfloat16"]) == ["--num-rows", "8", "--dtype", "bfloat16"]


def stream_of(*events: dict[str, Any]) -> bytearray:
    return bytearray(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))


def event(text: str, *, whole: str | None = None, reason: str = "length", sequence: int = 0) -> dict[str, Any]:
    details = None if whole is None else {"finish_reason": reason}
    return {"token": {"text": text}, "generated_text": whole, "details": details, "sequence": sequence}


ONE = Case(request=b"", stream=True, num_sequences=1)
PLAIN_CASE = Case(request=b"", num_sequences=1)
ERROR = bytearray(b'{"error": {"code": "engine_down"}}')
RETRY = {b"retry-after": b"1", b"retry-after-ms": b"1000"}


@pytest.mark.parametrize(
    ("case", "reply", "ending"),
    [
        (ONE, Reply(200, body=stream_of(event("a"), event("b", whole="ab"))), "answered"),
        (ONE, Reply(200, body=stream_of(event("a"))), "lost"),
        (ONE, Reply(200, body=stream_of(event("a", whole="b"))), "lost"),
        (ONE, Reply(200, body=stream_of(event("a", whole="a"), event("b"))), "lost"),
        (ONE, Reply(200, body=stream_of(event("a", whole="a", reason="cancelled"))), "lost"),
        (ONE, Reply(200, body=bytearray(b"data: {\n\n")), "lost"),
        (ONE, Reply(200, error="timeout"), "lost"),
        (ONE, Reply(200, error="cut off"), "lost"),
        (ONE, Reply(503, headers=RETRY, body=ERROR), "lost"),
        (ONE, Reply(429, headers=RETRY, body=ERROR), "refused"),
        (ONE, Reply(429, body=ERROR), "lost"),
        (PLAIN_CASE, Reply(200, body=bytearray(b'{"generated_text": "a"}')), "answered"),
        (PLAIN_CASE, Reply(200, body=bytearray(b"[]")), "lost"),
        (PLAIN_CASE, Reply(500, body=ERROR), "lost"),
        (PLAIN_CASE, Reply(500, body=bytearray(b"oops")), "lost"),
        (Case(request=b"", status=422), Reply(422, body=ERROR), "rejected"),
        (Case(request=b"", status=422), Reply(200, body=bytearray(b"{}")), "lost"),
        (Case(request=b"", timed=True), Reply(408, body=ERROR), "timeout"),
        (Case(request=b"", actions=((0.1, "leave"),)), Reply(200, error="left"), "left"),
    ],
)
def test_every_ending_has_a_name_and_what_is_not_allowed_is_lost(case, reply, ending):
    assert judge(case, reply, outage=False).partition(":")[0] == ending


def test_errors_of_the_engine_are_allowed_while_it_is_down():
    assert judge(ONE, Reply(503, body=ERROR), outage=True) == "engine error"
    broken = Reply(200, body=stream_of(event("a"), json.loads(ERROR)))
    assert judge(ONE, broken, outage=True) == "engine error"
    assert judge(ONE, broken, outage=False).startswith("lost")


def test_growth_compares_the_first_with_the_last_fifth():
    assert growth([500_000_000] * 10 + [100_000_000] * 90)["grew"] is False  # the first tenth is the warm-up
    assert growth([100_000_000] * 80 + [200_000_000] * 20)["grew"] is True


def test_memory_is_told_for_each_engine_that_lived_long_enough():
    samples = [(1, 7, 5)] * 12 + [(1, None, None)] + [(1, 8, 6)] * 3
    assert len(memory(samples)["engines"]) == 1


def run_module(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path):
    out = tmp_path / "soak.json"
    result = run_module("benchmarks.soak", "--minutes", "0.3", "--out", str(out))
    assert all(result["checks"].values())
    assert result["kills"] >= 1
    assert result["requests"] > 20
    assert json.loads(out.read_text()) == result


@pytest.mark.slow
def test_a_short_load_gives_every_figure():
    small = ["--prompt-tokens", "8", "--output-tokens", "8", "--set", "num_rows=2"]
    result = run_module("benchmarks.load", "--concurrency", "1", "3", "--seconds", "1", *small)
    assert [row["concurrency"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["errors"] == {}
        assert row["requests"] > 0
        assert {"engine_tokens_per_s", "share_of_engine", "api_us_per_token", "client_us_per_token"} <= row.keys()
    opened = run_module("benchmarks.load", "--rate", "5", "--requests", "4", *small)
    assert (opened["rows"][0]["tokens"], opened["rows"][0]["errors"]) == (32, {})
