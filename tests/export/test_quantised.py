"""Tests of artefacts with weights in 8 or 4 bits, or all in 16 bits: formats, errors, and independence of rows."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.quantise import BLOCK, quantised
from export.verify import BOUNDS
from model.artefact import GRAPHS
from model.frozen.baked import bake
from model.frozen.exported import ExportedLM
from tests.support.agreement_bundle import build_network, text_tokens
from tests.support.artefacts import artefact_of, model_of

LENGTH = 200  # longer than the longest ring
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
# Operators that may still use a float constant: tables that are looked up, biases, masks, norms, scales of blocks.
STAYING = {"Gather", "GatherND", "Add", "Where", "Expand", "Pad", "LayerNormalization", "MatMulNBits"}
CASES = (("masked", "onnx-int8"), ("words", "onnx-int8"), ("masked", "onnx-int4"))


def in_one_matrix(weight: np.ndarray, *, bits: int) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """Return a quantised product with a constant matrix, an input for it, and its output by numpy."""
    value = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [*weight.shape[:-2], "n", weight.shape[-2]]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [*weight.shape[:-2], "n", weight.shape[-1]]),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [numpy_helper.from_array(weight, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    given = np.random.default_rng(1).standard_normal((*weight.shape[:-2], 6, weight.shape[-2])).astype(np.float32)
    return quantised(proto, bits=bits), given, given @ weight


@pytest.mark.parametrize(("bits", "off"), [(8, 0.02), (4, 0.15)])
@pytest.mark.parametrize("shape", [(48, 32), (3, 8, 20)], ids=("a matrix", "a matrix a head"))
def test_a_product_with_a_constant_keeps_it_in_few_bits(shape, bits, off):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    proto, given, wanted = in_one_matrix(weight, bits=bits)
    products = [node for node in proto.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == (shape[0] if len(shape) == 3 else 1)
    assert not [node for node in proto.graph.node if node.op_type == "MatMul"]
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": given})
    difference = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 0 < difference < off


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "format"), CASES)
def test_every_product_with_a_constant_is_in_few_bits(kind, format):
    folder = artefact_of(kind, format)
    manifest = json.loads((folder / "manifest.json").read_text())
    bits = {"onnx-int8": 8, "onnx-int4": 4}[format]
    assert (manifest["weights"], manifest["dtype"]) == (f"int{bits}", "float32")
    for name in GRAPHS:
        graph = onnx.load(folder / f"{name}.onnx").graph
        floats = {tensor.name for tensor in graph.initializer if tensor.data_type in FLOATS and len(tensor.dims) > 0}
        users = {node.op_type for node in graph.node if floats & set(node.input)}
        assert users <= STAYING
        assert not any(node.op_type in ("Gemm", "Einsum") for node in graph.node)
        products = [node for node in graph.node if node.op_type == "MatMulNBits"]
        for node in products:
            said = {attribute.name: attribute.i for attribute in node.attribute}
            assert (said["bits"], said["block_size"]) == (bits, BLOCK)
        projections = 2 * 3  # per layer; the rest are persistent keys and values per head, and the output layer
        assert len(products) >= (1 if name == "logits" else projections + 2 * 4 * 3)


@pytest.mark.slow
def test_fewer_bits_make_smaller_files():
    sizes = [
        (artefact_of("masked", format) / "weights.bin").stat().st_size for format in ("onnx-int4", "onnx-int8", "onnx")
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def read_on(model: ExportedLM, text: np.ndarray) -> torch.Tensor:
    """Return the logits [T, V] after each token of a text: half of it is read at once, the rest token by token."""
    cache, half = model.allocate(4), len(text) // 2
    hidden, new = model.extend(torch.from_numpy(text[None, :half]), cache, [0])
    cache.commit([0], new, [half])
    parts = [model.logits(hidden[0])]
    for token in text[half:]:
        logits, new = model.decode(torch.full((4,), int(token)), cache)
        cache.commit([0, 1, 2, 3], new, [1, 0, 0, 0])
        parts.append(logits[:1])
    return torch.cat(parts)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx-int8", "onnx-int4", "onnx-fp16"])
def test_the_difference_from_full_numbers_is_bounded_and_there(format):
    text = text_tokens(LENGTH)
    baked = bake(build_network())
    cache = baked.allocate(1)
    wanted = baked.logits(baked.extend(torch.from_numpy(text[None]), cache, [0])[0][0])
    found = read_on(model_of("masked", format), text)
    difference = float((found - wanted).abs().max())
    weights = model_of("masked", format).weights
    assert 1e-4 < difference < BOUNDS[weights]
    said = json.loads((artefact_of("masked", format) / "manifest.json").read_text())["verified"]
    assert 1e-4 < said["logits_difference"] < BOUNDS[weights]
    loss = {"int8": 0.02, "int4": 0.5, "float16": 0.02}[weights]
    assert abs(said["bits_per_byte"] - said["bits_per_byte_of_bundle"]) < loss


def prepared(model: ExportedLM, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of row 2 of 6 in both kinds of step; `neighbours` is the seed of the other rows."""
    random = torch.Generator().manual_seed(neighbours)
    cache = model.allocate(6)
    tokens = torch.randint(256, (6, 40), generator=random)
    tokens[2] = torch.from_numpy(text_tokens(40))
    hidden, new = model.extend(tokens, cache, list(range(6)))
    counts = torch.randint(1, 41, (6,), generator=random)
    counts[2] = 40
    cache.commit(list(range(6)), new, counts.tolist())
    fed = torch.randint(256, (6,), generator=random)
    fed[2] = 65
    logits, _ = model.decode(fed, cache)
    assert torch.equal(model.logits(hidden[2]), model.logits(hidden.flatten(0, 1)).view(6, 40, -1)[2])
    return hidden[2], logits[2]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx-int8", "onnx-int4"])
def test_batch_mates_do_not_change_a_bit_of_a_row(format):
    model = model_of("masked", format)
    hidden, logits = prepared(model, 0)
    for neighbours in range(1, 6):
        other_hidden, other_logits = prepared(model, neighbours)
        assert torch.equal(hidden, other_hidden)
        assert torch.equal(logits, other_logits)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx-int8", "onnx-int4"])
@pytest.mark.parametrize("count", [4, 5, 8, 13])
def test_the_number_of_rows_does_not_change_a_bit_of_a_row(format, count):
    model = model_of("masked", format)
    found = []
    for num_rows in (4, count):
        cache = model.allocate(num_rows)
        tokens = torch.from_numpy(np.tile(text_tokens(30), (num_rows, 1)))
        tokens[1:] += torch.arange(1, num_rows)[:, None]
        _, new = model.extend(tokens, cache, list(range(num_rows)))
        cache.commit(list(range(num_rows)), new, [30] * num_rows)
        logits, _ = model.decode(torch.arange(num_rows), cache)
        found.append(logits[:4])
    assert torch.equal(*found)


@pytest.mark.slow
def test_with_float16_rings_and_hidden_states_are_and_logits_are_not():
    folder: Path = artefact_of("masked", "onnx-fp16")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["weights"], manifest["dtype"]) == ("float16", "float16")
    kinds = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}
    wanted = {"logits": "float32", "memory_share": "float32", "tokens": "int64", "num_new": "int64", "lengths": "int64"}
    for name in GRAPHS:
        graph = onnx.load(folder / f"{name}.onnx").graph
        facts = manifest["graphs"][name]
        for parts, said in ((graph.input, facts["inputs"]), (graph.output, facts["outputs"])):
            dtypes = {part.name: kinds[part.type.tensor_type.elem_type] for part in parts}
            assert dtypes == {part["name"]: part["dtype"] for part in said}
            assert dtypes == {name: wanted.get(name, "float16") for name in dtypes}
    model, full = model_of("masked", "onnx-fp16"), model_of("masked", "onnx")
    assert model.dtype == torch.float16
    assert 2 * model.allocate(3).bytes_per_row == full.allocate(3).bytes_per_row
    cache = model.allocate(1)
    hidden, new = model.extend(torch.tensor([[1, 2]]), cache, [0])
    assert (hidden.dtype, new[0].dtype) == (torch.float16, torch.float16)
    logits, new = model.decode(torch.tensor([1]), cache)
    assert (logits.dtype, new[0].dtype) == (torch.float32, torch.float16)
