"""Tests of `allattn COMMAND`: it runs `python -m` under a shorter name, and reports what is wrong if it cannot."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import allattn.__main__ as cli
from tests.support.artefacts import bundle_of

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
LOADS_TORCH = ("train", "evaluate", "export")
EACH_COMMAND = [
    pytest.param(name, marks=pytest.mark.slow) if name in LOADS_TORCH else name for name in sorted(cli.COMMANDS)
]


def run(*arguments: str, cwd: Path = ROOT, status: int = 0) -> str:
    """Return the output of a command, errors included."""
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def say(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit status and output of a command that runs nothing, in this process."""
    monkeypatch.setattr(sys, "argv", ["allattn", *arguments])
    status = cli.main()
    return status, "".join(capsys.readouterr())


def test_the_console_script_is_this_module():
    [script] = entry_points(group="console_scripts", name="allattn")
    assert script.load() is cli.main


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_has_a_line_for_each_command(arguments, monkeypatch, capsys):
    status, said = say(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 0
    for name in (*cli.COMMANDS, "bench"):
        assert re.search(rf"^  {name} +\w.{{20}}", said, flags=re.MULTILINE), name


def test_an_unknown_command_is_refused_with_all_that_there_are(monkeypatch, capsys):
    status, said = say("sevre", monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2
    assert said == (
        "allattn: there is no command 'sevre'; there are: serve, generate, train, evaluate, export, bench\n"
    )


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert say("--version", monkeypatch=monkeypatch, capsys=capsys) == (0, f"allattn {project['version']}\n")


@pytest.mark.parametrize("name", EACH_COMMAND)
def test_a_command_has_the_help_of_its_module_under_its_own_name(name):
    module = cli.COMMANDS[name].module
    ours, theirs = run("allattn", name, "--help"), run(module, "--help")
    assert ours.startswith(f"usage: allattn {name} ")
    assert theirs.startswith(f"usage: python -m {module} ")
    assert ours.split() == theirs.replace(f"usage: python -m {module} ", f"usage: allattn {name} ").split()


@pytest.mark.slow
def test_a_command_ends_with_the_exit_status_of_its_module(tmp_path):
    assert "--frob is not a flag" in run("allattn", "serve", "--frob", status=2)
    assert "usage: allattn export" in run("allattn", "export", "x", status=2)
    said = run("allattn", "evaluate", str(tmp_path / "nothing"), "--data", "shakespeare", status=1)
    assert said.startswith("error: ")
    assert "nothing" in said


def test_nothing_is_imported_before_it_is_asked_for():
    said = run("allattn", "--help")
    assert "serve" in said
    code = "import sys, allattn.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"model", "server", "training", "export", "torch", "pydantic"}.isdisjoint(done.stdout.split())


def test_a_command_whose_extra_is_missing_says_how_to_install_it(monkeypatch, capsys):
    lines = ['nosuchpackage==1.2; extra == "train"', 'neither-this>=3 ; extra == "train"', 'torch==2; extra == "train"']
    monkeypatch.setattr(cli, "requires", lambda _: [*lines, "absent==1", 'absent==1; extra == "server"'])
    status, said = say("train", "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert status == 1
    assert said == "allattn: train needs nosuchpackage, neither-this: pip install 'allattn[train]'\n"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_each_command_needs_an_extra_that_there_is(name, monkeypatch):
    extra = cli.COMMANDS[name].extra
    assert cli.missing_packages(extra) == []
    monkeypatch.setattr(cli, "_is_installed", lambda _: False)
    known = {re.split(r"[=\[;]", line)[0] for line in EXTRAS[extra]}
    assert known & set(cli.missing_packages(extra))


def test_bench_names_what_can_be_measured(monkeypatch, capsys):
    status, said = say("bench", monkeypatch=monkeypatch, capsys=capsys)
    assert status == 0
    listed = re.findall(r"^  (\w+)", said, flags=re.MULTILINE)
    assert {"training", "load", "stall", "decode", "soak"} <= set(listed)
    assert "client" not in listed
    assert say("bench", "client", monkeypatch=monkeypatch, capsys=capsys)[0] == 2


def test_bench_runs_from_anywhere(tmp_path):
    assert run("allattn", "bench", "soak", "--help", cwd=tmp_path).startswith("usage: allattn bench soak ")


def test_bench_says_that_it_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path / "benchmarks")
    status, said = say("bench", "load", monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2
    assert "needs a checkout" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_in_order(number):
    command = [sys.executable, "-m", "allattn", "serve", "--bundle", str(bundle_of()), "--port", "0", "--num-rows", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            assert any("url " in line for line in server.stdout)
            server.send_signal(number)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
        assert "Traceback" not in server.stderr.read()
