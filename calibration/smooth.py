"""Migrate the difficulty of activations into weights, folded into the normalisation before (SmoothQuant).

A channel whose activations are large is divided by s in the normalisation, and its weights are multiplied by s: the
product stays the same, and one scale for the whole tensor fits it better. A weight that is 0 stays 0.

Source: Xiao et al. 2023, arXiv:2211.10438, eq. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from sparse_engine import arguments
from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnx_graph import drop_unused, refer_to_weights
from sparse_engine.errors import OptionError

from .observe import Activation, layer_nodes

Factors = dict[str, np.ndarray]  # layer -> s, float32 [in]


@dataclass(frozen=True)
class Normalised:
    """A normalisation and the layers that are all that reads it."""

    norm: NodeProto
    layers: tuple[str, ...]


def check_strength(strength: float | None) -> None:
    """Raise OptionError where a strength is outside 0 to 1; None is no smoothing."""
    if strength is not None and not 0 <= arguments.real_number("smooth", strength) <= 1:
        raise OptionError(f"--smooth {strength:g}; expected 0 to 1", "0.5 is SmoothQuant's own")


def smoothing_factors(
    graph: StepGraph, activations: Mapping[str, Activation], layers: Sequence[str], strength: float
) -> Factors:
    """s = max|x|^strength / max|w|^(1 - strength) for each input channel of each layer behind a normalisation.

    Args:
        graph: float32.
        activations: layer -> what it is given.
        layers: those that will be quantised; the others are left as they are.
        strength: 0 to 1; 0.5 shares the difficulty evenly.
    """
    factors: Factors = {}
    for group in _normalised(graph, layers):
        weight_max = np.max([_channel_max(graph, name) for name in group.layers], axis=0)
        x_max = activations[group.layers[0]].channel_max
        usable = (x_max > 0) & (weight_max > 0)
        s = np.where(usable, x_max, 1) ** strength / np.where(usable, weight_max, 1) ** (1 - strength)
        factors |= dict.fromkeys(group.layers, s.astype(np.float32))
    return factors


def migrate(graph: StepGraph, factors: Factors) -> StepGraph:
    """The same function with normalisations divided and weights multiplied by ``factors``; any float precision."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    weights, places = dict(graph.weights), dict(graph.layers)
    for group in _normalised(StepGraph(proto, graph.weights, graph.layers), list(factors)):
        s = factors[group.layers[0]]
        for index, part in ((1, "scale"), (2, "bias")):
            old = _constant(graph, group.norm.input[index])
            group.norm.input[index] = f"{group.layers[0]}.smoothed.{part}"
            weights[group.norm.input[index]] = (old / s).astype(old.dtype)
        for name, node in layer_nodes(proto, group.layers).items():
            initializer, axis = places[name]
            old = graph.weights[initializer]
            node.input[1] = f"{name}.weight.smoothed"
            weights[node.input[1]] = (old * (s[:, None] if axis == 0 else s[None, :])).astype(old.dtype)
            places[name] = (node.input[1], axis)
    drop_unused(proto, weights)
    refer_to_weights(proto, weights)
    return StepGraph(proto, weights, places, graph.state)


def _normalised(graph: StepGraph, layers: Sequence[str]) -> Iterable[Normalised]:
    """The normalisations that are read by nothing but products of ``layers``, through a cast or none."""
    nodes = layer_nodes(graph.proto, layers)
    products = {name for name, node in nodes.items() if node.op_type in ("MatMul", "Gemm")}
    for norm in graph.proto.graph.node:
        if norm.op_type != "LayerNormalization" or len(norm.input) < 3:
            continue
        readers = _readers(graph.proto, norm.output[0])
        if len(readers) == 1 and readers[0].op_type == "Cast":
            readers = _readers(graph.proto, readers[0].output[0])
        if readers and all(node.name in products for node in readers):
            yield Normalised(norm, tuple(node.name for node in readers))


def _readers(proto: ModelProto, tensor: str) -> list[NodeProto]:
    return [node for node in proto.graph.node if tensor in node.input]


def _channel_max(graph: StepGraph, layer: str) -> np.ndarray:
    initializer, axis = graph.layers[layer]
    return np.abs(graph.weights[initializer]).max(axis=1 - axis)


def _constant(graph: StepGraph, name: str) -> np.ndarray:
    if name in graph.weights:
        return graph.weights[name]
    return numpy_helper.to_array(next(tensor for tensor in graph.proto.graph.initializer if tensor.name == name))
