"""Layers in 8 bits as layers in floats: what an int8 engine runs where that is faster on the machine at hand.

A weight is what its codes stand for, still 2:4, and its input is not rounded to codes: the results are nearer to the
network's than those of the codes are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from sparse_engine.backends.onnx_graph import GraphView, replace_patterns
from sparse_engine.kernels.library import Compute

from .int8 import Int8Layer, int8_layers
from .layers import FusedLayer, from_nibbles

Read = Callable[[str, type], np.ndarray]  # an initializer in the engine file and the type of its numbers -> those, flat


def takes(layer: Int8Layer, compute: Compute) -> bool:
    """Whether a float operator of ours computes a layer: dense ones in bf16 alone."""
    return layer.is_sparse or compute == "bf16"


def put_in_floats(model: ModelProto, read: Read, compute: Compute) -> tuple[dict[str, np.ndarray], list[str]]:
    """Make nodes of our float operators of the layers in 8 bits that these take; the others stay as they are.

    Args:
        model: as an engine file holds it; changed in place.
        read: what stands in the file.
        compute: of the nodes.

    Returns:
        The nodes' weights, float32 [N, K/2] with uint8 positions [N, K/4], or float32 [N, K]: initializers that are
        still to be added. And the names of initializers that nothing reads any more.
    """
    view = GraphView(model)
    weights: dict[str, np.ndarray] = {}
    unread: list[str] = []
    found = []
    for layer in int8_layers(view, model.graph):
        if takes(layer, compute):
            fused = _fused(layer)
            weights |= _weights(layer, fused, view, read)
            unread += [layer.packed.values, layer.packed.positions] if layer.packed else [layer.codes]
            found.append((fused, layer.nodes, _before(layer, view)))
    replace_patterns(model, found, lambda fused: [fused.node()])
    return weights, unread


def _fused(layer: Int8Layer) -> FusedLayer:
    return FusedLayer(
        name=layer.name,
        rows=layer.rows,
        depth=layer.depth,
        activation=layer.activation,
        x=layer.x,
        values=f"{layer.name}.floats",
        positions=f"{layer.name}.positions" if layer.is_sparse else "",
        bias=layer.bias,
        residual=layer.residual,
        output=layer.output,
    )


def _before(layer: Int8Layer, view: GraphView) -> list[NodeProto]:
    """What is there for the codes' sake, each after those that read it; other layers may read it too."""
    shared = [node for node in view.readers(layer.quantised) if node.op_type == "DequantizeLinear"]
    nodes = [*shared, view.producers[layer.quantised]]
    nodes += [layer.packed.node] if layer.packed else []
    return [node for node in nodes if node not in layer.nodes]


def _weights(layer: Int8Layer, fused: FusedLayer, view: GraphView, read: Read) -> dict[str, np.ndarray]:
    scales = view.constants[layer.scales]
    numbers = read(layer.scales, np.float32) if scales.external_data else numpy_helper.to_array(scales)
    rows = numbers.reshape(-1, 1)
    if layer.packed is None:
        codes = read(layer.codes, np.int8).reshape((layer.rows, -1) if layer.axis else (layer.depth, -1))
        return {fused.values: np.ascontiguousarray(codes if layer.axis else codes.T) * rows}
    kept = read(layer.packed.values, np.int8).reshape(layer.rows, -1)
    positions = read(layer.packed.positions, np.uint8).reshape(layer.rows, -1)
    return {fused.values: kept * rows, fused.positions: from_nibbles(positions, layer.depth)}
