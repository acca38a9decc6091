"""Observation: the graph out of an engine is the engine's, and what is seen is what was there."""

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import StepGraph
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.engine_graph import step_graph_of
from sparse_engine.calibration.observe import layer_inputs, layer_outputs, observe, predictions, run_network
from sparse_engine.errors import InputError, OptionError
from sparse_engine.export.masks import is_n_of_m


def test_the_graph_of_an_engine_predicts_what_the_engine_does(
    graph: StepGraph, data: CalibrationData, engine: SparseEngine
) -> None:
    found = predictions(graph, data)
    expected = engine.predict(data.x, data.times, conditioning=data.conditioning)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_its_layers_are_unpacked(graph: StepGraph, sparse_layers: list[str]) -> None:
    assert {node.domain for node in graph.proto.graph.node} == {""}
    for name in sparse_layers:
        initializer, axis = graph.layers[name]
        assert is_n_of_m(graph.weights[initializer], axis=axis)


def test_what_is_seen_is_what_each_layer_is_given(graph: StepGraph, data: CalibrationData) -> None:
    tensors = layer_inputs(graph.proto, ["mid_block.mlp.fc1", "mid_block.mlp.fc2", "final_layer"])
    seen = observe(graph, data, tensors)
    runs = [outputs[1:] for _, outputs in run_network(graph, data, list(tensors.values()))]
    for index, (name, activation) in enumerate(seen.items()):
        whole = np.concatenate([run[index] for run in runs])
        flat = whole.reshape(len(data), -1)
        assert np.array_equal(activation.lows, flat.min(axis=1))
        assert np.array_equal(activation.highs, flat.max(axis=1))
        assert np.isin(activation.values, flat).all()
        axis = 1 if name == "final_layer" else 2
        others = tuple(each for each in range(whole.ndim) if each != axis)
        assert np.array_equal(activation.channel_max, np.abs(whole).max(axis=others))
    fc2 = seen["mid_block.mlp.fc2"]
    assert fc2.lows.min() == pytest.approx(-0.17, abs=0.001)  # a GELU's


def test_outputs_have_their_bias(graph: StepGraph, data: CalibrationData) -> None:
    name = "mid_block.attn.proj"
    given, output = layer_inputs(graph.proto, [name])[name], layer_outputs(graph.proto, [name])[name]
    _, (_, x, y) = next(iter(run_network(graph, data, [given, output])))
    bias = next(tensor for tensor in graph.proto.graph.initializer if tensor.name == f"network.{name}.bias")
    expected = x @ graph.weights[graph.layers[name][0]] + numpy_helper.to_array(bias)
    assert np.allclose(y, expected, atol=1e-4)


def test_progress_counts_samples(graph: StepGraph, data: CalibrationData) -> None:
    told: list[tuple[int, int]] = []
    observe(graph, data, layer_inputs(graph.proto, ["final_layer"]), lambda *state: told.append(state))
    assert told[-1] == (len(data), len(data))


def test_an_activation_that_is_nan_has_no_range(graph: StepGraph, data: CalibrationData) -> None:
    name = graph.layers["mid_block.mlp.fc1"][0]
    broken = StepGraph(graph.proto, {**graph.weights, name: np.full_like(graph.weights[name], np.inf)}, graph.layers)
    with pytest.raises(InputError, match="is NaN or infinite near t = .*: it has no range to quantise"):
        observe(broken, data, layer_inputs(graph.proto, ["mid_block.mlp.fc2"]))


def test_only_engines_with_a_graph(conditional_engine: Path) -> None:
    file = EngineFile(conditional_engine)
    file.manifest.backend["name"] = "tensorrt"
    with pytest.raises(OptionError, match="is an engine for tensorrt, which holds no graph"):
        step_graph_of(file)
