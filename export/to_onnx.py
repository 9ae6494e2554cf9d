"""ONNX: three graphs over one file of weights."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from onnx import TensorProto

from export.graph import OPSET, Graph, Signature, Steps
from model.artefact import MODEL_HASH, GraphFacts, GraphName

WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # bytes; pages, so that the file can be mapped
SMALL = 1024  # bytes of a constant that stays in the graph's own file

Change = Callable[[onnx.ModelProto], onnx.ModelProto]


def write_onnx(
    steps: Steps, signatures: Sequence[Signature], folder: Path, *, model_hash: str, change: Change | None = None
) -> Iterator[tuple[GraphName, GraphFacts]]:
    """Write NAME.onnx for each graph, and weights.bin, in which constants that graphs have in common lie once.

    Args:
        change: what shall be done to each graph before it is written.

    Yields:
        each graph's name and facts, once it is written and checked by onnx.checker.
    """
    with (folder / WEIGHTS).open("wb") as weights:
        places: dict[bytes, tuple[int, int]] = {}
        for signature in signatures:
            proto = to_proto(steps, signature)
            if change is not None:
                proto = change(proto)
            proto.metadata_props.add(key=MODEL_HASH, value=model_hash)
            for tensor in proto.graph.initializer:
                _move_out(tensor, weights=weights, places=places)
            weights.flush()
            file = f"{signature.name}.onnx"
            (folder / file).write_bytes(proto.SerializeToString())
            onnx.checker.check_model(folder / file, full_check=True)
            yield signature.name, signature.facts(file)


def to_proto(steps: Steps, signature: Signature) -> onnx.ModelProto:
    """One graph with its constants inside."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter to its own authors, as what it logs
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Graph(steps, signature.name),
            signature.example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[facts.name for facts in signature.inputs],
            output_names=[facts.name for facts in signature.outputs],
            dynamic_shapes=(signature.dynamic,),
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def _move_out(tensor: TensorProto, *, weights: BinaryIO, places: dict[bytes, tuple[int, int]]) -> None:
    """Write a constant's bytes to the file of weights, unless the same bytes are there, and let it point to them."""
    content = tensor.raw_data
    if len(content) < SMALL:
        return
    digest = hashlib.sha256(content).digest()
    if digest not in places:
        weights.seek(-(-weights.tell() // ALIGNMENT) * ALIGNMENT)
        places[digest] = weights.tell(), len(content)
        weights.write(content)
    offset, length = places[digest]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
