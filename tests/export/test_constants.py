"""Tests of the constants in a graph: persistent vectors with their scaling, span masks and position vectors.

No input carries these values; the tests find each among the constants by its content, computed from raw parameters.
"""

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from model.artefact import GRAPHS
from model.network.network import AllAttentionLM
from tests import oracle
from tests.support.agreement_bundle import KINDS, SPANS, build_network
from tests.support.artefacts import artefact_of

SMALL = 1024  # largest bytes of a constant in a graph's own file
RINGS = {  # layer: [(heads, slots)], counted by hand from SPANS of agreement_bundle, in groups of 8 slots at most
    0: [(2, 24), (1, 80), (1, 160)],
    1: [(3, 32), (1, 160)],
    2: [(4, 160)],
}
RING_NAMES = [f"layer{i}.group{g}.{half}" for i in RINGS for g in range(len(RINGS[i])) for half in ("key", "value")]
INPUTS = {
    "decode": ["tokens", "lengths", *RING_NAMES],
    "extend": ["tokens", "num_new", "lengths", *RING_NAMES],
    "logits": ["hidden"],
}
NEW = [f"layer{i}.new" for i in RINGS]
OUTPUTS = {"decode": ["logits", *NEW], "extend": ["hidden", "logits", "memory_share", *NEW], "logits": ["logits"]}
FORMATS = ("torchscript", pytest.param("onnx", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=KINDS)
def network(request) -> AllAttentionLM:
    return build_network(request.param)


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, network) -> Path:
    words = network.config.vocab_size == 20
    return artefact_of("words" if words else network.config.empty_slots, request.param)


@pytest.fixture(scope="module")
def manifest(folder) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def constants(folder, manifest) -> dict[str, list[np.ndarray]]:
    """Return all constants of each graph, external constants too."""
    if manifest["kind"] == "torchscript":
        module = load_script(folder)
        return {name: list(script_constants(getattr(module, name))) for name in GRAPHS}
    return {name: [numpy_helper.to_array(tensor) for tensor in read(folder, name).graph.initializer] for name in GRAPHS}


def load_script(folder: Path) -> torch.jit.ScriptModule:
    with pytest.warns(DeprecationWarning, match="torch.jit.load"):
        return torch.jit.load(folder / "model.pt")


def read(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / f"{name}.onnx")


def script_constants(method: Any) -> Iterator[np.ndarray]:
    for node in method.graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            yield node.t("value").numpy()


def contains(constants: list[np.ndarray], wanted: np.ndarray) -> bool:
    """Return whether a constant equals a matrix, plain or transposed, or holds it at an index of its first axes."""
    for constant in constants:
        if constant.dtype.kind != "f" or constant.ndim < 2:
            continue
        for matrix in constant.reshape(-1, *constant.shape[-2:]):
            for form in (matrix, matrix.T):
                if form.shape == wanted.shape and np.allclose(form, wanted, rtol=1e-6, atol=0):
                    return True
    return False


def line_found(constants: list[np.ndarray], wanted: np.ndarray) -> bool:
    """Return whether a line of a constant, along any axis, equals a vector or the vector twice in a row."""
    for constant in constants:
        if constant.dtype.kind != "f":
            continue
        for axis, size in enumerate(constant.shape):
            if size in (len(wanted), 2 * len(wanted)):
                lines = np.moveaxis(constant, axis, -1).reshape(-1, size)
                twice = np.tile(wanted, size // len(wanted))
                with np.errstate(invalid="ignore"):
                    if np.isclose(lines, twice, rtol=1e-5, atol=1e-6).all(-1).any():
                        return True
    return False


def test_inputs_are_tokens_lengths_and_rings_and_nothing_else(folder, manifest):
    for name in GRAPHS:
        facts = manifest["graphs"][name]
        assert [part["name"] for part in facts["inputs"]] == INPUTS[name]
        assert [part["name"] for part in facts["outputs"]] == OUTPUTS[name]
    assert {i: [(g["num_heads"], g["num_slots"]) for g in layer] for i, layer in enumerate(manifest["rings"])} == RINGS
    if manifest["kind"] == "torchscript":
        module = load_script(folder)
        assert list(module.parameters()) == list(module.buffers()) == []
        assert {name: len(list(getattr(module, name).graph.inputs())) - 1 for name in GRAPHS} == {
            name: len(names) for name, names in INPUTS.items()
        }
        return
    for name in GRAPHS:
        graph = read(folder, name).graph
        assert [part.name for part in graph.input] == INPUTS[name]
        assert [part.name for part in graph.output] == OUTPUTS[name]
        assert not {tensor.name for tensor in graph.initializer} & set(INPUTS[name])


@pytest.mark.parametrize("graph", ["decode", "extend"])
def test_persistent_vectors_are_constants_with_their_scalings(network, constants, graph):
    config = network.config
    for layer in network.layers:
        for head in range(config.num_heads):
            key, value = layer.persistent_key[head].detach().numpy(), layer.persistent_value[head].detach().numpy()
            assert contains(constants[graph], key * math.sqrt(config.head_size))
            assert contains(constants[graph], value * math.sqrt(config.num_persistent))
            assert not contains(constants[graph], key)
            assert not contains(constants[graph], value)


@pytest.mark.parametrize("graph", ["decode", "extend"])
def test_span_masks_are_constants(network, constants, graph):
    config = network.config
    for index, spans in enumerate(SPANS):
        sizes = {slots for _, slots in RINGS[index]}
        for span in spans:
            mask = [
                oracle.span_mask(d, span=span, max_span=config.max_span, span_ramp=config.span_ramp)
                for d in range(1, config.max_span + 1)
            ]
            size = min(slots for slots in sizes if slots >= np.count_nonzero(mask))
            with np.errstate(divide="ignore"):
                bias = np.log(np.array(mask[:size][::-1]))  # the most distant slot first
            assert line_found(constants[graph], bias), (index, span)


@pytest.mark.parametrize("graph", ["decode", "extend"])
def test_position_vectors_are_constants_cut_to_the_rings(network, constants, graph):
    for size in {slots for layer in RINGS.values() for _, slots in layer}:
        table = network.position[:, :size].detach().numpy()[:, ::-1]  # [D, S], the most distant slot first
        assert contains(constants[graph], table if graph == "extend" else np.tile(table, 2)), size


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_large_constants_lie_in_one_file_and_once(kind):
    folder = artefact_of(kind, "onnx")
    places: dict[tuple[int, int], set[str]] = {}
    for name in GRAPHS:
        for tensor in onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                said = {entry.key: entry.value for entry in tensor.external_data}
                assert said.pop("location") == "weights.bin"
                places.setdefault((int(said["offset"]), int(said["length"])), set()).add(name)
            else:
                assert numpy_helper.to_array(tensor).nbytes < SMALL, tensor.name
    content = (folder / "weights.bin").read_bytes()
    pieces = {content[offset : offset + length] for offset, length in places}
    assert len(pieces) == len(places)  # no constant lies there twice
    assert all(b >= a + size for (a, size), (b, _) in zip(sorted(places), sorted(places)[1:], strict=False))
    assert max(offset + length for offset, length in places) == len(content)  # the file holds nothing else
    shared = {pair: sum(set(pair) <= users for users in places.values()) for pair in combinations(GRAPHS, 2)}
    projections = 2 * len(RINGS)  # the large matrices of each layer
    assert shared["decode", "extend"] >= projections
    if kind != "words":
        assert shared["decode", "logits"] == shared["extend", "logits"] == 2  # the output layer's


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_graphs_pass_the_checker_and_say_what_they_are(kind):
    folder = artefact_of(kind, "onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in GRAPHS:
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
        proto = read(folder, name)
        assert {entry.domain: entry.version for entry in proto.opset_import} == {"": manifest["opset"]}
        assert {entry.key: entry.value for entry in proto.metadata_props} == {"model_hash": manifest["model_hash"]}
        for facts, part in zip(manifest["graphs"][name]["inputs"], proto.graph.input, strict=True):
            shape = [size.dim_param or size.dim_value for size in part.type.tensor_type.shape.dim]
            assert shape == facts["shape"], part.name
