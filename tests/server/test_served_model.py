"""Tests of the checks that the API process and the engine process make on a model, and of their refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model.bundle import WEIGHTS, BundleError, inspect_bundle, open_bundle
from server.__main__ import main
from server.config import EngineOptions, Settings
from server.engine.runner import ModelRunner
from server.served_model import open_model
from tests.support.artefacts import bundle_of
from tests.support.hand_made import write_artefact
from tests.support.live_server import refused_server


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of(), tmp_path / "bundle"))


def spoil(file: Path) -> None:
    """Overwrite a file with other bytes of the same number."""
    file.write_bytes(bytes(file.stat().st_size))


def test_opening_a_model_reads_no_weights_and_trusts_the_hash_of_the_config(bundle):
    expected = open_bundle(bundle)
    spoil(bundle / WEIGHTS)
    found, _ = open_model(Settings(bundle=bundle))
    assert (found.hash, found.config, found.training) == (expected.hash, expected.config, expected.training)


def test_opening_an_artefact_reads_no_graphs(tmp_path):
    folder = write_artefact(tmp_path / "artefact")
    spoil(folder / "decode.onnx")
    found, settings = open_model(Settings(bundle=folder))
    assert (found.hash, settings.backend) == (open_bundle(bundle_of()).hash, "onnx")


def test_weights_that_were_changed_are_found_by_whoever_loads_them(bundle):
    spoil(bundle / WEIGHTS)
    for load in (open_bundle, lambda path: ModelRunner.load(EngineOptions(bundle=path, device="cpu"))):
        with pytest.raises(BundleError, match=r"model\.safetensors was changed or cut short: its sha256 is"):
            load(bundle)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(Path.unlink, "lacks model.safetensors; a bundle has", id="missing"),
        pytest.param(lambda file: file.write_bytes(b"no"), "is cut short: it has 2 bytes", id="cut short"),
    ],
)
def test_weights_that_are_missing_or_cut_short_are_told_before_anything_starts(
    bundle: Path, damage: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(bundle / WEIGHTS)
    assert main(["--bundle", str(bundle), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("allattn: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_server_over_changed_weights_says_so_in_its_last_line_and_ends_with_status_1(bundle):
    spoil(bundle / WEIGHTS)
    with pytest.raises(BundleError) as caught:
        inspect_bundle(bundle).tensors()
    ended = refused_server(bundle)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1] == f"allattn: {caught.value}"
    assert "Traceback" not in ended.stderr
    assert '"trace"' not in ended.stderr  # an expected refusal: the message is enough, no traceback
