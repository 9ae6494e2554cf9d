"""A row in the table of backends is all that a server needs to know about a backend."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from model.backends import BACKENDS, Backend, backends_for, names
from server.config import ConfigError, Settings, load_settings
from server.served_model import open_model
from tests.support.artefacts import bundle_of
from tests.support.hand_made import write_artefact
from tests.support.live_server import live_server

ROOT = Path(__file__).parents[3]
DUMMY = Backend("dummy", runs="bundle", loader="tests.support.dummy_backend:load_dummy")
KIND = Backend("kind", runs="artefact", loader="nowhere:load")


@pytest.fixture
def in_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Add the row in the API process and in the engine process: Python imports sitecustomize when it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        f"from model.backends import BACKENDS, Backend\nrow = {DUMMY!r}\nBACKENDS[row.name] = row\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")


def test_a_new_backend_is_in_the_help_of_the_server(in_every_process):
    command = [sys.executable, "-m", "server", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"--backend auto|{'|'.join(BACKENDS)}|dummy" in done.stdout


@pytest.mark.slow
def test_a_new_backend_serves_a_model(in_every_process):
    with live_server(bundle_of(), "--backend", "dummy", "--num-rows", "2") as url:
        assert httpx.get(f"{url}/info").json()["engine"]["backend"] == "dummy"
        asked = {"inputs": "C", "parameters": {"max_new_tokens": 3, "details": True}}
        assert httpx.post(f"{url}/generate", json=asked).json()["details"]["generated_tokens"] == 3


def test_a_new_backend_is_allowed_where_its_row_says(monkeypatch, tmp_path):
    monkeypatch.setitem(BACKENDS, "dummy", DUMMY)
    monkeypatch.setitem(BACKENDS, "kind", KIND)
    assert names(backends_for(None)) == ("native", "torch", "dummy")
    assert names(backends_for("kind")) == ("kind",)
    settings = load_settings(["--bundle", str(bundle_of()), "--backend", "dummy"], environ={})
    assert open_model(settings)[1].backend == "dummy"
    assert open_model(Settings(bundle=bundle_of()))[1].backend == "auto"
    with pytest.raises(ConfigError, match=r"is a bundle; allowed: auto, native, torch, dummy; python -m export\.run"):
        open_model(Settings(bundle=bundle_of(), backend="kind"))
    folder = write_artefact(tmp_path / "artefact", kind="kind")
    assert open_model(Settings(bundle=folder))[1].backend == "kind"
    with pytest.raises(ConfigError, match="is an artefact for kind; allowed: auto, kind"):
        open_model(Settings(bundle=folder, backend="dummy"))


def test_the_table_loads_no_tensor_library():
    code = "import sys, model.backends; print({'torch', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_names_a_loader_that_is_there(name):
    assert callable(BACKENDS[name].import_loader())
