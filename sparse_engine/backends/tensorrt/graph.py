"""The step graph as TensorRT's parser is to see it: Linears in the form asked for, attention as one node.

Convolutions are as exported: their weights are initializers [O, I, kh, kw], and what makes sparse kernels eligible is
that each group of four input channels, of each output channel and tap, keeps two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from sparse_engine.backends.attention import Attention, fuse_attention
from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnx_graph import only_consumer, refer_to_weights

ATTENTION_OPSET = 23  # the first with Attention
LARGEST_FUSED_HEAD = 256  # of TensorRT's fused attention kernels in fp16 and bf16


@dataclass(frozen=True)
class _Linear:
    """A Linear as exported: a MatMul of the weight as [K, N], and the nodes that belong to it.

    Attributes:
        product: the MatMul.
        codes: the DequantizeLinear that a quantised weight comes through.
        bias: the Add that follows.
        before, after: the QuantizeLinear and DequantizeLinear of its input and of its output.
    """

    product: NodeProto
    codes: NodeProto | None
    bias: NodeProto | None
    before: tuple[NodeProto, ...]
    after: tuple[NodeProto, ...]

    @property
    def source(self) -> str:
        """Its input, before it is rounded."""
        return str((self.before or (self.product,))[0].input[0])

    @property
    def output(self) -> str:
        """Its output, after it is rounded."""
        return str((self.product, *filter(None, [self.bias]), *self.after)[-1].output[0])


def with_linear_form(graph: StepGraph, form: str) -> StepGraph:
    """The step graph with each Linear as a MatMul, a Gemm or a 1x1 convolution.

    A Linear [K -> N] of tokens [B, L, K] is a Gemm of [B*L, K] with the weight as [N, K], or a convolution of B*L
    images of one pixel and K channels with the weight as [N, K, 1, 1]; the bias that follows it goes in. A quantised
    Linear's codes are laid out the same way, its scales stay one an output channel, and the Reshapes go outside the
    Q/DQ pairs of its input and output, which TensorRT wants next to the product.

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
    for name, (initializer, _) in graph.layers.items():
        linear = _find_linear(proto.graph, name, initializer)
        shape = shapes.get(linear.source, ()) if linear is not None else ()
        middle = [size for size in shape[1:-1] if isinstance(size, int)]
        if linear is None or not shape or len(middle) != len(shape) - 2:
            continue
        weight = np.ascontiguousarray(weights[initializer].T)
        weights[initializer] = weight if form == "gemm" else weight[:, :, None, None]
        layers[name] = (initializer, 1)
        _replace(proto.graph, linear, middle, weight.shape, form)
    _drop_unread_pairs(proto.graph)
    refer_to_weights(proto, weights)
    return StepGraph(proto, weights, layers, graph.state)


def with_attention_nodes(graph: StepGraph) -> tuple[StepGraph, int]:
    """The step graph with each attention as ONNX's Attention, and how many there are.

    None is where a head is larger than fused kernels take: the node would be taken apart again, with its softmax in
    the type of q and k, where the plain form has it in float32. One with a bias stays plain: the node's would be of the
    type of q and k, where the plain form adds it in float32.
    """
    proto, heads = ModelProto(), list[int]()
    proto.CopyFrom(graph.proto)

    def nodes(attention: Attention) -> list[NodeProto] | None:
        if attention.bias is not None:
            return None
        heads.append(attention.head_dim)
        count = attention.heads
        return attention.nodes("Attention", q_num_heads=count, kv_num_heads=count, scale=attention.scale)

    fused = fuse_attention(proto, nodes)
    if not fused or max(heads) > LARGEST_FUSED_HEAD:
        return graph, 0
    next(entry for entry in proto.opset_import if not entry.domain).version = ATTENTION_OPSET
    return StepGraph(proto, graph.weights, graph.layers, graph.state), fused


def _shapes(proto: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Every value's shape, unknown sizes as strings."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


def _find_linear(graph: GraphProto, name: str, initializer: str) -> _Linear | None:
    """A layer's nodes; None where it is no Linear, or its weight is not plain."""
    producers = {output: node for node in graph.node for output in node.output}
    product = next((node for node in graph.node if node.name == name and node.op_type == "MatMul"), None)
    codes = producers.get(product.input[1]) if product is not None else None
    if product is None or initializer not in (product.input[1], *(codes.input[:1] if codes is not None else ())):
        return None
    if product.input[1] == initializer:
        codes = None
    bias = _bias(graph, product, initializer)
    before, after = _pair_before(producers, product), _pair_after(graph, (bias or product).output[0])
    return _Linear(product, codes, bias, before, after)


def _bias(graph: GraphProto, product: NodeProto, weight: str) -> NodeProto | None:
    """The Add of a constant [N] that follows a product with a weight [K, N]."""
    add = only_consumer(graph, product.output[0])
    if add is None or add.op_type != "Add":
        return None
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    return add if any(sizes.get(each) == sizes[weight][1:] for each in add.input) else None


def _pair_before(producers: dict[str, NodeProto], product: NodeProto) -> tuple[NodeProto, ...]:
    dequantise = producers.get(product.input[0])
    quantise = producers.get(dequantise.input[0]) if dequantise is not None else None
    return _pair(quantise, dequantise)


def _pair_after(graph: GraphProto, output: str) -> tuple[NodeProto, ...]:
    quantise = only_consumer(graph, output)
    dequantise = only_consumer(graph, quantise.output[0]) if quantise is not None else None
    return _pair(quantise, dequantise)


def _pair(quantise: NodeProto | None, dequantise: NodeProto | None) -> tuple[NodeProto, ...]:
    if quantise is None or dequantise is None:
        return ()
    kinds = (quantise.op_type, dequantise.op_type)
    return (quantise, dequantise) if kinds == ("QuantizeLinear", "DequantizeLinear") else ()


def _replace(graph: GraphProto, linear: _Linear, middle: list[int], weight: tuple[int, ...], form: str) -> None:
    """Put a Gemm or a convolution between two Reshapes; ``middle`` is what lies between batch and channels."""
    rows, depth = weight
    name, source, output = linear.product.name, linear.source, linear.output
    flat = _constant(graph, f"{name}.flat", [-1, depth] if form == "gemm" else [-1, depth, 1, 1])
    restored = _constant(graph, f"{name}.restored", [-1, *middle, rows])
    nodes = [helper.make_node("Reshape", [source, flat], [f"{name}.in"], name=f"{name}.flatten")]
    for each in linear.before:  # copies: others may read the pair in its old shape
        nodes.append(_copy(each, f"{name}.{each.op_type}", nodes[-1].output[0]))
    nodes.append(_product(linear, nodes[-1].output[0], form))
    restore = helper.make_node("Reshape", [f"{name}.out", restored], [output], name=f"{name}.restore")
    if linear.codes is not None:
        _set_axis(linear.codes, 0)
    if linear.after:
        quantise, dequantise = linear.after
        quantise.input[0], dequantise.output[0], restore.input[0] = f"{name}.out", f"{name}.rounded", f"{name}.rounded"
        graph.node.insert(list(graph.node).index(dequantise) + 1, restore)
    else:
        nodes.append(restore)
    position = list(graph.node).index(linear.product)
    for gone in filter(None, (linear.product, linear.bias)):
        graph.node.remove(gone)
    for offset, each in enumerate(nodes):
        graph.node.insert(position + offset, each)


def _product(linear: _Linear, operand: str, form: str) -> NodeProto:
    product, add = linear.product, linear.bias
    bias = [each for each in add.input if each != product.output[0]] if add is not None else []
    inputs, outputs = [operand, product.input[1], *bias], [f"{product.name}.out"]
    if form == "gemm":
        return helper.make_node("Gemm", inputs, outputs, name=product.name, transB=1)
    return helper.make_node("Conv", inputs, outputs, name=product.name, kernel_shape=[1, 1])


def _copy(node: NodeProto, name: str, source: str) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    made.name, made.input[0], made.output[0] = name, source, name
    return made


def _set_axis(dequantise: NodeProto, axis: int) -> None:
    kept = [entry for entry in dequantise.attribute if entry.name != "axis"]
    del dequantise.attribute[:]
    dequantise.attribute.extend([*kept, helper.make_attribute("axis", axis)])


def _drop_unread_pairs(graph: GraphProto) -> None:
    """Take out the Q/DQ pairs that nothing reads any more."""
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        read = {tensor for node in graph.node for tensor in node.input} | {value.name for value in graph.output}
        for node in [node for node in graph.node if node.op_type == kind and node.output[0] not in read]:
            graph.node.remove(node)


def _constant(graph: GraphProto, name: str, values: Sequence[int]) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name
