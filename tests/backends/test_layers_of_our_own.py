"""Linear layers of a step graph as nodes of our own operators: what is taken with them, and when weights are packed."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparse_engine.backends.base import LazyArray, StepGraph, weights_payload
from sparse_engine.backends.onnxruntime.compress import compress
from sparse_engine.backends.onnxruntime.layers import from_nibbles
from sparse_engine.kernels.packing import unpack

ROWS, DEPTH = 8, 12


def graph_with(constant: tuple[int, ...]) -> StepGraph:
    """x [2, 3, 12] times a 2:4 weight, plus a constant of some shape."""
    weight = np.random.default_rng(0).standard_normal((ROWS, DEPTH), np.float32)
    weight.reshape(-1, 4)[:, 1:3] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "layer.weight"], ["product"], name="layer"),
        helper.make_node("Add", ["product", "constant"], ["y"], name="add"),
    ]
    inputs, outputs = (helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in ("x", "y"))
    stored = TensorProto(name="layer.weight", dims=(DEPTH, ROWS), data_type=TensorProto.FLOAT)
    stored.data_location = TensorProto.EXTERNAL
    stored.external_data.add(key="location", value="weights.bin")
    constants = [stored, numpy_helper.from_array(np.ones(constant, np.float32), "constant")]
    proto = helper.make_model(helper.make_graph(nodes, "g", [inputs], [outputs], constants))
    return StepGraph(proto, {"layer.weight": weight.T}, {"layer": ("layer.weight", 0)})


def nodes_of(proto: ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def test_a_bias_is_taken() -> None:
    proto, _ = compress(graph_with((ROWS,)), ["layer"])
    assert nodes_of(proto) == ["MatMul24"]
    assert proto.graph.node[0].input[-1] == "constant"


@pytest.mark.parametrize("shape", [(), (1,), (3, ROWS), (3, 1), (1, 3, ROWS), (1, 1, ROWS)])
def test_another_constant_stays_an_add(shape: tuple[int, ...]) -> None:
    """Positions, say: the kernel adds one row of the outputs to every token, and knows no other bias."""
    proto, _ = compress(graph_with(shape), ["layer"])
    assert nodes_of(proto) == ["MatMul24", "Add"]
    assert list(proto.graph.node[0].input) == ["x", "layer.values", "layer.positions"]


def test_weights_are_packed_as_they_are_written() -> None:
    graph = graph_with((ROWS,))
    _, weights = compress(graph, ["layer"])
    values, positions = weights["layer.values"], weights["layer.positions"]
    assert isinstance(values, LazyArray)
    assert (values.shape, positions.shape) == ((ROWS, DEPTH // 2), (ROWS, 2))
    assert (values.nbytes, positions.nbytes) == (4 * ROWS * DEPTH // 2, 2 * ROWS)
    dense = unpack(np.asarray(values), from_nibbles(np.asarray(positions), DEPTH))
    np.testing.assert_array_equal(dense, graph.weights["layer.weight"].T)
    payload = weights_payload(weights)
    assert sum(len(memoryview(chunk)) for chunk in payload.chunks()) == payload.size
