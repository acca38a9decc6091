"""Group normalisation in an exported graph -> one node of our own operator, with what follows it.

The pattern, as the exporter writes ``torch.nn.GroupNorm``, with the scale and shift that a time embedding gives each
image, and SiLU, where they follow:

    x [B, C, H, W] -> Reshape [B, G, -1] -> InstanceNormalization -> Reshape -> Mul(gamma) -> Add(beta)
                   [-> Mul(1 + scale [B, C, 1, 1]) -> Add(shift [B, C, 1, 1])] [-> y -> Mul(y, Sigmoid(y))]

A norm that is written out, as that of our decoders, has ReduceMean (over rows, then over them), Sub, Pow, ReduceMean,
Add(epsilon), Sqrt, Reciprocal and Mul between the two Reshapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparse_engine.backends.onnx_graph import GraphView, replace_patterns

from .layers import DOMAIN

OPERATOR = "GroupNorm"


class GroupNorm(NamedTuple):
    """One norm: activation((norm(x) * gamma + beta) * (1 + scale) + shift) -> ``output``. Absent inputs are "".

    Attributes:
        sizes: of x, [B, C, L] or [B, C, H, W], B 0 where it is dynamic.
        x, gamma, beta, scale, shift, output: names of tensors.
        activation: "none" or "silu".
        plain: the nodes that it was written as.
        constants: initializers that those read.
    """

    sizes: tuple[int, ...]
    groups: int
    epsilon: float
    x: str
    gamma: str
    beta: str
    scale: str
    shift: str
    activation: str
    output: str
    plain: list[NodeProto]
    constants: list[TensorProto]

    @property
    def name(self) -> str:
        """Of the node that it becomes."""
        return f"{self.output}.group_norm"

    @property
    def area(self) -> int:
        """Places of a map."""
        return math.prod(self.sizes[2:])

    def node(self, threads: int) -> NodeProto:
        """Our own operator."""
        inputs = [self.x, self.gamma, self.beta, self.scale, self.shift]
        while not inputs[-1]:
            inputs.pop()
        return helper.make_node(
            OPERATOR,
            inputs,
            [self.output],
            name=self.name,
            domain=DOMAIN,
            groups=self.groups,
            epsilon=self.epsilon,
            activation=self.activation,
            threads=threads,
        )

    def words(self) -> str:
        """What its time depends on."""
        size = "x".join(str(each) for each in self.sizes[1:])
        parts = [name for name in ("scale", "shift") if getattr(self, name)]
        return " ".join([size, f"{self.groups} groups", *parts, *([self.activation] * (self.activation != "none"))])

    def arrays(self) -> dict[str, np.ndarray]:
        """The constants; ones for those whose values lie in a file of weights."""
        return {
            tensor.name: np.ones(tensor.dims, np.float32) if tensor.external_data else numpy_helper.to_array(tensor)
            for tensor in self.constants
        }


def fuse_group_norms(model: ModelProto, replace: Callable[[GroupNorm], Sequence[NodeProto] | None]) -> int:
    """Replace each norm in place by ``replace``'s nodes; return how many were replaced.

    Those for which ``replace`` returns None are left as they are, and so is what only resembles a norm.
    """
    graph = GraphView(model)
    found = [match for node in model.graph.node if (match := _match(graph, node)) is not None]
    return replace_patterns(model, found, replace)


class _Written(NamedTuple):
    """What of a norm was found so far: as in ``GroupNorm``, its nodes, and those before it that may go with it."""

    sizes: tuple[int, ...]
    groups: int
    epsilon: float
    x: str
    output: str
    nodes: list[NodeProto]
    before: list[NodeProto]
    gamma: str = ""
    beta: str = ""
    scale: str = ""
    shift: str = ""
    activation: str = "none"

    def then(self, *nodes: NodeProto, before: Sequence[NodeProto] = (), **found: Any) -> _Written:
        """With more nodes, the last of which makes the output."""
        found |= {"nodes": [*self.nodes, *nodes], "before": [*self.before, *before]}
        return self._replace(output=nodes[-1].output[0], **found)


def _match(graph: GraphView, node: NodeProto) -> tuple[GroupNorm, list[NodeProto], list[NodeProto]] | None:
    find = {"InstanceNormalization": _instance_norm, "Sub": _written_out}.get(node.op_type)
    written = find(graph, node) if find is not None else None
    if written is None:
        return None
    for follow in (_gamma, _beta, _scale, _shift, _silu):
        written = follow(graph, written)
    plain = [*reversed(written.before), *written.nodes]
    made = {name for each in plain for name in each.output}
    read = dict.fromkeys(name for each in plain for name in each.input if name not in made)
    constants = [graph.constants[name] for name in read if name in graph.constants]
    told = {name: value for name, value in written._asdict().items() if name not in ("nodes", "before")}
    return GroupNorm(**told, plain=plain, constants=constants), written.nodes, written.before


def _instance_norm(graph: GraphView, norm: NodeProto) -> _Written | None:
    split, whole = graph.producer(norm.input[0], "Reshape"), graph.consumer(norm, "Reshape")
    if split is None or whole is None:
        return None
    factor, offset = (_constant(graph, name) for name in norm.input[1:])
    if factor is None or offset is None or not ((factor == 1).all() and (offset == 0).all()):
        return None
    epsilon = next((entry.f for entry in norm.attribute if entry.name == "epsilon"), 1e-5)
    return _between(graph, split, whole, factor.size, epsilon, [norm])


def _written_out(graph: GraphView, centred: NodeProto) -> _Written | None:
    split = graph.producer(centred.input[0], "Reshape")
    means = _mean(graph, centred.input[1])
    square = _reader(graph, centred, "Pow")
    normed = _reader(graph, centred, "Mul")
    if split is None or square is None or normed is None or not means or means[0].input[0] != split.output[0]:
        return None
    inverse = graph.producer(_other(normed, centred), "Reciprocal")
    deviation = graph.producer(inverse.input[0], "Sqrt") if inverse is not None else None
    variance = graph.producer(deviation.input[0], "Add") if deviation is not None else None
    whole = graph.consumer(normed, "Reshape")
    if inverse is None or deviation is None or variance is None or whole is None or not _is(graph, square.input[1], 2):
        return None
    spread, epsilon = _mean(graph, variance.input[0]), _constant(graph, variance.input[1])
    if not spread or spread[0].input[0] != square.output[0] or epsilon is None or epsilon.size != 1:
        return None
    inner = [*means, centred, square, *spread, variance, deviation, inverse, normed]
    if not _closed(graph, [*inner, whole]):
        return None
    groups = graph.sizes(split.output[0])
    return _between(graph, split, whole, groups[1] if len(groups) > 1 else 0, float(epsilon.reshape(())), inner)


def _between(
    graph: GraphView, split: NodeProto, whole: NodeProto, groups: int, epsilon: float, inner: Sequence[NodeProto]
) -> _Written | None:
    """From the two Reshapes: into groups of adjacent channels, and back to what x was."""
    x = split.input[0]
    sizes, grouped = graph.sizes(x), graph.sizes(split.output[0])
    if len(sizes) not in (3, 4) or min(sizes[1:]) < 1 or groups < 1 or sizes[1] % groups:
        return None
    if grouped[:2] != (sizes[0], groups) or math.prod(grouped[2:]) != math.prod(sizes[1:]) // groups:
        return None
    shape = graph.producer(whole.input[1], "Shape")
    of_x = shape is not None and shape.input[0] == x and all(not entry.i for entry in shape.attribute)
    if not of_x and graph.sizes(whole.output[0]) != sizes:
        return None
    before = [split] if shape is None else [split, shape]
    return _Written(sizes, groups, epsilon, x, whole.output[0], [*inner, whole], before)


def _gamma(graph: GraphView, norm: _Written) -> _Written:
    found = _of_channels(graph, norm, "Mul")
    return norm.then(found[0], gamma=found[1]) if found is not None else norm


def _beta(graph: GraphView, norm: _Written) -> _Written:
    found = _of_channels(graph, norm, "Add")
    return norm.then(found[0], beta=found[1]) if found is not None else norm


def _scale(graph: GraphView, norm: _Written) -> _Written:
    """Times 1 + scale: any other factor stays."""
    found = _of_images(graph, norm, "Mul")
    add = graph.producer(found[1], "Add") if found is not None else None
    if found is None or add is None:
        return norm
    for scale, one in (add.input, reversed(add.input)):
        if _is(graph, one, 1) and graph.sizes(scale) == graph.sizes(add.output[0]):
            return norm.then(found[0], before=[add], scale=scale)
    return norm


def _shift(graph: GraphView, norm: _Written) -> _Written:
    found = _of_images(graph, norm, "Add")
    return norm.then(found[0], shift=found[1]) if found is not None else norm


def _silu(graph: GraphView, norm: _Written) -> _Written:
    readers = graph.readers(norm.output)
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    product = graph.consumer(sigmoid, "Mul")
    if sigmoid is None or product is None or graph.leaves(norm.output) or len(readers) != 2:
        return norm
    if sorted(product.input) != sorted((norm.output, sigmoid.output[0])):
        return norm
    return norm.then(sigmoid, product, activation="silu")


def _of_channels(graph: GraphView, norm: _Written, kind: str) -> tuple[NodeProto, str] | None:
    """The one node that comes next, where it is of this kind and over a constant [C, 1, ...]; and that constant."""
    found = _next(graph, norm, kind)
    shape = (norm.sizes[1], *[1] * (len(norm.sizes) - 2))
    fits = found is not None and found[1] in graph.constants and graph.sizes(found[1]) == shape
    return found if fits else None


def _of_images(graph: GraphView, norm: _Written, kind: str) -> tuple[NodeProto, str] | None:
    """The same over what is [B or 1, C, 1, ...]."""
    found = _next(graph, norm, kind)
    sizes = graph.sizes(found[1]) if found is not None else ()
    fits = sizes[1:] == (norm.sizes[1], *[1] * (len(norm.sizes) - 2)) and sizes[0] in (1, norm.sizes[0])
    return found if fits else None


def _next(graph: GraphView, norm: _Written, kind: str) -> tuple[NodeProto, str] | None:
    """The one node that reads a norm, if it is of this kind, and the name of its other operand."""
    node = graph.consumer(norm.nodes[-1], kind)
    return (node, _other(node, norm.nodes[-1])) if node is not None else None


def _other(node: NodeProto, producer: NodeProto) -> str:
    first, second = node.input
    return second if first == producer.output[0] else first


def _reader(graph: GraphView, node: NodeProto, kind: str) -> NodeProto | None:
    """The first of those that read what a node makes that is of this kind."""
    return next((each for each in graph.readers(node.output[0]) if each.op_type == kind), None)


def _closed(graph: GraphView, nodes: Sequence[NodeProto]) -> bool:
    """Whether nobody else reads what nodes make, but for what the last one makes."""
    outputs = {node.output[0] for node in nodes}
    return all(
        not graph.leaves(name) and all(reader.output[0] in outputs for reader in graph.readers(name))
        for name in outputs - {nodes[-1].output[0]}
    )


def _mean(graph: GraphView, name: str) -> list[NodeProto]:
    """The ReduceMeans, in their order, that leave one number a group of [B, G, ...]; none where there are not such."""
    chain, axes = list[NodeProto](), set[int]()
    while (node := graph.producer(name, "ReduceMean")) is not None and len(node.input) == 2:
        over, rank = _constant(graph, node.input[1]), len(graph.sizes(node.input[0]))
        keeps = next((entry.i for entry in node.attribute if entry.name == "keepdims"), 1)
        if over is None or not rank or not keeps:
            break
        axes |= {int(axis) % rank for axis in over.ravel()}
        chain.insert(0, node)
        name = node.input[0]
        if axes == set(range(2, rank)):
            return chain
    return []


def _constant(graph: GraphView, name: str) -> np.ndarray | None:
    """A constant that lies in the graph."""
    tensor = graph.constants.get(name)
    return numpy_helper.to_array(tensor) if tensor is not None and not tensor.external_data else None


def _is(graph: GraphView, name: str, number: float) -> bool:
    constant = _constant(graph, name)
    return constant is not None and constant.size == 1 and float(constant.reshape(())) == number
