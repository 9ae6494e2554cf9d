"""`allattn COMMAND ...`, or `python -m allattn COMMAND ...`: one command for all programs of this project.

A command runs the module that `python -m` would run, with the same arguments, signals and exit status. Its module is
imported only when the command runs, so the modules of other commands and their packages need not be installed.
"""

import ast
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
WRONG_USE = 2  # exit status for a wrong command line, the same as argparse's


class Command(NamedTuple):
    """A command: the module that it runs, and the extra that it needs."""

    module: str
    extra: str  # name of an extra in pyproject.toml
    summary: str


COMMANDS = {
    "serve": Command("server", "server", "serve a model over HTTP"),
    "generate": Command("allattn.generate", "server", "continue a text in the terminal, here or by a server"),
    "train": Command("training.run", "train", "train a model: from a text to a bundle"),
    "evaluate": Command("training.evaluate", "train", "bits per byte and perplexity of a whole text"),
    "export": Command("export.run", "export", "write a model as TorchScript, ONNX or pt2, and verify it"),
}
BENCH = "bench"


def main() -> int:
    """Run the command in `sys.argv`; returns the exit status, unless the command itself ends the process."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(describe_commands(), end="")
        return 0
    if name == "--version":
        print(f"allattn {version('allattn')}")
        return 0
    if name == BENCH:
        return run_benchmark(arguments)
    if name not in COMMANDS:
        return complain(f"there is no command {name!r}; there are: {', '.join([*COMMANDS, BENCH])}")
    command = COMMANDS[name]
    if missing := missing_packages(command.extra):
        return complain(f"{name} needs {', '.join(missing)}: pip install 'allattn[{command.extra}]'", status=1)
    run(command.module, name=name, arguments=arguments)
    return 0


def describe_commands() -> str:
    """The text of `allattn --help`."""
    described = {name: command.summary for name, command in COMMANDS.items()}
    described[BENCH] = "measure the speed of training and serving; in a checkout of the repository only"
    lines = [f"  {name:10}{summary}" for name, summary in described.items()]
    return "\n".join(
        [
            "usage: allattn [--version] COMMAND ...",
            "",
            "Train, export and serve all-attention language models.",
            "",
            *lines,
            "",
            "allattn COMMAND --help tells all about a command.",
            "",
        ]
    )


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed; empty if the project itself is not installed."""
    try:
        lines = requires("allattn") or []
    except PackageNotFoundError:
        return []
    wanted = [line for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    names = [match[0] for line in wanted if (match := re.match(r"[\w.-]+", line))]
    return [name for name in names if not _is_installed(name)]


def run_benchmark(arguments: Sequence[str]) -> int:
    """Run `allattn bench NAME ...`, which is `python -m benchmarks.NAME ...` at the root of the checkout."""
    if not (BENCHMARKS / "__init__.py").exists() or not (ROOT / "pyproject.toml").exists():
        return complain("bench needs a checkout of the repository: what it runs, benchmarks/, is not installed")
    described = dict(_benchmarks())
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("usage: allattn bench NAME ...\n")
        print("".join(f"  {benchmark:10}{summary}\n" for benchmark, summary in described.items()))
        print("allattn bench NAME --help tells all about one.")
        return 0
    if name not in described:
        return complain(f"there is no benchmark {name!r}; there are: {', '.join(described)}")
    sys.path.insert(0, str(ROOT))
    run(f"benchmarks.{name}", name=f"{BENCH} {name}", arguments=rest)
    return 0


def run(module: str, *, name: str, arguments: Sequence[str]) -> None:
    """Run a module as `python -m module` does. Argument parsers read the name of the program from `sys.argv`."""
    sys.argv = [f"allattn {name}", *arguments]
    runpy.run_module(module, run_name="__main__")


def complain(message: str, *, status: int = WRONG_USE) -> int:
    """Print a message on standard error; returns the exit status."""
    print(f"allattn: {message}", file=sys.stderr)
    return status


def _benchmarks() -> Iterator[tuple[str, str]]:
    """The name and the first line of the docstring of each benchmark that can be run."""
    for file in sorted(BENCHMARKS.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            yield file.stem, (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
