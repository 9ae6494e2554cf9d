"""Whether a folder is a whole artefact: each kind of damage is named, with the file and what to do about it.

Most artefacts here hold no model (see hand_made.py), since a folder is checked before a graph is opened. Damage that
only shows in the graphs must be found when they are loaded.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.artefact import ArtefactError, check_replaceable, is_artefact, open_artefact, write_manifest
from model.backends import LoadOptions
from model.bundle import open_bundle
from model.frozen.exported import load_exported
from server.__main__ import main
from tests.support.artefacts import artefact_of, bundle_of
from tests.support.hand_made import onnx_graph, sealed, stamped, write_artefact
from tests.support.live_server import refused_server

AGAIN = "export the bundle again"
OTHER = "0" * 64  # the hash of another model
deprecated = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # of calls in the tests themselves


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_artefact(tmp_path / "artefact", graph=onnx_graph(open_bundle(bundle_of()).hash))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest, as a person with an editor would."""
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def load(folder: Path) -> None:
    load_exported(open_artefact(folder), LoadOptions(device="cpu", num_threads=1))


def flip(file: Path) -> None:
    """Change one bit in the middle, which keeps the size."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_whole_artefact_opens_and_says_what_it_holds(folder):
    artefact = open_artefact(folder)
    assert is_artefact(folder)
    assert artefact.manifest.model_hash == artefact.bundle.hash == open_bundle(bundle_of()).hash
    assert set(artefact.manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert not is_artefact(bundle_of())


DAMAGE = {
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is cut short: it has"),
    "empty": (lambda file: file.write_bytes(b""), "is cut short: it has 0 bytes"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"\n"), "is too long: it has"),
    "one bit": (flip, "was changed: its sha256 is"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", ["decode.onnx", "logits.onnx", "tokenizer.json", "config.json", "README.md"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found_and_the_message_says_what_to_do(folder, name, damage, capsys):
    harm, complaint = DAMAGE[damage]
    harm(folder / name)
    with pytest.raises(ArtefactError) as caught:
        open_artefact(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / name} {complaint}")
    assert message.endswith(f"copy the artefact again, or {AGAIN}")
    if damage == "one bit" and name.endswith(".onnx"):  # only the engine process reads graphs
        ended = refused_server(folder)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.splitlines()[-1] == f"allattn: {message}"
    else:
        assert main(["--bundle", str(folder), "--port", "0"]) == 1
        assert capsys.readouterr().err == f"allattn: {message}\n"


MANIFESTS = {
    "empty": ("", "manifest.json is not valid JSON"),
    "cut short": ('{"format": 1, "kind": "on', "manifest.json is not valid JSON"),
    "no UTF-8": (b"\xff\xfe\x00", "manifest.json is not valid JSON"),
    "a list": ("[1]", "manifest.json: format is None and this version reads 1"),
    "a number": ("1", "manifest.json: format is None and this version reads 1"),
    "no format": ("{}", "manifest.json: format is None and this version reads 1"),
    "a later format": ('{"format": 2}', "manifest.json: format is 2 and this version reads 1"),
    "format as text": ('{"format": "1"}', "manifest.json: format is '1' and this version reads 1"),
    "nothing else": ('{"format": 1}', "manifest.json: kind: Field required; weights: Field required"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_none_is_refused(folder, case, capsys):
    content, complaint = MANIFESTS[case]
    (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtefactError) as caught:
        open_artefact(folder)
    assert str(caught.value).startswith(f"{folder}/{complaint}")
    assert str(caught.value).endswith(AGAIN)
    assert main(["--bundle", str(folder), "--port", "0"]) == 1
    assert capsys.readouterr().err == f"allattn: {caught.value}\n"


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("kind", "tensorrt", "kind: Input should be 'torchscript', 'onnx' or 'pt2'"),
        ("dtype", "int8", "dtype: Input should be 'float32' or 'float16'"),
        ("device", "tpu", "device: Input should be 'cpu' or 'cuda'"),
        ("model_hash", 7, "model_hash: Input should be a valid string"),
        ("opset", "twenty", "opset: Input should be a valid integer"),
        ("graphs", {"encode": {"file": "x", "inputs": [], "outputs": []}}, "graphs.encode.[key]: "),
        ("graphs", {"decode": {"file": "x", "inputs": [{"name": "tokens"}], "outputs": []}}, "inputs.0.dtype: Field"),
        ("rings", [[{"num_heads": 1}]], "rings.0.0.num_slots: Field required"),
        ("spans", [["far"]], "spans.0.0: Input should be a valid integer"),
        ("files", {"decode.onnx": "there"}, "files.decode.onnx: Input should be"),
        ("licence", "none", "licence: Extra inputs are not permitted"),
    ],
)
def test_fields_of_wrong_types_are_named(folder, field, value, complaint):
    edit(folder, lambda document: document.update({field: value}))
    with pytest.raises(ArtefactError) as caught:
        open_artefact(folder)
    assert str(caught.value).startswith(f"{folder}/manifest.json: ")
    assert complaint in str(caught.value)
    assert str(caught.value).endswith(AGAIN)


@pytest.mark.parametrize("name", ["decode", "extend", "logits"])
def test_a_manifest_without_one_of_the_graphs_is_refused(folder, name):
    edit(folder, lambda document: document["graphs"].pop(name))
    with pytest.raises(ArtefactError, match=rf"manifest\.json: .*{name}.*{AGAIN}"):
        open_artefact(folder)


def test_a_graph_whose_file_the_manifest_does_not_list_is_refused(folder):
    (folder / "spare.onnx").write_bytes(b"never checked")
    edit(folder, lambda document: document["graphs"]["extend"].update(file="spare.onnx"))
    with pytest.raises(ArtefactError, match=rf"manifest\.json: .*spare\.onnx.*{AGAIN}"):
        open_artefact(folder)


def test_without_its_manifest_it_is_taken_for_a_bundle_that_lacks_its_weights(folder, capsys):
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"manifest\.json: No such file or directory; an artefact is what export"):
        open_artefact(folder)
    assert main(["--bundle", str(folder), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"allattn: {folder} lacks model.safetensors; ")
    assert error.count("\n") == 1


def test_files_of_two_models_in_one_folder_are_found(folder, tmp_path, capsys):
    hashes = [open_bundle(bundle_of(kind)).hash for kind in ("masked", "words")]
    other = write_artefact(tmp_path / "other", bundle="words")
    for name in ("config.json", "tokenizer.json"):  # both are valid, but of another model
        shutil.copy(other / name, folder / name)
    sealed(folder)
    with pytest.raises(ArtefactError) as caught:
        open_artefact(folder)
    assert str(caught.value) == (
        f"{folder}/manifest.json: model_hash is {hashes[0]}, config.json is of the model {hashes[1]}; "
        f"files of two models lie in one folder: {AGAIN}"
    )
    assert main(["--bundle", str(folder), "--port", "0"]) == 1
    assert capsys.readouterr().err == f"allattn: {caught.value}\n"


def test_a_manifest_that_names_another_model_is_found(folder):
    sealed(folder, model_hash=OTHER)
    with pytest.raises(ArtefactError, match=f"model_hash is {OTHER}, config.json is of the model"):
        open_artefact(folder)


@pytest.mark.parametrize(("said", "shown"), [(OTHER, OTHER), (None, "(none named)")])
def test_a_graph_of_another_model_is_found_by_what_it_says_itself(tmp_path, said, shown):
    folder = write_artefact(tmp_path / "artefact", graph=onnx_graph(said))
    with pytest.raises(ArtefactError) as caught:
        load(folder)
    expected = open_bundle(bundle_of()).hash
    assert str(caught.value) == (
        f"{folder}/decode.onnx is a graph of the model {shown}, not of {expected}; export the bundle again"
    )


@pytest.mark.parametrize("name", ["extend", "logits"])
def test_one_graph_of_another_model_among_right_ones_is_found(folder, name):
    (folder / f"{name}.onnx").write_bytes(onnx_graph(OTHER))
    with pytest.raises(ArtefactError, match=rf"{name}\.onnx is a graph of the model 0000"):
        load(sealed(folder))


@deprecated
def test_a_script_of_another_model_is_found_by_what_it_says_itself(tmp_path):
    folder = tmp_path / "artefact"
    shutil.copytree(artefact_of("masked", "torchscript"), folder)
    load(folder)
    shutil.copy(artefact_of("words", "torchscript") / "model.pt", folder / "model.pt")
    with pytest.raises(ArtefactError, match=r"model\.pt is a graph of the model [0-9a-f]{64}, not of"):
        load(sealed(folder))
    torch.jit.save(torch.jit.load(folder / "model.pt"), folder / "model.pt")
    with pytest.raises(ArtefactError, match=r"model\.pt is a graph of the model \(none named\), not of"):
        load(sealed(folder))


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2"])
def test_garbage_in_place_of_a_graph_is_found_though_its_hash_is_right(tmp_path, kind):
    folder = write_artefact(tmp_path / "artefact", kind=kind, graph=b"\x08\x07garbage" * 99)
    with pytest.raises(ArtefactError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder}/{'model.pt' if kind == 'torchscript' else f'decode.{kind}'} cannot")
    assert str(caught.value).endswith(AGAIN)


@deprecated
def test_a_script_that_is_no_model_is_found(tmp_path):
    folder = write_artefact(tmp_path / "artefact", kind="torchscript")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "model.pt")
    with pytest.raises(ArtefactError, match=r"model\.pt cannot be loaded by torch .*decode"):
        load(sealed(folder))


def test_an_opset_that_onnxruntime_does_not_know_is_found(tmp_path):
    graph = onnx_graph(open_bundle(bundle_of()).hash, opset=99)
    folder = write_artefact(tmp_path / "artefact", graph=graph)
    with pytest.raises(ArtefactError, match=r"decode\.onnx cannot be loaded by onnxruntime .*opset.*export the bundle"):
        load(sealed(folder, opset=99))


@pytest.mark.slow
def test_real_graphs_of_another_opset_or_of_another_model_are_found(tmp_path):
    folder = tmp_path / "artefact"
    shutil.copytree(artefact_of("masked", "onnx"), folder)
    load(folder)
    shutil.copy(artefact_of("words", "onnx") / "extend.onnx", folder / "extend.onnx")
    with pytest.raises(ArtefactError, match=r"extend\.onnx is a graph of the model [0-9a-f]{64}, not of"):
        load(sealed(folder))
    shutil.copy(artefact_of("masked", "onnx") / "extend.onnx", folder / "extend.onnx")
    stamped(folder / "extend.onnx", 99)
    with pytest.raises(ArtefactError, match=r"extend\.onnx cannot be loaded by onnxruntime .*opset"):
        load(sealed(folder, opset=99))


def test_only_what_is_an_artefact_and_no_more_may_be_replaced(folder, tmp_path):
    for harmless in (tmp_path / "nowhere", folder):
        check_replaceable(harmless)
    empty = tmp_path / "empty"
    empty.mkdir()
    check_replaceable(empty)
    (empty / "thesis.txt").write_text("ten years")
    with pytest.raises(ArtefactError, match=r"is not an artefact \(it has thesis\.txt\); it was left as it is"):
        check_replaceable(empty)
    (folder / "thesis.txt").write_text("ten years")
    with pytest.raises(ArtefactError, match=r"is not an artefact \(it has thesis\.txt\); it was left as it is"):
        check_replaceable(folder)
    with pytest.raises(ArtefactError, match="is a file; an artefact is a folder: choose another place"):
        check_replaceable(folder / "thesis.txt")
    with pytest.raises(ArtefactError, match=r"is not an artefact \(it has .*model\.safetensors"):
        check_replaceable(bundle_of())


def test_a_manifest_covers_every_other_file(tmp_path, folder):
    (folder / "late.bin").write_bytes(b"x")
    facts = open_artefact(folder).manifest.model_dump(exclude={"format", "ring_layout", "files"})
    manifest = write_manifest(folder, facts=facts)
    assert manifest.files["late.bin"].num_bytes == 1
    assert open_artefact(folder).manifest == manifest
