"""Tests of the order of start and stop: `serve` over a fake engine, then whole servers in processes of their own."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.__main__ import ListenError, banner, listen, main, serve
from server.config import Settings
from tests.support.fake_link import FakeLink
from tests.support.fake_runner import DIE_TOKEN, STALL_TOKEN
from tests.support.http_harness import eventually, make_bundle, make_link, read_events

pytestmark = pytest.mark.anyio


class Running:
    """`serve` in a task, and a client for it."""

    def __init__(self, link: FakeLink, **settings: Any) -> None:
        self.link = link
        listener = listen("127.0.0.1", port=0)
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10)
        self.task = asyncio.create_task(serve(Settings(**settings), bundle=make_bundle(), link=link, listener=listener))

    async def __aenter__(self) -> "Running":
        async with asyncio.timeout(5):
            while await self.state() not in ("ready", "failed"):
                await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self.task

    async def state(self) -> str:
        return (await self.client.get("/health")).json()["state"]

    def generate(self, **parameters: Any) -> asyncio.Task[httpx.Response]:
        body = {"inputs": "x", "stream": True, "parameters": parameters}
        return asyncio.create_task(self.client.post("/generate", json=body))


def send_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def test_on_sigterm_live_work_finishes_while_new_work_is_refused():
    async with Running(make_link(step_s=0.05)) as server:
        live = server.generate(max_new_tokens=12)
        await eventually(lambda: server.link.rows_used)
        send_signal()
        await eventually(lambda: server.link.state == "draining")
        assert (await server.client.get("/health/ready")).status_code == 503
        refused = await server.client.post("/generate", json={"inputs": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert read_events((await live).text)[-1]["details"]["finish_reason"] == "length"
    assert server.task.result() == 0


async def test_what_outlasts_the_shutdown_time_ends_with_what_it_has():
    async with Running(make_link(hang_after=3), shutdown_timeout_s=0.2) as server:
        live = server.generate()
        await eventually(lambda: server.link.num_hanging)
        send_signal()
        last = read_events((await live).text)[-1]
    assert (last["generated_text"], last["details"]["finish_reason"]) == ("The", "shutdown")
    assert server.task.result() == 0


async def test_a_second_signal_ends_at_once(capsys):
    async with Running(make_link(hang_after=3), shutdown_timeout_s=60) as server:
        live = server.generate()
        await eventually(lambda: server.link.num_hanging)
        send_signal()
        await eventually(lambda: server.link.state == "draining")
        send_signal()
        assert read_events((await live).text)[-1]["details"]["finish_reason"] == "shutdown"
    assert server.task.result() == 1
    assert "a second signal" in capsys.readouterr().err


async def test_an_engine_that_fails_ends_the_server_with_an_error(capsys):
    async with Running(make_link(hang_after=3)) as server:
        live = server.generate()
        await eventually(lambda: server.link.num_hanging)
        server.link.state, server.link.failure = "failed", "out of memory"
        server.link.end_all("error", error="out of memory")
        assert read_events((await live).text)[-1]["error"]["code"] == "engine_down"
    assert server.task.result() == 1
    assert "allattn: the engine has failed: out of memory" in capsys.readouterr().err


async def test_an_engine_that_does_not_start_ends_the_server_with_an_error(capsys):
    link = make_link()
    link.state, link.failure = "starting", "no such device"
    async with Running(link) as server:
        pass
    assert server.task.result() == 1
    assert "no such device" in capsys.readouterr().err


async def test_the_banner_names_the_model_and_has_a_command_to_paste(capsys):
    async with Running(make_link()) as server:
        send_signal()
    text = capsys.readouterr().out
    assert "tiny" in text
    command = text[text.index("curl") :]
    assert f"{server.client.base_url}/generate" in command
    body = json.loads(command[command.index("{") : command.rindex("}") + 1])
    assert body["stream"] is True


def test_the_banner_tells_the_quality_that_training_measured():
    bundle = make_bundle()
    bundle.training["splits"] = {"test": {"bits_per_byte": 2.0417}}
    text = banner(Settings(), bundle=bundle, link=make_link(), port=8000)
    assert "test 2.042 bits per byte" in text


def test_a_taken_port_is_a_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            listen("127.0.0.1", port=port)


def test_a_wrong_setting_is_one_line_and_status_2(capsys):
    assert main(["--prot", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("allattn: ")
    assert "--prot" in error
    assert error.count("\n") == 1


def test_a_missing_bundle_is_one_line_and_status_1(capsys, tmp_path):
    assert main(["--bundle", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert error.count("\n") == 1


ROOT = Path(__file__).parents[2]
SERVER = """
import asyncio, sys, time, uvloop
from tests.support.http_harness import make_bundle
from server.__main__ import listen, run
from server.config import load_settings

async def main():
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)  # works for nobody
    await run(load_settings(sys.argv[2:], environ={}), bundle=make_bundle(), listener=listener, runner=sys.argv[1])

listener = listen("127.0.0.1", port=0)
print(listener.getsockname()[1], flush=True)
uvloop.run(main())
"""


class ServerProcess:
    """A server with an engine process over a fake runner, in a process group of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.url = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def wait_for(self, state: str) -> None:
        deadline = time.monotonic() + 20
        while httpx.get(f"{self.url}/health", timeout=10).json()["state"] != state:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    @property
    def engines(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]

    @contextmanager
    def generating(self, tokens: list[int], **parameters: Any) -> Iterator[httpx.Response]:
        body = {"inputs": tokens, "stream": True, "parameters": parameters}
        with httpx.stream("POST", f"{self.url}/generate", json=body, timeout=20) as response:
            yield response

    def ends(self, *, within_s: float) -> int:
        """Return the exit status; assert that the server's engines are gone too."""
        engines = self.engines
        status = self.process.wait(within_s)
        deadline = time.monotonic() + 2
        while any(Path(f"/proc/{engine}").exists() for engine in engines):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return status


@contextmanager
def server_process(
    *arguments: str, runner: str = "tests.support.fake_runner:FakeRunner.load"
) -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": folder}
        command = [sys.executable, "-c", SERVER, runner, *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        ) as process:
            try:
                yield ServerProcess(process)
            finally:
                process.kill()
        assert list(Path(folder).iterdir()) == []


def test_live_work_survives_a_signal_to_all_processes():
    with server_process() as server:
        server.wait_for("ready")
        with server.generating([1, 2], max_new_tokens=3000) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(server.process.pid, signal.SIGTERM)
            server.wait_for("draining")
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["details"]["finish_reason"] == "length"
        assert server.ends(within_s=5) == 0


def test_a_signal_to_the_engine_means_the_server():
    with server_process() as server:
        server.wait_for("ready")
        with server.generating([1, 2], max_new_tokens=3000) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engines[0], signal.SIGTERM)
            server.wait_for("draining")
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["details"]["finish_reason"] == "length"
        assert server.ends(within_s=5) == 0


def test_an_engine_that_hangs_does_not_hold_up_the_shutdown():
    with server_process("--heartbeat-timeout-s", "60", "--shutdown-timeout-s", "0.3") as server:
        server.wait_for("ready")
        with server.generating([STALL_TOKEN]) as response:
            server.process.terminate()
            assert '"shutdown"' in response.read().decode()
        assert server.ends(within_s=3) == 0


def test_a_second_signal_ends_a_server_whose_engine_hangs_at_once():
    with server_process("--heartbeat-timeout-s", "60") as server:
        server.wait_for("ready")
        with server.generating([STALL_TOKEN]):
            server.process.terminate()
            server.wait_for("draining")
            server.process.terminate()
            assert server.ends(within_s=1) == 1


def test_a_second_signal_does_not_wait_for_a_client_that_does_not_read():
    with server_process() as server:
        server.wait_for("ready")
        with server.generating([1], max_new_tokens=10**6):
            time.sleep(0.5)
            server.process.terminate()
            server.wait_for("draining")
            server.process.terminate()
            assert server.ends(within_s=1) == 1


@pytest.mark.parametrize("state", ["starting", "restarting"])
def test_a_signal_during_a_start_ends_the_server(state):
    with tempfile.TemporaryDirectory() as marks:
        runner = "hang" if state == "starting" else "hang_the_second_time"
        with server_process("--bundle", marks, runner=f"tests.support.odd_runner:{runner}") as server:
            if state == "restarting":
                server.wait_for("ready")
                os.kill(server.engines[0], signal.SIGKILL)
            server.wait_for(state)
            assert httpx.get(f"{server.url}/health/ready").status_code == 503
            server.process.terminate()
            assert server.ends(within_s=2) == 0


def test_a_server_recovers_from_the_death_of_its_engine():
    with server_process() as server:
        server.wait_for("ready")
        (engine,) = server.engines
        with server.generating([DIE_TOKEN]) as response:
            assert "ended with status 9" in response.read().decode()
        server.wait_for("ready")
        assert server.engines != [engine]
        assert httpx.get(f"{server.url}/health").json()["engine"]["restarts"] == 1
        with server.generating([1], max_new_tokens=2) as response:
            assert '"length"' in response.read().decode()
        server.process.terminate()
        assert server.ends(within_s=3) == 0


def test_repeated_failures_of_the_engine_end_the_server_with_status_1():
    with (
        tempfile.TemporaryDirectory() as marks,
        server_process("--bundle", marks, "--max-restarts", "1", runner="tests.support.odd_runner:only_once") as server,
    ):
        server.wait_for("ready")
        os.kill(server.engines[0], signal.SIGKILL)
        assert server.process.wait(5) == 1
