"""Artefacts that hold no model, made in milliseconds: for all that is checked before a graph computes anything."""

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
    """An artefact of a small bundle with the same bytes for every graph; `device` is where it was made."""
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
    """Where a graph lies."""
    return "model.pt" if kind == "torchscript" else f"{graph}.{kind}"


def sealed(folder: Path, **changes: object) -> Path:
    """Write the manifest anew, so that it fits the files as they are now; `changes` are to its fields."""
    known = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    facts = known.model_dump(exclude={"format", "ring_layout", "files"})
    write_manifest(folder, facts={**facts, **changes})
    return folder


def onnx_graph(model_hash: str | None, *, opset: int = 20) -> bytes:
    """A graph of ONNX that says which model it is of."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if model_hash is not None:
        helper.set_model_props(model, {"model_hash": model_hash})
    return model.SerializeToString()


def stamped(file: Path, opset: int) -> None:
    """Let a graph of ONNX say that it is of another opset."""
    proto = onnx.load(file, load_external_data=False)
    proto.opset_import[0].version = opset
    file.write_bytes(proto.SerializeToString())
