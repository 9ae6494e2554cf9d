"""Clients leave a real server, on each backend, at random moments: then no row is in use and no sequence waits."""

import asyncio
import json
import random
import re
import signal
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.artefacts import BACKENDS, named_backend, shipped_folder

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def leave_early(port: int, rng: random.Random, number: int) -> None:
    """Run one client, which asks for a long answer and leaves after up to 150 ms."""
    path, body = rng.choice(
        [
            ("/generate", {"inputs": "It was", "stream": True, "parameters": {"max_new_tokens": None}}),
            ("/generate", {"inputs": ["It was", "a dark"], "parameters": {"max_new_tokens": 5000}}),
            ("/generate", {"inputs": "a", "stream": True, "parameters": {"temperature": 1.0, "n": 3, "stop": ["zq"]}}),
            ("/score", {"inputs": "It was a dark night. " * 2000}),
        ]
    )
    await asyncio.sleep(number * 0.01)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    writer.write((head + data)[: rng.choice([len(head) // 2, len(head) + len(data) // 2, 10**9])])
    try:
        async with asyncio.timeout(rng.random() * 0.15):
            while await reader.read(1000):
                pass
    except TimeoutError:
        pass
    if rng.random() < 0.5:
        writer.transport.abort()  # close with a reset, not in an orderly way
    writer.close()


@pytest.mark.parametrize("backend", BACKENDS)
async def test_200_random_disconnects_leave_no_row_used(backend):
    command = [sys.executable, "-m", "server", "--bundle", str(shipped_folder(backend)), "--port", "0"]
    command += ["--backend", named_backend(backend), "--num-rows", "4", "--max-waiting", "1000"]
    server = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert server.stdout is not None
    found = None
    while not found:
        found = re.search(rb"http://127\.0\.0\.1:(\d+)", await server.stdout.readline())
    port, rng = int(found[1]), random.Random(0)
    await asyncio.gather(*(leave_early(port, rng, number) for number in range(200)))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        async with asyncio.timeout(20):
            while True:
                health = (await client.get("/health")).json()
                if health["rows"]["used"] == health["queue"]["requests"] == health["queue"]["tokens"] == 0:
                    break
                await asyncio.sleep(0.05)
        reply = await client.post("/generate", json={"inputs": "It was", "parameters": {"max_new_tokens": 3}})
        assert reply.status_code == 200
        assert health["engine"]["restarts"] == 0
    server.send_signal(signal.SIGTERM)
    assert await server.wait() == 0
