"""The link and a real engine process over a fake runner: streams, endings, failures, and what is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from fake_runner import RAISE_TOKEN, STALL_TOKEN, next_token

from server.config import Settings
from server.link import HANG_S, EngineLink, Stream
from server.messages import Ended, Generate, Sampling, Score, Scores, Step, Token

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
RUNNER = "fake_runner:FakeRunner.load"
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
FOR_EVER = 10**9  # tokens

PARENT = f"""
import asyncio, sys, uvloop
from server.config import Settings
from server.link import EngineLink

async def main():
    link = EngineLink(Settings(num_rows=2), runner={RUNNER!r})
    starting = asyncio.create_task(link.start())
    while link._process is None or sys.argv[1] == "ready" and link.ready is None:
        await asyncio.sleep(0)
    print(link._process.pid, flush=True)
    await asyncio.sleep(600)

uvloop.run(main())
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where links put their folders (its path is short, as those of sockets must be), for children too."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        yield Path(name)


@asynccontextmanager
async def running(*, runner: str = RUNNER, num_rows: int = 2) -> AsyncIterator[EngineLink]:
    link = EngineLink(Settings(num_rows=num_rows), runner=runner)
    try:
        await link.start()
        yield link
    finally:
        await link.close(0)


def packed(tokens: list[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def generate(name: str, tokens: list[int], *, max_new_tokens: int = FOR_EVER) -> Generate:
    return Generate(name, packed(tokens), GREEDY, max_new_tokens, ())


async def collect(stream: Stream) -> list[Token | Scores | Ended]:
    """All messages, of which exactly one, the last, is an ending."""
    async with asyncio.timeout(20):
        messages = [message async for message in stream]
    assert [isinstance(message, Ended) for message in messages] == [False] * (len(messages) - 1) + [True]
    return messages


async def ending(stream: Stream) -> Ended:
    last = (await collect(stream))[-1]
    assert isinstance(last, Ended)
    return last


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def becomes_true(condition: Callable[[], bool], *, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


async def test_a_stream_holds_the_tokens_in_order_and_then_one_ending(folder):
    async with running() as link:
        messages = await collect(link.submit(generate("a", [1, 2, 3], max_new_tokens=5)))
    history = [1, 2, 3]
    for message in messages[:-1]:
        assert isinstance(message, Token)
        assert message.token == next_token(history)
        history.append(message.token)
    assert len(history) == 8
    assert messages[-1].finish_reason == "length"


async def test_a_document_longer_than_a_chunk_arrives_whole(folder):
    async with running() as link:
        messages = await collect(link.submit(Score("a", packed([7] * 1000))))
    parts = [message for message in messages if isinstance(message, Scores)]
    logprobs = np.concatenate([np.frombuffer(part.logprobs, "<f4") for part in parts])
    assert len(parts) > 1
    assert logprobs.tolist() == [-n / 8 for n in range(1, 1000)]
    assert messages[-1].finish_reason == "scored"


async def test_a_cancelled_sequence_ends_and_its_row_is_free(folder):
    async with running(num_rows=1) as link:
        first, second = link.submit(generate("a", [1])), link.submit(generate("b", [2], max_new_tokens=3))
        await anext(first)
        link.cancel("a")
        assert (await ending(first)).finish_reason == "cancelled"
        assert (await ending(second)).finish_reason == "length"
        link.cancel("a")  # long over
        assert (link.rows_used, link.num_waiting, link.state) == (0, 0, "ready")


async def test_each_step_is_told_to_whoever_counts_them(folder):
    steps: list[Step] = []
    async with running() as link:
        link.on_step = steps.append
        await ending(link.submit(generate("a", [1, 2, 3], max_new_tokens=4)))
    assert sum(step.num_prefilled for step in steps) == 3
    assert sum(step.num_decoded for step in steps) == 3  # the prompt's last chunk drew the first of the four


async def test_when_the_engine_is_killed_every_stream_ends_once_with_an_error(folder):
    async with running(num_rows=1) as link:
        streams = [link.submit(generate(name, [1])) for name in "ab"]  # one computed, one waiting
        await anext(streams[0])
        os.kill(link.ready.pid, signal.SIGKILL)
        for stream in streams:
            last = await ending(stream)
            assert last.finish_reason == "error"
            assert "ended with status -9" in last.error
        assert link.state == "failed"
        late = await ending(link.submit(generate("late", [1])))
        assert (late.finish_reason, late.error) == ("error", link.failure)


async def test_an_exception_of_the_runner_is_told_and_ends_the_engine(folder, capfd):
    async with running() as link:
        good, bad = link.submit(generate("a", [1])), link.submit(generate("b", [RAISE_TOKEN]))
        assert (await ending(bad)).error == "RuntimeError: the fake device has failed"
        assert (await ending(good)).finish_reason == "error"
        assert link.state == "failed"
        assert becomes_true(lambda: not is_alive(link.ready.pid))
    assert "Traceback" in capfd.readouterr().err


async def test_an_engine_that_cannot_load_fails_the_start_with_its_reason(folder, capfd):
    async with running(runner="fake_runner:Nothing") as link:
        assert link.state == "failed"
        assert link.ready is None
        assert "Nothing" in link.failure


@pytest.mark.slow
async def test_an_engine_that_hangs_over_work_is_noticed_and_killed(folder):
    async with running() as link:
        started = time.monotonic()
        last = await ending(link.submit(generate("a", [STALL_TOKEN])))
        assert "silent" in last.error
        assert time.monotonic() - started < HANG_S + 3
        assert becomes_true(lambda: not is_alive(link.ready.pid))


@pytest.mark.slow
async def test_a_loop_that_was_held_up_itself_does_not_blame_the_engine(folder):
    async with running() as link:
        stream = link.submit(generate("a", [1]))
        await anext(stream)
        time.sleep(HANG_S + 0.5)
        await asyncio.sleep(0.5)
        assert (link.state, link.failure) == ("ready", "")
        link.cancel("a")
        assert (await ending(stream)).finish_reason == "cancelled"


async def test_ctrl_c_in_the_terminal_does_not_reach_the_engine(folder):
    async with running() as link:
        os.kill(link.ready.pid, signal.SIGINT)
        assert (await ending(link.submit(generate("a", [1], max_new_tokens=20)))).finish_reason == "length"


async def test_closing_lets_live_work_end_by_itself(folder):
    async with running() as link:
        stream = link.submit(generate("a", [1], max_new_tokens=300))
        await link.close(20)
        assert (await ending(stream)).finish_reason == "length"


async def test_closing_leaves_no_stream_no_process_and_no_file(folder):
    async with running() as link:
        (own,) = folder.iterdir()
        assert own.stat().st_mode & 0o777 == 0o700
        stream = link.submit(generate("a", [1]))
        await anext(stream)
        await link.close(0)
        assert (await ending(stream)).finish_reason == "shutdown"
        assert not is_alive(link.ready.pid)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("moment", ["starting", "ready"])
def test_when_the_parent_is_killed_no_process_and_no_file_is_left(folder, moment):
    with subprocess.Popen([sys.executable, "-c", PARENT, moment], stdout=subprocess.PIPE, text=True) as parent:
        engine = int(parent.stdout.readline())
        parent.kill()
    gone = becomes_true(lambda: not is_alive(engine))
    if not gone:
        os.kill(engine, signal.SIGKILL)
    assert gone
    assert becomes_true(lambda: list(folder.iterdir()) == [])
