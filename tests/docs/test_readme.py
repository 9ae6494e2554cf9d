"""Tests that the README is true and short, and that the shipped model does on every backend what the documents say."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docs.commands import PAGES, ROOT, blocks, commands
from tests.support.artefacts import BACKENDS, named_backend, shipped_folder
from training.corpus import SHAKESPEARE

README = ROOT / "README.md"
CURLS = list(dict.fromkeys(line for page in PAGES for line in commands(page) if line.startswith("curl ")))
MOST_WORDS = 900


def test_the_readme_is_read_in_a_minute():
    assert len(README.read_text().split()) <= MOST_WORDS


def test_its_pictures_are_small():
    pictures = re.findall(r"(?:\]\(|src(?:set)?=\")(docs/[\w-]+\.(?:svg|png))", README.read_text())
    assert {"docs/layer.svg", "docs/state.svg", "docs/page.png", "docs/page-dark.png"} <= set(pictures)
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 500_000


def test_make_says_what_the_documents_say():
    plan = subprocess.run(["make", "-n", "train", "serve"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "python -m training.run configs/quickstart.toml" in plan
    assert "python -m server --bundle bundles/default --port 8000" in plan


@pytest.fixture(scope="module", params=BACKENDS)
def port(request, tmp_path_factory) -> Iterator[int]:
    """Run the server as `make serve PORT=0` does, with the shipped model on each backend; give its port."""
    model = tmp_path_factory.mktemp(request.param) / "default"
    shutil.copytree(shipped_folder(request.param), model)  # the server would take a link's target for the name
    command = [sys.executable, "-m", "server", "--bundle", str(model), "--port", "0"]
    command += ["--backend", named_backend(request.param)]
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
def test_each_curl_line_is_answered(port, line, tmp_path):
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    command = line.replace(":8000", f":{port}") + " -sS --fail-with-body"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    answer = done.stdout
    assert done.returncode == 0, f"{line}\n{answer}{done.stderr}"
    if '"stream": true' in line:
        events = [json.loads(event.removeprefix("data: ")) for event in answer.strip().split("\n\n")]
        assert events[-1]["generated_text"].startswith("".join(event["token"]["text"] for event in events[:-1]))
    elif "metrics" in line:
        assert "time_to_first_token_seconds" in answer
    else:
        assert "error" not in json.loads(answer)


@pytest.mark.slow
def test_the_answer_in_the_readme_is_the_real_one(port):
    """In float32 the logits of the backends are so close that they give the same text."""
    [line] = [line for line in commands(README) if line.startswith("curl ")]
    [shown] = blocks(README.read_text(), "json")
    command = shlex.split(line.replace(":8000", f":{port}"))
    said = subprocess.run([*command, "-sS", "--fail"], capture_output=True, text=True, check=True).stdout
    assert said == shown.strip()


@pytest.mark.slow
def test_what_ships_keeps_its_promises(client):
    """Plain = streamed; a seed gives the same text alone and in a batch; English scores better than gibberish."""
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
        assert answer["num_bytes"] > num_bytes - 20  # every token but the first is scored
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{engine}/status").read_text())
        assert found
        return int(found[1]) * 1024

    short = peak_after(20_000)
    assert peak_after(200_000) < short + 30e6
