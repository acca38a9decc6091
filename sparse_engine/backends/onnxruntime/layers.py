"""Linear layers in a step graph: to nodes of our own operators, and back.

``fuse`` turns MatMul or Gemm, with the bias, activation and residual add that follow it, into one node. Packed 2:4
weights become ``sparse_engine.MatMul24``; dense ones to be multiplied in bf16 ``sparse_engine.MatMulBf16``.
``FusedLayer.plain_nodes`` writes a node out in plain ONNX again, for a layer whose plain kernel is faster on the
machine at hand, or where the compiled kernels are not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper

from sparse_engine.backends.onnx_graph import only_consumer

DOMAIN = "sparse_engine"
SPARSE_OP, DENSE_OP = "MatMul24", "MatMulBf16"
# Two layers in one node: made where an engine is loaded, never stored in its file.
SPARSE_MLP, DENSE_MLP = "Mlp24", "MlpBf16"
PAIR = "+"  # between their names
PATTERNS = (4, 8, 12, 9, 13, 14)  # the positions that two of four can have
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
    def arguments(self) -> list[str]:
        """Inputs of the operators that take several layers."""
        return [self.values, self.positions, self.bias]

    @property
    def _weights(self) -> list[str]:
        return [self.values, self.positions] if self.is_sparse else [self.values]

    @property
    def geometry(self) -> str:
        """What a kernel's time depends on beside rows, depth and tokens."""
        return ""

    def tokens(self, batch: int, positions: int, enough: int) -> int:
        """How many tokens to time it over: those of a batch, but no more than ``enough``."""
        return min(batch * positions, enough)

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Of what goes into the node beside constants, over so many tokens."""
        given = {self.x: (tokens, self.depth), self.residual: (tokens, self.rows)}
        return {name: shape for name, shape in given.items() if name}

    def output_shape(self, tokens: int) -> tuple[int, ...]:
        """Of what comes out."""
        return (tokens, self.rows)

    def plain_weight(self, weight: np.ndarray) -> np.ndarray:
        """The initializer that ``plain_nodes`` takes, of a dense weight [N, K]."""
        return np.ascontiguousarray(weight.T)

    def own_node(self, kernel: str, compute: str, threads: int) -> NodeProto:
        """Write it as a node that runs a kernel of ours."""
        tactic = {"tactic": kernel, "compute": compute} if self.is_sparse else {}
        return self.node(threads=threads, **tactic)

    def node(self, **attributes: Any) -> NodeProto:
        """Write it as a node. Attributes: ``threads``, and of a sparse one ``compute`` and ``tactic``."""
        inputs = [self.x, *self._weights, self.bias, self.residual]
        while not inputs[-1]:
            inputs.pop()
        attributes |= {"N": self.rows, "K": self.depth, "activation": self.activation}
        operator = SPARSE_OP if self.is_sparse else DENSE_OP
        return helper.make_node(operator, inputs, [self.output], name=self.name, domain=DOMAIN, **attributes)

    def node_with(self, second: FusedLayer, **attributes: Any) -> NodeProto:
        """Write it and the layer that takes its output as one node. Attributes as ``node``'s."""
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


def fuse(proto: ModelProto, name: str, shape: tuple[int, ...], values: str, positions: str) -> None:
    """Replace a MatMul or Gemm, and what follows it, by one node over a weight [N, K]; a bias is [N], and no other."""
    graph = proto.graph
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    start = next(node for node in graph.node if node.name == name)
    absorbed, activation, bias, residual = [start], "none", start.input[2] if len(start.input) > 2 else "", ""
    follower = only_consumer(graph, start.output[0])
    if (
        not bias
        and follower is not None
        and follower.op_type == "Add"
        and (constants.get(other := other_input(follower, start)) == shape[:1])
    ):
        absorbed, bias = [*absorbed, follower], other
        follower = only_consumer(graph, follower.output[0])
    if follower is not None and follower.op_type == "Gelu":
        absorbed, activation = [*absorbed, follower], GELU_FORMS[approximation(follower)]
    elif follower is not None and follower.op_type == "Add":
        other = other_input(follower, absorbed[-1])
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
    put_in_place(graph, absorbed, layer.node(), start.input[1])


def put_in_place(graph: GraphProto, absorbed: list[NodeProto], node: NodeProto, weight: str) -> None:
    """Write a node in place of the last of those that it absorbed, and take their weight out."""
    graph.node.insert(list(graph.node).index(absorbed[-1]), node)
    for gone in absorbed:
        graph.node.remove(gone)
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == weight))


def approximation(gelu: NodeProto) -> str:
    """Which form of GELU a node is, in ONNX's words."""
    return next((entry.s.decode() for entry in gelu.attribute if entry.name == "approximate"), "none")


def other_input(add: NodeProto, producer: NodeProto) -> str:
    """What a node of two inputs takes beside a producer's output."""
    first, second = add.input
    return second if first == producer.output[0] else first


def to_nibbles(positions: np.ndarray) -> np.ndarray:
    """Two groups' positions a byte, the even group low: [N, K/4] -> [N, ceil(K/8)]."""
    padded = np.pad(positions, ((0, 0), (0, positions.shape[1] % 2)))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def from_nibbles(packed: np.ndarray, depth: int) -> np.ndarray:
    """[N, ceil(K/8)] -> positions uint8 [N, K/4], as the kernels take them."""
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.ascontiguousarray(both[:, : depth // 4])
