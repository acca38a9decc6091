"""Attention in an exported step graph -> one fused node, of whatever operator a runtime has for it.

The exporter writes attention out in its plain form, which every runtime reads. The pattern:

    Split -> q -> Reshape -> Transpose -> Mul(scale) -> MatMul -> Softmax -> MatMul -> Transpose -> Reshape
             k -> Reshape -> Transpose ---------------/                     /
             v -> Reshape -> Transpose ------------------------------------/

with a Cast before and after the Softmax where the rest is in a lower precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .onnx_graph import only_consumer


class Attention(NamedTuple):
    """One attention: softmax(scale q k^T) v over the heads of qkv [B, L, 3D], q first."""

    qkv: str
    output: str
    tokens: int
    heads: int
    head_dim: int
    scale: float

    def nodes(self, operator: str, domain: str = "", **attributes: Any) -> list[NodeProto]:
        """A split into q, k and v, and an operator that takes the three."""
        name = f"{self.output}.attention"
        parts = [f"{name}.{part}" for part in "qkv"]
        split = helper.make_node("Split", [self.qkv], parts, name=f"{name}.split", axis=-1, num_outputs=3)
        fused = helper.make_node(operator, parts, [self.output], name=name, domain=domain, **attributes)
        return [split, fused]


def fuse_attention(model: ModelProto, replace: Callable[[Attention], Sequence[NodeProto]]) -> int:
    """Replace each attention in place by ``replace``'s nodes; return how many were replaced.

    The domains of the new nodes are imported. Anything that only resembles an attention is left alone.
    """
    graph = model.graph
    found = [match for node in graph.node if node.op_type == "Softmax" and (match := _match(graph, node))]
    for attention, nodes in found:
        position = list(graph.node).index(nodes[-1])
        for offset, node in enumerate(replace(attention)):
            graph.node.insert(position + offset, node)
            if node.domain not in {entry.domain for entry in model.opset_import}:
                model.opset_import.append(helper.make_opsetid(node.domain, 1))
        for node in nodes:
            graph.node.remove(node)
    return len(found)


def _match(graph: GraphProto, softmax: NodeProto) -> tuple[Attention, list[NodeProto]] | None:
    """The attention around a Softmax, and the nodes that make it up, in an order that ends with the last."""
    producers = {output: node for node in graph.node for output in node.output}
    raised = _of_type(producers.get(softmax.input[0]), "Cast")
    lowered = _of_type(only_consumer(graph, softmax.output[0]), "Cast")
    casts = [node for node in (raised, lowered) if node is not None]
    probabilities = lowered.output[0] if lowered is not None else softmax.output[0]
    scores = _of_type(producers.get(raised.input[0] if raised is not None else softmax.input[0]), "MatMul")
    context = _of_type(only_consumer(graph, probabilities), "MatMul")
    if scores is None or context is None or context.input[0] != probabilities or len(casts) == 1:
        return None
    scaled = _of_type(producers.get(scores.input[0]), "Mul")
    merged = _of_type(only_consumer(graph, context.output[0]), "Transpose")
    out = _of_type(only_consumer(graph, merged.output[0]), "Reshape") if merged is not None else None
    if scaled is None or merged is None or out is None or _permutation(merged) != [0, 2, 1, 3]:
        return None
    constants = {tensor.name: tensor for tensor in graph.initializer}
    if scaled.input[1] not in constants:
        return None
    q = _split_heads(producers, constants, scaled.input[0], [0, 2, 1, 3])
    k = _split_heads(producers, constants, scores.input[1], [0, 2, 3, 1])
    v = _split_heads(producers, constants, context.input[1], [0, 2, 1, 3])
    if q is None or k is None or v is None or not q.dims == k.dims == v.dims:
        return None
    split = _of_type(producers.get(q.input), "Split")
    if split is None or list(split.output) != [q.input, k.input, v.input]:
        return None
    scale = float(numpy_helper.to_array(constants[scaled.input[1]]).reshape(()))
    _, tokens, heads, head_dim = q.dims
    attention = Attention(split.input[0], out.output[0], tokens, heads, head_dim, scale)
    return attention, [split, *q.nodes, scaled, *k.nodes, scores, *casts, softmax, *v.nodes, context, merged, out]


class Heads(NamedTuple):
    """A tensor [B, L, D] split into heads: where it came from, [?, L, H, D/H], and the nodes."""

    input: str
    dims: tuple[int, ...]
    nodes: list[NodeProto]


def _split_heads(
    producers: dict[str, NodeProto], constants: dict[str, TensorProto], name: str, permutation: list[int]
) -> Heads | None:
    transpose = _of_type(producers.get(name), "Transpose")
    reshape = _of_type(producers.get(transpose.input[0]), "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or _permutation(transpose) != permutation:
        return None
    shape = constants.get(reshape.input[1])
    dims = tuple(int(size) for size in numpy_helper.to_array(shape)) if shape is not None else ()
    return Heads(reshape.input[0], dims, [reshape, transpose]) if len(dims) == 4 and min(dims[1:]) > 0 else None


def _of_type(node: NodeProto | None, kind: str) -> NodeProto | None:
    return node if node is not None and node.op_type == kind else None


def _permutation(transpose: NodeProto) -> list[int]:
    return next((list(entry.ints) for entry in transpose.attribute if entry.name == "perm"), [])
