"""Tests of the structure: where every module stands, what it may import, and where softmax and torch may appear.

HOUSE, in tests/support/house.py, names each module of the project once. If a module is new, moved or gone, the first
test fails until HOUSE names its room; other tests compare the imports of every module with the rule of its room. Each
rule is a function from sources, {path from the root: text}, to the lines that break it, so that a test can show that it
fails on a few made-up lines.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path

import pytest

from tests.support.house import HOUSE, ROOM_OF, room_names

Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]

ROOT = Path(__file__).parents[1]


PACKAGES = ("model", "training", "export", "server", "allattn")
TENSOR_LIBRARIES = {"torch", "onnxruntime"}
# modules of server/ and allattn/ that load torch, when they are imported or when they load a model
TENSOR_MODULES = {"server.engine.runner", "server.engine.drawer", "allattn.generate"}
ONE_MODULE = {  # packages that only one module of a room may import
    "tqdm": {"model": "model.tokenizer"},
    "onnxruntime": {"model.frozen": "model.frozen.onnx_graphs", "export": "export.quantise"},
    "ray": {"server (top)": "server.ray_serve"},
}
SOFTMAX_MAY_APPEAR = {
    # attention over keys, attention over keys, probabilities over the vocabulary
    "softmax": {"model/attention.py", "model/network/tiled.py", "model/sampling/draw.py"},
    "log_softmax": {"model/sampling/draw.py", "model/network/network.py", "model/frozen/baked.py", "model/adaptive.py"},
    "scaled_dot_product_attention": {"model/attention.py"},
}
MAX_LINES = 400
MAX_MODULES_IN_SERVER = 8


def sources() -> dict[str, str]:
    folders = (*PACKAGES, "tests", "benchmarks")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def inside(files: Sources, *packages: str) -> Iterator[tuple[str, str]]:
    return ((path, text) for path, text in files.items() if path.startswith(tuple(f"{name}/" for name in packages)))


def imports(path: str, text: str) -> set[str]:
    """Return the dotted names that a file imports, at its top or in functions; `from a import b` gives a and a.b."""
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
    """Return the last name of the called function: `softmax` for softmax(x), F.softmax(x) and scores.softmax(-1)."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def modules_of(files: Sources) -> dict[str, tuple[str, str]]:
    """Return the path and text of all modules by name; the __init__ of a package does not count."""
    return {module_name(path): (path, text) for path, text in inside(files, *PACKAGES) if "__init__" not in path}


def graph(files: Sources) -> dict[str, set[str]]:
    """Return the project's modules that each module imports; a package stands for the modules in its __init__."""
    modules = modules_of(files)
    packages = {module_name(path): text for path, text in inside(files, *PACKAGES) if "__init__" in path}
    edges = {}
    for name, (path, text) in modules.items():
        found = imports(path, text)
        for package in found & packages.keys():
            found |= imports(f"{package.replace('.', '/')}/__init__.py", packages[package])
        edges[name] = (found & modules.keys()) - {name}
    return edges


def reachable(edges: Mapping[str, Set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def modules_without_a_room(files: Sources) -> list[str]:
    """Return modules that HOUSE does not name, and names in HOUSE without a module."""
    there = modules_of(files).keys()
    return [
        *(f"{name} has no place in HOUSE" for name in sorted(there - ROOM_OF.keys())),
        *(f"{name} is in HOUSE and not there" for name in sorted(ROOM_OF.keys() - there)),
    ]


def imports_of_other_rooms(files: Sources) -> list[str]:
    """Return imports of rooms that the module's room does not name."""
    return [
        f"{name} imports {other}"
        for name, others in graph(files).items()
        if name in ROOM_OF
        for other in sorted(others & ROOM_OF.keys())
        if ROOM_OF[other] not in (ROOM_OF[name], *room_names(ROOM_OF[name]))
    ]


def imports_of_foreign_packages(files: Sources) -> list[str]:
    """Return imports of packages that the module's room does not name, or that only another module may import."""
    broken = []
    for name, (path, text) in modules_of(files).items():
        room = ROOM_OF.get(name)
        if room is None:
            continue
        roots = {found.partition(".")[0] for found in imports(path, text)}
        foreign = roots - set(PACKAGES) - sys.stdlib_module_names - {"tests", "benchmarks"}
        for package in sorted(foreign):
            owner = ONE_MODULE.get(package, {}).get(room, name)
            if package not in HOUSE[room].packages.split() or owner != name:
                broken.append(f"{name} imports {package}")
    return broken


def imports_of_tests_or_benchmarks(files: Sources) -> list[str]:
    forbidden = {"tests": {"benchmarks"}, "benchmarks": {"tests"}}
    return [
        f"{path} imports {name}"
        for path, text in files.items()
        if not path.startswith("tests/benchmarks/")
        for name in sorted(
            {found.partition(".")[0] for found in imports(path, text)}
            & forbidden.get(path.partition("/")[0], {"tests", "benchmarks"})
        )
    ]


def circles(files: Sources) -> list[str]:
    edges = graph(files)
    return [f"{name} reaches itself" for name in sorted(edges) if name in reachable(edges, name)]


def tensors_in_the_server(files: Sources) -> list[str]:
    """Return modules of server/ and allattn/, outside TENSOR_MODULES, that load torch or ONNX Runtime in any way."""
    edges = graph(files)
    modules = modules_of(files)
    direct = {
        name
        for name, (path, text) in modules.items()
        if {found.partition(".")[0] for found in imports(path, text)} & TENSOR_LIBRARIES
    }
    heavy = {name for name in edges if name.startswith("model.") and (reachable(edges, name) | {name}) & direct}
    return [
        f"{name} imports {other}"
        for name, (path, text) in modules.items()
        if name.startswith(("server.", "allattn.")) and name not in TENSOR_MODULES
        for other in sorted(imports(path, text) & (TENSOR_LIBRARIES | heavy))
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


def crowded_server(files: Sources) -> list[str]:
    direct = [path for path, _ in inside(files, "server") if path.count("/") == 1 and "__init__" not in path]
    return [f"server/ has {len(direct)} modules"] if len(direct) > MAX_MODULES_IN_SERVER else []


LONG = "x = 1\n" * (MAX_LINES + 1)
RULES: dict[Rule, list[tuple[Sources, str]]] = {  # each rule, with sources that break it once and the complaint
    modules_without_a_room: [
        ({"server/helpers.py": ""}, "server.helpers has no place in HOUSE"),
        ({"server/requests/engine.py": ""}, "server.requests.engine has no place in HOUSE"),
        ({"model/network.py": ""}, "model.network has no place in HOUSE"),
    ],
    imports_of_other_rooms: [
        ({"training/run.py": "from server.config import settings"}, "training.run imports server.config.settings"),
        ({"export/graph.py": "def f():\n    from training.run import main"}, "export.graph imports training.run"),
        ({"model/bundle.py": "import training.run"}, "model.bundle imports training.run"),
        ({"model/sampling/draw.py": "from model import bundle"}, "model.sampling.draw imports model.bundle"),
        ({"server/engine/engine.py": "import server.app"}, "server.engine.engine imports server.app"),
        ({"server/requests/plan.py": "from ..web import body"}, "server.requests.plan imports server.web.body"),
        (
            {"server/errors.py": "import importlib\nimportlib.import_module('server.app')"},
            "server.errors imports server.app",
        ),
        (
            {
                "server/config/__init__.py": "from server.config.settings import Settings",
                "server/protocol/json.py": "from server.config import Settings",
            },
            "server.protocol.json imports server.config.settings",
        ),
    ],
    imports_of_foreign_packages: [
        ({"model/spans.py": "import requests"}, "model.spans imports requests"),
        ({"model/spans.py": "def f():\n    import msgspec"}, "model.spans imports msgspec"),
        ({"model/spans.py": "from tqdm import tqdm"}, "model.spans imports tqdm"),
        ({"model/frozen/exported.py": "import onnxruntime"}, "model.frozen.exported imports onnxruntime"),
        ({"server/engine/engine.py": "from fastapi import Request"}, "server.engine.engine imports fastapi"),
        ({"server/requests/plan.py": "import pydantic"}, "server.requests.plan imports pydantic"),
    ],
    imports_of_tests_or_benchmarks: [
        ({"server/app.py": "from tests import oracle"}, "server/app.py imports tests"),
        ({"tests/test_speed.py": "import benchmarks.decode"}, "tests/test_speed.py imports benchmarks"),
        ({"benchmarks/decode.py": "import tests.oracle"}, "benchmarks/decode.py imports tests"),
    ],
    circles: [
        (
            {
                "training/loop.py": "import training.data",
                "training/data.py": "def f():\n    from training.loop import g",
            },
            "training.data reaches itself",
        )
    ],
    tensors_in_the_server: [
        ({"server/engine/engine.py": "import torch"}, "server.engine.engine imports torch"),
        ({"server/engine/pipe.py": "def f():\n    import onnxruntime"}, "server.engine.pipe imports onnxruntime"),
        (
            {
                "server/engine/engine.py": "from model.frozen.baked import bake",
                "model/frozen/baked.py": "from model import attention",
                "model/attention.py": "import torch",
            },
            "server.engine.engine imports model.frozen.baked",
        ),
    ],
    misplaced_softmax: [
        ({"model/spans.py": "import torch\ntorch.softmax(x, -1)"}, "model/spans.py:2 calls softmax"),
        ({"model/frozen/baked.py": "scores.softmax(-1)"}, "model/frozen/baked.py:1 calls softmax"),
        ({"model/frozen/baked.py": "nn.Softmax(-1)"}, "model/frozen/baked.py:1 calls softmax"),
        ({"model/spans.py": "log_softmax(x)"}, "model/spans.py:1 calls log_softmax"),
        (
            {"model/spans.py": "F.scaled_dot_product_attention(q, k, v)"},
            "model/spans.py:1 calls scaled_dot_product_attention",
        ),
    ],
    long_files: [({"server/app.py": LONG}, f"server/app.py has {MAX_LINES + 1} lines")],
    crowded_server: [({"server/one.py": "", "server/more.py": ""}, "server/ has 9 modules")],
}
NAMES = [getattr(rule, "__name__", "") for rule in RULES]
ALLOWED = {  # sources about which no rule complains
    **{f"{name.replace('.', '/')}.py": "" for name in ROOM_OF},
    "model/tokenizer.py": "import json\nimport tokenizers\nfrom tqdm import tqdm\nfrom model.config import ModelConfig",
    "model/attention.py": "import torch\ntorch.softmax(scores, -1)",
    "model/frozen/onnx_graphs.py": "import onnxruntime",
    "model/frozen/baked.py": "import torch.nn.functional as F\nF.log_softmax(logits, -1)",
    "training/loop.py": "x = 1\n" * MAX_LINES,
    "server/engine/runner.py": "import torch\nfrom model.frozen.baked import load_baked",
    "server/engine/process.py": "def main():\n    from server.engine import engine, runner",
    "server/__main__.py": "import uvicorn\nfrom server.app import create_app",
    "tests/test_x.py": "import server.app\nimport training.run",
    "tests/benchmarks/test_load.py": "import benchmarks.load",
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


def test_a_module_that_is_gone_is_missed() -> None:
    files = {path: text for path, text in ALLOWED.items() if path != "server/errors.py"}
    assert modules_without_a_room(files) == ["server.errors is in HOUSE and not there"]


def test_a_room_imports_rooms_above_it_only() -> None:
    above: list[str] = []
    for room in HOUSE:
        assert set(room_names(room)) <= set(above), room
        above.append(room)


def test_the_walk_sees_the_imports_that_are_really_there() -> None:
    files = sources()
    layer = "model/network/layer.py"
    assert {"torch", "model.attention", "model.config"} <= imports(layer, files[layer])
    assert "model.attention" in graph(files)["model.network.layer"]
    assert "server.config.settings" in graph(files)["server.__main__"]
    for package in PACKAGES:
        seen = [path for path, _ in inside(files, package)]
        assert len(seen) == len(list((ROOT / package).rglob("*.py")))
    assert "softmax" in {called(n) for n in ast.walk(ast.parse(files["model/attention.py"])) if isinstance(n, ast.Call)}


def loaded_tensor_libraries(module: str) -> set[str]:
    """Return the tensor libraries that a new interpreter has loaded after it imports `module`."""
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & TENSOR_LIBRARIES


@pytest.mark.parametrize(
    "module",
    ["model.artefact", "server.engine.scheduler", "server.engine.engine", "server.__main__", "allattn.generate"],
)
def test_a_module_that_may_not_wait_for_torch_loads_none(module: str) -> None:
    assert loaded_tensor_libraries(module) == set()


def test_a_tensor_library_that_is_loaded_would_be_noticed() -> None:
    assert loaded_tensor_libraries("model.attention") == {"torch"}
