"""The commands of the documents, and how each is proven: PROOFS is the table.

A command is a line in a block of shell code in README.md, CONTRIBUTING.md or docs/. The tests fail if no entry covers
a line, so that every command in a document has been run, or its entry says why not. The commands of a page run
from top to bottom in a sandbox: a folder that looks like the root of the repository, with its own bundles.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from tests.support.official_checkpoint import plain_state, saved
from training.corpus import SHAKESPEARE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = ("allattn", "benchmarks", "configs", "deploy", "export", "model", "server", "training", "Makefile")
PROGRAMS = {
    "python": "",
    "allattn": "-m allattn",
    "torchrun": "-m torch.distributed.run --standalone",
}  # programs in .venv/bin, with the arguments that the tests' interpreter gets for each

How = Literal["run", "serve", "ask", "ci", "by hand"]


class Proof(NamedTuple):
    """The way in which a command is proven."""

    how: How
    more: str = ""  # words added to the command, to make a run short
    says: str = ""  # pattern that the output must contain
    why: str = ""  # who runs the command, or why no test runs it


SHORT = "--optim.max_steps 3 --eval.every_steps 2 --eval.tokens 5000"
PROOFS: dict[str, Proof] = {  # from a pattern of a whole line to its proof
    r"curl .*": Proof("ask"),
    r"make serve": Proof("serve", more="PORT=0"),
    r"\S+/allattn serve(?!.*--print-config).*": Proof("serve", more="--port 0"),
    r"\S+/allattn serve --print-config": Proof("run", says=r"num_rows = 32"),
    r"\S+/allattn generate [^|]*--url .*": Proof("ask"),
    r"\S+/allattn generate (?!.*--url).*": Proof("run"),
    r"make train": Proof("run", more=f"CONFIG='configs/quickstart.toml {SHORT}'", says="make serve BUNDLE="),
    r"\S+/allattn train --help": Proof("run", says=r"--optim\.lr"),
    r"\S+/allattn train(?! --help).*": Proof("run", more=SHORT, says="make serve BUNDLE="),
    r"\S+/torchrun .* -m training\.run .*": Proof("run", more=SHORT, says="make serve BUNDLE="),
    r"\S+/allattn evaluate (?!.*--json).*": Proof("run", says="bits per character"),
    r"\S+/allattn evaluate .*--json": Proof("run", says="bits_per_byte"),
    r"\S+/python -m training\.compare .*": Proof("run", says="two"),
    r"\S+/python -m training\.import_official .*": Proof("run", more="--span-ramp 4"),
    r"\S+/allattn export .*": Proof("run", more="--num-bytes 3000"),
    r"\S+/python -m export\.verify .*": Proof("run", more="--num-bytes 3000"),
    r"\S+/python generate\.py .*": Proof("run", says="It was a dark"),
    r"\S+/python -m docs\.pictures": Proof("run"),
    r"\S+/python -m model\.frozen\.native\.build": Proof("run", says=r"liballattn-"),
    r"\S+/python -m server .*--help": Proof("run", says=r"--native-variant"),
    r"make docs": Proof("run"),
    r"\S+/allattn bench decode .*": Proof("run", more="--repeats 1", says=r'"tokens_per_s"'),
    r"\S+/allattn bench load .*": Proof("run", more="--seconds 1 --repeats 1 --concurrency 1", says="share_of_engine"),
    r"\S+/allattn bench stall .*": Proof("run", more="--seconds 1 --rounds 1", says=r'"benchmark": "stall"'),
    r"\S+/allattn bench training": Proof(
        "run",
        more="--config configs/quickstart.toml --dtype float32 --spans 0.2 --num-threads 1",
        says=r'"ours_over_gpt"',
    ),
    r"\S+/allattn bench backends .*": Proof(
        "run", more="--bundles bundles/default --formats torchscript --repeats 1", says="torchscript"
    ),
    r"make soak MINUTES=60": Proof("run", more="MINUTES=0.2"),
    r"make bench": Proof("by hand", why="minutes; the lines above it run its parts"),
    r"make (test|test-fast|check|\.venv)": Proof("ci", why="`make test` is what CI runs, and has the others as parts"),
    r"openssl .*|chmod .*": Proof("run"),
    r"docker .*|make docker-check": Proof("by hand", why="needs docker, podman or buildah"),
    r"kubectl .*": Proof("by hand", why="needs a cluster; tests/deploy checks the manifests"),
    r"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=.*": Proof("by hand", why="needs the extra ray; see `make test-ray`"),
}


def blocks(text: str, language: str) -> list[str]:
    """Return the contents of the blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands_in(text: str) -> list[str]:
    """Return the commands of a text, in order."""
    return [line for block in blocks(text, "sh") for line in block.splitlines() if line]


def commands(page: Path, *how: How) -> list[str]:
    """Return the commands of a page in order: all, or those that are proven in one of the ways `how`."""
    lines = commands_in(page.read_text(encoding="utf-8"))
    return [line for line in lines if not how or any(PROOFS[pattern].how in how for pattern in patterns_of(line))]


def patterns_of(line: str) -> list[str]:
    """Return the entries of PROOFS that cover a command; exactly one should."""
    return [pattern for pattern in PROOFS if re.fullmatch(pattern, line)]


def proof_of(line: str) -> Proof:
    """Return the proof of a command."""
    [pattern] = patterns_of(line)
    return PROOFS[pattern]


def make_sandbox(folder: Path, page: Path) -> None:
    """Fill a folder in which the commands of a page can run, with the code, bundles and files that the page names."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "bundles").mkdir()
    (folder / "bundles" / "default").symlink_to(ROOT / "bundles" / "default")
    if page.name == "operations.md":
        (folder / "bundles" / "mine").symlink_to(ROOT / "bundles" / "default")
    if page.name == "export.md":
        [snippet] = blocks(page.read_text(), "python")
        (folder / "generate.py").write_text(snippet)
    (folder / "book.txt").write_text(SHAKESPEARE.read_text()[:60_000])
    (folder / "train.txt").write_text("a _ c _ a b")
    saved(folder, plain_state(5)).rename(folder / "checkpoint.pt")
    _make_programs(folder / ".venv" / "bin")
    shutil.copy(ROOT / "pyproject.toml", folder)
    os.utime(folder / "pyproject.toml", (0, 0))  # older than .venv, so that make leaves .venv alone


def _make_programs(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, words in PROGRAMS.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        program.chmod(0o755)


def run(line: str, folder: Path) -> str:
    """Run a command, shortened, and return its output."""
    proof = proof_of(line)
    done = subprocess.run(
        ["bash", "-euc", f"{line} {proof.more}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    assert re.search(proof.says, done.stdout), f"{line}\n{done.stdout}"
    return done.stdout


def serve(line: str, folder: Path) -> None:
    """Run a command that serves; when its banner names a URL, end it as Ctrl-C does."""
    command = ["bash", "-euc", f"exec {line} {proof_of(line).more}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        assert server.stdout is not None
        try:
            assert any("url " in line for line in server.stdout), f"{line}: no banner"
        finally:
            os.killpg(server.pid, signal.SIGINT)
        server.stdout.read()
        status = server.wait(timeout=60)
    assert status == 0 or line.startswith("make "), f"{line}: status {status}"  # make reports the signal
