"""Linear layers in a step graph: to nodes of our own operators, and back.

``compress`` turns MatMul, with the bias, activation and residual add that follow it, into one node. Packed 2:4 weights
become ``sparse_engine.MatMul24``; dense ones to be multiplied in bf16 ``sparse_engine.MatMulBf16``. That
is what an engine file stores. ``FusedLayer.plain_nodes`` writes a node out in plain ONNX again, for a layer whose plain
kernel is faster on the machine at hand, or where the compiled kernels are not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper

from sparse_engine.backends.base import LazyArray, StepGraph, Weights
from sparse_engine.backends.onnx_graph import only_consumer, refer_to_weights
from sparse_engine.kernels.packing import pack

DOMAIN = "sparse_engine"
SPARSE_OP, DENSE_OP = LAYER_OPS = "MatMul24", "MatMulBf16"
# Two layers in one node: made where an engine is loaded, never stored in its file.
SPARSE_MLP, DENSE_MLP = "Mlp24", "MlpBf16"
PAIR = "+"  # between their names
GELU_FORMS = {"none": "gelu", "tanh": "gelu-tanh"}  # ONNX's `approximate` -> the kernels' activation


@dataclass(frozen=True)
class FusedLayer:
    """A node's inputs and attributes. Absent inputs are empty strings: a dense layer has no ``positions``."""

    name: str
    rows: int
    depth: int
    activation: str
    x: str
    values: str
    positions: str
    bias: str
    residual: str
    output: str

    @classmethod
    def of(cls, node: NodeProto) -> FusedLayer:
        """Read a node."""
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        x, values, *others = node.input
        positions = others.pop(0) if node.op_type == SPARSE_OP else ""
        bias, residual = [*others, "", ""][:2]
        return cls(
            name=node.name,
            rows=attributes["N"],
            depth=attributes["K"],
            activation=attributes["activation"].decode(),
            x=x,
            values=values,
            positions=positions,
            bias=bias,
            residual=residual,
            output=node.output[0],
        )

    @property
    def is_sparse(self) -> bool:
        """Whether the weights are 2:4."""
        return bool(self.positions)

    @property
    def _weights(self) -> list[str]:
        return [self.values, self.positions] if self.is_sparse else [self.values]

    def node(self, **attributes: Any) -> NodeProto:
        """Write it as a node. Attributes: ``threads``, and of a sparse one ``compute`` and ``tactic``."""
        inputs = [self.x, *self._weights, self.bias, self.residual]
        while not inputs[-1]:
            inputs.pop()
        attributes |= {"N": self.rows, "K": self.depth, "activation": self.activation}
        operator = SPARSE_OP if self.is_sparse else DENSE_OP
        return helper.make_node(operator, inputs, [self.output], name=self.name, domain=DOMAIN, **attributes)

    def node_with(self, second: FusedLayer, **attributes: Any) -> NodeProto:
        """Write it and the layer that takes its output as one node. Attributes: ``threads``, and of 2:4 ``compute``."""
        inputs = [self.x, *self._weights, self.bias, *second._weights, second.bias, second.residual]
        while not inputs[-1]:
            inputs.pop()
        attributes |= {"N": second.rows, "H": self.rows, "K": self.depth, "activation": self.activation}
        operator = SPARSE_MLP if self.is_sparse else DENSE_MLP
        name = PAIR.join((self.name, second.name))
        return helper.make_node(operator, inputs, [second.output], name=name, domain=DOMAIN, **attributes)

    def feeds(self, second: FusedLayer) -> bool:
        """Whether one kernel could compute both, if nobody else wants what lies between: ``node_with``."""
        follows = second.x == self.output != second.residual and self.is_sparse == second.is_sparse
        return follows and not self.residual and second.activation == "none"

    def plain_nodes(self, weight: str) -> list[NodeProto]:
        """The same in plain ONNX over a dense initializer [K, N]."""
        steps = [("MatMul", [self.x, weight])]
        if self.bias:
            steps.append(("Add", [self.bias]))
        if self.activation != "none":
            steps.append(("Gelu", []))
        if self.residual:
            steps.append(("Add", [self.residual]))
        nodes: list[NodeProto] = []
        for index, (kind, inputs) in enumerate(steps):
            taken = inputs if not nodes else [nodes[-1].output[0], *inputs]
            output = self.output if index == len(steps) - 1 else f"{self.name}.{index}"
            nodes.append(helper.make_node(kind, taken, [output], name=f"{self.name}.{index}" if index else self.name))
            if kind == "Gelu":
                form = next(form for form, activation in GELU_FORMS.items() if activation == self.activation)
                nodes[-1].attribute.append(helper.make_attribute("approximate", form))
        return nodes


def compress(graph: StepGraph, sparse: Iterable[str], dense: Iterable[str] = ()) -> tuple[ModelProto, Weights]:
    """The step graph with some layers as nodes of our own operators, and its weights, packed where they are read.

    Args:
        graph: as exported.
        sparse: names of MatMul layers whose weights are 2:4 along the inputs.
        dense: names of others, to be multiplied in bf16.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    weights: dict[str, np.ndarray | LazyArray] = dict(graph.weights)

    @lru_cache(maxsize=1)  # values and positions of a layer are read one after the other
    def packed(initializer: str) -> tuple[np.ndarray, np.ndarray]:
        values, positions = pack(np.ascontiguousarray(graph.weights[initializer].T))
        return values, _to_nibbles(positions)

    def part_of(initializer: str, index: int) -> np.ndarray:
        return packed(initializer)[index]

    for name in sparse:
        initializer, _ = graph.layers[name]
        rows, depth = weights.pop(initializer).shape[::-1]
        kinds = {"values": ((rows, depth // 2), np.float32), "positions": ((rows, -(-depth // 8)), np.uint8)}
        for index, (part, (shape, kind)) in enumerate(kinds.items()):
            weights[f"{name}.{part}"] = LazyArray(shape, np.dtype(kind), partial(part_of, initializer, index))
        _fuse(proto, name, (rows, depth), f"{name}.values", f"{name}.positions")
    for name in dense:
        initializer, _ = graph.layers[name]
        del weights[initializer]
        weights[f"{name}.values"] = weight = graph.weights[initializer].T
        _fuse(proto, name, weight.shape, f"{name}.values", "")
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    refer_to_weights(proto, weights)
    return proto, weights


def _fuse(proto: ModelProto, name: str, shape: tuple[int, ...], values: str, positions: str) -> None:
    """Replace a MatMul, and what follows it, by one node over a weight of shape [N, K]; a bias is [N], and no other."""
    graph = proto.graph
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    start = next(node for node in graph.node if node.name == name)
    absorbed, activation, bias, residual = [start], "none", "", ""
    follower = only_consumer(graph, start.output[0])
    if (
        follower is not None
        and follower.op_type == "Add"
        and (constants.get(other := _other_input(follower, start)) == shape[:1])
    ):
        absorbed, bias = [*absorbed, follower], other
        follower = only_consumer(graph, follower.output[0])
    if follower is not None and follower.op_type == "Gelu":
        absorbed, activation = [*absorbed, follower], GELU_FORMS[_approximation(follower)]
    elif follower is not None and follower.op_type == "Add":
        other = _other_input(follower, absorbed[-1])
        if other not in constants:
            absorbed, residual = [*absorbed, follower], other
    layer = FusedLayer(
        name=name,
        rows=shape[0],
        depth=shape[1],
        activation=activation,
        x=start.input[0],
        values=values,
        positions=positions,
        bias=bias,
        residual=residual,
        output=absorbed[-1].output[0],
    )
    graph.node.insert(list(graph.node).index(absorbed[-1]), layer.node())
    for node in absorbed:
        graph.node.remove(node)
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == start.input[1]))


def _approximation(gelu: NodeProto) -> str:
    return next((entry.s.decode() for entry in gelu.attribute if entry.name == "approximate"), "none")


def _other_input(add: NodeProto, producer: NodeProto) -> str:
    first, second = add.input
    return second if first == producer.output[0] else first


def _to_nibbles(positions: np.ndarray) -> np.ndarray:
    """Two groups' positions a byte, the even group low: [N, K/4] -> [N, ceil(K/8)]."""
    padded = np.pad(positions, ((0, 0), (0, positions.shape[1] % 2)))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def from_nibbles(packed: np.ndarray, depth: int) -> np.ndarray:
    """[N, ceil(K/8)] -> positions uint8 [N, K/4], as the kernels take them."""
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.ascontiguousarray(both[:, : depth // 4])
