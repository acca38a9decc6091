"""The step graph as TensorRT's parser is to see it: Linears in the form asked for, attention as one node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparse_engine.backends.attention import Attention, fuse_attention
from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnx_graph import only_consumer, refer_to_weights

ATTENTION_OPSET = 23  # the first with Attention


def with_linear_form(graph: StepGraph, form: str) -> StepGraph:
    """The step graph with each Linear as a MatMul, a Gemm or a 1x1 convolution.

    A Linear [K -> N] of tokens [B, L, K] is a Gemm of [B*L, K] with the weight as [N, K], or a convolution of B*L
    images of one pixel and K channels with the weight as [N, K, 1, 1]; the bias that follows it goes in. Quantised
    Linears stay as they are.

    Args:
        graph: as exported: MatMul with the weight as [K, N].
        form: "matmul", "gemm" or "conv1x1".
    """
    if form == "matmul":
        return graph
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    shapes = _shapes(proto)
    weights, layers = dict(graph.weights), dict(graph.layers)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, (initializer, _) in graph.layers.items():
        node = next((node for node in proto.graph.node if node.name == name and node.op_type == "MatMul"), None)
        shape = shapes.get(node.input[0]) if node is not None else None
        middle = [size for size in (shape or ())[1:-1] if isinstance(size, int)]
        if node is None or shape is None or len(middle) != len(shape) - 2 or node.input[1] not in weights:
            continue
        weight = np.ascontiguousarray(weights[initializer].T)
        weights[initializer] = weight if form == "gemm" else weight[:, :, None, None]
        layers[name] = (initializer, 1)
        _replace_matmul(proto.graph, node, middle, weight.shape, constants, form)
    refer_to_weights(proto, weights)
    return StepGraph(proto, weights, layers, graph.state)


def with_attention_nodes(graph: StepGraph) -> tuple[StepGraph, int]:
    """The step graph with each attention as ONNX's Attention, and how many there are."""
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    fused = fuse_attention(proto, _attention_nodes)
    if fused:
        next(entry for entry in proto.opset_import if not entry.domain).version = ATTENTION_OPSET
    return StepGraph(proto, graph.weights, graph.layers, graph.state), fused


def _attention_nodes(attention: Attention) -> list[NodeProto]:
    heads = attention.heads
    return attention.nodes("Attention", q_num_heads=heads, kv_num_heads=heads, scale=attention.scale)


def _shapes(proto: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Every value's shape, unknown sizes as strings."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


def _replace_matmul(
    graph: GraphProto,
    node: NodeProto,
    middle: list[int],
    weight: tuple[int, ...],
    constants: dict[str, TensorProto],
    form: str,
) -> None:
    """Put a Gemm or a convolution between two Reshapes; ``middle`` is what lies between batch and channels."""
    rows, depth = weight
    taken, bias = [node], []
    follower = only_consumer(graph, node.output[0])
    if follower is not None and follower.op_type == "Add":
        other = follower.input[1] if follower.input[0] == node.output[0] else follower.input[0]
        if other in constants and list(constants[other].dims) == [rows]:
            taken, bias = [node, follower], [other]
    name, output = node.name, taken[-1].output[0]
    flat = _constant(graph, f"{name}.flat", [-1, depth] if form == "gemm" else [-1, depth, 1, 1])
    restored = _constant(graph, f"{name}.restored", [-1, *middle, rows])
    inputs = [f"{name}.in", node.input[1], *bias]
    product = (
        helper.make_node("Gemm", inputs, [f"{name}.out"], name=name, transB=1)
        if form == "gemm"
        else helper.make_node("Conv", inputs, [f"{name}.out"], name=name, kernel_shape=[1, 1])
    )
    nodes = [
        helper.make_node("Reshape", [node.input[0], flat], [f"{name}.in"], name=f"{name}.flatten"),
        product,
        helper.make_node("Reshape", [f"{name}.out", restored], [output], name=f"{name}.restore"),
    ]
    position = list(graph.node).index(node)
    for gone in taken:
        graph.node.remove(gone)
    for offset, each in enumerate(nodes):
        graph.node.insert(position + offset, each)


def _constant(graph: GraphProto, name: str, values: Sequence[int]) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name
