"""Tests with engine processes that die, hang or are ended: every stream ends once, and no process or file is left."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import Settings
from server.link.supervisor import EngineLink
from server.protocol.messages import Ended
from tests.support.fake_runner import DIE_TOKEN, RAISE_ALL_TOKEN, STALL_TOKEN
from tests.support.link_harness import (
    FOR_EVER,
    RUNNER,
    becomes_true,
    children,
    ending,
    generate,
    is_alive,
    left_empty,
    running,
    state,
)

pytestmark = pytest.mark.anyio

PARENT = f"""
import asyncio, sys, uvloop
from server.config import Settings
from server.link.supervisor import EngineLink
from server.protocol.messages import Generate, SamplingParams

async def main():
    link = EngineLink(Settings(num_rows=2), runner=sys.argv[2])
    starting = asyncio.create_task(link.start())
    if sys.argv[1] != "starting":
        await starting
    if sys.argv[1] == "stepping":
        (stream,) = link.submit(Generate("a", bytes(4), SamplingParams(), {FOR_EVER}))
        await stream.take()
    print(sys.argv[1], flush=True)
    await asyncio.sleep(600)

uvloop.run(main())
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with left_empty(monkeypatch):
        yield


@pytest.mark.parametrize(
    ("token", "why"),
    [
        pytest.param(1, "ended with status -9", id="kill"),
        pytest.param(DIE_TOKEN, "ended with status 9", id="exit"),
        pytest.param(RAISE_ALL_TOKEN, "RuntimeError: the fake device", id="raise"),
    ],
)
async def test_an_engine_that_dies_is_replaced_and_every_stream_ends_once_with_an_error(token, why):
    async with running(max_behind=10**9) as link:
        streams = [generate(link, "a", [1])]
        await anext(streams[0])
        streams += [generate(link, "b", [token]), generate(link, "c", [1])]  # the last stream waits for a row
        first_pid = link.ready.pid
        if why.endswith("-9"):
            os.kill(first_pid, signal.SIGKILL)
        for stream in streams:
            last = await ending(stream)
            assert last.finish_reason == "error"
            assert why in last.error
        assert (link.state, link.rows_used, link.num_waiting) == ("restarting", 0, 0)
        late = await ending(generate(link, "late", [1]))
        assert (late.finish_reason, late.error) == ("error", link.failure)
        await state(link, "ready")
        assert (await ending(generate(link, "a", [1], max_new_tokens=3))).finish_reason == "length"
        assert link.restarts == 1
        assert link.ready.pid != first_pid
        assert children() == [link.ready.pid]


async def test_an_engine_that_hangs_over_work_is_noticed_and_replaced():
    async with running(heartbeat_timeout_s=0.5) as link:
        started = time.monotonic()
        first_pid = link.ready.pid
        last = await ending(generate(link, "a", [STALL_TOKEN]))
        assert "silent" in last.error
        assert 0.5 < time.monotonic() - started < 2
        await state(link, "ready")
        assert not is_alive(first_pid)
        assert (await ending(generate(link, "b", [1], max_new_tokens=3))).finish_reason == "length"


async def test_a_stopped_engine_is_noticed_once_there_is_work():
    async with running(heartbeat_timeout_s=0.4) as link:
        os.kill(link.ready.pid, signal.SIGSTOP)
        await asyncio.sleep(0.8)
        assert link.state == "ready"  # no sequence waits for the engine
        assert "silent" in (await ending(generate(link, "a", [1]))).error
        await state(link, "ready")
        assert link.restarts == 1


async def test_a_loop_that_was_held_up_itself_does_not_blame_the_engine():
    async with running(heartbeat_timeout_s=0.5, max_behind=10**9) as link:
        stream = generate(link, "a", [1])
        await anext(stream)
        time.sleep(1)
        await asyncio.sleep(0.3)
        assert (link.state, link.failure) == ("ready", "")
        link.cancel("a")
        async with asyncio.timeout(20):
            while not isinstance(last := (await stream.take())[-1], Ended):
                pass
        assert last.finish_reason == "cancelled"


async def test_repeated_failures_end_in_failure():
    with tempfile.TemporaryDirectory() as marks:
        async with running(runner="tests.support.odd_runner:only_once", bundle=Path(marks), max_restarts=2) as link:
            os.kill(link.ready.pid, signal.SIGKILL)
            await state(link, "failed")
            assert link.restarts == 2
            assert link.failure == "the engine process ended with status 7"
            assert len(list(Path(marks).iterdir())) == 3
            assert (await ending(generate(link, "a", [1]))).error == link.failure


async def test_without_restarts_the_first_failure_is_the_last():
    async with running(max_restarts=0) as link:
        assert (await ending(generate(link, "a", [DIE_TOKEN]))).finish_reason == "error"
        await state(link, "failed")
        assert link.restarts == 0


async def test_restarts_outside_the_window_do_not_count():
    async with running(max_restarts=1, restart_window_s=0.01) as link:
        for number in (1, 2, 3):
            await ending(generate(link, "a", [DIE_TOKEN]))
            await state(link, "ready")
            assert link.restarts == number


async def test_a_restart_that_hangs_is_killed_and_tried_again():
    with tempfile.TemporaryDirectory() as marks:
        options = {
            "runner": "tests.support.odd_runner:hang_the_second_time",
            "bundle": Path(marks),
            "restart_slack_s": 0.5,
        }
        async with running(**options) as link:
            await ending(generate(link, "a", [DIE_TOKEN]))
            await state(link, "ready")
            assert link.restarts == 2
            assert "not become ready" in link.failure


async def test_an_engine_that_cannot_load_fails_the_start_with_its_reason(capfd):
    async with running(runner="tests.support.odd_runner:refuse") as link:
        assert (link.state, link.ready, link.restarts) == ("failed", None, 0)
        assert link.failure == "RuntimeError: no such device"
    line = json.loads(capfd.readouterr().err)
    assert any("odd_runner.py" in place for place in line["trace"])


async def test_starts_and_failures_are_logged_without_a_word_of_the_prompt(caplog):
    caplog.set_level(logging.INFO, logger="server.link.supervisor")
    async with running(num_rows=3) as link:
        await ending(generate(link, "a", [DIE_TOKEN]))
        await state(link, "ready")
    started, failed, again = [record for record in caplog.records if record.name == "server.link.supervisor"]
    assert started.fields["rows"] * started.fields["state_bytes_per_row"] == started.fields["state_bytes"] == 24
    assert (failed.levelname, failed.fields["sequences"], failed.fields["restarts"]) == ("WARNING", 1, 1)
    assert set(failed.fields) == {"why", "sequences", "state", "restarts"}
    assert again.fields["restarts"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_to_all_processes_does_not_end_the_engine(number):
    async with running() as link:
        os.kill(link.ready.pid, number)
        assert (await ending(generate(link, "a", [1], max_new_tokens=20))).finish_reason == "length"


async def test_closing_lets_live_work_end_by_itself():
    async with running() as link:
        stream = generate(link, "a", [1], max_new_tokens=300)
        await link.close(20)
        assert (await ending(stream)).finish_reason == "length"


@pytest.mark.parametrize("grace_s", [0, 0.5])
async def test_closing_leaves_no_stream_and_no_process(grace_s):
    async with running(max_behind=10**9) as link:
        stream = generate(link, "a", [1])
        await anext(stream)
        started = time.monotonic()
        await link.close(grace_s)
        assert time.monotonic() - started < 2 * grace_s + 0.5
        last = await ending(stream)
        assert last.finish_reason == "shutdown"
        if grace_s > 0:
            assert last.timings.decode_ms > 0  # the engine process sent these times itself
        assert children() == []


async def test_an_engine_that_dies_while_draining_is_not_replaced():
    async with running() as link:
        stream = generate(link, "a", [1])
        await anext(stream)
        closing = asyncio.create_task(link.close(20))
        await state(link, "draining")
        os.kill(link.ready.pid, signal.SIGKILL)
        assert (await ending(stream)).finish_reason == "error"
        await asyncio.wait_for(closing, 2)
        assert (link.state, link.restarts, children()) == ("draining", 0, [])


async def test_closing_does_not_wait_for_an_engine_that_hangs():
    async with running(heartbeat_timeout_s=60) as link:
        stream = generate(link, "a", [STALL_TOKEN])
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await link.close(0.3)
        assert (await ending(stream)).finish_reason == "shutdown"
        assert time.monotonic() - started < 1.5


async def test_closing_during_a_restart_does_not_wait_for_it():
    with tempfile.TemporaryDirectory() as marks:
        async with running(runner="tests.support.odd_runner:hang_the_second_time", bundle=Path(marks)) as link:
            await ending(generate(link, "a", [DIE_TOKEN]))
            await state(link, "restarting")
            await asyncio.sleep(0.4)
            assert len(children()) == 1
            await asyncio.wait_for(link.close(20), 1)
            assert children() == []


async def test_closing_during_the_start_ends_both():
    link = EngineLink(Settings(), runner="tests.support.odd_runner:hang")
    starting = asyncio.create_task(link.start())
    await asyncio.sleep(0.3)
    assert len(children()) == 1
    await asyncio.wait_for(link.close(20), 1)
    await asyncio.wait_for(starting, 1)
    assert children() == []


async def test_closing_in_the_moment_of_the_start_leaves_no_process():
    for turns in range(12):
        link = EngineLink(Settings(), runner=RUNNER)
        starting = asyncio.create_task(link.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await link.close(0)
        await asyncio.wait_for(starting, 1)
    assert becomes_true(lambda: children() == [])


@pytest.mark.parametrize("moment", ["starting", "ready", "stepping", "stopped", "hanging while it loads"])
def test_when_the_parent_is_killed_no_process_is_left(moment):
    runner = "tests.support.odd_runner:hang" if "loads" in moment else RUNNER
    argument = {"stopped": "ready", "hanging while it loads": "starting"}.get(moment, moment)
    command = [sys.executable, "-c", PARENT, argument, runner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == argument + "\n"
        assert becomes_true(lambda: len(children(parent.pid)) == 1)
        (engine,) = children(parent.pid)
        if moment == "stopped":
            os.kill(engine, signal.SIGSTOP)
        if "loads" in moment:
            time.sleep(0.5)
        parent.kill()
    gone = becomes_true(lambda: not is_alive(engine), seconds=5)
    if not gone:
        os.kill(engine, signal.SIGKILL)
    assert gone
