"""Tests of `allattn generate`: it writes text as it arrives, from a model in this process or from a server."""

import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from allattn import generate as terminal
from model.sampling.params import SamplingParams
from server.config import EngineOptions
from server.engine.engine import Engine
from server.engine.sequence import Chunk, ChunkResult, Draw, Drawn
from tests.support.artefacts import bundle_of
from tests.support.fake_runner import FakeRunner
from tests.support.live_server import live_server

ROOT = Path(__file__).parents[2]
SCRIPT = "The café is open → come in. "
LOGPROB = -0.5


class ScriptRunner(FakeRunner):
    """A runner that repeats the script, whatever it reads; in capitals if it samples with an odd seed."""

    def extend(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        return [
            replace(one, drawn=one.drawn and (self._say(0, chunk.draws[0].sampling),))
            for one, chunk in zip(super().extend(chunks), chunks, strict=True)
        ]

    def decode(self, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]) -> list[Drawn]:
        super().decode(rows, tokens, draws)
        return [self._say(draw.num_generated, draw.sampling) for draw in draws]

    def _say(self, place: int, sampling: SamplingParams) -> Drawn:
        is_loud = sampling.temperature > 0 and sampling.seed % 2
        said = (SCRIPT.upper() if is_loud else SCRIPT).encode()
        return Drawn(said[place % len(said)], LOGPROB)


@pytest.fixture
def script(monkeypatch) -> Callable[..., int]:
    """Return a function that runs the command on the tiny bundle, with a runner that repeats the script."""
    monkeypatch.setattr(terminal, "_load_engine", lambda _: Engine(ScriptRunner(1), EngineOptions(budget_tokens=64)))
    return lambda *arguments: terminal.main(["--bundle", str(bundle_of()), *arguments])


class Writes(io.RawIOBase):
    """Standard output that keeps each write as a part."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.parts.append(bytes(data))  # type: ignore[call-overload]
        return len(self.parts[-1])


def read_from(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_it_writes_the_continuation_and_nothing_else(script, capfdbinary):
    assert script("Once", "--max-new-tokens", "8") == 0
    assert capfdbinary.readouterr() == ("The café".encode()[:8].decode(errors="replace").encode(), b"")


def test_text_comes_as_it_is_made_in_whole_characters(script, monkeypatch):
    out = Writes()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(out)))
    assert script("Once", "--max-new-tokens", str(len(SCRIPT.encode()))) == 0
    sys.stdout.detach()
    assert [part.decode() for part in out.parts] == list(SCRIPT)


def test_the_figures_are_told_where_asked_for(script, capfd):
    assert script("Once", "--max-new-tokens", "8", "--temperature", "1", "--seed", "6", "--stats") == 0
    told = capfd.readouterr().err
    assert re.fullmatch(rf"seed 6, 8 tokens, [\d.]+ tokens/s, {0.5 / math.log(2):.3f} bits per token\n", told)
    assert script("Once", "--max-new-tokens", "1", "--stats") == 0
    assert capfd.readouterr().err == f"greedy, 1 token, {0.5 / math.log(2):.3f} bits per token\n"


def test_a_seed_that_is_drawn_is_told_and_gives_the_same_again(script, capfd):
    assert script("Once", "--do-sample", "--stats") == 0
    first = capfd.readouterr()
    seed = re.match(r"seed (\d+),", first.err)
    assert seed
    assert script("Once", "--do-sample", "--seed", seed[1]) == 0
    assert capfd.readouterr().out == first.out
    assert script("Once", "--do-sample", "--seed", str(int(seed[1]) + 1)) == 0
    assert capfd.readouterr().out != first.out


def test_a_stop_text_ends_the_output_and_is_no_part_of_it(script, capfd):
    assert script("Once", "--stop", "never", "--stop", " → ", "--max-new-tokens", "none") == 0
    assert capfd.readouterr().out == "The café is open"


def test_the_prompt_comes_from_standard_input_less_a_line_end(monkeypatch, capfd):
    arguments = ["--bundle", str(bundle_of()), "--device", "cpu", "--max-new-tokens", "20", "--top-k", "9", "--seed"]
    said = []
    for text in (None, b"Call me", b"Call me\n", b"Call me\n\n"):
        read_from(text or b"", monkeypatch)
        assert terminal.main([*(["Call me"] if text is None else []), *arguments, "5"]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1] == said[2] != said[3]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--temperature", "3"], "--temperature: 3 is not allowed; it should be at least 0 and at most 2"),
        (["--temperature", "warm"], '--temperature: "warm" is not allowed; it should be at least 0 and at most 2'),
        (["--top-k", ""], '--top-k: "" is not allowed; it should be at least 0 and at most 2147483647'),
        (["--seed", "-1"], "--seed: -1 is not allowed; it should be at least 0 and at most 18446744073709551615"),
        (["--url", "http://x", "--bundle", "b"], "--bundle is for a model in this process, --url for one in a server"),
        (["--url", "http://x", "--device", "cpu"], "--device is for a model in this process"),
        (["--url", "file:///etc/hosts"], "--url: 'file:///etc/hosts' is not allowed; it should begin with http:// or"),
        (["--api-key-file", "keys"], "--api-key-file is for a server; give its --url"),
        (["--dtype", "int3"], "--dtype = 'int3': Input should be 'float32' or 'bfloat16'"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_by_name(arguments, complaint, capfd):
    assert terminal.main(["Once", *arguments]) == 2
    out, told = capfd.readouterr()
    assert out == ""
    assert told.startswith(f"allattn: {complaint}")


def test_a_prompt_that_cannot_be_is_refused(monkeypatch, capfd):
    read_from(b"caf\xe9", monkeypatch)
    assert terminal.main([]) == 2
    assert "standard input is not UTF-8 at byte 3" in capfd.readouterr().err
    assert terminal.main(["", "--bundle", str(bundle_of())]) == 2
    assert 'PROMPT: "" is not allowed; it should hold at least one token' in capfd.readouterr().err
    terminal_side, other = os.openpty()
    with os.fdopen(terminal_side), os.fdopen(other) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert terminal.main([]) == 2
    assert "PROMPT is missing" in capfd.readouterr().err


def test_a_bundle_that_is_not_there_is_an_error(tmp_path, capfd):
    assert terminal.main(["Once", "--bundle", str(tmp_path / "no")]) == 1
    assert str(tmp_path / "no") in capfd.readouterr().err


def test_a_model_that_fails_is_an_error(script, capfd):
    assert script("Once\x0e") == 1  # the fake device fails when it reads this token
    assert "allattn: the model failed on this sequence: RuntimeError" in capfd.readouterr().err


def test_a_terminal_is_shown_what_it_would_obey():
    assert terminal.printable("\x1b[31m red\r\n\t\x7f\x9b é → 字") == "␛[31m red␍\n\t\ufffd\ufffd é → 字"


@contextmanager
def answering(status: int, body: bytes, *, num_promised: int | None = None) -> Iterator[tuple[str, list[dict]]]:
    """Serve one answer to each request; give the server's URL and the list of requests."""
    asked: list[dict] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            asked.append(
                {"path": self.path, "key": self.headers["Authorization"], **json.loads(self.rfile.read(length))}
            )
            self.send_response(status)
            self.send_header("Content-Length", str(num_promised or len(body)))
            self.send_header("Location", "/elsewhere")  # the command must not follow the redirect
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def event(text: str | None, *, whole: str | None = None, reason: str = "length") -> bytes:
    token = None if text is None else {"id": 1, "text": text, "logprob": LOGPROB, "special": False}
    details = None if whole is None else {"finish_reason": reason}
    return b"data: " + json.dumps({"token": token, "generated_text": whole, "details": details}).encode() + b"\n\n"


def test_a_server_is_asked_what_the_flags_say(capfd, monkeypatch):
    monkeypatch.setenv("ALLATTN_API_KEYS", "first-key-of-them,second-key-of-them")
    stream = event("caf") + b": ping\n\n" + event("é, ") + event(None, whole="café, tea", reason="eos_token")
    with answering(200, stream) as (url, asked):
        flags = ["--top-p", "0.9", "--seed", "4", "--max-new-tokens", "none", "--stop", "x", "--stats"]
        assert terminal.main(["Once", "--url", url + "/", *flags]) == 0
    assert asked == [
        {
            "path": "/generate",
            "key": "Bearer first-key-of-them",
            "inputs": "Once",
            "parameters": {"top_p": 0.9, "seed": 4, "max_new_tokens": None, "stop": ["x"]},
            "stream": True,
        }
    ]
    out, told = capfd.readouterr()
    assert out == "café, tea"
    assert told.startswith("seed 4, 2 tokens, ")


ERROR = json.dumps({"error": {"message": "the queue is full"}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "out", "complaint"),
    [
        (429, ERROR, "", ": the queue is full"),
        (502, b"<html>", "", ": 502 Bad Gateway"),
        (302, b"", "", ": 302 Found"),
        (200, event("caf") + b"data: [DONE]\n\n", "caf", " sent an unknown event: b'data: [DONE]\\n'"),
        (200, b'data: {"text": "x"}\n\n', "", ' sent an unknown event: b\'data: {"text": "x"}\\n\''),
        (200, event("caf") + b"data: " + ERROR + b"\n\n", "caf", ": the queue is full"),
        (200, event("caf"), "caf", " broke off"),
        (200, event("caf") + event(None, whole="caf", reason="shutdown"), "caf", " ended the text early: shutdown"),
    ],
)
def test_a_server_that_does_not_answer_in_full_is_an_error(status, body, out, complaint, capfd):
    with answering(status, body) as (url, _):
        assert terminal.main(["Once", "--url", url]) == 1
    said = capfd.readouterr()
    assert said.out == out
    assert said.err == f"allattn: {url}{complaint}\n"


def test_a_connection_that_breaks_is_an_error(capfd):
    with answering(200, event("caf"), num_promised=500) as (url, _):
        assert terminal.main(["Once", "--url", url]) == 1
    assert f"{url} broke off" in capfd.readouterr().err


def test_a_server_that_is_not_there_is_an_error(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert terminal.main(["Once", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "cannot be reached" in capfd.readouterr().err


@contextmanager
def endless(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the whole command on the tiny model, with no limit on the output."""
    command = [sys.executable, "-m", "allattn", "generate", "Call me", "--bundle", str(bundle_of()), "--do-sample"]
    command += ["--max-new-tokens", "none", "--device", "cpu", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_ctrl_c_ends_a_text_without_end(capfd):
    with endless("--stats") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        begun = process.stdout.read(2000)
        process.send_signal(signal.SIGINT)
        (begun + process.stdout.read()).decode()  # fails if a character was cut
        assert process.wait(timeout=30) == 130
        assert re.fullmatch(r"seed \d+, \d+ tokens, .* bits per token\n", process.stderr.read().decode())


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_without_a_word():
    with endless() as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(timeout=30) == 141
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_the_same_text_comes_from_here_and_from_a_server(capfd):
    flags = [
        "--temperature",
        "0.9",
        "--seed",
        "7",
        "--max-new-tokens",
        "60",
        "--stop",
        "qq",
        "--repetition-penalty",
        "1.1",
    ]
    assert terminal.main(["Call me", "--bundle", str(bundle_of()), "--device", "cpu", *flags]) == 0
    here = capfd.readouterr().out
    with live_server(bundle_of()) as url:
        assert terminal.main(["Call me", "--url", url, *flags]) == 0
        parameters = {"temperature": 0.9, "seed": 7, "max_new_tokens": 60, "stop": ["qq"], "repetition_penalty": 1.1}
        plain = httpx.post(f"{url}/generate", json={"inputs": "Call me", "parameters": parameters}).json()
    assert capfd.readouterr().out == here == plain["generated_text"]
    assert len(here) > 10
