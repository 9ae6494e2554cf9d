"""Tests of `python -m server` over an artefact that is broken or does not fit the settings: it refuses to start."""

import shutil
import subprocess
from itertools import product

import pytest

from model.bundle import open_bundle
from server.__main__ import main
from server.config import Settings
from server.served_model import open_model
from tests.support.artefacts import artefact_of, bundle_of
from tests.support.hand_made import onnx_graph, sealed, write_artefact
from tests.support.live_server import refused_server

KINDS = ("torchscript", "onnx", "pt2")


@pytest.mark.parametrize("kind", ["torch", *KINDS])
def test_the_backend_is_what_the_folder_was_made_for(tmp_path, kind):
    folder = bundle_of() if kind == "torch" else write_artefact(tmp_path / "artefact", kind=kind)
    for backend in ("auto", kind):
        bundle, settings = open_model(Settings(bundle=folder, backend=backend))
        assert settings.backend == (backend if kind == "torch" else kind)  # for a bundle, the engine process decides
        assert bundle.hash == open_bundle(bundle_of()).hash


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the server's message about settings that do not fit; it ends with status 2 before anything starts."""
    assert main([*argv, "--port", "0"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.removeprefix("allattn: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("kind", "backend"), [pair for pair in product(KINDS, ("torch", *KINDS)) if len(set(pair)) == 2]
)
def test_another_backend_than_the_artefact_s_own_is_refused(tmp_path, capsys, kind, backend):
    folder = write_artefact(tmp_path / "artefact", kind=kind)
    assert complaint(capsys, "--bundle", str(folder), "--backend", backend) == (
        f"backend = '{backend}', but {folder} is an artefact for {kind}; allowed: auto, {kind}"
    )


@pytest.mark.parametrize("backend", KINDS)
def test_a_bundle_needs_an_export_before_another_backend_runs_it(capsys, backend):
    assert complaint(capsys, "--bundle", str(bundle_of()), "--backend", backend) == (
        f"backend = '{backend}', but {bundle_of()} is a bundle; allowed: auto, native, torch; "
        "python -m export.run makes artefacts of bundles"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_that_is_not_the_artefact_s_own_is_refused(tmp_path, capsys, dtype):
    own = {"bfloat16": "float32", "float32": "float16"}[dtype]
    folder = write_artefact(tmp_path / "artefact", dtype=own)
    assert complaint(capsys, "--bundle", str(folder), "--dtype", dtype) == (
        f"dtype = '{dtype}', but {folder} is an artefact for onnx with its state in {own}; leave dtype out"
    )
    open_model(Settings(bundle=folder))
    open_model(Settings(bundle=write_artefact(tmp_path / "full"), dtype="float32"))


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_provider_is_for_onnx_only(tmp_path, capsys, provider):
    folder = write_artefact(tmp_path / "artefact", kind="pt2")
    assert complaint(capsys, "--bundle", str(folder), "--provider", provider) == (
        f"provider = '{provider}' is for ONNX artefacts, but {folder} is an artefact for pt2; allowed: auto"
    )
    assert complaint(capsys, "--bundle", str(bundle_of()), "--provider", provider) == (
        f"provider = '{provider}' is for ONNX artefacts, but {bundle_of()} is a bundle; allowed: auto"
    )
    open_model(Settings(bundle=write_artefact(tmp_path / "onnx"), provider=provider))


def check_refusal(ended: subprocess.CompletedProcess[str], *said: str) -> None:
    assert ended.returncode == 1
    assert "allattn serves" not in ended.stdout
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("allattn: ")
    for part in said:
        assert part in last
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_server_never_starts_over_a_graph_that_is_garbage(tmp_path):
    folder = write_artefact(tmp_path / "artefact", graph=b"garbage")  # the file matches its hash
    check_refusal(refused_server(folder), f"{folder}/decode.onnx cannot be loaded by onnxruntime ")


@pytest.mark.slow
def test_a_server_never_starts_over_another_model_s_graph(tmp_path):
    folder = tmp_path / "artefact"
    shutil.copytree(artefact_of("masked", "torchscript"), folder)
    shutil.copy(artefact_of("words", "torchscript") / "model.pt", folder / "model.pt")
    check_refusal(refused_server(sealed(folder)), f"{folder}/model.pt is a graph of the model ")


@pytest.mark.slow
def test_a_server_never_starts_over_an_unknown_opset(tmp_path):
    graph = onnx_graph(open_bundle(bundle_of()).hash, opset=99)
    folder = sealed(write_artefact(tmp_path / "artefact", graph=graph), opset=99)
    check_refusal(refused_server(folder), f"{folder}/decode.onnx cannot be loaded by onnxruntime ", "pset 99")


@pytest.mark.slow
def test_a_server_never_starts_over_a_truncated_file(tmp_path):
    folder = write_artefact(tmp_path / "artefact")
    (folder / "logits.onnx").write_bytes(b"no")
    check_refusal(
        refused_server(folder), f"{folder}/logits.onnx is cut short: it has 2 bytes, manifest.json says 8; copy the"
    )


@pytest.mark.slow
def test_a_server_never_starts_over_graphs_that_cannot_compute(tmp_path):
    """The graphs load and belong to the right model, but do not compute steps."""
    folder = write_artefact(tmp_path / "artefact", graph=onnx_graph(open_bundle(bundle_of()).hash))
    ended = refused_server(folder, "--max-restarts", "0")
    assert ended.returncode == 1
    assert "allattn serves" not in ended.stdout


@pytest.mark.slow
def test_a_server_does_not_take_the_cpu_where_cuda_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = write_artefact(tmp_path / "artefact", graph=onnx_graph(open_bundle(bundle_of()).hash))
    check_refusal(refused_server(folder, "--provider", "cuda"), "provider = 'cuda', but ", "; allowed here: auto, cpu")
