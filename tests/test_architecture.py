"""The rules of DESIGN.md section 4 as a walk over the syntax trees: imports, the place of softmax, file sizes.

A rule is a function from sources, {path from the root: text}, to the lines that break it, so that each is shown to fail
on a few synthetic lines. Files that a rule names and that do not exist yet are passed over.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "training", "export", "server")
MODEL_MAY_IMPORT = {"torch", "numpy", "safetensors", "tokenizers", "pydantic"}
TENSOR_LIBRARIES = {"torch", "onnxruntime"}
HTTP_LIBRARIES = {"fastapi", "starlette", "uvicorn"}
SERVER_LAYERS = (  # a module knows its own layer and those before it
    ("server.errors", "server.protocol.messages", "server.engine.sequence"),
    ("server.engine.scheduler",),
    ("server.engine.engine",),
    ("server.protocol.frames", "server.link.mailbox"),
    ("server.link.child", "server.engine.process"),
    ("server.link.supervisor",),
    ("server.app",),
    ("server.__main__",),
)
SOFTMAX_MAY_APPEAR = {
    "softmax": {
        "model/attention.py",
        "model/network/tiled.py",
        "model/sampling/draw.py",
    },  # over keys; over the vocabulary
    "log_softmax": {
        "model/sampling/draw.py",
        "model/scoring.py",
        "model/network/network.py",
        "model/frozen/baked.py",
        "model/adaptive.py",
    },
    "scaled_dot_product_attention": {"model/attention.py"},
}
MAX_LINES = 400


def sources() -> dict[str, str]:
    folders = (*PACKAGES, "tests", "benchmarks")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, text: str) -> set[str]:
    """Dotted names of all that a file imports, at its top or inside functions; `from a import b` gives a and a.b."""
    package = path.rpartition("/")[0].replace("/", ".").split(".")
    names = set()
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(start + ([node.module] if node.module else []))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def called(node: ast.Call) -> str:
    """The last name of what is called: `softmax` for softmax(x), F.softmax(x) and scores.softmax(-1)."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def roots(path: str, text: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, text)}


def inside(files: Sources, *packages: str) -> Iterator[tuple[str, str]]:
    return ((path, text) for path, text in files.items() if path.startswith(tuple(f"{name}/" for name in packages)))


def graph(files: Sources, package: str) -> dict[str, set[str]]:
    """For each module of a package, the modules of the same package that it imports."""
    modules = {module_name(path) for path, _ in inside(files, package)}
    return {module_name(path): (imports(path, text) & modules) - {package} for path, text in inside(files, package)}


def reachable(edges: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def foreign_imports_of_model(files: Sources) -> list[str]:
    broken = []
    for path, text in inside(files, "model"):
        allowed = {"model", *MODEL_MAY_IMPORT, *sys.stdlib_module_names}
        if path == "model/tokenizer.py":
            allowed |= {"tqdm"}
        if path == "model/frozen/onnx_graphs.py":
            allowed |= {"onnxruntime"}
        broken += [f"{path} imports {name}" for name in sorted(roots(path, text) - allowed)]
    return broken


def imports_across_packages(files: Sources) -> list[str]:
    broken = []
    for package in PACKAGES:
        forbidden = {*PACKAGES, "tests", "benchmarks"} - {package, "model"}
        for path, text in inside(files, package):
            broken += [f"{path} imports {name}" for name in sorted(roots(path, text) & forbidden)]
    return broken


def imports_of_tests_or_benchmarks(files: Sources) -> list[str]:
    forbidden = {"tests": {"benchmarks"}, "benchmarks": {"tests"}}
    return [
        f"{path} imports {name}"
        for path, text in files.items()
        if not path.startswith("tests/test_benchmarks_")
        for name in sorted(roots(path, text) & forbidden.get(path.partition("/")[0], {"tests", "benchmarks"}))
    ]


def upward_imports_in_server(files: Sources) -> list[str]:
    edges = graph(files, "server")
    layer = {module: i for i, modules in enumerate(SERVER_LAYERS) for module in modules}
    return [
        f"{module} reaches {other}"
        for module in sorted(edges.keys() & layer)
        for other in sorted(reachable(edges, module) & layer.keys())
        if layer[other] > layer[module]
    ]


def cycles(files: Sources) -> list[str]:
    found = []
    for package in PACKAGES:
        edges = graph(files, package)
        found += [f"{module} reaches itself" for module in sorted(edges) if module in reachable(edges, module)]
    return found


def tensor_imports_in_server(files: Sources) -> list[str]:
    """Files other than server/runner*.py that import a tensor library, or a module of model/ that loads one."""
    edges = graph(files, "model")
    direct = {module_name(path) for path, text in inside(files, "model") if roots(path, text) & TENSOR_LIBRARIES}
    heavy = direct | {module for module in edges if reachable(edges, module) & direct}
    return [
        f"{path} imports {name}"
        for path, text in inside(files, "server")
        if not fnmatch(path, "server/runner*.py")
        for name in sorted((roots(path, text) & TENSOR_LIBRARIES) | (imports(path, text) & heavy))
    ]


def http_imports_of_the_engine(files: Sources) -> list[str]:
    edges = graph(files, "server")
    below_http = reachable(edges, "server.engine.process") | {"server.engine.process"}
    return [
        f"{path} imports {name}"
        for path, text in inside(files, "server")
        if module_name(path) in below_http
        for name in sorted(roots(path, text) & HTTP_LIBRARIES)
    ]


def misplaced_softmax(files: Sources) -> list[str]:
    broken = []
    for path, text in inside(files, "model"):
        for node in ast.walk(ast.parse(text, path)):
            if not isinstance(node, ast.Call):
                continue
            name = called(node)
            name = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}.get(name, name)
            if path not in SOFTMAX_MAY_APPEAR.get(name, {path}):
                broken.append(f"{path}:{node.lineno} calls {name}")
    return broken


def long_files(files: Sources) -> list[str]:
    lengths = {path: len(text.splitlines()) for path, text in files.items()}
    return [f"{path} has {length} lines" for path, length in lengths.items() if length > MAX_LINES]


LONG = "x = 1\n" * (MAX_LINES + 1)
RULES: dict[Rule, list[tuple[Sources, str]]] = {  # rule: sources that break it once, and the complaint
    foreign_imports_of_model: [
        ({"model/network/network.py": "import requests"}, "model/network/network.py imports requests"),
        ({"model/network/network.py": "def f():\n    import msgspec"}, "model/network/network.py imports msgspec"),
        ({"model/network/network.py": "from tqdm import tqdm"}, "model/network/network.py imports tqdm"),
        ({"model/network/network.py": "import server.errors"}, "model/network/network.py imports server"),
        ({"model/frozen/exported.py": "import onnxruntime"}, "model/frozen/exported.py imports onnxruntime"),
    ],
    imports_across_packages: [
        ({"training/run.py": "from server import config"}, "training/run.py imports server"),
        ({"export/graph.py": "def f():\n    from training.run import main"}, "export/graph.py imports training"),
        (
            {"server/requests/output_text.py": "import importlib\nimportlib.import_module('export.run')"},
            "server/requests/output_text.py imports export",
        ),
        ({"model/frozen/cache.py": "import training"}, "model/frozen/cache.py imports training"),
    ],
    imports_of_tests_or_benchmarks: [
        ({"server/engine/engine.py": "from tests import oracle"}, "server/engine/engine.py imports tests"),
        ({"tests/test_speed.py": "import benchmarks.decode"}, "tests/test_speed.py imports benchmarks"),
        ({"benchmarks/decode.py": "import tests.oracle"}, "benchmarks/decode.py imports tests"),
    ],
    upward_imports_in_server: [
        (
            {"server/engine/scheduler.py": "from server.engine.engine import Engine", "server/engine/engine.py": ""},
            "server.engine.scheduler reaches server.engine.engine",
        ),
        (
            {
                "server/engine/engine.py": "from . import text",
                "server/requests/output_text.py": "import server.app",
                "server/app.py": "",
            },
            "server.engine.engine reaches server.app",
        ),
    ],
    cycles: [
        (
            {
                "training/loop.py": "import training.data",
                "training/data.py": "def f():\n    from training.loop import g",
            },
            "training.data reaches itself",
        )
    ],
    tensor_imports_in_server: [
        ({"server/engine/engine.py": "import torch"}, "server/engine/engine.py imports torch"),
        (
            {"server/engine/scheduler.py": "def f():\n    import onnxruntime"},
            "server/engine/scheduler.py imports onnxruntime",
        ),
        (
            {
                "server/engine/engine.py": "from model.frozen.baked import bake",
                "model/frozen/baked.py": "from model import attention",
                "model/attention.py": "import torch",
            },
            "server/engine/engine.py imports model.frozen.baked",
        ),
    ],
    http_imports_of_the_engine: [
        (
            {
                "server/engine/process.py": "import server.engine.engine",
                "server/engine/engine.py": "from fastapi import Request",
            },
            "server/engine/engine.py imports fastapi",
        )
    ],
    misplaced_softmax: [
        (
            {"model/network/network.py": "import torch\ntorch.softmax(x, -1)"},
            "model/network/network.py:2 calls softmax",
        ),
        ({"model/frozen/baked.py": "scores.softmax(-1)"}, "model/frozen/baked.py:1 calls softmax"),
        ({"model/frozen/baked.py": "nn.Softmax(-1)"}, "model/frozen/baked.py:1 calls softmax"),
        ({"model/frozen/cache.py": "log_softmax(x)"}, "model/frozen/cache.py:1 calls log_softmax"),
        (
            {"model/network/network.py": "F.scaled_dot_product_attention(q, k, v)"},
            "model/network/network.py:1 calls scaled_dot_product_attention",
        ),
    ],
    long_files: [({"server/app.py": LONG}, f"server/app.py has {MAX_LINES + 1} lines")],
}
NAMES = [getattr(rule, "__name__", "") for rule in RULES]
ALLOWED = {  # what no rule complains about
    "model/tokenizer.py": "import json\nimport tokenizers\nfrom tqdm import tqdm\nfrom model.config import ModelConfig",
    "model/config.py": "import pydantic",
    "model/attention.py": "import torch\ntorch.softmax(scores, -1)",
    "model/frozen/onnx_graphs.py": "import onnxruntime",
    "model/frozen/baked.py": "import torch.nn.functional as F\nF.log_softmax(logits, -1)",
    "training/run.py": "import tqdm\nimport torch\nfrom model import attention\nfrom training.loop import train",
    "training/loop.py": "x = 1\n" * MAX_LINES,
    "server/errors.py": "",
    "server/engine/scheduler.py": "import server.errors\nfrom model.tokenizer import Tokenizer",
    "server/engine/runner.py": "import torch\nfrom model.attention import joint_attention",
    "server/engine/engine.py": "from server.engine.scheduler import plan",
    "server/engine/process.py": "def main():\n    from server import engine, runner",
    "server/app.py": "import fastapi\nfrom server import errors",
    "server/__main__.py": "import uvicorn\nfrom server.app import app",
    "tests/test_x.py": "import server.app\nimport training.run",
    "benchmarks/decode.py": "import server.engine.engine\nimport model.frozen.baked",
}


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_repository_keeps_the_rule(rule: Rule) -> None:
    assert rule(sources()) == []


@pytest.mark.parametrize(
    ("rule", "broken", "complaint"),
    [(rule, broken, complaint) for rule, cases in RULES.items() for broken, complaint in cases],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rule_complains_of_a_tree_that_breaks_it(rule: Rule, broken: Sources, complaint: str) -> None:
    assert complaint in rule(ALLOWED | dict(broken))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_accepts_a_tree_that_keeps_it(rule: Rule) -> None:
    assert rule(ALLOWED) == []


def test_the_walk_sees_the_imports_that_are_really_there() -> None:
    files = sources()
    assert {"torch", "model.attention", "model.config"} <= imports(
        "model/network/layer.py", files["model/network/layer.py"]
    )
    assert "model.attention" in graph(files, "model")["model.network.layer"]
    for package in PACKAGES:
        seen = [path for path, _ in inside(files, package)]
        assert len(seen) == len(list((ROOT / package).rglob("*.py")))
    assert "softmax" in {called(n) for n in ast.walk(ast.parse(files["model/attention.py"])) if isinstance(n, ast.Call)}


def test_every_module_that_a_rule_names_exists() -> None:
    if not (ROOT / "server/engine/engine.py").exists():
        pytest.skip("the engine is not written yet")
    named = {module for layer in SERVER_LAYERS for module in layer} | {"server.engine.runner"}
    assert named - {module_name(path) for path in sources()} == set()


def loaded_tensor_libraries(module: str) -> set[str]:
    """Which tensor libraries a fresh interpreter holds after importing `module`."""
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & TENSOR_LIBRARIES


@pytest.mark.parametrize(
    "module",
    [
        "model.config",
        "model.tokenizer",
        "model.bundle",
        "model.artefact",
        "server.protocol.messages",
        "server.engine.scheduler",
        "server.app",
        "server.__main__",
    ],
)
def test_a_module_of_the_api_process_loads_no_tensor_library(module: str) -> None:
    if not (ROOT / f"{module.replace('.', '/')}.py").exists():
        pytest.skip(f"{module} does not exist yet")
    assert loaded_tensor_libraries(module) == set()


def test_a_tensor_library_that_is_loaded_would_be_noticed() -> None:
    assert loaded_tensor_libraries("model.attention") == {"torch"}
