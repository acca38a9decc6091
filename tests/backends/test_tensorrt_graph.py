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
from sparse_engine.export.masks import is_n_of_m

Graphs = Callable[[str], StepGraph]

FORMS = ("matmul", "gemm", "conv1x1")
OPERATOR = {"matmul": "MatMul", "gemm": "Gemm", "conv1x1": "Conv"}


def run(graph: StepGraph, folder: Path) -> list[np.ndarray]:
    """The step in ONNX Runtime, on a batch of 3 and two passes."""
    weights = weights_payload(graph.weights)
    with (folder / weights.name).open("wb") as stream:
        stream.writelines(weights.chunks())
    (folder / "step.onnx").write_bytes(graph.proto.SerializeToString())
    session = onnxruntime.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])
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


def test_quantised_layers_stay_as_they_are(step_graph: Graphs) -> None:
    graph = step_graph("fp32")
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    node = next(node for node in proto.graph.node if node.name == "mid_block.mlp.fc1")
    dequantise = onnx.helper.make_node("DequantizeLinear", [node.input[1], "scale"], ["dequantised"], axis=1)
    node.input[1] = "dequantised"
    proto.graph.node.insert(0, dequantise)
    rewritten = with_linear_form(StepGraph(proto, graph.weights, graph.layers), "gemm")
    kinds = {node.name: node.op_type for node in rewritten.proto.graph.node}
    assert kinds["mid_block.mlp.fc1"] == "MatMul"
    assert kinds["mid_block.mlp.fc2"] == "Gemm"
    assert rewritten.layers["mid_block.mlp.fc1"] == graph.layers["mid_block.mlp.fc1"]
