"""Export to ONNX: three graphs that share one file of weights."""

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
ALIGNMENT = 4096  # bytes: a page, so that the file can be mapped into memory
SMALL = 1024  # bytes; smaller constants stay in the file of the graph

Change = Callable[[onnx.ModelProto], onnx.ModelProto]


def write_onnx(
    steps: Steps, signatures: Sequence[Signature], folder: Path, *, model_hash: str, change: Change | None = None
) -> Iterator[tuple[GraphName, GraphFacts]]:
    """Write NAME.onnx for each graph, and weights.bin, which holds every constant once, shared by the graphs.

    Args:
        change: applied to each graph before it is written.

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
    """One graph as an ONNX model that contains its constants."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are for the exporter's authors, like its logs
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
    """Move a constant to the file of weights, unless equal bytes are there already, and make `tensor` refer to it.

    places: offset and length in the file, by digest.
    """
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
