"""What the tables of the CPU kernels time: a layer, two in a row or a convolution, by each kernel that computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_engine import kernels
from sparse_engine.backends.onnxruntime.choose import DENSE, candidates
from sparse_engine.backends.onnxruntime.compute import NO_SPINNING
from sparse_engine.backends.onnxruntime.convolutions import FusedConv
from sparse_engine.backends.onnxruntime.layers import FusedLayer
from sparse_engine.backends.onnxruntime.layers_bf16 import KERNELS, Bf16Unit
from sparse_engine.backends.onnxruntime.library import load_onnxruntime

LAYERS_PER_CALL = 4  # in a row, as a network runs them: waking the threads is paid once, not by each layer
ONE_NODE = "one node"  # two layers in T-lanes; in 8 bits in R-lanes
ONE_NODE_BF16 = "one node, r-lanes"
ORT, TORCH = "ORT", "torch"
TORCH_PACKED = "torch, packed weights"
ORT_PLAIN = "ORT, plain layout"  # of a convolution: ONNX Runtime's own blocked layout has to be reordered to and from


class Shape(NamedTuple):
    """What is computed, but for how many rows of x: a product, two in a row, or a convolution."""

    widths: tuple[int, ...]  # (K, N), or (K, H, N) of two; a convolution's channels and output channels
    taps: int = 1  # of a convolution, along both axes
    side: int | None = None  # of the square maps that it goes over; None: a product

    def rows_of_x(self, count: int) -> int:
        """M, of so many rows or images."""
        return count * (self.side or 1) ** 2

    def __str__(self) -> str:
        widths = " → ".join(map(str, self.widths))
        return widths if self.side is None else f"{widths}, {self.taps}x{self.taps} at {self.side}x{self.side}"


class Layer(NamedTuple):
    """One layer: its node, the weight [N, K] that has zeros, and the bias [N]."""

    node: FusedLayer
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


def random_layers(rng: np.random.Generator, shape: Shape) -> list[Layer]:
    """Layers of a shape, all but the last with a GELU."""
    layers = []
    for index, (channels, rows) in enumerate(pairwise(shape.widths)):
        depth = channels * shape.taps**2
        weight = two_of_four(rng.standard_normal((rows, depth)).astype(np.float32) / np.float32(depth**0.5))
        last = index + 2 == len(shape.widths)
        node = _node(index, rows, depth, "none" if last else "gelu", shape)
        layers.append(Layer(node, weight, rng.standard_normal(rows).astype(np.float32)))
    return layers


def _node(index: int, rows: int, depth: int, activation: str, shape: Shape) -> FusedLayer:
    facts: dict[str, Any] = {name: f"{name}{index}" for name in ("name", "x", "values", "positions", "bias")}
    facts |= {"rows": rows, "depth": depth, "activation": activation, "residual": "", "output": f"x{index + 1}"}
    if shape.side is None:
        return FusedLayer(**facts)
    pad = shape.taps // 2
    window: dict[str, Any] = {"kernel": (shape.taps,) * 2, "stride": 1, "pads": (pad,) * 4, "upsample": 1}
    return FusedConv(**facts, **window, size=(shape.side, shape.side))


def random_input(rng: np.random.Generator, stack: Sequence[Layer], M: int) -> NDArray[np.float32]:
    """What the first layer takes for M rows of output."""
    first = stack[0].node
    return rng.standard_normal(first.shapes(M)[first.x]).astype(np.float32)


def two_of_four(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of ``weight`` ``[N, K]`` that keeps the two largest of each group of four."""
    groups = weight.reshape(weight.shape[0], -1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=-1)[..., :2], 0, axis=-1)
    return groups.reshape(weight.shape)


def make_contenders(
    stack: Sequence[Layer], x: NDArray[np.float32], compute: str, threads: int
) -> dict[str, Callable[[], object]]:
    """A call of each kernel that computes the layers: ours, ONNX Runtime's, and PyTorch's if it is installed.

    Ours are the lanes that an engine would time, the same for two layers, which are also one node.
    """
    layers = [layer.node for layer in stack]
    M = _rows_of_x(layers[0], x)
    nodes = {
        lanes: [layer.own_node(lanes, compute, threads) for layer in layers]
        for lanes in candidates(layers[0], M, compute)
        if lanes not in DENSE
    }
    if len(layers) == 2:
        nodes = {ONE_NODE: [layers[0].node_with(layers[1], compute=compute, threads=threads)], **nodes}
    if compute == "bf16" and not isinstance(layers[0], FusedConv):
        nodes |= _in_whole_registers(layers, threads)
    nodes[ORT] = [node for index, layer in enumerate(layers) for node in layer.plain_nodes(f"weight{index}")]
    contenders = {name: _onnxruntime_call(stack, x, each, threads) for name, each in nodes.items()}
    if isinstance(layers[0], FusedConv):
        contenders[ORT_PLAIN] = _onnxruntime_call(stack, x, nodes[ORT], threads, optimise=False)
    return contenders | _torch_calls(stack, x, compute, threads)


def _in_whole_registers(layers: Sequence[FusedLayer], threads: int) -> dict[str, list[NodeProto]]:
    """Products in bf16 as a network's engine has them, without what surrounds them there."""
    nodes = {KERNELS[True]: [Bf16Unit((layer,), layer.x).node(threads) for layer in layers]}
    if len(layers) == 2:
        nodes[ONE_NODE_BF16] = [Bf16Unit(tuple(layers), layers[0].x).node(threads)]
    return nodes


def _rows_of_x(layer: FusedLayer, x: NDArray[np.float32]) -> int:
    return len(x) * (x[0, 0].size if isinstance(layer, FusedConv) else 1)  # maps keep their size


def _onnxruntime_call(
    stack: Sequence[Layer], x: NDArray[np.float32], nodes: Sequence[NodeProto], threads: int, optimise: bool = True
) -> Callable[[], object]:
    """Optimising a graph makes a MatMul and its bias one Gemm, and lays convolutions out in blocks of channels."""
    onnxruntime = load_onnxruntime()
    options = session_options(threads)
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    shape = stack[-1].node.output_shape(_rows_of_x(stack[0].node, x))
    model = _model(stack, nodes, x.shape, shape).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for entry in session.get_inputs():
        binding.bind_cpu_input(entry.name, x)
    outputs = [np.empty(shape, np.float32) for _ in range(LAYERS_PER_CALL)]  # as a network has them: there already
    for entry, output in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(entry.name, "cpu", 0, np.float32, shape, output.ctypes.data)

    def call() -> object:
        session.run_with_iobinding(binding)
        return outputs

    return call


def session_options(threads: int) -> Any:
    """Of a session that is timed: its threads spin while it runs, but not into the next contender's turn."""
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(*NO_SPINNING)
    return options


def _model(
    stack: Sequence[Layer], nodes: Sequence[NodeProto], x_shape: Sequence[int], y_shape: Sequence[int]
) -> onnx.ModelProto:
    """LAYERS_PER_CALL copies of some nodes from x0 to the last x, with those of the weights that they read.

    Each reads an x0 of its own name, though it be the same array: equal nodes of one input would be merged into one.
    """
    copies, inputs, outputs = [], [], []
    made = {"x0", *(name for node in nodes for name in node.output)}
    for copy in range(LAYERS_PER_CALL):
        for node in nodes:
            copies.append(NodeProto())
            copies[-1].CopyFrom(node)
            copies[-1].name = f"{node.name}.{copy}"
            copies[-1].input[:] = [f"{name}.{copy}" if name in made else name for name in node.input]
            copies[-1].output[:] = [f"{name}.{copy}" for name in node.output]
        inputs.append(helper.make_tensor_value_info(f"x0.{copy}", TensorProto.FLOAT, x_shape))
        outputs.append(helper.make_tensor_value_info(f"x{len(stack)}.{copy}", TensorProto.FLOAT, y_shape))
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(array, name) for name, array in _constants(stack).items() if name in used]
    return helper.make_model(
        helper.make_graph(copies, "layers", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)],
        ir_version=9,
    )


def _constants(stack: Sequence[Layer]) -> dict[str, NDArray[Any]]:
    constants: dict[str, NDArray[Any]] = {}
    for index, (node, weight, bias) in enumerate(stack):
        values, positions = kernels.pack(weight)
        constants |= {node.values: values, node.positions: positions, node.bias: bias}
        constants[f"weight{index}"] = node.plain_weight(weight)
    return constants


def _torch_calls(
    stack: Sequence[Layer], x: NDArray[np.float32], compute: str, threads: int
) -> dict[str, Callable[[], object]]:
    """PyTorch's functions, and the operators that its compiler makes of them, whose weights are laid out beforehand."""
    try:
        import torch
        from torch.nn import functional as F
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    maps = isinstance(stack[0].node, FusedConv)

    def given(array: NDArray[np.float32]) -> torch.Tensor:
        layout = torch.channels_last if maps and array.ndim == 4 else torch.preserve_format
        return torch.from_numpy(array).to(dtype, memory_format=layout)

    def operands(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        return given(layer.node.plain_weight(layer.weight) if maps else layer.weight), given(layer.bias)

    def eager(layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, bias = operands(layer)
        activate = F.gelu if layer.node.activation == "gelu" else torch.nn.Identity()
        if maps:
            return lambda y: activate(F.conv2d(y, weight, bias, padding=weight.shape[-1] // 2))
        return lambda y: activate(F.linear(y, weight, bias))

    def packed(layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, bias = operands(layer)
        operators: Any = torch.ops.mkldnn
        if not maps:
            made = operators._reorder_linear_weight(weight, len(x))
            return lambda y: operators._linear_pointwise(y, made, bias, layer.node.activation, [], "none")
        window = ([weight.shape[-1] // 2] * 2, [1, 1], [1, 1], 1)  # padding, strides, dilations, groups
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        made = reorder(weight.to_mkldnn(), *window, list(x.shape))
        return lambda y: operators._convolution_pointwise(y, made, bias, *window, "none", [], "none")

    def run(layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                for _ in range(LAYERS_PER_CALL):
                    y = first
                    for layer in layers:
                        y = layer(y)
                return y

        return call

    first = given(x)
    calls = {TORCH: run([eager(layer) for layer in stack])}
    try:  # operators without a promise: of another version, or for another processor, they are not there
        with torch.inference_mode():
            calls[TORCH_PACKED] = run([packed(layer) for layer in stack])
        calls[TORCH_PACKED]()
    except (AttributeError, RuntimeError):
        calls.pop(TORCH_PACKED, None)
    return calls
