"""Convolutions as nodes of our own: what a node takes with it, what it leaves alone, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparse_engine import kernels
from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnxruntime.compress import compress, layers_in, why_no_kernel
from sparse_engine.backends.onnxruntime.convolutions import FusedConv
from sparse_engine.backends.onnxruntime.layers import from_nibbles
from sparse_engine.kernels.packing import unpack
from tests.kernels.kernel_cases import random_weight

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not built")
CHANNELS, ROWS, SIZE = 8, 16, 6


def make_graph(size: int = 2 * SIZE, enlarged: bool = True, **window: Any) -> StepGraph:
    """x enlarged, convolved, plus something of each image and channel, plus something of everything."""
    weight = random_weight(np.random.default_rng(0), ROWS, CHANNELS * 9).reshape(ROWS, CHANNELS // 4, 9, 4)
    weight = np.ascontiguousarray(weight.swapaxes(2, 3).reshape(ROWS, CHANNELS, 3, 3))
    window = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3], **window}
    where = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    channels = CHANNELS * window.get("group", 1)
    nodes = [
        helper.make_node("Conv", ["large" if enlarged else "x", "conv.weight", "b"], ["y"], name="conv", **window),
        helper.make_node("Add", ["y", "time"], ["with time"]),
        helper.make_node("Add", ["residual", "with time"], ["out"]),
    ]
    if enlarged:
        nodes.insert(0, helper.make_node("Resize", ["x", "", "scales"], ["large"], **where))
    floats = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shape])  # noqa: E731
    given = [floats("x", channels, SIZE, SIZE), floats("time", ROWS, 1, 1), floats("residual", ROWS, size, size)]
    graph = helper.make_graph(
        nodes,
        "step",
        given,
        [floats("out", ROWS, size, size)],
        [
            numpy_helper.from_array(weight, "conv.weight"),
            numpy_helper.from_array(np.arange(ROWS, dtype=np.float32), "b"),
            numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
        ],
        value_info=[floats("large", channels, 2 * SIZE, 2 * SIZE), floats("y", ROWS, size, size)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return StepGraph(proto, {"conv.weight": weight}, {"conv": ("conv.weight", 1)})


def run(proto: ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feed)[0]
    return result


def feed(size: int = 2 * SIZE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"x": (3, CHANNELS, SIZE, SIZE), "time": (3, ROWS, 1, 1), "residual": (3, ROWS, size, size)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def with_weights(proto: ModelProto, weights: dict[str, np.ndarray]) -> ModelProto:
    """Weights in the graph, where there are references to a file."""
    kept = [tensor for tensor in proto.graph.initializer if not tensor.external_data]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def compressed(graph: StepGraph) -> tuple[ModelProto, FusedConv, dict[str, np.ndarray]]:
    proto, stored = compress(graph, ["conv"])
    (layer,) = layers_in(proto)
    assert isinstance(layer, FusedConv)
    weights = {name: np.asarray(array) for name, array in stored.items()}
    weights[layer.positions] = from_nibbles(weights[layer.positions], layer.depth)
    return proto, layer, weights


def test_a_convolution_takes_its_neighbours_with_it() -> None:
    graph = make_graph()
    proto, layer, weights = compressed(graph)
    assert [node.op_type for node in proto.graph.node] == ["Conv24"]
    assert (layer.x, layer.bias, layer.image_bias, layer.residual) == ("x", "b", "time", "residual")
    assert (layer.upsample, layer.size, layer.out_size) == (2, (SIZE, SIZE), (12, 12))
    assert FusedConv.of(layer.node(compute="fp32", threads=1)) == layer
    expected = run(graph.proto, feed())
    np.testing.assert_allclose(run(with_weights(proto, weights), feed()), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", ["t-lanes", "n-lanes"])
def test_its_lanes_are_an_attribute(kernel: str) -> None:
    graph = make_graph()
    proto, layer, weights = compressed(graph)
    proto.graph.node[0].CopyFrom(layer.own_node(kernel, "fp32", 2))
    result = run(with_weights(proto, weights), feed())
    np.testing.assert_allclose(result, run(graph.proto, feed()), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("enlarged", [True, False])
def test_the_way_back_is_the_same_graph(enlarged: bool) -> None:
    size = 2 * SIZE if enlarged else SIZE
    graph = make_graph(size, enlarged)
    proto, layer, weights = compressed(graph)
    matrix = unpack(weights[layer.values], weights[layer.positions])
    plain = layer.plain_weight(matrix)
    np.testing.assert_array_equal(plain, graph.weights["conv.weight"])
    del proto.graph.node[:]
    proto.graph.node.extend(layer.plain_nodes("plain"))
    result = run(with_weights(proto, {"plain": plain}), feed(size))
    np.testing.assert_array_equal(result, run(graph.proto, feed(size)))


def test_strides_and_padding_of_one_side() -> None:
    graph = make_graph(SIZE // 2, False, strides=[2, 2], pads=[0, 0, 1, 1])
    proto, layer, weights = compressed(graph)
    assert (layer.stride, layer.pads, layer.out_size) == (2, (0, 0, 1, 1), (3, 3))
    result = run(with_weights(proto, weights), feed(3))
    np.testing.assert_allclose(result, run(graph.proto, feed(3)), rtol=1e-5, atol=2e-5)


def test_an_enlarged_input_that_others_read_stays() -> None:
    graph = make_graph()
    graph.proto.graph.node.append(helper.make_node("Neg", ["large"], ["negative"]))
    graph.proto.graph.output.append(helper.make_tensor_value_info("negative", TensorProto.FLOAT, None))
    _, layer, _ = compressed(graph)
    assert (layer.x, layer.upsample, layer.size) == ("large", 1, (12, 12))


@pytest.mark.parametrize(
    "window, why",
    [
        ({"group": 2}, "a convolution in 2 groups: the kernels have none"),
        ({"dilations": [2, 2]}, "a convolution with dilations [2, 2]"),
        ({"strides": [1, 2]}, "a convolution with strides [1, 2]"),
        ({"auto_pad": "SAME_UPPER", "pads": None}, "not a convolution of images with explicit padding"),
    ],
)
def test_convolutions_that_no_kernel_takes(window: dict[str, Any], why: str) -> None:
    graph = make_graph(**{name: value for name, value in window.items() if value is not None})
    assert (why_no_kernel(graph, "conv") or "").startswith(why)
    assert why_no_kernel(make_graph(), "conv") is None


def test_images_of_a_size_that_is_not_known() -> None:
    graph = make_graph()
    del graph.proto.graph.value_info[:]
    assert why_no_kernel(graph, "conv") == "the size of its images is not known"
