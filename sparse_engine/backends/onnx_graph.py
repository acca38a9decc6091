"""What the backends' rewrites of a step graph share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from .base import WEIGHTS_FILE, Weights, weight_offsets

STEP_INPUTS = ("x", "t", "guidance", "coef", "clip", "base", "h1", "h2", "z")  # all but the conditions


def conditions_of(proto: ModelProto) -> list[ValueInfoProto]:
    """The inputs of a step graph that are conditions: what the network is told beside x and t."""
    return [value for value in proto.graph.input if value.name not in STEP_INPUTS]


def dtype_of(value: ValueInfoProto) -> type[np.generic]:
    """Of a tensor's elements, as NumPy has it."""
    found: type[np.generic] = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).type
    return found


def sizes(value: ValueInfoProto) -> tuple[int, ...]:
    """Of a tensor's axes; 0 where one is dynamic."""
    return tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)


def only_consumer(graph: GraphProto, name: str) -> NodeProto | None:
    """The one node that reads a value; None where several do, or where it leaves the graph."""
    consumers = [node for node in graph.node if name in node.input]
    outputs = [entry.name for entry in graph.output]
    return consumers[0] if len(consumers) == 1 and name not in outputs else None


class GraphView:
    """What a search for a pattern asks of a graph, which it does not change."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self.producers = {output: node for node in model.graph.node for output in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)

    def sizes(self, name: str) -> tuple[int, ...]:
        """Of a tensor's axes, 0 where one is dynamic; empty where nothing is known.

        As the exporter said, else as ONNX infers.
        """
        return self._stated[name] if name in self._stated else self._inferred.get(name, ())

    @functools.cached_property
    def _stated(self) -> dict[str, tuple[int, ...]]:
        graph = self._model.graph
        return _sizes_of([*graph.value_info, *graph.input, *graph.output]) | {
            name: tuple(tensor.dims) for name, tensor in self.constants.items()
        }

    @functools.cached_property
    def _inferred(self) -> dict[str, tuple[int, ...]]:
        """Without what the exporter said, which weights that were laid out anew since then contradict."""
        bare = ModelProto()
        bare.CopyFrom(self._model)
        bare.graph.ClearField("value_info")
        return _sizes_of(onnx.shape_inference.infer_shapes(bare, data_prop=True).graph.value_info)

    def producer(self, name: str, kind: str) -> NodeProto | None:
        """The node that makes a value, if it is of this kind."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == kind else None

    def readers(self, name: str) -> list[NodeProto]:
        """The nodes that read a value, in the graph's order."""
        return self._readers.get(name, [])

    def leaves(self, name: str) -> bool:
        """Whether a value is a result of the graph."""
        return name in self._outputs

    def only_reader(self, name: str) -> NodeProto | None:
        """As ``only_consumer``."""
        readers = self.readers(name)
        return readers[0] if len(readers) == 1 and not self.leaves(name) else None

    def consumer(self, node: NodeProto | None, kind: str) -> NodeProto | None:
        """The one node that reads what another makes, if it is of this kind."""
        found = self.only_reader(node.output[0]) if node is not None else None
        return found if found is not None and found.op_type == kind else None

    def feeds(self, node: NodeProto, after: NodeProto) -> bool:
        """Whether one node, and nothing else, reads what another makes."""
        found = self.only_reader(node.output[0])
        return found is not None and found.output[0] == after.output[0]


def _sizes_of(values: Iterable[ValueInfoProto]) -> dict[str, tuple[int, ...]]:
    return {value.name: sizes(value) for value in values if value.type.tensor_type.HasField("shape")}


Pattern = TypeVar("Pattern")


def replace_patterns(
    model: ModelProto,
    found: Sequence[tuple[Pattern, Sequence[NodeProto], Sequence[NodeProto]]],
    replace: Callable[[Pattern], Sequence[NodeProto] | None],
) -> int:
    """Put other nodes in the place of some patterns; return how many were replaced.

    Args:
        model: changed in place; the domains of the new nodes are imported.
        found: of each pattern, what ``replace`` is told; its nodes, the last at the end, which are replaced; and those
            before it, which go where nobody reads them any more, each after those that read it.
        replace: gives the new nodes; None leaves the pattern as it is.
    """
    replaced = 0
    for pattern, inner, before in found:
        nodes = replace(pattern)
        if nodes is None:
            continue
        replaced += 1
        position = list(model.graph.node).index(inner[-1])
        for offset, node in enumerate(nodes):
            model.graph.node.insert(position + offset, node)
            if node.domain not in {entry.domain for entry in model.opset_import}:
                model.opset_import.append(helper.make_opsetid(node.domain, 1))
        for node in inner:
            model.graph.node.remove(node)
        drop_unread(model.graph, before)
    return replaced


def put_in_place(graph: GraphProto, gone: Sequence[NodeProto], node: NodeProto) -> None:
    """Write a node where the last of those stands that it takes the place of."""
    indices = [index for index, each in enumerate(graph.node) if any(each is other for other in gone)]
    graph.node.insert(indices[-1] + 1, node)
    for index in reversed(indices):
        del graph.node[index]


def drop_unread(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Take out those of some nodes, each after those that read it, that nobody reads any more."""
    outputs = {value.name for value in graph.output}
    for node in nodes:
        read = outputs.union(*(each.input for each in graph.node))
        if node in graph.node and not read.intersection(node.output):
            graph.node.remove(node)


def refer_to_weights(proto: ModelProto, weights: Weights) -> None:
    """Point the graph's external initializers at their places in ``weights.bin``."""
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in weights and not tensor.external_data]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    offsets, _ = weight_offsets(weights)
    for name, array in weights.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", offsets[name]), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(tensor)


def drop_unused(proto: ModelProto, weights: dict[str, np.ndarray]) -> None:
    """Take out, of graph and weights, the initializers that no node reads any more."""
    used = {tensor for node in proto.graph.node for tensor in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name in [name for name in weights if name not in used]:
        del weights[name]
