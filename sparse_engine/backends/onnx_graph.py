"""What the backends' rewrites of a step graph share."""

from __future__ import annotations

import numpy as np
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
