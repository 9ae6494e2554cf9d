"""Tests that every command of the documents is run here or by CI, or that its section says that people run it."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.docs.commands import (
    PAGES,
    PROOFS,
    ROOT,
    blocks,
    commands,
    commands_in,
    make_sandbox,
    patterns_of,
    proof_of,
    run,
    serve,
)
from tests.support.artefacts import SHIPPED
from tests.support.live_server import live_server

LINES = [line for page in PAGES for line in commands(page)]
ASKED = list(dict.fromkeys(line for page in PAGES for line in commands(page, "ask") if not line.startswith("curl")))
CLIENTS = blocks((ROOT / "docs" / "clients.md").read_text(), "python")
TO_RUN = [page for page in PAGES if commands(page, "run", "serve")]
URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_one_entry_of_the_table_covers_a_command(line):
    assert len(patterns_of(line)) == 1, "tests/docs/commands.py says how a command is proven"


@pytest.mark.parametrize("pattern", PROOFS)
def test_every_entry_of_the_table_covers_a_command(pattern):
    assert any(re.fullmatch(pattern, line) for line in LINES)


def test_a_new_command_would_be_noticed():
    assert patterns_of("make coffee") == []
    assert patterns_of(".venv/bin/python -m server.coffee") == []
    assert len(LINES) > 50


def test_ci_runs_what_the_table_says_it_runs():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert any(re.search(r"\bmake\b.*\btest\b", line) for line in lines if not line.startswith("#"))
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "ruff check" in plan
    assert "pytest" in plan


def test_make_bench_runs_what_the_lines_above_it_run():
    plan = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"-m benchmarks\.(\w+)", plan) == ["training", "load", "stall"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_which_commands_no_test_runs(page):
    """No test can run Docker, Kubernetes and Ray; a section with such a command must mention tests."""
    for section in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE):
        if any(proof_of(line).how == "by hand" for line in commands_in(section)):
            assert re.search(r"\btests?\b", section), section


@pytest.mark.slow
@pytest.mark.timeout(1500)  # benchmarks.md takes minutes
@pytest.mark.parametrize("page", TO_RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_from_top_to_bottom(page, tmp_path):
    make_sandbox(tmp_path, page)
    for line in commands(page, "run", "serve"):
        if proof_of(line).how == "serve":
            serve(line, tmp_path)
        else:
            run(line, tmp_path)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(SHIPPED) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("line", ASKED)
def test_a_command_that_asks_a_server_is_answered(line, url, tmp_path):
    make_sandbox(tmp_path, ROOT / "docs" / "clients.md")
    assert run(line.replace(URL, url), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", CLIENTS, ids=["openai", "huggingface_hub"])
def test_a_client_of_other_people_is_answered(snippet, url):
    assert URL in snippet
    program = [sys.executable, "-c", snippet.replace(URL, url)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
