"""The float step graph out of an engine file, for observing what its layers are given."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import GRAPH_FILE, WEIGHTS_FILE, StepGraph
from sparse_engine.backends.onnx_graph import drop_unused, refer_to_weights
from sparse_engine.backends.onnxruntime.compress import expand_codes, layers_in
from sparse_engine.backends.onnxruntime.layers import from_nibbles
from sparse_engine.errors import OptionError
from sparse_engine.kernels.packing import unpack


def step_graph_of(engine: EngineFile) -> StepGraph:
    """The step graph of an engine for ONNX Runtime, layers of our own operators written out in plain ONNX again.

    Raises:
        OptionError: an engine of another backend, which holds no graph.
    """
    backend = engine.manifest.backend["name"]
    if backend != "onnxruntime":
        raise OptionError(
            f"{engine.path} is an engine for {backend}, which holds no graph to look into",
            "give the checkpoint, or an engine for onnxruntime",
        )
    proto = onnx.load_model_from_string(engine.read(GRAPH_FILE))
    weights = _weights(proto, engine)
    for layer in layers_in(proto):
        values = weights.pop(layer.values)
        if layer.is_sparse:
            values = unpack(values, from_nibbles(weights.pop(layer.positions), layer.depth))
        weights[f"{layer.name}.weight"] = layer.plain_weight(values)
        index = next(index for index, node in enumerate(proto.graph.node) if node.name == layer.name)
        proto.graph.node.remove(proto.graph.node[index])
        for offset, plain in enumerate(layer.plain_nodes(f"{layer.name}.weight")):
            proto.graph.node.insert(index + offset, plain)
    expand_codes(proto, weights)
    drop_unused(proto, weights)
    refer_to_weights(proto, weights)
    names = [layer["name"] for layer in engine.manifest.layers]
    places = {
        node.name: (node.input[1], 1 if node.op_type == "Conv" else 0)
        for node in proto.graph.node
        if node.name in names
    }
    return StepGraph(proto, weights, places)


def _weights(proto: onnx.ModelProto, engine: EngineFile) -> dict[str, np.ndarray]:
    """The graph's external initializers, mapped from the engine file."""
    start, _ = engine.span(WEIGHTS_FILE)
    weights: dict[str, np.ndarray] = {}
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            offset = start + int(entries["offset"])
            weights[tensor.name] = np.memmap(engine.path, dtype, "r", offset, tuple(tensor.dims))
    return weights
