"""Tests of two replicas under Ray Serve on this machine: streams, clients that leave, a replica killed under load.

Ray listens on every interface, so these tests run only where the loopback is the only interface: `make test-ray`.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[3]
URL = "http://127.0.0.1:8000"
LONG = 400  # tokens; eight streams of this length take seconds
BODY = {"inputs": "It was", "stream": True, "parameters": {"ignore_eos": True, "max_new_tokens": LONG}}


def only_loopback() -> bool:
    names = [line.partition(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    return names == ["lo"]


pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # two replicas start, and a third one later
    pytest.mark.skipif(find_spec("ray") is None or not only_loopback(), reason="run by `make test-ray`"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `serve run` with two replicas; give the file of its output."""
    output = tmp_path_factory.mktemp("ray") / "output"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.operation.ray_proxy:middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    command = [str(Path(sys.executable).with_name("serve")), "run", "server.ray_serve:app"]
    command += ["bundle=bundles/default", "min_replicas=2", "num_rows=4", "max_waiting=8"]
    with (
        output.open("wb") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            deadline = time.monotonic() + 180
            while "is ready at" not in output.read_text():
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.2)
            yield output
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert running("server.engine.process") == []


def running(name: str) -> list[int]:
    """Return the pids in this network namespace, which only this test uses, whose command line has the word `name`."""
    ours, found = Path("/proc/self/ns/net").readlink(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if name in (path / "cmdline").read_text() and (path / "ns/net").readlink() == ours:
                found.append(int(path.name))
        except OSError:  # the process has ended meanwhile
            pass
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def health_of_all(client: httpx.AsyncClient) -> dict[int, dict[str, Any]]:
    """Return the health of each replica by the pid of its engine; ask many times, since any replica may answer."""
    replies = await asyncio.gather(*(client.get("/health") for _ in range(16)))
    return {reply.json()["engine"]["pid"]: reply.json() for reply in replies if reply.status_code == 200}


async def until(condition: Callable[[], Awaitable[bool]], *, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.1)


async def stream(client: httpx.AsyncClient, *, begun: list[str]) -> list[dict[str, Any]]:
    """Return all events of a long stream, or the error in their place; add the stream's id to `begun` at its begin."""
    events: list[dict[str, Any]] = []
    async with client.stream("POST", "/generate", json=BODY) as reply:
        if reply.status_code == 503:
            return [json.loads(await reply.aread())]
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 1:
                    begun.append(reply.headers["x-request-id"])
    return events


def make_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=URL, timeout=200)


async def test_each_replica_has_an_engine_of_its_own(cluster):
    assert len(running("server.engine.process")) == 2
    async with make_client() as client:
        seen: set[int] = set()

        async def all_seen() -> bool:
            seen.update(await health_of_all(client))
            return len(seen) == 2

        await until(all_seen, within_s=20)
    assert seen == set(running("server.engine.process"))


async def test_tokens_come_one_by_one(cluster):
    async with make_client() as client, client.stream("POST", "/generate", json=BODY) as reply:
        arrivals = []
        async for chunk in reply.aiter_raw():
            arrivals.append((time.monotonic(), chunk))
            if len(arrivals) == 50:
                break
    assert all(chunk.count(b"data: ") <= 3 for _, chunk in arrivals)
    assert sum(chunk.count(b"data: ") == 1 for _, chunk in arrivals) > 40
    gaps = [after - before for (before, _), (after, _) in pairwise(arrivals)]
    assert max(gaps) < 1


async def test_errors_and_ids_are_those_of_the_contract(cluster):
    async with make_client() as client:
        reply = await client.post("/generate", json={"inputs": ""}, headers={"X-Request-Id": "mine-1"})
        assert reply.status_code == 422
        assert reply.json()["error"]["code"] == "invalid_field"
        assert reply.headers.get_list("x-request-id") == ["mine-1"] == [reply.json()["request_id"]]
        named = await client.post("/generate", json={"inputs": "It", "request_id": "b-2", "parameters": {"n": 1}})
        assert named.headers.get_list("x-request-id") == ["b-2"]


async def test_clients_that_leave_free_their_rows(cluster):
    async with make_client() as client:

        async def leave() -> None:
            async with client.stream("POST", "/generate", json=BODY) as reply:
                await anext(reply.aiter_lines())

        await asyncio.gather(*(leave() for _ in range(12)))

        async def all_free() -> bool:
            healths = await health_of_all(client)
            return len(healths) == 2 and all(one["rows"]["used"] == 0 for one in healths.values())

        await until(all_free, within_s=5)

    async def all_logged() -> bool:  # the lines of the log pass through Ray
        return cluster.read_text().count('"status": 499') >= 12

    await until(all_logged, within_s=20)
    assert "a stream failed" not in cluster.read_text()


async def test_a_replica_restarts_an_engine_that_is_killed(cluster):
    async with make_client() as client:
        victim = running("server.engine.process")[0]
        replica = parent(victim)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()

        async def is_back() -> bool:
            healths = await health_of_all(client)
            return len(healths) == 2 and victim not in healths

        await until(is_back, within_s=60)
        print(f"an engine again after {time.monotonic() - killed:.1f} s")
        assert sorted(one["engine"]["restarts"] for one in (await health_of_all(client)).values()) == [0, 1]
    assert replica in map(parent, running("server.engine.process"))


async def test_a_replica_killed_under_load_ends_its_streams_with_an_error_and_comes_back(cluster):
    async with make_client() as client:
        victim = running("server.engine.process")[0]
        begun: list[str] = []
        streams = [asyncio.create_task(stream(client, begun=begun)) for _ in range(8)]
        waiting = [asyncio.create_task(client.post("/generate", json=BODY | {"stream": False})) for _ in range(4)]
        async with asyncio.timeout(60):
            while len(begun) < 4:
                await asyncio.sleep(0.01)
        killed = time.monotonic()
        os.kill(parent(victim), signal.SIGKILL)
        ended: list[float] = []
        for task in streams:
            task.add_done_callback(lambda _: ended.append(time.monotonic() - killed))
        meanwhile = await client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2}})
        results = await asyncio.gather(*streams)
        replies = await asyncio.gather(*waiting)

        lost = [events for events in results if "error" in events[-1]]
        assert 1 <= len(lost) < 8
        assert all(events[-1]["error"]["code"] == "engine_down" for events in lost)
        assert all(len(events) == 1 or events[-1]["request_id"] in begun for events in lost)
        assert sorted(ended)[len(lost) - 1] < 5
        for events in results:
            if events not in lost:
                assert events[-1]["details"]["generated_tokens"] == LONG
        assert meanwhile.status_code in (200, 503)
        assert {reply.status_code for reply in replies} <= {200, 503}
        for reply in replies:
            if reply.status_code == 503:
                assert reply.json()["error"]["code"] == "engine_down"
                assert int(reply.headers["retry-after"]) >= 1

        async def is_gone() -> bool:
            return not Path(f"/proc/{victim}").exists()

        await until(is_gone, within_s=5)

        async def is_back() -> bool:
            return len(await health_of_all(client)) == 2

        await until(is_back, within_s=200)
        print(f"\nlost {len(lost)} of 8 streams, ended after {[round(one, 2) for one in sorted(ended)]} s; "
              f"plain {[reply.status_code for reply in replies]}, meanwhile {meanwhile.status_code}, "
              f"two again after {time.monotonic() - killed:.0f} s")  # fmt: skip
    assert victim not in running("server.engine.process")
