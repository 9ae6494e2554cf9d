"""Artefacts without a model, made in milliseconds, for tests of the checks that come before any computation."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from model.artefact import GRAPHS, Manifest, write_manifest
from model.bundle import DESCRIPTION, open_bundle
from tests.support.artefacts import bundle_of


def write_artefact(
    folder: Path,
    *,
    kind: str = "onnx",
    dtype: str = "float32",
    device: str = "cpu",
    graph: bytes = b"no graph",
    bundle: str = "masked",
) -> Path:
    """Write an artefact of a small bundle with the same bytes for every graph. `device`: where it was made."""
    folder.mkdir()
    model = open_bundle(bundle_of(bundle))
    for name in DESCRIPTION:
        (folder / name).write_bytes((model.path / name).read_bytes())
    for name in GRAPHS:
        (folder / file_of(name, kind)).write_bytes(graph)
    write_manifest(
        folder,
        facts={
            "kind": kind,
            "weights": dtype,
            "dtype": dtype,
            "device": None if kind == "onnx" else device,
            "model_hash": model.hash,
            "opset": 20 if kind == "onnx" else None,
            "versions": {},
            "graphs": {name: {"file": file_of(name, kind), "inputs": [], "outputs": []} for name in GRAPHS},
            "rings": [],
            "spans": [],
            "verified": {},
        },
    )
    return folder


def file_of(graph: str, kind: str) -> str:
    """Return the name of a graph's file."""
    return "model.pt" if kind == "torchscript" else f"{graph}.{kind}"


def sealed(folder: Path, **changes: object) -> Path:
    """Write the manifest again with the hashes of the present files; `changes` replace its fields."""
    known = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    facts = known.model_dump(exclude={"format", "ring_layout", "files"})
    write_manifest(folder, facts={**facts, **changes})
    return folder


def onnx_graph(model_hash: str | None, *, opset: int = 20) -> bytes:
    """Return an ONNX graph that names the model it was made from."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if model_hash is not None:
        helper.set_model_props(model, {"model_hash": model_hash})
    return model.SerializeToString()


def stamped(file: Path, opset: int) -> None:
    """Change the opset that the file of an ONNX graph names."""
    proto = onnx.load(file, load_external_data=False)
    proto.opset_import[0].version = opset
    file.write_bytes(proto.SerializeToString())
