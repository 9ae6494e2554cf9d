import asyncio
import json
import os
import signal
import socket
from typing import Any

import httpx
import pytest
from fake_link import FakeLink
from http_harness import eventually, make_bundle, make_link, read_events

from server.__main__ import ListenError, banner, listen, main, serve
from server.config import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Running:
    """`serve` as a task, and a client for it."""

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


async def test_a_second_signal_ends_at_once():
    async with Running(make_link(hang_after=3), shutdown_timeout_s=60) as server:
        live = server.generate()
        await eventually(lambda: server.link.num_hanging)
        send_signal()
        await eventually(lambda: server.link.state == "draining")
        send_signal()
        assert read_events((await live).text)[-1]["details"]["finish_reason"] == "shutdown"


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
