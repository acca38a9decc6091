"""A step graph as an engine file stores it: layers as nodes of our own operators, 2:4 weights packed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, NodeProto, helper

from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnx_graph import refer_to_weights
from sparse_engine.kernels.packing import conv_as_matrix, pack

from .convolutions import CONV_OP, FusedConv, fuse_conv, why_not
from .layers import DENSE_OP, DOMAIN, SPARSE_OP, FusedLayer, fuse, to_nibbles

LAYER_OPS = (SPARSE_OP, DENSE_OP, CONV_OP)


def layers_in(proto: ModelProto) -> list[FusedLayer]:
    """The nodes of our own layer operators, in the graph's order."""
    return [
        FusedConv.of(node) if node.op_type == CONV_OP else FusedLayer.of(node)
        for node in proto.graph.node
        if node.op_type in LAYER_OPS
    ]


def why_no_kernel(graph: StepGraph, name: str) -> str | None:
    """Why a layer whose weights are 2:4 stays dense in our kernels' eyes; None where a kernel takes it."""
    node = _node(graph.proto, name)
    if node.op_type == "Conv":
        return why_not(graph.proto.graph, node)
    if node.op_type == "Gemm" and not _is_linear(node):
        return "a product of another form than x W^T + b"
    return None


def compress(graph: StepGraph, sparse: Iterable[str], dense: Iterable[str] = ()) -> StepGraph:
    """The step graph with some layers as nodes of our own operators.

    Args:
        graph: as exported.
        sparse: names of layers whose weights are 2:4 along the inputs, and which a kernel takes (``why_no_kernel``).
        dense: names of MatMul layers, to be multiplied in bf16.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    weights = dict(graph.weights)
    for name in sparse:
        weight, axis = weights.pop(graph.layers[name][0]), graph.layers[name][1]
        is_conv = weight.ndim == 4
        matrix = conv_as_matrix(weight) if is_conv else np.ascontiguousarray(weight if axis else weight.T)
        values, positions = pack(matrix)
        weights[f"{name}.values"] = values
        weights[f"{name}.positions"] = to_nibbles(positions)
        if is_conv:
            fuse_conv(proto, name, len(matrix), f"{name}.values", f"{name}.positions")
        else:
            fuse(proto, name, matrix.shape, f"{name}.values", f"{name}.positions")
    for name in dense:
        weight = np.ascontiguousarray(weights.pop(graph.layers[name][0]).T)
        weights[f"{name}.values"] = weight
        fuse(proto, name, weight.shape, f"{name}.values", "")
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    refer_to_weights(proto, weights)
    return StepGraph(proto, weights, graph.layers, graph.state)


def _node(proto: ModelProto, name: str) -> NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def _is_linear(gemm: NodeProto) -> bool:
    """Whether a Gemm is x W^T + b."""
    found = {entry.name: helper.get_attribute_value(entry) for entry in gemm.attribute}
    plain = found.get("alpha", 1.0) == 1.0 and found.get("beta", 1.0) == 1.0
    return plain and not found.get("transA", 0) and found.get("transB", 0) == 1
