"""`allattn COMMAND ...`, or `python -m allattn COMMAND ...`: one name for the programs of this project.

A command is the module that `python -m` would run, with the same arguments, signals and exit status. It is looked up
when it is asked for, so that none of the others, nor what they need, has to be there.
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
WRONG_USE = 2  # exit status, as argparse has it


class Command(NamedTuple):
    """What a command runs."""

    module: str
    extra: str  # of pyproject.toml, that it needs
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
    """Run what `sys.argv` asks for; returns the exit status where the command itself does not end the process."""
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
    """What `allattn --help` says."""
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
    """What an extra of pyproject.toml names and is not installed; nothing where the project itself is not."""
    try:
        lines = requires("allattn") or []
    except PackageNotFoundError:
        return []
    wanted = [line for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    names = [match[0] for line in wanted if (match := re.match(r"[\w.-]+", line))]
    return [name for name in names if not _is_installed(name)]


def run_benchmark(arguments: Sequence[str]) -> int:
    """`allattn bench NAME ...`, the same as `python -m benchmarks.NAME ...` at the root of the checkout."""
    if not (BENCHMARKS / "__init__.py").exists() or not (ROOT / "pyproject.toml").exists():
        return complain("bench needs a checkout of the repository: what it runs, benchmarks/, is not installed")
    described = dict(_benchmarks())
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("usage: allattn bench NAME ...\n")
        print("".join(f"  {one:10}{summary}\n" for one, summary in described.items()))
        print("allattn bench NAME --help tells all about one.")
        return 0
    if name not in described:
        return complain(f"there is no benchmark {name!r}; there are: {', '.join(described)}")
    sys.path.insert(0, str(ROOT))
    run(f"benchmarks.{name}", name=f"{BENCH} {name}", arguments=rest)
    return 0


def run(module: str, *, name: str, arguments: Sequence[str]) -> None:
    """What `python -m module` does. Parsers of arguments find the name of the program in `sys.argv`."""
    sys.argv = [f"allattn {name}", *arguments]
    runpy.run_module(module, run_name="__main__")


def complain(message: str, *, status: int = WRONG_USE) -> int:
    """Say it on standard error; returns the exit status."""
    print(f"allattn: {message}", file=sys.stderr)
    return status


def _benchmarks() -> Iterator[tuple[str, str]]:
    """Names of those that can be run, each with the first line of its docstring."""
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
