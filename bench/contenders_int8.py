"""The layers of the kernels' tables in 8 bits: ours against ONNX Runtime's dense ones, floats in and floats out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_engine import kernels
from sparse_engine.backends.onnxruntime.convolutions import FusedConv
from sparse_engine.backends.onnxruntime.library import load_onnxruntime
from sparse_engine.kernels.convolution_int8 import ConvInt8
from sparse_engine.kernels.int8 import Codes, MatMulInt8

from .contenders import LAYERS_PER_CALL, ONE_NODE, ORT, Layer, session_options

R_LANES = "r-lanes"  # a whole register of x permuted a step
GELU_RANGE = (-0.17, 8.0)  # which the hidden codes are spread over


def make_int8_contenders(
    stack: Sequence[Layer], x: NDArray[np.float32], threads: int
) -> dict[str, Callable[[], object]]:
    """A call of each kernel that computes one layer, or two in a row, from float32 x [M, K] to float32 [M, N].

    Or a convolution, from maps to maps, of which x are those.

    Rounding x to codes, scales, bias and activation are inside. Each is called ``LAYERS_PER_CALL`` times in a row: ours
    from Python, ONNX Runtime's in one session.
    """
    given = [_spread(float(x.min()), float(x.max())), _spread(*GELU_RANGE)][: len(stack)]
    scales = [np.abs(layer.weight).max(axis=1).astype(np.float32) / 127 for layer in stack]
    codes = [
        np.round(layer.weight / scale[:, None]).astype(np.int8) for layer, scale in zip(stack, scales, strict=True)
    ]
    first = stack[0].node
    if isinstance(first, FusedConv):
        conv = ConvInt8(*_packed(codes[0], scales[0]), x=given[0], kernel=first.kernel, padding=first.pads)
        return {
            R_LANES: _our_convolution(conv, stack[0].bias, x, threads),
            ORT: _onnxruntime_call(stack, x, codes, scales, given, threads),
        }
    layers = [
        MatMulInt8(*_packed(each, scale), x=codes_of_x)
        for each, scale, codes_of_x in zip(codes, scales, given, strict=True)
    ]
    return {
        **_ours(stack, layers, x, threads),
        ORT: _onnxruntime_call(stack, x, codes, scales, given, threads),
    }


def _spread(low: float, high: float) -> Codes:
    """The codes whose range is that of some floats, 0 among them."""
    scale = float(np.float32((max(high, 0) - min(low, 0)) / 255))
    return Codes(scale, round(-min(low, 0) / scale))


def _packed(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32], Any]:
    values, positions = kernels.pack(codes.astype(np.float32))
    return values.astype(np.int8), scales, positions


def _ours(
    stack: Sequence[Layer], layers: Sequence[MatMulInt8], x: NDArray[np.float32], threads: int
) -> dict[str, Callable[[], object]]:
    bias = [layer.bias for layer in stack]
    last = layers[-1]
    out = np.empty((len(x), last.rows), np.float32)

    def apart() -> object:
        for _ in range(LAYERS_PER_CALL):
            y = x
            for layer, of_bias in zip(layers[:-1], bias[:-1], strict=True):
                y = layer(y, bias=of_bias, activation="gelu", threads=threads)
            last(y, bias=bias[-1], threads=threads, buffer=out)
        return out

    def one() -> object:
        for _ in range(LAYERS_PER_CALL):
            last(x, bias=bias[1], activation="gelu", after=layers[0], after_bias=bias[0], threads=threads, buffer=out)
        return out

    return {ONE_NODE: one, R_LANES: apart} if len(layers) == 2 else {R_LANES: apart}


def _our_convolution(
    conv: ConvInt8, bias: NDArray[np.float32], x: NDArray[np.float32], threads: int
) -> Callable[[], object]:
    out = conv(x)

    def call() -> object:
        for _ in range(LAYERS_PER_CALL):
            conv(x, bias=bias, threads=threads, out=out)
        return out

    return call


def _onnxruntime_call(
    stack: Sequence[Layer],
    x: NDArray[np.float32],
    codes: Sequence[NDArray[np.int8]],
    scales: Sequence[NDArray[np.float32]],
    given: Sequence[Codes],
    threads: int,
) -> Callable[[], object]:
    """The standard Q/DQ form. As in a network x has a dynamic batch, or it makes product and bias a Gemm, in floats."""
    nodes: list[NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    conv = stack[0].node if isinstance(stack[0].node, FusedConv) else None
    for index, layer in enumerate(stack):
        constants |= {
            f"w{index}": conv.plain_weight(codes[index]) if conv else np.ascontiguousarray(codes[index].T),
            f"ws{index}": scales[index],
            f"wz{index}": np.zeros(len(scales[index]), np.int8),
            f"xs{index}": np.array(given[index].scale, np.float32),
            f"xz{index}": np.array(given[index].zero, np.uint8),
            f"b{index}": layer.bias,
        }
    for copy in range(LAYERS_PER_CALL):
        name = f"x.{copy}"
        for index in range(len(stack)):
            q, d, w, y = (f"{kind}{index}.{copy}" for kind in ("q", "d", "dw", "y"))
            nodes += [
                helper.make_node("QuantizeLinear", [name, f"xs{index}", f"xz{index}"], [q]),
                helper.make_node("DequantizeLinear", [q, f"xs{index}", f"xz{index}"], [d]),
                helper.make_node(
                    "DequantizeLinear", [f"w{index}", f"ws{index}", f"wz{index}"], [w], axis=0 if conv else 1
                ),
            ]
            if conv:
                nodes.append(helper.make_node("Conv", [d, w, f"b{index}"], [y], pads=conv.pads))
            else:
                nodes.append(helper.make_node("MatMul", [d, w], [f"{y}.product"]))
                nodes.append(helper.make_node("Add", [f"{y}.product", f"b{index}"], [y]))
            name = y
            if index + 1 < len(stack):
                nodes.append(helper.make_node("Gelu", [y], [f"{y}.gelu"]))
                name = f"{y}.gelu"
        nodes[-1].output[0] = f"out.{copy}"
    if conv:
        places: list[int | str] = ["B", *conv.output_shape(len(x) * conv.size[0] * conv.size[1])[1:]]
        session = _session(nodes, constants, ("B", *x.shape[1:]), places, threads)
        feed = {f"x.{copy}": x for copy in range(LAYERS_PER_CALL)}
    else:
        session = _session(nodes, constants, ("B", *x.shape), ("B", len(x), stack[-1].node.rows), threads)
        feed = {f"x.{copy}": x[None] for copy in range(LAYERS_PER_CALL)}
    return lambda: session.run(None, feed)


def _session(
    nodes: Sequence[NodeProto],
    constants: dict[str, NDArray[Any]],
    x_shape: Sequence[int | str],
    y_shape: Sequence[int | str],
    threads: int,
) -> Any:
    copies = range(LAYERS_PER_CALL)
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info(f"x.{copy}", TensorProto.FLOAT, x_shape) for copy in copies],
        [helper.make_tensor_value_info(f"out.{copy}", TensorProto.FLOAT, y_shape) for copy in copies],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    options, providers = session_options(threads), ["CPUExecutionProvider"]
    return load_onnxruntime().InferenceSession(model.SerializeToString(), options, providers=providers)
