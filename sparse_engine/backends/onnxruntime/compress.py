"""A step graph as an engine file stores it: layers as nodes of our own operators, 2:4 weights packed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, partial

import numpy as np
from onnx import ModelProto, NodeProto, helper

from sparse_engine.backends.base import LazyArray, StepGraph, Weights
from sparse_engine.backends.onnx_graph import refer_to_weights
from sparse_engine.kernels.packing import conv_as_matrix, pack, pack_codes, unpack_codes

from .convolutions import CONV_OP, FusedConv, fuse_conv, why_no_window, why_not
from .int8 import codes_node, packed_codes
from .layers import DENSE_OP, DOMAIN, SPARSE_OP, FusedLayer, from_nibbles, fuse, to_nibbles

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
    if node.op_type == "Gemm" and not _is_linear(graph.proto, node):
        return "a product of another form than x W^T + b"
    return None


def compress(graph: StepGraph, sparse: Iterable[str], dense: Iterable[str] = ()) -> tuple[ModelProto, Weights]:
    """The step graph with some layers as nodes of our own operators, and its weights, packed where they are read.

    Args:
        graph: as exported.
        sparse: names of layers whose weights are 2:4 along the inputs, and which a kernel takes (``why_no_kernel``).
        dense: names of MatMul layers, to be multiplied in bf16.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    weights: dict[str, np.ndarray | LazyArray] = dict(graph.weights)

    @lru_cache(maxsize=1)  # values and positions of a layer are read one after the other
    def packed(layer: str) -> tuple[np.ndarray, np.ndarray]:
        values, positions = pack(_matrix(graph, layer))
        return values, to_nibbles(positions)

    def part_of(layer: str, index: int) -> np.ndarray:
        return packed(layer)[index]

    for name in sparse:
        initializer, axis = graph.layers[name]
        weight = weights.pop(initializer)
        rows, depth = weight.shape[1 - axis], math.prod(weight.shape) // weight.shape[1 - axis]
        kinds = {"values": ((rows, depth // 2), np.float32), "positions": ((rows, -(-depth // 8)), np.uint8)}
        for index, (part, (shape, kind)) in enumerate(kinds.items()):
            weights[f"{name}.{part}"] = LazyArray(shape, np.dtype(kind), partial(part_of, name, index))
        fused = fuse_conv if len(weight.shape) == 4 else fuse
        fused(proto, name, (rows, depth), f"{name}.values", f"{name}.positions")
    for name in dense:
        initializer, _ = graph.layers[name]
        del weights[initializer]
        weights[f"{name}.values"] = matrix = graph.weights[initializer].T
        fuse(proto, name, matrix.shape, f"{name}.values", "")
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    refer_to_weights(proto, weights)
    return proto, weights


def compress_codes(
    graph: StepGraph, proto: ModelProto, weights: Weights, sparse: Iterable[str]
) -> tuple[ModelProto, Weights]:
    """Pack the codes of 2:4 layers in 8 bits; what reads them stays as it is, behind a node each that says so.

    Args:
        graph: as quantised.
        proto, weights: the same, other layers packed already.
        sparse: names of layers whose codes are 2:4 along the inputs, and can be packed (``why_not_packed``).
    """
    packed = ModelProto()
    packed.CopyFrom(proto)
    made: dict[str, np.ndarray | LazyArray] = dict(weights)
    for name in sparse:
        initializer, axis = graph.layers[name]
        codes = graph.weights[initializer]
        kernel = codes.shape[2:] if codes.ndim == 4 else None
        matrix = _matrix(graph, name)
        values, positions = pack_codes(matrix)
        del made[initializer]
        kept, where = f"{initializer}.values", f"{initializer}.positions"
        made[kept], made[where] = values, to_nibbles(positions)
        packed.graph.initializer.remove(next(each for each in packed.graph.initializer if each.name == initializer))
        packed.graph.node.insert(0, codes_node(name, matrix.shape, kept, where, initializer, axis, kernel))
    if DOMAIN not in {entry.domain for entry in packed.opset_import}:
        packed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    refer_to_weights(packed, made)
    return packed, made


def why_not_packed(graph: StepGraph, layer: str) -> str | None:
    """Why the codes of a 2:4 layer in 8 bits stay as they are; None where they can be packed."""
    initializer, axis = graph.layers[layer]
    weight = graph.weights[initializer]
    if weight.shape[axis] % 4:
        return f"{weight.shape[axis]} inputs: the kernels take groups of four"
    return why_no_window(_node(graph.proto, layer)) if weight.ndim == 4 else None


def expand_codes(proto: ModelProto, weights: dict[str, np.ndarray]) -> None:
    """Undo ``compress_codes``: the plain codes, in place of packed ones."""
    for name, packed in packed_codes(proto.graph).items():
        values, positions = weights.pop(packed.values), from_nibbles(weights.pop(packed.positions), packed.depth)
        weights[name] = packed.plain(unpack_codes(values, positions))
        proto.graph.node.remove(packed.node)


def _matrix(graph: StepGraph, layer: str) -> np.ndarray:
    """A layer's weight as the kernels' [N, K]."""
    initializer, axis = graph.layers[layer]
    weight = graph.weights[initializer]
    return conv_as_matrix(weight) if weight.ndim == 4 else np.ascontiguousarray(weight if axis else weight.T)


def _node(proto: ModelProto, name: str) -> NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def _is_linear(proto: ModelProto, gemm: NodeProto) -> bool:
    """Whether a Gemm is x W^T + b, b one number an output."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    if len(gemm.input) > 2 and shapes.get(gemm.input[2]) != shapes[gemm.input[1]][:1]:
        return False
    found = {entry.name: helper.get_attribute_value(entry) for entry in gemm.attribute}
    plain = found.get("alpha", 1.0) == 1.0 and found.get("beta", 1.0) == 1.0
    return plain and not found.get("transA", 0) and found.get("transB", 0) == 1
