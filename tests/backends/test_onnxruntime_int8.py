"""Layers in 8 bits in an engine for ONNX Runtime: packed codes in the file, our kernel where it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_engine import SparseEngine, kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import GRAPH_FILE
from sparse_engine.backends.onnx_graph import GraphView
from sparse_engine.backends.onnxruntime import choose
from sparse_engine.backends.onnxruntime.int8 import int8_units, packed_codes
from sparse_engine.backends.onnxruntime.layers import DOMAIN
from sparse_engine.backends.onnxruntime.runner import OnnxRuntimeRunner
from sparse_engine.backends.onnxruntime.session import prepare
from sparse_engine.calibration.engine_graph import step_graph_of
from sparse_engine.calibration.sensitivity import relative_error
from tests.backends.conftest import open_session

needs_kernel = pytest.mark.skipif(
    not kernels.is_available() or "avx512-vnni" not in kernels.available_tiers("int8"),
    reason="this machine lacks AVX512-VNNI or AVX512-VBMI",
)
INNER, SPARSE = 13, 12  # layers in 8 bits: four a block in three blocks, and one skip_linear, which is dense


@pytest.fixture
def built(int8_engines: dict[str, Path]) -> dict[str, Path]:
    return int8_engines


def predict(engine: SparseEngine, batch: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((batch, *engine.manifest.data_shape)).astype(np.float32)
    return engine.predict(x, 0.5, labels=np.zeros(batch, np.int64))


def kernels_of(engine: SparseEngine) -> dict[str, int]:
    ran = [layer["kernel"] for layer in engine.info["layers"]]
    return {name: ran.count(name) for name in set(ran)}


def graph_of(path: Path) -> onnx.ModelProto:
    return onnx.load_model_from_string(EngineFile(path).read(GRAPH_FILE))


def test_codes_of_sparse_layers_are_packed_and_the_rest_is_plain(built: dict[str, Path]) -> None:
    model = graph_of(built["2:4"])
    packed = packed_codes(model.graph)
    assert len(packed) == SPARSE
    bytes_of = {each.name: int(np.prod(each.dims)) for each in model.graph.initializer}
    for each in packed.values():
        kept = bytes_of[each.values] + bytes_of[each.positions]
        assert kept == each.rows * each.depth * 5 // 8
    others = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    assert others == {"Codes24"}
    dense = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".weight.int8")}
    assert len(dense) == INNER - SPARSE
    assert not packed_codes(graph_of(built["dense"]).graph)


def test_the_file_becomes_the_standard_graph_again(built: dict[str, Path], tmp_path: Path) -> None:
    plain = step_graph_of(EngineFile(built["2:4"]))
    assert {node.domain for node in plain.proto.graph.node} <= {"", "ai.onnx"}
    codes = [array for name, array in plain.weights.items() if name.endswith(".weight.int8")]
    assert len(codes) == INNER
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    t, y, one, zeros = np.full(2, 400, np.float32), np.zeros((1, 2), np.int64), np.ones(1, np.float32), np.zeros_like(x)
    row, clip = np.array([0, 1, 0, 0, 0, 0, 0, 0], np.float32), np.array([-1e30, 1e30], np.float32)
    feed = {"x": x, "t": t, "coef": row, "clip": clip, "base": zeros, "h1": zeros, "h2": zeros, "z": zeros}
    (found,) = open_session(plain, tmp_path).run(["m"], {**feed, "y": y, "guidance": one})
    runner = OnnxRuntimeRunner(EngineFile(built["2:4"]), 1, autotune=False)
    expected = runner.network(x, t, conditioning={"y": y}, guidance=one)
    assert relative_error(found, expected) < 0.02


@needs_kernel
@pytest.mark.parametrize(
    "name, ours", [("2:4", {"r-lanes int8": 12, "own dense int8": 1}), ("dense", {"own dense int8": 13})]
)
def test_ours_computes_what_onnxruntime_computes(
    built: dict[str, Path], name: str, ours: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SparseEngine.load(built[name], autotune=False) as engine:
        found = predict(engine)
        assert kernels_of(engine).items() >= ours.items()
        chosen = [layer["name"] for layer in engine.info["layers"] if layer["chosen"]]
        assert len(chosen) == ours.get("r-lanes int8", 0)
    monkeypatch.setenv(kernels.ISA_VARIABLE, "avx2")
    with SparseEngine.load(built[name], autotune=False) as engine:
        expected = predict(engine)
        assert kernels_of(engine) == {"dense": 3, "dense int8": INNER}
        why = {layer["why"] for layer in engine.info["layers"] if layer["kernel"] == "dense int8"}
        assert why == {f"no kernel of ours: {choose.LACKING}"}
    assert relative_error(found, expected) < 0.02  # a code here and there is the next one


@needs_kernel
def test_one_node_is_a_layer_with_what_is_around_it(built: dict[str, Path]) -> None:
    prepared = prepare(EngineFile(built["2:4"]), 2, autotune=False)
    graph = prepared.model.graph
    nodes = {node.name: node for node in graph.node if node.op_type == "LayersInt8"}
    assert len(nodes) == 3 * 2 + 1  # qkv; proj with the two of an MLP; and skip_linear
    block = "+".join(f"mid_block.{name}" for name in ("attn.proj", "mlp.fc1", "mlp.fc2"))
    assert {"mid_block.attn.qkv", block} < set(nodes)
    left = [node.op_type for node in graph.node]
    assert not {"QuantizeLinear", "DequantizeLinear", "Gelu", "Codes24"} & set(left)
    assert left.count("LayerNormalization") == 1  # before the last layer, which is in float
    attention = [node for node in graph.node if node.op_type == "SelfAttention"]
    assert len(attention) == 3
    assert all(node.input[0] == "" and list(node.output)[:2] == ["", ""] for node in attention)  # bfloat16, codes
    assert nodes[block].input[:3] == ["", "", attention[1].output[2]]
    skip = nodes["out_blocks.0.skip_linear"]
    assert all(skip.input[:2])  # the two parts of what was a Concat


@needs_kernel
def test_the_faster_of_the_candidates_is_taken(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    timed: list[tuple[str, ...]] = []

    def slow(candidates: Any) -> choose.Choice:
        names = tuple(candidates)
        for run in candidates.values():
            run()  # each can be run alone
        timed.append(names)
        kernel = "int8" if "int8" in names else names[-1]
        return choose.Choice(kernel, dict.fromkeys(names, 1.0))

    monkeypatch.setattr("sparse_engine.tactics.fastest", slow)
    with SparseEngine.load(built["2:4"], threads=1) as engine:
        layers = {layer["name"]: layer for layer in engine.info["layers"]}
        predict(engine)
    layer = layers["mid_block.mlp.fc1"]
    assert (layer["kernel"], layer["chosen"]) == ("dense int8", False)
    (times,) = layer["timed_by_tokens"].values()
    assert set(times["milliseconds"]) == {"own", "dense int8"}
    assert timed.count(("own", "dense int8")) == 3  # one of each shape: qkv, proj with the MLP, skip_linear


@needs_kernel
def test_an_image_does_not_depend_on_its_batch_or_on_the_threads(built: dict[str, Path]) -> None:
    drawn = {}
    for threads in (1, 2):
        with SparseEngine.load(built["2:4"], threads=threads, autotune=False) as engine:
            drawn[threads] = predict(engine, 5)
            np.testing.assert_array_equal(predict(engine, 2), drawn[threads][:2])
    np.testing.assert_array_equal(drawn[1], drawn[2])


def quantised_graph(operator: str = "MatMul", zero: int = 0, shared: bool = False) -> onnx.ModelProto:
    """x -> Q/DQ -> a layer or two of it."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"xs": np.float32(0.1), "xz": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
    ]
    outputs = ["y", "y2"] if shared else ["y"]
    axis = 1 if operator == "MatMul" else 0
    for name in outputs:
        arrays |= {
            f"{name}.w": rng.integers(-127, 128, (8, 12) if axis else (12, 8), np.int8),
            f"{name}.s": rng.random(12).astype(np.float32),
            f"{name}.z": np.full(12, zero, np.int8),
        }
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.w", f"{name}.s", f"{name}.z"], [f"{name}.f"], axis=axis)
        )
        more = {} if axis else {"transB": 1}
        nodes.append(helper.make_node(operator, ["d", f"{name}.f"], [name], name=f"layer {name}", **more))
    shape = [3, 5, 8] if axis else [5, 8]
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [*shape[:-1], 12]) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def units_of(model: onnx.ModelProto) -> list[Any]:
    return int8_units(GraphView(model), model.graph)


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_a_product_between_pairs_is_a_layer(operator: str) -> None:
    (unit,) = units_of(quantised_graph(operator))
    assert (unit.x, unit.rounded, unit.last.rows, unit.last.depth) == ("x", "", 12, 8)


def test_weights_with_zero_points_are_left_alone() -> None:
    assert units_of(quantised_graph(zero=3)) == []


@needs_kernel
def test_layers_that_share_codes_read_them() -> None:
    model = quantised_graph(shared=True)
    units = units_of(model)
    assert [(unit.x, unit.rounded) for unit in units] == [("", "q")] * 2
    x = np.random.default_rng(1).standard_normal((3, 5, 8)).astype(np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    for unit in units:
        codes = next(each for each in model.graph.initializer if each.name == unit.last.codes)
        rows = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(codes).T), unit.last.values)
        model.graph.initializer.append(rows)
        model.graph.node.append(unit.node(1))
        for gone in unit.last.nodes:
            model.graph.node.remove(gone)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    found = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4 * abs(theirs).max())
