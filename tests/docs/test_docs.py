"""Tests that the pages in docs/ are true: links lead somewhere, commands and settings exist, and code runs."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from allattn import generate as terminal
from allattn.__main__ import BENCH, COMMANDS
from server import reference
from server.config import Settings
from server.config.sources import ENV_PREFIX
from server.requests.metrics import Metrics
from tests.docs.commands import PAGES, ROOT, blocks, commands
from tests.support.artefacts import shipped_folder
from tests.support.house import HOUSE, room_names

ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
WITH_LINKS = [*PAGES, ROOT / "configs" / "README.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"\]\((?!https?://)([^)\s]+)\)")
LINES = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
FOREIGN = ("openssl", "chmod", "docker", "kubectl", "serve")  # `serve` is Ray's command
VENV = ".venv/bin/"
OWN_FOLDERS = ("configs/", "deploy/", "docs/", "bundles/default")
PATHS = json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE):
        found.add(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_links_are_found_and_a_broken_one_would_be_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c/d\n[one](no.md) [two](#a-b-cd) [three](#e) [four](https://x)")
    assert LINK.findall(page.read_text()) == ["no.md", "#a-b-cd", "#e"]
    assert anchors(page) == {"a-b-cd"}
    assert sum(len(LINK.findall(page.read_text())) for page in DOCS) > 20


@pytest.mark.parametrize("name", ["openapi.json", "api.md"])
def test_the_reference_is_what_the_application_gives(name):
    """If it fails after a change of the API, run: python -m server.reference."""
    assert (ROOT / "docs" / name).read_text() == reference.files()[name], f"{reference.COMMAND} writes it anew"


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_command_names_what_there_is(line):
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    for word in words:
        if word.startswith(OWN_FOLDERS):
            assert (ROOT / word).exists(), word
    for variable in re.findall(rf"{ENV_PREFIX}(\w+)", line):
        assert variable.lower() in Settings.model_fields
    program, *arguments = words
    if program == "curl":
        [url] = [word for word in arguments if word.startswith("http")]
        assert "/" + url.split("/", 3)[3] in PATHS
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program.removeprefix(VENV) not in FOREIGN:
        assert program.startswith(VENV), program
        if module := module_of(program.removeprefix(VENV), arguments):
            check_flags(module, arguments)


def module_of(program: str, arguments: list[str]) -> str | None:
    """Return the module that a command of the virtual environment runs; its own arguments are left in `arguments`."""
    if program == "allattn":
        command = arguments.pop(0)
        return f"benchmarks.{arguments.pop(0)}" if command == BENCH else COMMANDS[command].module
    assert program in ("python", "torchrun")
    if "-m" not in arguments:
        assert arguments[0] == "generate.py"  # the snippet has a test of its own
        return None
    place = arguments.index("-m")
    module = arguments[place + 1]
    del arguments[: place + 2]
    return module


def check_flags(module: str, arguments: list[str]) -> None:
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")} - {"--help"}
    for flag in flags:
        assert re.search(rf"{re.escape(flag)}[\s,]", help_of(module)), f"{module} has no {flag}"


@cache
def help_of(module: str) -> str:
    """Return the output of `python -m module --help`."""
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def inline_flags() -> Iterator[tuple[str, str]]:
    for page in DOCS:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code):
                yield page.name, flag


@pytest.mark.slow
def test_every_flag_that_is_spoken_of_exists():
    ours = "".join(help_of(command.module) for command in COMMANDS.values())
    ours += help_of("training.import_official")
    foreign = {
        "--gpus",
        "--stop-timeout",
        "--build-arg",
        "--adapt-span-ramp",
        "--section.key",
        "--model",
        "--model_args",
    }
    spoken = set(inline_flags())
    assert len(spoken) > 20
    assert [(page, flag) for page, flag in sorted(spoken) if flag not in foreign and f"{flag} " not in ours] == []


def test_every_metric_that_is_spoken_of_exists():
    class Engine:
        state, restarts, heartbeat_age_s, rows_used, num_waiting, tokens_waiting = "ready", 0, 0.0, 0, 0, 0

    metrics = Metrics(Engine(), num_rows=1)  # type: ignore[arg-type]
    there = {family.name for family in metrics.registry.collect()}
    spoken = set(re.findall(r"`(allattn_\w+)`", (ROOT / "docs" / "operations.md").read_text()))
    assert len(spoken) > 12
    assert {name.removesuffix("_total") for name in spoken} - there == set()


@pytest.mark.parametrize("word", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", ARCHITECTURE.read_text()))))
def test_every_file_and_folder_of_the_architecture_exists(word):
    assert any((ROOT / folder / word).exists() for folder in ("", "server", "server/engine")), word


def folders_of_the_server() -> set[str]:
    return {folder.parent.name for folder in (ROOT / "server").glob("*/__init__.py")}


def test_the_architecture_and_its_picture_name_every_room_of_the_server():
    assert len(folders_of_the_server()) >= 8
    for file in (ARCHITECTURE, ARCHITECTURE.with_suffix(".svg")):
        assert {room for room in folders_of_the_server() if f"{room}/" not in file.read_text()} == set(), file.name


def test_the_rooms_import_what_the_architecture_says():
    """The table of rooms in the page agrees with tests/support/house.py, which is the rule."""
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]+) \|$", ARCHITECTURE.read_text(), flags=re.MULTILINE)
    said = {room: set(re.findall(r"\w+", words)) & {"model", *folders_of_the_server()} for room, words in rows}
    allowed: dict[str, set[str]] = {}
    for room in HOUSE:
        package, _, name = room.partition(".")
        if package == "server" and name:
            others = {other.removeprefix("server.").partition(".")[0] for other in room_names(room)}
            allowed.setdefault(name.partition(".")[0], set()).update(others)
    rooms = {"model", *folders_of_the_server()}
    assert {room: said[room] for room in allowed} == {
        room: (others & rooms) - {room} for room, others in allowed.items()
    }


@pytest.mark.slow
def test_the_snippet_runs_without_this_project(tmp_path, capfd):
    """The snippet writes the same text as the project, and imports nothing of it."""
    [snippet] = blocks((ROOT / "docs" / "export.md").read_text(), "python")
    (tmp_path / "generate.py").write_text(snippet)
    folder = shipped_folder("onnx")
    capfd.readouterr()
    command = [sys.executable, "generate.py", str(folder), "It was a dark", "40"]
    alone = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert terminal.main(["It was a dark", "--bundle", str(folder), "--max-new-tokens", "40"]) == 0
    assert alone == "It was a dark" + capfd.readouterr().out + "\n"
    imported = set(re.findall(r"^(?:import|from) (\w+)", snippet, flags=re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}
