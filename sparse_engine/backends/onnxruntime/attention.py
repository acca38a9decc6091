"""Attention in an exported step graph -> ONNX Runtime's fused MultiHeadAttention.

The exporter writes attention out in its plain form, which every runtime reads; ONNX Runtime's own optimiser does not
recognise it in graphs that come from ``torch.export``. The pattern, with q, k and v the three outputs of a Split:

    q -> Reshape -> Transpose -> Mul(scale) -> MatMul -> Softmax -> MatMul -> Transpose -> Reshape -> out
    k -> Reshape -> Transpose ---------------/                      /
    v -> Reshape -> Transpose ------------------------------------/
"""

from __future__ import annotations

from typing import NamedTuple

import onnx
from onnx import GraphProto, NodeProto, numpy_helper

DOMAIN = "com.microsoft"


class Pattern(NamedTuple):
    """One attention found: its three inputs [B, L, D], its output [B, L, D], and what goes."""

    q: str
    k: str
    v: str
    output: str
    heads: int
    scale: float
    nodes: list[NodeProto]


def fuse_attention(model: onnx.ModelProto) -> int:
    """Replace each attention in place; return how many were. Anything that only resembles one is left alone."""
    graph = model.graph
    found = [pattern for node in graph.node if node.op_type == "Softmax" and (pattern := _match(graph, node))]
    for pattern in found:
        fused = onnx.helper.make_node(
            "MultiHeadAttention",
            [pattern.q, pattern.k, pattern.v],
            [pattern.output],
            name=f"{pattern.output}.attention",
            domain=DOMAIN,
            num_heads=pattern.heads,
            scale=pattern.scale,
        )
        position = list(graph.node).index(pattern.nodes[-1])
        graph.node.insert(position, fused)
        for node in pattern.nodes:
            graph.node.remove(node)
    if found and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return len(found)


def _match(graph: GraphProto, softmax: NodeProto) -> Pattern | None:
    producers = {output: node for node in graph.node for output in node.output}
    scores = _of_type(producers.get(softmax.input[0]), "MatMul")
    context = _of_type(_only_consumer(graph, softmax.output[0]), "MatMul")
    if scores is None or context is None or context.input[0] != softmax.output[0]:
        return None
    scaled = _of_type(producers.get(scores.input[0]), "Mul")
    merged = _of_type(_only_consumer(graph, context.output[0]), "Transpose")
    out = _of_type(_only_consumer(graph, merged.output[0]), "Reshape") if merged is not None else None
    if scaled is None or merged is None or out is None or _permutation(merged) != [0, 2, 1, 3]:
        return None
    constants = {tensor.name: tensor for tensor in graph.initializer}
    if scaled.input[1] not in constants:
        return None
    q = _split_heads(producers, constants, scaled.input[0], [0, 2, 1, 3])
    k = _split_heads(producers, constants, scores.input[1], [0, 2, 3, 1])
    v = _split_heads(producers, constants, context.input[1], [0, 2, 1, 3])
    if q is None or k is None or v is None or not q[1] == k[1] == v[1]:
        return None
    scale = float(numpy_helper.to_array(constants[scaled.input[1]]).reshape(()))
    nodes = [*q[2], scaled, *k[2], scores, softmax, *v[2], context, merged, out]
    return Pattern(q[0], k[0], v[0], out.output[0], q[1], scale, nodes)


def _split_heads(
    producers: dict[str, NodeProto], constants: dict[str, onnx.TensorProto], name: str, permutation: list[int]
) -> tuple[str, int, list[NodeProto]] | None:
    """[B, L, D] -> Reshape [B, L, H, D/H] -> Transpose: (input, heads, nodes)."""
    transpose = _of_type(producers.get(name), "Transpose")
    reshape = _of_type(producers.get(transpose.input[0]), "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or _permutation(transpose) != permutation:
        return None
    shape = constants.get(reshape.input[1])
    dims = numpy_helper.to_array(shape).tolist() if shape is not None else []
    return (reshape.input[0], int(dims[2]), [reshape, transpose]) if len(dims) == 4 else None


def _of_type(node: NodeProto | None, kind: str) -> NodeProto | None:
    return node if node is not None and node.op_type == kind else None


def _only_consumer(graph: GraphProto, name: str) -> NodeProto | None:
    consumers = [node for node in graph.node if name in node.input]
    return consumers[0] if len(consumers) == 1 else None


def _permutation(transpose: NodeProto) -> list[int]:
    return next((list(entry.ints) for entry in transpose.attribute if entry.name == "perm"), [])
