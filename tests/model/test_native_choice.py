"""Tests of when the native step serves a bundle, and of the messages if it cannot."""

from pathlib import Path

import pytest
import torch

from model.backends import LoadOptions, chosen
from model.bundle import save_bundle
from model.config import ModelConfig
from model.frozen.loading import load_model
from model.frozen.native import build
from model.network.network import AllAttentionLM
from model.tokenizer import BytesTokenizer
from server.config import ConfigError, Settings
from server.served_model import open_model
from tests.support.artefacts import artefact_of, bundle_of


@pytest.fixture
def narrow_bundle(tmp_path: Path) -> Path:
    """Return a bundle whose width is not a multiple of 16, which the native step does not support."""
    config = ModelConfig(vocab_size=256, num_layers=1, width=24, num_heads=2, num_persistent=4, max_span=16)
    torch.manual_seed(0)
    tensors = {name: tensor.numpy() for name, tensor in AllAttentionLM(config).state_dict().items()}
    save_bundle(
        tmp_path / "narrow", config=config, tokenizer=BytesTokenizer(), tensors=tensors, card="# narrow", training={}
    )
    return tmp_path / "narrow"


def test_auto_is_native_on_a_cpu_where_the_library_is_built(monkeypatch, tmp_path):
    build.build()
    assert chosen(LoadOptions(device="cpu"), kind=None).name == "native"
    assert load_model(bundle_of(), LoadOptions(device="cpu", num_threads=1)).backend == "native"
    assert chosen(LoadOptions(device="cuda"), kind=None).name == "torch"
    monkeypatch.setattr(build, "library_path", lambda: tmp_path / "not-there.so")
    assert chosen(LoadOptions(device="cpu"), kind=None).name == "torch"


def test_auto_is_torch_where_there_is_a_gpu(monkeypatch, tmp_path):
    device = tmp_path / "nvidiactl"
    monkeypatch.setattr(build, "NVIDIA_DEVICE", device)
    assert chosen(LoadOptions(), kind=None).name == "native"
    device.touch()
    assert chosen(LoadOptions(), kind=None).name == "torch"
    assert chosen(LoadOptions(device="cpu"), kind=None).name == "native"


def test_auto_goes_on_with_torch_and_says_why_if_the_model_does_not_fit(narrow_bundle, caplog):
    assert load_model(narrow_bundle, LoadOptions(device="cpu")).backend == "torch"
    assert "width 24 is not supported by the native step" in caplog.text
    assert "the backend torch serves instead" in caplog.text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"backend": "native"}, "width 24 is not supported by the native step; allowed: multiples of 16"),
        ({"backend": "native", "device": "cuda"}, "the native backend computes on the CPU; allowed: auto, cpu"),
    ],
)
def test_what_native_cannot_do_is_an_error_where_it_was_asked_for(narrow_bundle, options, complaint):
    with pytest.raises(build.NativeError, match=complaint):
        load_model(narrow_bundle, LoadOptions(**options))


def test_an_unknown_variant_is_an_error_that_names_those_there_are():
    with pytest.raises(build.NativeError, match="'sse9' cannot run here; allowed: auto, generic"):
        load_model(bundle_of(), LoadOptions(backend="native", native_variant="sse9"))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_weights_are_a_setting_of_the_native_backend(weights):
    options = LoadOptions(device="cpu", weights=weights, num_threads=1)
    assert load_model(bundle_of(), options).weights == weights
    open_model(Settings(bundle=bundle_of(), weights=weights, device="cpu"))


@pytest.mark.parametrize("folder", [bundle_of, lambda: artefact_of("masked", "torchscript")])
def test_weights_that_a_backend_does_not_have_are_refused(folder):
    backend = "torch" if folder is bundle_of else "auto"
    with pytest.raises(ConfigError, match=r"weights = 'int8', but backend = .* allowed: auto, or backend = native"):
        open_model(Settings(bundle=folder(), backend=backend, weights="int8"))
