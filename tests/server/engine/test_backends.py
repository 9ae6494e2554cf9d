"""Tests of whole servers, the same model on every backend: equal answers, descriptions of the backend, restarts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model.artefact import GRAPHS
from model.backends import BACKENDS
from server.config import EngineOptions
from server.engine.runner import ModelRunner
from tests.support.agreement_bundle import TEXT
from tests.support.artefacts import BACKENDS as SERVED_BACKENDS
from tests.support.artefacts import EACH_BACKEND, artefact_of, named_backend, served_folder

ROOT = Path(__file__).parents[3]
NUM_ROWS = 4
BOUND = 1e-4  # largest allowed difference of two log-probabilities
PINNED = "OMP_PROC_BIND"  # tells OpenMP to keep each thread to a core
DRAWN = {"temperature": 0.9, "seed": 5, "max_new_tokens": 40, "details": True}
PENALISED = {
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "logit_bias": {"101": 2.0},
}
CHOICES = [" so it was", " and is not over yet", " ", "é", " Some years ago - never mind how long"]


@dataclass(frozen=True)
class Server:
    """A server that runs, with a client for it."""

    client: httpx.Client
    banner: str

    def post(self, path: str, body: dict[str, Any]) -> Any:
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, path: str) -> Any:
        return self.client.get(path).json()

    @property
    def engine(self) -> Path:
        """Return the folder of the engine process in /proc."""
        return Path("/proc", str(self.get("/health")["engine"]["pid"]))


@contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "server", "--bundle", str(folder), "--port", "0", "--num-rows", str(NUM_ROWS)]
    command += ["--device", "cpu", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != PINNED}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=inherited | environment) as process:
        assert process.stdout is not None
        try:
            banner = ""
            while "  try  " not in banner:
                banner += (line := process.stdout.readline())
                assert line, "the server did not start, its error output says why"
            url = re.findall(r"http://127\.0\.0\.1:\d+", banner)[0]
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Server(client, banner)
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=60)
    assert status == 0


@pytest.fixture(scope="module")
def torch_server() -> Iterator[Server]:
    with serving(served_folder("masked", "torch"), "--backend", "torch") as server:
        yield server


@pytest.mark.parametrize("length", [20, 64, 200])
def test_a_prompt_that_is_told_has_the_figures_of_its_score(torch_server, length):
    ids = torch_server.post("/tokenize", {"prompt": TEXT[:length]})["tokens"]
    scored = [one["logprob"] for one in torch_server.post("/score", {"inputs": ids, "return": ["tokens"]})["tokens"]]
    asked = {"inputs": ids, "parameters": {"max_new_tokens": 1, "details": True, "decoder_input_details": True}}
    told = [one["logprob"] for one in torch_server.post("/generate", asked)["details"]["prefill"]]
    echoed = torch_server.post("/v1/completions", {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0})
    assert told[1:] == pytest.approx(scored[1:], abs=1e-5)
    assert echoed["choices"][0]["logprobs"]["token_logprobs"][: len(ids)] == told


@pytest.fixture(scope="module", params=EACH_BACKEND[1:])
def other(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def other_server(other) -> Iterator[Server]:
    with serving(served_folder("masked", other), "--backend", named_backend(other)) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/generate", {"inputs": TEXT, "parameters": DRAWN | {"temperature": 0.0}}, id="greedy"),
        pytest.param("/generate", {"inputs": TEXT[:90], "parameters": DRAWN | PENALISED}, id="penalties"),
        pytest.param("/generate", {"inputs": "C", "parameters": DRAWN | {"typical_p": 0.9}}, id="one token"),
        pytest.param(
            "/generate",
            {"inputs": TEXT[:201], "parameters": DRAWN | {"top_n_tokens": 5, "decoder_input_details": True}},
            id="prompt and top tokens",
        ),
        pytest.param("/generate", {"inputs": TEXT[:170], "parameters": DRAWN | {"n": 3}}, id="forks"),
        pytest.param(
            "/generate", {"inputs": [TEXT[: 30 * n] for n in range(1, 9)], "parameters": DRAWN | PENALISED}, id="batch"
        ),
        pytest.param("/score", {"inputs": TEXT, "prefix": "\n", "return": ["tokens"]}, id="document"),
        pytest.param("/score", {"inputs": TEXT, "return": ["top", "entropy", "memory_share"]}, id="figures"),
        pytest.param("/score", {"inputs": TEXT[:180], "continuations": CHOICES, "return": ["top"]}, id="continuations"),
    ],
)
def test_a_request_has_the_same_answer_on_every_backend(torch_server, other_server, path, body):
    answer = torch_server.post(path, body)
    assert num_figures(answer) > 8
    assert_alike(other_server.post(path, body), answer)


def assert_alike(found: Any, expected: Any, *, place: str = "answer") -> None:
    """Assert that two answers are equal but for rounding in fractions; clocks and fingerprints may differ."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name in expected.keys() - {"timings", "fingerprint"}:
            assert_alike(found[name], expected[name], place=f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, (left, right) in enumerate(zip(found, expected, strict=True)):
            assert_alike(left, right, place=f"{place}.{i}")
    elif isinstance(expected, float):
        is_sum = place.endswith(("perplexity", "logprob_sum", "answer.logprob"))
        assert found == pytest.approx(expected, abs=BOUND, rel=BOUND if is_sum else 0), place
    else:
        assert found == expected, place


def num_figures(answer: Any) -> int:
    if isinstance(answer, dict | list):
        return sum(map(num_figures, answer.values() if isinstance(answer, dict) else answer))
    return isinstance(answer, float)


def test_a_server_tells_its_backend(torch_server, other_server, other):
    for server, backend in ((torch_server, "torch"), (other_server, other)):
        engine = server.get("/info")["engine"]
        facts = {"backend": backend, "weights": "float32", "dtype": "float32", "device": "cpu"}
        assert {name: engine[name] for name in facts} == facts
        shown = backend if engine["variant"] is None else f"{backend} ({engine['variant']})"
        assert (engine["variant"] is not None) is (backend == "native")
        assert f"engine   {shown}, float32 on cpu, {NUM_ROWS} rows" in server.banner


def test_the_fingerprint_differs_between_backends(torch_server, other_server):
    ours, theirs = torch_server.get("/info"), other_server.get("/info")
    assert ours["model"]["hash"] == theirs["model"]["hash"]
    assert ours["fingerprint"] != theirs["fingerprint"]
    asked = {"inputs": "C", "parameters": {"max_new_tokens": 1, "details": True}}
    assert other_server.post("/generate", asked)["details"]["fingerprint"] == theirs["fingerprint"]


@pytest.mark.slow
def test_weights_of_8_bits_are_told():
    with serving(artefact_of("masked", "onnx-int8")) as server:
        info = server.get("/info")
        assert (info["engine"]["backend"], info["engine"]["weights"], info["engine"]["dtype"]) == (
            "onnx",
            "int8",
            "float32",
        )
        assert "-int8-" in info["fingerprint"]
        assert "onnx, int8 on cpu" in server.banner


@pytest.mark.slow
@pytest.mark.parametrize("backend", SERVED_BACKENDS)
def test_an_engine_that_is_killed_under_load_is_replaced_and_answers_as_before(backend):
    asked = {"inputs": TEXT[:150], "parameters": DRAWN | PENALISED}
    endless = {"inputs": TEXT, "stream": True, "parameters": {"temperature": 1.0, "max_new_tokens": None}}

    def last_event() -> dict[str, Any]:
        with server.client.stream("POST", "/generate", json=endless) as stream:
            return json.loads([line for line in stream.iter_lines() if line][-1].removeprefix("data: "))

    with (
        serving(served_folder("masked", backend), "--backend", named_backend(backend)) as server,
        ThreadPoolExecutor(2 * NUM_ROWS) as pool,
    ):
        before = without_clock(server.post("/generate", asked))
        first = server.engine
        streams = [pool.submit(last_event) for _ in range(2 * NUM_ROWS)]
        becomes_true(lambda: server.get("/health")["rows"]["used"] == NUM_ROWS)
        os.kill(int(first.name), signal.SIGKILL)
        assert {stream.result()["error"]["code"] for stream in streams} == {"engine_down"}
        becomes_true(lambda: server.get("/health")["state"] == "ready")
        assert server.get("/health")["engine"]["restarts"] == 1
        assert server.engine != first
        assert without_clock(server.post("/generate", asked)) == before


def without_clock(reply: dict[str, Any]) -> dict[str, Any]:
    return reply | {"details": reply["details"] | {"timings": None}}


def becomes_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_threads_are_pinned_but_for_backends_with_threads_of_their_own(torch_server, other_server, other):
    """A thread that such a backend starts inherits the cores of its parent thread: one core if the parent is pinned."""
    for server, is_pinned in ((torch_server, True), (other_server, not BACKENDS[other].has_own_threads)):
        assert (f"{PINNED}=true" in (server.engine / "environ").read_text()) is is_pinned


def cores_of(thread: Path) -> str:
    return re.findall(r"Cpus_allowed_list:\s*(.+)", (thread / "status").read_text())[0]


def cores_of_threads(process: Path) -> list[str]:
    return [cores_of(thread) for thread in (process / "task").iterdir()]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core for all threads")
def test_threads_of_onnx_runtime_are_as_many_as_asked_for_and_free_to_move():
    found = {}
    for name, flags in {"by default": (), "one": ("--num-threads", "1")}.items():
        with serving(served_folder("masked", "onnx"), *flags, OMP_NUM_THREADS="2") as server:
            server.post("/generate", {"inputs": TEXT, "parameters": {"max_new_tokens": 3}})
            found[name] = cores_of_threads(server.engine)
    assert {cores for threads in found.values() for cores in threads} == {cores_of(Path("/proc/self"))}
    assert len(found["by default"]) >= len(found["one"]) + len(GRAPHS)


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 3])
def test_each_session_of_onnx_runtime_has_one_worker_less_than_threads(num_threads):
    def load() -> ModelRunner:
        return ModelRunner.load(EngineOptions(bundle=folder, num_rows=1, device="cpu", num_threads=num_threads))

    folder, before = served_folder("masked", "onnx"), torch.get_num_threads()
    try:
        runners = [load()]  # the first session also starts threads that stay
        count = len(cores_of_threads(Path("/proc/self")))
        runners.append(load())
        assert len(cores_of_threads(Path("/proc/self"))) - count == (num_threads - 1) * len(GRAPHS)
        assert [runner.model.backend for runner in runners] == ["onnx", "onnx"]
    finally:
        torch.set_num_threads(before)
