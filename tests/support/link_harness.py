"""Links with real engine processes over a fake runner, for the tests of links."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.sampling.params import SamplingParams
from server.config import Settings
from server.link.supervisor import EngineLink, Stream
from server.protocol.messages import Ended, Generate, Score, Scores, Token

ROOT = Path(__file__).parents[2]
RUNNER = "tests.support.fake_runner:FakeRunner.load"
FOR_EVER = 10**9  # tokens


@contextmanager
def left_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give this process and its children a folder for temporary files, and check that it is empty at the end."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield
        assert list(Path(name).iterdir()) == []


@asynccontextmanager
async def running(*, runner: str = RUNNER, restart_slack_s: float = 60, **settings: Any) -> AsyncIterator[EngineLink]:
    link = EngineLink(Settings(**{"num_rows": 2} | settings), runner=runner, restart_slack_s=restart_slack_s)
    try:
        await link.start()
        yield link
    finally:
        await link.close(0)
    assert children() == []


def packed(tokens: list[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def generate(link: EngineLink, name: str, tokens: list[int], *, max_new_tokens: int = FOR_EVER) -> Stream:
    (stream,) = link.submit(Generate(name, packed(tokens), SamplingParams(), max_new_tokens))
    return stream


def score(link: EngineLink, name: str, tokens: list[int]) -> Stream:
    (stream,) = link.submit(Score(name, packed(tokens)))
    return stream


async def collect(stream: Stream) -> list[Token | Scores | Ended]:
    """Return all messages; exactly one, the last, must be an ending."""
    async with asyncio.timeout(20):
        messages = [message async for message in stream]
    assert [isinstance(message, Ended) for message in messages] == [False] * (len(messages) - 1) + [True]
    return messages


async def ending(stream: Stream) -> Ended:
    last = (await collect(stream))[-1]
    assert isinstance(last, Ended)
    return last


async def state(link: EngineLink, expected: str) -> None:
    async with asyncio.timeout(20):
        while link.state != expected:
            await asyncio.sleep(0.01)


def children(pid: int | None = None) -> list[int]:
    """Return the children of a process (of this one by default) that are not reaped."""
    pid = pid or os.getpid()
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def becomes_true(condition: Callable[[], object], *, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())
