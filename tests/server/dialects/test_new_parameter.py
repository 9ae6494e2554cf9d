"""A new sampling parameter is written in two places, and then the wire, --help, the form and the docs have it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FIELD = "    dummy_p: float = 1.0\n"  # in SamplingParams
WIRE_FIELD = '    dummy_p: float | None = Field(default=None, gt=0, le=1, description="keep what a dummy keeps")\n'
PROGRAM = """
import asyncio, json
from model.sampling.params import SamplingParams
from server.reference import files
from tests.support.http_harness import make_link, make_client

async def main():
    link = make_link()
    async with make_client(link) as client:
        replies = [
            await client.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 1, "dummy_p": 0.25}}),
            await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "dummy_p": 0.5}),
            await client.post("/generate", json={"inputs": "x", "parameters": {"dummy_p": 2}}),
            await client.post("/generate", json={"inputs": "x", "parameters": {"do_sample": False, "dummy_p": 0.5}}),
        ]
        form = (await client.get("/playground/parameters.json")).json()
    print(json.dumps({
        "statuses": [reply.status_code for reply in replies],
        "complaint": replies[2].json()["error"]["message"],
        "told": [message.sampling.dummy_p for message in link.submitted],
        "temperature": link.submitted[0].sampling.temperature,
        "form": [one for one in form if one["name"] == "dummy_p"],
        "docs": files()["api.md"].count("`dummy_p`"),
    }))

asyncio.run(main())
"""


def insert(path: Path, *, before: str, text: str) -> None:
    whole = path.read_text(encoding="utf-8")
    assert whole.count(before) == 1
    path.write_text(whole.replace(before, text + before), encoding="utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the code with the parameter in its two places; the tests come from the repository itself."""
    tree = tmp_path_factory.mktemp("tree")
    for package in ("model", "server", "allattn"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    insert(tree / "model/sampling/params.py", before="    repetition_penalty:", text=FIELD)
    insert(tree / "server/dialects/sampling.py", before="    typical_p:", text=WIRE_FIELD)
    return tree


def run(tree: Path, *arguments: str) -> str:
    environment = {"PYTHONPATH": f"{tree}:{ROOT}", "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def seen(changed: Path) -> dict[str, Any]:
    return json.loads(run(changed, "-c", PROGRAM))


def test_it_reaches_the_engine_from_both_dialects(seen: dict[str, Any]) -> None:
    assert seen["statuses"] == [200, 200, 422, 422]
    assert seen["told"] == [0.25, 0.5]


def test_it_asks_for_sampling_and_its_range_is_checked_by_name(seen: dict[str, Any]) -> None:
    assert seen["temperature"] == 1
    allowed = "it should be more than 0 and at most 1"
    assert seen["complaint"] == f"parameters.dummy_p: 2 is not allowed; {allowed}"


def test_the_form_and_the_docs_have_it(seen: dict[str, Any]) -> None:
    assert [one["description"] for one in seen["form"]] == ["keep what a dummy keeps"]
    assert seen["docs"] == 2, "a line in the table of each dialect"


def test_the_command_line_has_it(changed: Path) -> None:
    assert "--dummy-p N           keep what a dummy keeps" in run(changed, "-m", "allattn.generate", "--help")
