"""The graphs that TensorRT's parser is given: the same step in each form, 2:4 where the hardware looks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_engine.backends.base import StepGraph, weights_payload
from sparse_engine.backends.tensorrt.graph import with_attention_nodes, with_linear_form
from sparse_engine.calibration.quantize import observed_tensors, quantize, scheme_for
from sparse_engine.export.masks import is_n_of_m

Graphs = Callable[[str], StepGraph]

FORMS = ("matmul", "gemm", "conv1x1")
OPERATOR = {"matmul": "MatMul", "gemm": "Gemm", "conv1x1": "Conv"}


def run(graph: StepGraph, folder: Path) -> list[np.ndarray]:
    """The step in ONNX Runtime as it is written, on a batch of 3 and two passes."""
    weights = weights_payload(graph.weights)
    with (folder / weights.name).open("wb") as stream:
        stream.writelines(weights.chunks())
    (folder / "step.onnx").write_bytes(graph.proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "step.onnx", options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((3, 3, 8, 8), np.float32) for name in ("x", "base", "h1", "h2", "z")}
    feed |= {"t": rng.uniform(0, 999, 3).astype(np.float32), "y": rng.integers(0, 5, (2, 3))}
    feed |= {"guidance": np.array([2, -1], np.float32), "coef": rng.standard_normal(8).astype(np.float32)}
    feed |= {"clip": np.array([-np.inf, np.inf], np.float32)}
    return session.run(["x_next", "m"], feed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", [False, True])
def test_each_form_is_the_same_step(step_graph: Graphs, form: str, attention: bool, tmp_path: Path) -> None:
    graph = with_linear_form(step_graph("fp32"), form)
    if attention:
        graph, fused = with_attention_nodes(graph)
        assert fused == 3
    for found, expected in zip(run(graph, tmp_path), run(step_graph("fp32"), tmp_path), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_initializers_are_24_along_the_reduction_axis_and_plain_constants(
    step_graph: Graphs, small_model: tuple, precision: str, form: str
) -> None:
    _, baked = small_model
    graph, _ = with_attention_nodes(with_linear_form(step_graph(precision), form))
    nodes = {node.name: node for node in graph.proto.graph.node}
    initializers = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
    for layer in baked.sparse_layers:
        initializer, axis = graph.layers[layer.name]
        weight = graph.weights[initializer]
        assert nodes[layer.name].op_type == OPERATOR[form]
        assert nodes[layer.name].input[1] == initializer  # no node between the constant and the product
        assert axis == {"matmul": 0, "gemm": 1, "conv1x1": 1}[form]
        assert list(initializers[initializer].dims) == list(weight.shape)
        assert str(weight.dtype) == {"fp16": "float16", "bf16": "bfloat16"}[precision]
        assert is_n_of_m(weight, axis=axis)
        assert weight.size == baked.state[f"{layer.name}.weight"].size
    assert len(baked.sparse_layers) == 12


@pytest.mark.parametrize("form", ["gemm", "conv1x1"])
def test_a_product_takes_its_bias_in(step_graph: Graphs, form: str) -> None:
    graph = with_linear_form(step_graph("fp32"), form)
    nodes = {node.name: node for node in graph.proto.graph.node}
    assert len(nodes["mid_block.mlp.fc1"].input) == 3
    assert not any(node.op_type == "MatMul" and node.name in graph.layers for node in graph.proto.graph.node)
    assert len(graph.proto.graph.initializer) == len({tensor.name for tensor in graph.proto.graph.initializer})


def test_low_precision_keeps_float32_where_it_matters(step_graph: Graphs) -> None:
    graph = step_graph("bf16").proto.graph
    inferred = onnx.shape_inference.infer_shapes(step_graph("bf16").proto).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    by_operator: dict[str, set[int]] = {}
    for node in graph.node:
        by_operator.setdefault(node.op_type, set()).add(kinds[node.output[0]])
    for operator in ("LayerNormalization", "Softmax", "Cos", "Sin", "Conv"):
        assert by_operator[operator] == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.BFLOAT16 in by_operator["MatMul"]
    assert {kinds["x_next"], kinds["m"]} == {onnx.TensorProto.FLOAT}
    names = {node.name: kinds[node.output[0]] for node in graph.node}
    assert names["mid_block.mlp.fc1"] == onnx.TensorProto.BFLOAT16
    assert names["decoder_pred"] == onnx.TensorProto.FLOAT


def quantised(step_graph: Graphs, small_model: tuple, precision: str) -> StepGraph:
    """The step with its 2:4 layers in 8 bits and the rest in float32, which rounds next to nothing otherwise."""
    names = [layer.name for layer in small_model[1].sparse_layers]
    graph, scheme = step_graph("fp32"), scheme_for("tensorrt", precision)
    ranges = dict.fromkeys(observed_tensors(graph, names, names, scheme), (-4.0, 4.0))
    return quantize(graph, ranges, names, names, scheme)


def neighbours(graph: onnx.GraphProto, node: onnx.NodeProto) -> tuple[str | None, str | None, set[str]]:
    """What a product's input and weight come from, and what reads its output."""
    producers = {output: each.op_type for each in graph.node for output in each.output}
    readers = {each.op_type for each in graph.node if node.output[0] in each.input}
    return producers.get(node.input[0]), producers.get(node.input[1]), readers


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("form", ["gemm", "conv1x1"])
def test_quantised_layers_take_the_form_with_their_pairs_next_to_the_product(
    step_graph: Graphs, small_model: tuple, precision: str, form: str, tmp_path: Path
) -> None:
    plain = quantised(step_graph, small_model, precision)
    graph = with_linear_form(plain, form)
    nodes = {node.name: node for node in graph.proto.graph.node}
    rounded_outputs = 0
    for layer in small_model[1].sparse_layers:
        initializer, axis = graph.layers[layer.name]
        product, codes = nodes[layer.name], graph.weights[initializer]
        assert product.op_type == OPERATOR[form]
        source, weight, readers = neighbours(graph.proto.graph, product)
        assert (source, weight) == ("DequantizeLinear", "DequantizeLinear")
        dequantise = nodes[f"{layer.name}.dequantise"]
        assert dequantise.input[0] == initializer
        assert [entry.i for entry in dequantise.attribute if entry.name == "axis"] == [0]
        assert axis == 1
        assert is_n_of_m(codes.astype(np.float32), axis=axis)
        assert codes.shape[:2] == plain.weights[initializer].shape[::-1]
        rounded_outputs += readers == {"QuantizeLinear"}
    expected_readers = [neighbours(plain.proto.graph, node)[2] for node in bias_or_product(plain, small_model)]
    assert rounded_outputs == sum(each == {"QuantizeLinear"} for each in expected_readers)
    assert (rounded_outputs > 0) == (precision == "int8")
    for found, expected in zip(run(graph, tmp_path), run(plain, tmp_path), strict=True):
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def bias_or_product(graph: StepGraph, small_model: tuple) -> list[onnx.NodeProto]:
    """The node that ends each of the 2:4 Linears of a graph of MatMuls."""
    nodes = {node.name: node for node in graph.proto.graph.node}
    products = [nodes[layer.name] for layer in small_model[1].sparse_layers]
    adds = {each: node for node in graph.proto.graph.node if node.op_type == "Add" for each in node.input}
    return [adds.get(node.output[0], node) for node in products]


def test_a_pair_that_others_read_keeps_its_shape(step_graph: Graphs, small_model: tuple, tmp_path: Path) -> None:
    plain = quantised(step_graph, small_model, "int8")
    node = next(node for node in plain.proto.graph.node if node.name == "mid_block.mlp.fc1")
    shared = onnx.helper.make_node("Identity", [node.input[0]], ["shared"], name="shared")
    plain.proto.graph.node.insert(list(plain.proto.graph.node).index(node), shared)
    graph = with_linear_form(plain, "gemm")
    assert len(run(graph, tmp_path)) == 2


def test_heads_beyond_the_fused_kernels_stay_plain(step_graph: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_engine.backends.tensorrt.graph.LARGEST_FUSED_HEAD", 15)  # here they are 16 wide
    graph, fused = with_attention_nodes(step_graph("fp16"))
    assert fused == 0
    kinds = [node.op_type for node in graph.proto.graph.node]
    assert (kinds.count("Softmax"), kinds.count("Attention")) == (3, 0)
