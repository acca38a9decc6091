"""8-bit numbers: a layer's weight as codes with scales, read off a quantised step graph, and the rounding of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from sparse_engine.backends.base import StepGraph
from sparse_engine.errors import BackendError

from .fused import fused

LIMITS = {torch.int8: (-128, 127), torch.float8_e4m3fn: (-448, 448)}  # where ONNX's QuantizeLinear saturates


@dataclass(frozen=True)
class QuantisedWeight:
    """A layer's weight in 8 bits, with the scale of its input.

    Attributes:
        codes: int8 or float8_e4m3fn [N, K]. The weight is ``scale[n] * codes[n, k]``; a pruned weight is code 0.
        scale: float32 [N].
        input_scale: float32 [], one for the whole tensor that the layer is given.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor

    def to(self, device: torch.device) -> QuantisedWeight:
        """The same on a device."""
        return QuantisedWeight(self.codes.to(device), self.scale.to(device), self.input_scale.to(device))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the codes stand for."""
        return (self.codes.float() * self.scale[:, None]).to(dtype)


def quantised_weights(graph: StepGraph) -> dict[str, QuantisedWeight]:
    """The layers of a step graph that are in 8 bits, as explicit Q/DQ says it.

    A convolution's weight [N, K, 1, 1] becomes [N, K]. Raises BackendError where a layer with 8-bit weights is given
    something that is not quantised.
    """
    nodes = {node.name: node for node in graph.proto.graph.node}
    makers = {output: node for node in graph.proto.graph.node for output in node.output}
    scales = _small_initializers(graph.proto)
    found = {}
    for layer, (initializer, axis) in graph.layers.items():
        stored = graph.weights[initializer]
        if stored.dtype.itemsize != 1:
            continue
        weight, x = (makers.get(name) for name in reversed(nodes[layer].input[:2]))
        if weight is None or x is None or x.op_type != "DequantizeLinear":
            raise BackendError(f"{layer}: its weights are in 8 bits, and its input is not")
        codes = stored if axis == 1 else stored.T
        found[layer] = QuantisedWeight(
            _to_torch(codes).flatten(1),
            torch.from_numpy(scales[weight.input[1]].astype(np.float32)),
            torch.from_numpy(scales[x.input[1]].astype(np.float32).reshape(())),
        )
    return found


def _small_initializers(proto: ModelProto) -> dict[str, np.ndarray]:
    return {
        tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if not tensor.external_data
    }


def _to_torch(codes: np.ndarray) -> Tensor:
    dtype = torch.int8 if codes.dtype == np.int8 else torch.float8_e4m3fn
    return torch.from_numpy(np.ascontiguousarray(codes).view(np.uint8)).view(dtype)


@fused
def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values -> codes, rounded to nearest even and saturated, as ONNX's QuantizeLinear does it."""
    scaled = x.float() / scale
    return (scaled.round() if dtype == torch.int8 else scaled).clamp(*LIMITS[dtype]).to(dtype)


@fused
def rounded(x: Tensor, scale: Tensor, codes: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Values -> the nearest that ``codes`` stand for, as ``dtype``."""
    return (quantise(x, scale, codes).float() * scale).to(dtype)


@fused
def rescale(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product of codes [M, N], int32 or float32, times scale [N], plus bias [N]."""
    y = product.float() * scale
    return (y if bias is None else y + bias).to(dtype)
