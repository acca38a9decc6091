"""Convolutions for TensorRT: 2:4 where its kernels look for it, and plans built of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparse_engine.backends import BuildOptions, TensorRTOptions, backend_named
from sparse_engine.backends.tensorrt.builder import Messages, build_plan
from sparse_engine.backends.tensorrt.graph import with_attention_nodes, with_linear_form
from sparse_engine.backends.tensorrt.libraries import RTX
from sparse_engine.export.masks import is_n_of_m
from tests.backends.convolutions import CONVOLUTIONS, ENDS, SPARSE, graph_of
from tests.backends.test_tensorrt_build import accepted

FORMS = ("matmul", "gemm", "conv1x1")
TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
needs_rtx = pytest.mark.skipif(not RTX.availability().version, reason="tensorrt_rtx is not installed")


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_24_along_input_channels_and_plain_constants(precision: str, form: str) -> None:
    """The parser gives TensorRT a convolution's second input as its kernel weights: they have to be a constant."""
    graph, _ = with_attention_nodes(with_linear_form(graph_of(precision), form))
    nodes = {node.name: node for node in graph.proto.graph.node}
    initializers = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
    for name in CONVOLUTIONS:
        initializer, axis = graph.layers[name]
        weight, node = graph.weights[initializer], nodes[name]
        assert (node.op_type, node.input[1], axis) == ("Conv", initializer, 1)
        assert [entry.i for entry in node.attribute if entry.name == "group"] == [1]
        assert list(initializers[initializer].dims) == list(weight.shape)
        assert weight.shape == graph.state[f"{name}.weight"].shape  # [O, I, kh, kw]
        assert str(weight.dtype) == TYPES[precision]
        assert is_n_of_m(weight, axis=1)
        assert np.count_nonzero(weight) > 0.49 * weight.size
    for name in ENDS:
        initializer, axis = graph.layers[name]
        assert not is_n_of_m(graph.weights[initializer], axis=axis)
        assert str(graph.weights[initializer].dtype) == "float32"


def test_norms_keep_their_statistics_in_float32() -> None:
    inferred = onnx.shape_inference.infer_shapes(graph_of("fp16").proto).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    norms = [node for node in inferred.node if node.op_type == "InstanceNormalization"]
    assert len(norms) == 3
    assert {kinds[norm.input[0]] for norm in norms} == {onnx.TensorProto.FLOAT}
    convolutions = {node.name: kinds[node.output[0]] for node in inferred.node if node.op_type == "Conv"}
    assert {convolutions[name] for name in CONVOLUTIONS} == {onnx.TensorProto.FLOAT16}


@needs_rtx
@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("form", ["matmul", "conv1x1"])
def test_a_plan_is_built(precision: str, form: str) -> None:
    graph = with_linear_form(graph_of(precision), form)
    options, messages = BuildOptions(True, precision, (1, 2, 4)), Messages()
    plan = build_plan(RTX, graph, options, sparse=True, timings=None, messages=messages)
    assert accepted(RTX, bytes(plan))
    assert messages.errors == []


@needs_rtx
def test_the_backend_says_that_rtx_runs_them_dense() -> None:
    options = BuildOptions(True, "fp16", (1, 2, 4), tensorrt=TensorRTOptions(cache=False))
    payload = backend_named("tensorrt-rtx").build(graph_of("fp16"), options, list(SPARSE))
    assert set(payload.layers) == {*SPARSE, *ENDS}
    assert {layer["chosen"] for layer in payload.layers.values()} == {False}
    why = "TensorRT for RTX has no sparse kernels: the flag is taken and not used"
    assert {payload.layers[name]["why"] for name in SPARSE} == {why}
