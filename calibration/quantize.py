"""Q/DQ into a step graph: 8-bit weights, and a quantise-dequantise pair before each quantised layer, and for it alone.

Weights are quantised here, because ONNX Runtime's quantiser wants them inside the protobuf (2 GiB at most) and scales
float8 by standard deviation; the pairs on activations are its work. Nothing is done to biases, and nothing to residual
adds, which stay float: both of their sides are in one scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnx_graph import drop_unused, refer_to_weights
from sparse_engine.backends.onnxruntime.library import load_onnxruntime
from sparse_engine.errors import BackendError, UnsupportedError

from .formats import FLOAT8, INT8, UINT8, Format
from .observe import layer_inputs, layer_nodes, layer_outputs
from .ranges import Range


@dataclass(frozen=True)
class Scheme:
    """What a backend's 8-bit kernels take.

    Attributes:
        activations: one scale a tensor.
        weights: one scale an output channel.
        sparse_outputs: a 2:4 layer's output is rounded to 8 bits too. TensorRT 10.14 is reported to take sparse int8
            kernels only there; it costs accuracy, so it is done nowhere else.
    """

    activations: Format
    weights: Format
    sparse_outputs: bool = False


SCHEMES = {
    # Unsigned by signed is the form of AVX512-VNNI's product, and a zero point halves the step of a GELU's output.
    ("onnxruntime", "int8"): Scheme(UINT8, INT8),
    ("tensorrt", "int8"): Scheme(INT8, INT8, sparse_outputs=True),
    ("tensorrt", "fp8"): Scheme(FLOAT8, FLOAT8),
    ("tensorrt-rtx", "int8"): Scheme(INT8, INT8),
    ("tensorrt-rtx", "fp8"): Scheme(FLOAT8, FLOAT8),
    ("torch", "int8"): Scheme(INT8, INT8),
    ("torch", "fp8"): Scheme(FLOAT8, FLOAT8),
}
QUANTISED_PRECISIONS = ("int8", "fp8")


def scheme_for(backend: str, precision: str) -> Scheme:
    """The scheme of a backend's precision. Raises UnsupportedError where it has none."""
    if (backend, precision) not in SCHEMES:
        has = [each for name, each in SCHEMES if name == backend]
        raise UnsupportedError(
            f"the {backend} backend has no {precision} products"
            + (f"; of the 8-bit precisions it has {', '.join(has)}" if has else ""),
            f"build with --precision {has[0]}" if has else "build in fp32, fp16 or bf16",
        )
    return SCHEMES[backend, precision]


def observed_tensors(graph: StepGraph, layers: Sequence[str], sparse: Sequence[str], scheme: Scheme) -> dict[str, str]:
    """The tensors whose ranges ``quantize`` needs: key of the range -> name in this graph.

    A layer's input has the layer's name as its key, its output the name and "/output". The same keys serve the graph
    of the same model in another precision, where tensors have other names.
    """
    tensors = layer_inputs(graph.proto, layers)
    if scheme.sparse_outputs:
        outputs = layer_outputs(graph.proto, [name for name in layers if name in set(sparse)])
        tensors |= {f"{name}/output": tensor for name, tensor in outputs.items() if not _is_gelu_next(graph, tensor)}
    return tensors


def _is_gelu_next(graph: StepGraph, tensor: str) -> bool:
    """The activation belongs to the product, and the next layer's input is rounded behind it."""
    return any(node.op_type == "Gelu" and tensor in node.input for node in graph.proto.graph.node)


def quantize(
    graph: StepGraph, ranges: Mapping[str, Range], layers: Sequence[str], sparse: Sequence[str], scheme: Scheme
) -> StepGraph:
    """A step graph with some layers in 8 bits.

    Args:
        graph: float32, float16 or bfloat16.
        ranges: as ``observed_tensors`` keys them.
        layers: the layers to quantise.
        sparse: those with 2:4 weights.
        scheme: the formats.

    Returns:
        The graph; its ``layers`` say where the quantised weights are.

    Raises:
        BackendError: a pruned weight did not stay 0.
    """
    proto = onnx.shape_inference.infer_shapes(graph.proto)
    kinds = _element_types(proto)
    weights, places = dict(graph.weights), dict(graph.layers)
    for name, node in layer_nodes(proto, layers).items():
        initializer, axis = places[name]
        codes, scale = quantized_weight(name, graph.weights[initializer], axis, kinds[node.input[0]], scheme.weights)
        places[name] = (f"{name}.weight.{scheme.weights.name}", axis)
        weights[places[name][0]] = codes
        _dequantize_before(proto, node, places[name][0], 1 - axis, codes, scale, scheme.weights)
    drop_unused(proto, weights)
    tensors = observed_tensors(graph, layers, sparse, scheme)
    refer_to_weights(proto, weights)
    proto = _with_activation_pairs(proto, {tensor: ranges[key] for key, tensor in tensors.items()}, scheme.activations)
    outputs = {tensor for key, tensor in tensors.items() if key not in places}
    _float_elsewhere(proto, layers, {tensor for tensor in tensors.values() if tensor not in outputs})
    return StepGraph(proto, weights, places, graph.state)


def quantized_weight(
    layer: str, weight: np.ndarray, reduction_axis: int, element_type: int, form: Format
) -> tuple[np.ndarray, np.ndarray]:
    """A weight's codes and its scales [out], as ``element_type``: the largest weight of a channel is the last code.

    Raises BackendError where a weight that was 0 is 0 no longer: 2:4 would be lost.
    """
    values = weight.astype(np.float32)
    out_axis = 1 - reduction_axis
    others = tuple(axis for axis in range(values.ndim) if axis != out_axis)
    largest = np.abs(values).max(axis=others)
    scale = form.scale_and_zero(-largest, largest)[0]
    scale = _cast(scale, element_type)
    shape = [-1 if axis == out_axis else 1 for axis in range(values.ndim)]
    codes = form.quantize(values, scale.astype(np.float32).reshape(shape), np.zeros((), form.dtype))
    if np.any(codes[values == 0] != 0):
        raise BackendError(f"{layer}: a pruned weight is not 0 in {form.name}")
    return codes, scale


def _dequantize_before(
    proto: ModelProto, node: NodeProto, codes_name: str, axis: int, codes: np.ndarray, scale: np.ndarray, form: Format
) -> None:
    """Let a layer read codes through a DequantizeLinear; where the codes lie is filled in by ``refer_to_weights``."""
    scale_name, zero_name = f"{codes_name}.scale", f"{codes_name}.zero"
    proto.graph.initializer.append(numpy_helper.from_array(scale, scale_name))
    proto.graph.initializer.append(helper.make_tensor(zero_name, form.onnx_type, scale.shape, np.zeros(scale.shape)))
    inputs, output = [codes_name, scale_name, zero_name], f"{codes_name}.float"
    position = next(index for index, each in enumerate(proto.graph.node) if each.name == node.name)
    dequantise = helper.make_node("DequantizeLinear", inputs, [output], name=f"{node.name}.dequantise", axis=axis)
    proto.graph.node.insert(position, dequantise)
    proto.graph.node[position + 1].input[1] = output


def _with_activation_pairs(proto: ModelProto, ranges: Mapping[str, Range], form: Format) -> ModelProto:
    """Put a Q/DQ pair on each of some tensors, before all that read it."""
    quantization = load_onnxruntime("quantization")
    calibrate, quant_utils = (load_onnxruntime(f"quantization.{part}") for part in ("calibrate", "quant_utils"))
    kind = next(each for each in quantization.QuantType if each.tensor_type == form.onnx_type)
    kinds = _element_types(proto)
    overrides, seen = {}, {}
    for tensor, ends in ranges.items():
        scale, zero = form.scale_and_zero(*ends)
        overrides[tensor] = [{"scale": _cast(scale, kinds[tensor]), "zero_point": zero, "quant_type": kind}]
        low, high = (np.float32(end) for end in ends)
        seen[tensor] = calibrate.TensorData(lowest=low, highest=high, avg=np.float32(0), std=np.float32(1))
    # Shapes are inferred already: the quantiser need not write the graph to disk and read it again.
    quant_utils.add_infer_metadata(proto)
    quantizer = quantization.QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=kind,
        activation_qType=kind,
        tensors_range=quantization.TensorsData(calibrate.CalibrationMethod.Distribution, seen),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=[],
        extra_options={"TensorQuantOverrides": overrides},
    )
    for tensor in ranges:
        quantizer.quantize_activation_tensor(tensor)
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    model: ModelProto = quantizer.model.model
    del model.metadata_props[:]
    model.producer_name, model.producer_version = proto.producer_name, proto.producer_version
    return model


def _float_elsewhere(proto: ModelProto, layers: Sequence[str], inputs: Collection[str]) -> None:
    """Let whatever else reads layers' inputs, a norm beside a convolution or a residual add, read them unrounded."""
    wanted = set(layers)
    quantised = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    floats = {
        node.output[0]: quantised[node.input[0]]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and quantised.get(node.input[0]) in inputs
    }
    for node in proto.graph.node:
        if node.name not in wanted:
            node.input[:] = [floats.get(name, name) for name in node.input]


def _element_types(proto: ModelProto) -> dict[str, int]:
    known = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in known}


def _cast(scale: np.ndarray, element_type: int) -> np.ndarray:
    """A scale in the type of the tensor it belongs to; never rounded to 0."""
    kind = helper.tensor_dtype_to_np_dtype(element_type)
    return np.asarray(np.maximum(scale.astype(kind), np.finfo(kind).smallest_subnormal))
