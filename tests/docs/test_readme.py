"""The README is true: every command in it is one that this test, or CI itself, has run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.artefacts import BACKENDS, shipped_folder
from training.corpus import SHAKESPEARE

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
CURLS = [line for line in COMMANDS if line.startswith("curl ")]
EXPORTS = [line for line in COMMANDS if "-m export.run" in line]
BOOK = [line for line in COMMANDS if line.startswith(".venv/bin/allattn ")]
IN_THE_VENV = [line for line in COMMANDS if line.startswith(".venv/bin/") and line not in EXPORTS + BOOK]
BY_CI = ["make test", "make .venv"]
BY_THE_FIXTURE = ["make serve"]
BY_ITS_TWIN = ["make train"]  # the quickstart, which test_the_quickstart_trains shortens


def test_every_command_is_run_somewhere():
    assert CURLS
    assert IN_THE_VENV
    assert sorted(COMMANDS) == sorted(CURLS + IN_THE_VENV + EXPORTS + BOOK + BY_CI + BY_THE_FIXTURE + BY_ITS_TWIN)


def test_what_is_exported_is_what_is_served_here():
    """The fixture `port` serves the very artefact, but for the text that it was verified with."""
    assert EXPORTS == [".venv/bin/python -m export.run bundles/default bundles/default-onnx --format onnx"]
    assert "onnx" in BACKENDS


def test_make_says_what_the_readme_says():
    plan = subprocess.run(["make", "-n", "train", "serve"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "python -m training.run configs/quickstart.toml" in plan
    assert "python -m server --bundle bundles/default --port 8000" in plan


@pytest.fixture(scope="module", params=BACKENDS)
def port(request) -> Iterator[int]:
    """The server as `make serve PORT=0` starts it, with what ships on each backend."""
    command = [sys.executable, "-m", "server", "--bundle", str(shipped_folder(request.param)), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        banner = ""
        for line in server.stdout:
            banner += line
            if "try " in line:
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)", banner)
        assert found, banner
        yield int(found[1])
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0


@pytest.fixture
def client(port) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("line", CURLS)
def test_each_curl_line_is_answered(port, line):
    command = shlex.split(line.replace(":8000", f":{port}"))
    answer = subprocess.run([*command, "-sS", "--fail"], capture_output=True, text=True, check=True).stdout
    if "stream" in line:
        events = [json.loads(event.removeprefix("data: ")) for event in answer.strip().split("\n\n")]
        assert events[-1]["generated_text"].startswith("".join(event["token"]["text"] for event in events[:-1]))
    elif "metrics" in line:
        assert "time_to_first_token_seconds" in answer
    else:
        assert "error" not in json.loads(answer)


@pytest.mark.slow
def test_what_ships_keeps_its_promises(client):
    """Plain = streamed; a seed means the same text alone and among others; English scores better than gibberish."""
    asked = {"inputs": "The morning was", "parameters": {"temperature": 0.9, "seed": 7, "max_new_tokens": 60}}
    alone = client.post("/generate", json=asked).json()["generated_text"]
    with client.stream("POST", "/generate", json=asked | {"stream": True}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert "".join(event["token"]["text"] for event in events) == alone == events[-1]["generated_text"]
    crowd = {"inputs": [asked["inputs"], *(f"Chapter {n}. When the" for n in range(16))]}
    among = client.post("/generate", json=asked | crowd).json()
    assert among[0]["generated_text"] == alone
    english, gibberish = (
        client.post("/score", json={"inputs": text}).json()["bits_per_byte"]
        for text in ("She had not seen him since the day of the wedding, and she did not wish to.", "xq zvkw jjpf " * 6)
    )
    assert gibberish > english + 1


@pytest.mark.slow
def test_a_long_document_is_scored_in_one_pass_at_flat_memory(client):
    engine = client.get("/health").json()["engine"]["pid"]

    def peak_after(num_bytes: int) -> int:
        answer = client.post("/score", json={"inputs": SHAKESPEARE.read_text()[:num_bytes]}).json()
        assert answer["num_bytes"] > num_bytes - 20  # all but the first token
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{engine}/status").read_text())
        assert found
        return int(found[1]) * 1024

    short = peak_after(20_000)
    assert peak_after(200_000) < short + 30e6


@pytest.mark.slow
def test_training_lines_do_what_they_say_one_after_another(tmp_path):
    """`make train` and the lines below it, with a few steps each, their bundles elsewhere."""
    short = ["--optim.max_steps", "3", "--eval.every_steps", "2", "--eval.tokens", "5000"]
    said = {}
    for line in [f".venv/bin/python -m training.run --out {tmp_path}/quickstart", *IN_THE_VENV]:
        command = shlex.split(
            line.replace("bundles/", f"{tmp_path}/").replace("compare.png", f"{tmp_path}/compare.png")
        )
        is_many = command.pop(0).endswith("torchrun")
        launcher = ["-m", "torch.distributed.run", "--standalone"] if is_many else []
        command = [sys.executable, *launcher, *command, *(short if "training.run" in line else [])]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"
        said[line] = ended.stdout
    trained, mine, two, compared, evaluated = said.values()
    for name, output in (("quickstart", trained), ("mine", mine), ("two", two)):
        assert f"make serve BUNDLE={tmp_path / name}" in output
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "two" in compared
    assert "bits per character" in evaluated


@pytest.mark.slow
def test_a_text_of_ones_own_is_trained_on_and_served(tmp_path):
    """The lines of the five minutes, with a few steps, on a short text."""
    (tmp_path / "book.txt").write_text(SHAKESPEARE.read_text()[:60_000])
    train, generate, serve = (
        shlex.split(line.replace("bundles/", f"{tmp_path}/").replace("book.txt", f"{tmp_path}/book.txt"))[1:]
        for line in BOOK
    )
    program = [sys.executable, "-m", "allattn"]
    short = ["--optim.max_steps", "3", "--eval.every_steps", "2", "--eval.tokens", "5000"]
    subprocess.run([*program, *train, *short], cwd=ROOT, check=True, capture_output=True)
    said = subprocess.run([*program, *generate], cwd=ROOT, check=True, capture_output=True).stdout
    assert said
    with subprocess.Popen([*program, *serve, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert "allattn serves book" in server.stdout.readline()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
