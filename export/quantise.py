"""Quantised weights for ONNX graphs: 8 or 4 bits, one scale for each block of weights; activations stay float32.

Every product with a constant matrix becomes a MatMulNBits of ONNX Runtime. The result of a row depends only on the row,
which would not hold if all activations of a batch shared one scale.
"""

import logging

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxscript import ir, optimizer

BLOCK = 64  # weights that share a scale: the head size of the paper's models
ACCURACY_LEVEL = 4  # products of 8-bit integers; activations have a scale for each block of each row
UNLIMITED = 1 << 40  # bytes

for _name in ("onnxscript", "onnx_ir", "onnxruntime"):  # the quantiser's import turns their logs on
    logging.getLogger(_name).setLevel(logging.ERROR)


def quantised(proto: onnx.ModelProto, *, bits: int, accuracy_level: int = ACCURACY_LEVEL) -> onnx.ModelProto:
    """The graph with its constant matrices in `bits` (4 or 8) bits."""
    model = ir.serde.deserialize_model(proto)
    optimizer.fold_constants(model, input_size_limit=UNLIMITED, output_size_limit=UNLIMITED)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    proto = ir.serde.serialize_model(model)
    _split_heads(proto)
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=accuracy_level, bits=bits, op_types_to_quantize=("MatMul",)
    )
    quantizer = MatMulNBitsQuantizer(proto, algo_config=config)
    quantizer.process()
    done: onnx.ModelProto = quantizer.model.model
    return done


def _split_heads(proto: onnx.ModelProto) -> None:
    """Split every product [h, X, K] @ constant [h, K, N] into h products, because only matrices are quantised."""
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        tensor = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if tensor is None or len(tensor.dims) != 3:
            nodes.append(node)
            continue
        matrices = numpy_helper.to_array(tensor)
        names = [f"{node.name}.head{i}" for i in range(len(matrices))]
        nodes.append(
            helper.make_node("Split", [node.input[0]], [f"{name}.in" for name in names], axis=0, num_outputs=len(names))
        )
        for name, matrix in zip(names, matrices, strict=True):
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), f"{name}.weight"))
            nodes.append(helper.make_node("MatMul", [f"{name}.in", f"{name}.weight"], [f"{name}.out"], name=name))
        nodes.append(helper.make_node("Concat", [f"{name}.out" for name in names], list(node.output), axis=0))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
