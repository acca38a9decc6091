"""The work in a step graph: floating-point operations of its products, from their shapes."""

from __future__ import annotations

import math

from onnx import ModelProto, NodeProto, helper, shape_inference

from sparse_engine.backends import StepGraph

Shape = tuple[int, ...]


def product_flops(graph: StepGraph, batch: int, passes: int = 1) -> dict[str, int]:
    """Operations of each product: two for each multiply-add, zeros counted like any other weight.

    Args:
        graph: as exported.
        batch, passes: that the step runs with.

    Returns:
        Node name -> operations of one step: linears and convolutions under their layers' names, and the two products
        of each attention.
    """
    shapes = _shapes(graph.proto, {"batch": batch, "guidance": passes})
    return {node.name: flops for node in graph.proto.graph.node if (flops := _flops(node, shapes))}


def _shapes(proto: ModelProto, sizes: dict[str, int]) -> dict[str, Shape]:
    """Every value's shape, the graph's free dimensions set."""
    fixed = ModelProto()
    fixed.CopyFrom(proto)
    del fixed.graph.value_info[:]
    for entry in [*fixed.graph.input, *fixed.graph.output]:
        for dimension in entry.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
            elif dimension.dim_param:
                dimension.Clear()
    inferred = shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for entry in [*inferred.input, *inferred.output, *inferred.value_info]:
        shapes[entry.name] = tuple(each.dim_value for each in entry.type.tensor_type.shape.dim)
    return shapes


def _flops(node: NodeProto, shapes: dict[str, Shape]) -> int:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return 0
    a, b, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        return 2 * math.prod(out) * math.prod(b[1:])  # weights are [out, in / groups, kh, kw]
    transposed = node.op_type == "Gemm" and _attribute(node, "transA")
    return 2 * math.prod(out) * (a[-2] if transposed else a[-1])


def _attribute(node: NodeProto, name: str) -> int:
    return next((int(helper.get_attribute_value(entry)) for entry in node.attribute if entry.name == name), 0)
