"""Tests of `export.run` and `export.verify`: the files they write, their refusals, and the folder after a refusal."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from export import run, verify
from model.artefact import open_artefact
from model.bundle import open_bundle
from tests import oracle
from tests.support.agreement_bundle import SPANS
from tests.support.artefacts import artefact_of, bundle_of, text_file
from tests.support.hand_made import sealed, write_artefact


@pytest.fixture
def text() -> list[str]:
    return ["--text", str(text_file())]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on standard error."""
    error = capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_an_artefact_is_written_and_the_way_to_serve_it_is_said(tmp_path, capsys, text):
    out = tmp_path / "deep" / "out"
    assert run.main([str(bundle_of()), str(out), "--format", "torchscript", *text]) == 0
    artefact = open_artefact(out)
    assert artefact.manifest.kind == "torchscript"
    assert artefact.manifest.opset is None
    assert artefact.manifest.versions.keys() == {"allattn", "torch"}
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "tokenizer.json", "README.md"),
        *("model.pt", "manifest.json"),
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    said = capsys.readouterr().out
    assert f"serve it with: python -m server --bundle {out}" in said
    assert "logits differ by at most" in said
    for graph in ("decode", "extend", "logits"):
        assert f"  {graph:8} model.pt, " in said


def test_an_artefact_takes_the_place_of_another_one(tmp_path, text):
    out = write_artefact(tmp_path / "out")  # an ONNX artefact, with files that the new artefact does not have
    assert (
        run.main([str(bundle_of("words")), str(out), "--format", "torchscript", "--text", str(text_file("words"))]) == 0
    )
    assert open_artefact(out).bundle.hash == open_bundle(bundle_of("words")).hash
    assert not list(out.glob("*.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_spans_and_rings_in_the_manifest_are_those_of_the_model():
    document = json.loads((artefact_of("masked", "torchscript") / "manifest.json").read_text())
    for layer, spans in zip(document["spans"], SPANS, strict=True):
        for reach, span in zip(layer, spans, strict=True):
            masks = [oracle.span_mask(d, span=span, max_span=160, span_ramp=8) for d in range(1, 161)]
            assert reach - np.count_nonzero(masks) in (0, 1)  # 1 if a span ends a little later in fp32
    assert document["rings"][0] == [{"num_heads": h, "num_slots": s} for h, s in ((2, 24), (1, 80), (1, 160))]
    assert "slot p % num_slots" in document["ring_layout"]


@pytest.mark.parametrize("format", ["onnx-int2", "tensorrt", ""])
def test_a_format_that_is_none_is_refused_with_those_that_are(tmp_path, capsys, format):
    with pytest.raises(SystemExit) as caught:
        run.main([str(bundle_of()), str(tmp_path / "out"), "--format", format])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    for known in ("torchscript", "onnx", "onnx-fp16", "onnx-int8", "onnx-int4", "pt2"):
        assert known in error
    assert not list(tmp_path.iterdir())


def test_a_format_must_be_given(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main([str(bundle_of()), str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "--format" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(tmp_path, capsys, text, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = [str(bundle_of()), str(tmp_path / "out"), "--format", "torchscript", "--device", "cuda", *text]
    assert run.main(argv) == 1
    assert error_of(capsys) == "error: device = 'cuda', but torch sees no CUDA device; allowed here: cpu"
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_not_there_is_refused(tmp_path, capsys, text):
    assert run.main([str(tmp_path / "nowhere"), str(tmp_path / "out"), "--format", "torchscript", *text]) == 1
    assert "nowhere" in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_an_artefact_in_place_of_the_bundle_is_refused(tmp_path, capsys, text):
    artefact = artefact_of("masked", "torchscript")
    assert run.main([str(artefact), str(tmp_path / "out"), "--format", "torchscript", *text]) == 1
    assert f"{artefact} lacks model.safetensors" in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_a_place_that_holds_something_else_is_left_as_it_is(tmp_path, capsys, text):
    places = [tmp_path / name for name in ("notes", "bundle", "extra", "later")]
    places[0].mkdir()
    (places[0] / "thesis.txt").write_text("ten years")
    shutil.copytree(bundle_of(), places[1])
    write_artefact(places[2])
    (places[2] / "thesis.txt").write_text("ten years")
    write_artefact(places[3])
    (places[3] / "manifest.json").write_text('{"format": 2}')
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    for place, complaint in zip(
        (*places, tmp_path / "file", tmp_path / "file" / "out"),
        ("thesis.txt", "model.safetensors", "thesis.txt", "format is 2", "is a file", "file"),
        strict=True,
    ):
        assert run.main([str(bundle_of()), str(place), "--format", "torchscript", *text]) == 1, place
        error = error_of(capsys)
        assert complaint in error
        assert str(place) in error or place.name == "out"
        assert contents(tmp_path) == before


TEXTS = {
    "missing": (None, "No such file or directory"),
    "latin-1": ("précisément".encode("latin-1"), "can't decode byte 0xe9"),
    "latin-1, beyond what is read": ("précisément ".encode("latin-1") * 99, "can't decode byte 0xe9"),
    "cut": ("précisé".encode()[:-1], "unexpected end of data"),
    "empty": (b"", "has 0 tokens; at least 2 are needed"),
    "one token": (b"a", "has 1 tokens; at least 2 are needed"),
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_text_that_cannot_be_scored_is_refused(tmp_path, capsys, command, case):
    content, complaint = TEXTS[case]
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    common = ["--text", str(text), "--num-bytes", "100"]
    if command == "run":
        assert run.main([str(bundle_of()), str(tmp_path / "out"), "--format", "torchscript", *common]) == 1
    else:
        assert verify.main([str(artefact_of("masked", "torchscript")), str(bundle_of()), *common]) == 1
    error = error_of(capsys)
    assert str(text) in error
    assert complaint in error
    assert [path.name for path in tmp_path.iterdir() if path != text] == []


def test_a_folder_is_no_text(tmp_path, capsys):
    argv = [str(artefact_of("masked", "torchscript")), str(bundle_of()), "--text", str(tmp_path)]
    assert verify.main(argv) == 1
    assert f"text {tmp_path} cannot be used: " in error_of(capsys)


@pytest.mark.parametrize("num_bytes", ["-1", "0", "many"])
def test_a_number_of_bytes_that_is_none_is_refused(tmp_path, capsys, text, num_bytes):
    argv = [str(bundle_of()), str(tmp_path / "out"), "--format", "torchscript", *text, "--num-bytes", num_bytes]
    for call in (lambda: run.main(argv), lambda: verify.main([*argv[:2], *argv[4:]])):
        try:
            status = call()
        except SystemExit as error:  # argparse raises it
            status = error.code
        assert status != 0
        assert "--num-bytes" in capsys.readouterr().err


def test_another_bundle_than_the_artefact_s_own_is_refused(capsys, text):
    artefact, other = artefact_of("masked", "torchscript"), bundle_of("words")
    assert verify.main([str(artefact), str(other), *text]) == 1
    assert error_of(capsys) == (
        f"error: {artefact} was made from the model {open_bundle(bundle_of()).hash}, {other} is "
        f"{open_bundle(other).hash}; verify it against the bundle that it was made from"
    )


@pytest.mark.parametrize("missing", ["artefact", "bundle"])
def test_what_is_not_there_cannot_be_verified(tmp_path, capsys, missing, text):
    places = {"artefact": artefact_of("masked", "torchscript"), "bundle": bundle_of(), missing: tmp_path / "nowhere"}
    assert verify.main([str(places["artefact"]), str(places["bundle"]), *text]) == 1
    assert "nowhere" in error_of(capsys)


def test_an_artefact_that_computes_something_else_fails_with_status_1(tmp_path, capsys, text, monkeypatch):
    """All files match their hashes, but the graphs come from a model without the factor sqrt(N)."""
    load = run.load_baked

    def wrong(bundle, *, dtype, device):
        model = load(bundle, dtype=dtype, device=device)
        model.layers[0].persistent_value.div_(6**0.5)
        return model

    monkeypatch.setattr(run, "load_baked", wrong)
    monkeypatch.setattr(run, "verify", lambda *_, **__: verify.Verified(*range(8)))
    out = tmp_path / "out"
    assert run.main([str(bundle_of()), str(out), "--format", "torchscript", *text]) == 0
    capsys.readouterr()
    assert verify.main([str(out), str(bundle_of()), *text]) == 1
    assert "error: the artefact's logits differ from the bundle's by " in error_of(capsys)


def test_graphs_that_are_garbage_cannot_be_verified(tmp_path, capsys, text):
    out = sealed(write_artefact(tmp_path / "out", graph=b"garbage"))
    assert verify.main([str(out), str(bundle_of()), *text]) == 1
    assert error_of(capsys).startswith(f"error: {out}/decode.onnx cannot be loaded by onnxruntime ")


def test_formats_name_what_is_missing_to_write_them(tmp_path, capsys, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "export.to_onnx", None)  # as if onnx were not installed
    assert run.main([str(bundle_of()), str(tmp_path / "out"), "--format", "onnx", *text]) == 1
    assert "pip install 'allattn[export,onnx]'" in error_of(capsys)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.main([str(bundle_of()), str(tmp_path / "out"), "--format", "pt2", *text]) == 1
    assert error_of(capsys) == ("error: format pt2 needs a C++ compiler, one of c++, g++, clang++: apt-get install g++")
    assert not list(tmp_path.iterdir())
