"""Linear layers with 2:4 weights in a step graph: to ``sparse_engine.MatMul24`` nodes, and back.

``compress`` turns MatMul, with the bias, activation and residual add that follow it, into one node over canonical
packed weights: that is what an engine file stores. ``SparseLayer.dense_nodes`` writes a node out in plain ONNX again,
for a layer whose dense kernel is faster on the machine at hand, or where the compiled kernels are not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from sparse_engine.backends.base import WEIGHTS_FILE, StepGraph, weight_offsets
from sparse_engine.kernels.packing import pack

DOMAIN = "sparse_engine"
OP = "MatMul24"
GELU_FORMS = {"none": "gelu", "tanh": "gelu-tanh"}  # ONNX's `approximate` -> the kernels' activation


@dataclass(frozen=True)
class SparseLayer:
    """A ``MatMul24`` node's inputs and attributes. Absent inputs are empty strings."""

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
    def of(cls, node: NodeProto) -> SparseLayer:
        """Read a node."""
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        x, values, positions, bias, residual = [*node.input, "", ""][:5]
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

    def node(self, **attributes: Any) -> NodeProto:
        """Write it as a node. Attributes: ``compute``, ``tactic``, ``threads``."""
        inputs = [self.x, self.values, self.positions, self.bias, self.residual]
        while not inputs[-1]:
            inputs.pop()
        attributes |= {"N": self.rows, "K": self.depth, "activation": self.activation}
        return helper.make_node(OP, inputs, [self.output], name=self.name, domain=DOMAIN, **attributes)

    def dense_nodes(self, weight: str) -> list[NodeProto]:
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


def compress(graph: StepGraph, layers: Iterable[str]) -> StepGraph:
    """The step graph with some layers as ``MatMul24`` over packed weights.

    Args:
        graph: as exported.
        layers: names of MatMul layers whose weights are 2:4 along the inputs.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    weights = dict(graph.weights)
    for name in layers:
        initializer, _ = graph.layers[name]
        values, positions = pack(np.ascontiguousarray(weights.pop(initializer).T))
        weights[f"{name}.values"] = values
        weights[f"{name}.positions"] = _to_nibbles(positions)
        _replace_by_sparse(proto, name, *values.shape)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    _refer_to(proto, weights)
    return StepGraph(proto, weights, graph.layers)


def _replace_by_sparse(proto: ModelProto, name: str, rows: int, kept: int) -> None:
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    start = next(node for node in graph.node if node.name == name)
    absorbed, activation, bias, residual = [start], "none", "", ""
    follower = _only_consumer(proto, start.output[0])
    if follower is not None and follower.op_type == "Add" and (other := _other_input(follower, start)) in constants:
        absorbed, bias = [*absorbed, follower], other
        follower = _only_consumer(proto, follower.output[0])
    if follower is not None and follower.op_type == "Gelu":
        absorbed, activation = [*absorbed, follower], GELU_FORMS[_approximation(follower)]
    elif follower is not None and follower.op_type == "Add":
        other = _other_input(follower, absorbed[-1])
        if other not in constants:
            absorbed, residual = [*absorbed, follower], other
    layer = SparseLayer(
        name=name,
        rows=rows,
        depth=2 * kept,
        activation=activation,
        x=start.input[0],
        values=f"{name}.values",
        positions=f"{name}.positions",
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


def _only_consumer(proto: ModelProto, name: str) -> NodeProto | None:
    consumers = [node for node in proto.graph.node if name in node.input]
    outputs = [entry.name for entry in proto.graph.output]
    return consumers[0] if len(consumers) == 1 and name not in outputs else None


def _other_input(add: NodeProto, producer: NodeProto) -> str:
    first, second = add.input
    return second if first == producer.output[0] else first


def _refer_to(proto: ModelProto, weights: dict[str, np.ndarray]) -> None:
    """Point the graph's external initializers at their places in ``weights.bin``."""
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in weights]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    offsets, _ = weight_offsets(weights)
    for name, array in weights.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", offsets[name]), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(tensor)


def _to_nibbles(positions: np.ndarray) -> np.ndarray:
    """Two groups' positions a byte, the even group low: [N, K/4] -> [N, ceil(K/8)]."""
    padded = np.pad(positions, ((0, 0), (0, positions.shape[1] % 2)))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def from_nibbles(packed: np.ndarray, depth: int) -> np.ndarray:
    """[N, ceil(K/8)] -> positions uint8 [N, K/4], as the kernels take them."""
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.ascontiguousarray(both[:, : depth // 4])
