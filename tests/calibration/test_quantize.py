"""Q/DQ graphs: where the pairs stand, that zeros stay zeros, and that the network still says the same."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, numpy_helper

from sparse_engine.backends import StepGraph
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.formats import FLOAT8, INT8, UINT8, Format
from sparse_engine.calibration.observe import layer_nodes, layer_outputs, observe, predictions
from sparse_engine.calibration.quantize import (
    SCHEMES,
    Scheme,
    observed_tensors,
    quantize,
    quantized_weight,
    scheme_for,
)
from sparse_engine.calibration.ranges import mse_range
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.errors import BackendError, UnsupportedError
from sparse_engine.export.bake import bake
from sparse_engine.export.graphs import export_baked
from sparse_engine.export.masks import is_n_of_m
from sparse_engine.export.model import load_model
from tests.backends.convolutions import CONVOLUTIONS, graph_of

Made = dict[tuple[str, str], StepGraph]


@pytest.fixture(scope="module")
def made(graph: StepGraph, data: CalibrationData, inner_layers: list[str], sparse_layers: list[str]) -> Made:
    """The quantised graph of each scheme."""
    return {
        key: quantize(
            graph, ranges_for(graph, data, inner_layers, sparse_layers, scheme), inner_layers, sparse_layers, scheme
        )
        for key, scheme in SCHEMES.items()
    }


def ranges_for(
    graph: StepGraph, data: CalibrationData, layers: list[str], sparse: list[str], scheme: Scheme
) -> dict[str, tuple[float, float]]:
    seen = observe(graph, data, observed_tensors(graph, layers, sparse, scheme))
    return {key: mse_range(activation, scheme.activations) for key, activation in seen.items()}


def producer(graph: StepGraph, tensor: str) -> NodeProto | None:
    return next((node for node in graph.proto.graph.node if tensor in node.output), None)


@pytest.mark.parametrize("key", SCHEMES, ids=" ".join)
def test_it_is_valid_and_says_nearly_the_same(
    key: tuple[str, str], made: Made, graph: StepGraph, data: CalibrationData
) -> None:
    inferred = onnx.shape_inference.infer_shapes(made[key].proto, strict_mode=True)
    assert {output.name for output in inferred.graph.output} == {"x_next", "m"}
    expected = predictions(graph, data)
    error = relative_error(predictions(made[key], data), expected)
    assert 0.001 < error < 0.1


@pytest.mark.parametrize("key", SCHEMES, ids=" ".join)
def test_products_of_codes_do_not_saturate(
    key: tuple[str, str], made: Made, data: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime's do by default on processors with AVX2 and no VNNI: off by 4 %."""
    found, options = predictions(made[key], data), onnxruntime.SessionOptions

    def literally() -> onnxruntime.SessionOptions:
        chosen = options()
        chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return chosen

    monkeypatch.setattr(onnxruntime, "SessionOptions", literally)
    assert relative_error(found, predictions(made[key], data)) < 3e-3


@pytest.mark.parametrize("key", SCHEMES, ids=" ".join)
def test_both_inputs_of_each_layer_and_nothing_else_are_quantised(
    key: tuple[str, str], made: Made, inner_layers: list[str], sparse_layers: list[str]
) -> None:
    quantised = made[key]
    nodes = layer_nodes(quantised.proto, list(quantised.layers))
    for name, node in nodes.items():
        kinds = [getattr(producer(quantised, tensor), "op_type", None) for tensor in node.input[:2]]
        assert (kinds == ["DequantizeLinear", "DequantizeLinear"]) == (name in inner_layers), name
    kinds = [node.op_type for node in quantised.proto.graph.node]
    outputs = [name for name in sparse_layers if not name.endswith("fc1")] if key == ("tensorrt", "int8") else []
    assert kinds.count("QuantizeLinear") == len(inner_layers) + len(outputs)
    assert kinds.count("DequantizeLinear") == 2 * len(inner_layers) + len(outputs)
    for name, tensor in layer_outputs(quantised.proto, outputs).items():
        readers = [node.op_type for node in quantised.proto.graph.node if tensor in node.input]
        assert readers == ["QuantizeLinear"], name


@pytest.mark.parametrize("key", SCHEMES, ids=" ".join)
def test_zeros_stay_zeros_so_the_weights_stay_2_of_4(
    key: tuple[str, str], made: Made, graph: StepGraph, sparse_layers: list[str]
) -> None:
    for name in sparse_layers:
        codes_name, axis = made[key].layers[name]
        codes, weight = made[key].weights[codes_name], graph.weights[graph.layers[name][0]]
        assert codes.dtype == SCHEMES[key].weights.dtype
        assert not codes[weight == 0].astype(np.float32).any()
        assert is_n_of_m(codes, axis=axis)
        assert np.count_nonzero(codes.astype(np.float32)) > 0.45 * codes.size


def test_weights_have_one_symmetric_scale_an_output_channel(
    made: Made, graph: StepGraph, inner_layers: list[str]
) -> None:
    quantised = made["onnxruntime", "int8"]
    constants = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in quantised.proto.graph.initializer
        if not tensor.external_data
    }
    for name in inner_layers:
        codes_name, _ = quantised.layers[name]
        codes, scale = quantised.weights[codes_name], constants[f"{codes_name}.scale"]
        assert scale.shape == (codes.shape[1],)
        assert not constants[f"{codes_name}.zero"].any()
        assert np.abs(codes.astype(int)).max(axis=0).tolist() == [127] * codes.shape[1]
        weight = graph.weights[graph.layers[name][0]]
        assert np.abs(codes * scale - weight).max() <= 0.5001 * scale.max()


def test_a_layer_left_out_keeps_its_weights(graph: StepGraph, data: CalibrationData, inner_layers: list[str]) -> None:
    some, scheme = inner_layers[:3], SCHEMES["onnxruntime", "int8"]
    quantised = quantize(graph, ranges_for(graph, data, some, [], scheme), some, [], scheme)
    for name in inner_layers[3:]:
        assert quantised.layers[name] == graph.layers[name]
        assert np.array_equal(quantised.weights[graph.layers[name][0]], graph.weights[graph.layers[name][0]])
    assert not any(graph.layers[name][0] in quantised.weights for name in some)


def test_a_graph_in_fp16_has_scales_in_fp16(
    conditional_checkpoint: Path, graph: StepGraph, data: CalibrationData, inner_layers: list[str]
) -> None:
    """Ranges are found in float32, and fit the lowered graph, whose tensors have other names."""
    model = load_model(conditional_checkpoint, heads=4, null_class=4)
    lowered = export_baked(model, bake(model), "fp16")
    for scheme in (SCHEMES["tensorrt-rtx", "int8"], SCHEMES["tensorrt-rtx", "fp8"]):
        ranges = ranges_for(graph, data, inner_layers, [], scheme)
        quantised = quantize(lowered, ranges, inner_layers, [], scheme)
        scales = [t for t in quantised.proto.graph.initializer if t.name.endswith("scale") and "weight." in t.name]
        assert {tensor.data_type for tensor in scales} == {onnx.TensorProto.FLOAT16}
        assert relative_error(predictions(quantised, data), predictions(graph, data)) < 0.1


@pytest.mark.parametrize("form", [INT8, FLOAT8], ids=lambda form: form.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_all_patterns_of_a_group_survive(form: Format, axis: int, rng: np.random.Generator) -> None:
    kept = np.array([[i >> bit & 1 for bit in range(4)] for i in range(16)], bool)  # [16, 4]
    weight = np.where(np.tile(kept, (1, 8)), rng.normal(0, 0.02, (16, 32)), 0).astype(np.float32)
    codes, scale = quantized_weight("layer", weight if axis else weight.T, axis, onnx.TensorProto.FLOAT, form)
    codes = (codes if axis else codes.T).astype(np.float32)
    assert not codes[weight == 0].any()
    assert codes[np.abs(weight) > scale[:, None]].all()


def test_a_format_that_cannot_hold_zero_is_refused() -> None:
    shifted = Format("shifted", UINT8.onnx_type, np.uint8, 1, 255)
    with pytest.raises(BackendError, match="fc1: a pruned weight is not 0 in shifted"):
        quantized_weight("fc1", np.array([[0.0, 1.0]], np.float32), 1, onnx.TensorProto.FLOAT, shifted)


def test_tiny_weights_do_not_lose_their_scale_in_fp16() -> None:
    weight = np.array([[1e-9, -1e-9], [1.0, 2.0]], np.float32)
    _, scale = quantized_weight("layer", weight, 1, onnx.TensorProto.FLOAT16, INT8)
    assert scale.dtype == np.float16
    assert np.all(scale > 0)


def test_a_backend_without_the_precision() -> None:
    with pytest.raises(UnsupportedError, match="the onnxruntime backend has no fp8 products; .* it has int8"):
        scheme_for("onnxruntime", "fp8")
    with pytest.raises(UnsupportedError, match="the abacus backend has no int8 products"):
        scheme_for("abacus", "int8")


def test_what_else_reads_a_layers_input_reads_it_unrounded() -> None:
    graph = graph_of("fp32")
    layers = list(CONVOLUTIONS)
    ranges = dict.fromkeys(layers, (-3.0, 3.0))
    quantised = quantize(graph, ranges, layers, layers, SCHEMES["onnxruntime", "int8"]).proto.graph
    of_pairs = {node.output[0] for node in quantised.node if node.op_type == "DequantizeLinear"}
    readers = {node.name for node in quantised.node if of_pairs & set(node.input)}
    assert readers == set(layers)  # not the norm beside block.skip, nor the sums beside down and mid.out
    rounded = {node.input[0] for node in quantised.node if node.op_type == "QuantizeLinear"}
    assert any(rounded & set(node.input) for node in quantised.node if node.op_type == "Reshape")
